"""The TensorRT backend on NVIDIA GPUs: three streams, slots of pinned and device memory, one
captured graph a slot.

The only file that imports TensorRT, and only when an engine is asked for. ``tensorrt`` 10 and 11
and ``tensorrt_rtx`` go by the same code.

::

    submit:   feeds ─► pinned ─► device     on the stream upwards
              execution (captured)          on the stream that works, once they are there
              device ─► pinned ─► event     on the stream downwards, once it has run
              nothing waits
    collect:  wait for the event of that slot, copy its outputs out
"""

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import clear_frames
from typing import Any

import numpy as np
import onnx

from engines.backends.cuda import (
    CapturedGraph,
    Gpu,
    check_driver,
    current_context,
    leave_context,
    load_pycuda,
    probe_gpu,
)
from engines.backends.registry import EngineRequest
from engines.backends.tensorrt_build import cannot_start, quiet_logger
from engines.certificate import (
    MOST_BYTES,
    certificate_path,
    find_engine,
    kernels_path,
    key_of,
    require,
    subject_of,
)
from engines.engine import Array, Engine, GpuTimes, TensorSpec
from engines.errors import (
    REBUILD,
    EngineError,
    ModelError,
    OutputError,
    install_extra,
    sightline_command,
)
from engines.files import read_file, whole_file
from engines.typed_graph import checked_precision, typed_graph

NON_BLOCKING = (
    1  # CU_STREAM_NON_BLOCKING: no waiting for the default stream, which other libraries use
)


def load_tensorrt(ahead: bool = False) -> Any:
    """The library: ``tensorrt`` where it is installed, else ``tensorrt_rtx``.

    Args:
        ahead: for a GPU that is not here, which only ``tensorrt_rtx`` builds for: it comes first.

    Raises:
        EngineError: neither is installed, or neither starts.
    """
    for name in ("tensorrt_rtx", "tensorrt") if ahead else ("tensorrt", "tensorrt_rtx"):
        try:
            if name == "tensorrt":
                import tensorrt as trt
            else:
                import tensorrt_rtx as trt
        except (ImportError, OSError, RuntimeError):
            continue
        if hasattr(trt, "Builder"):  # a folder of that name imports as well
            return trt
    raise EngineError(
        f"TensorRT is not installed: {install_extra('rtx')} (GeForce, RTX), or"
        f" {install_extra('tensorrt')} (data centre); pycuda is compiled then, which needs nvcc and"
        " the headers of NVIDIA's CUDA toolkit"
    )


class TensorRtEngine(Engine):
    """A plan on a GPU. See ``engines.engine.Engine``.

    Args:
        plan: what ``build_plan`` made.
        model: the graph that it was made of, for names, types, shapes and metadata.
        precision: in words.
        slots: how many calls may be under way, 2 or 3: while the GPU works on one, the next is
            filled and the last is read.
        spin: wait by asking again and again, which reacts soonest and takes a processor core; else
            sleep.
        capture: record each slot's execution as a CUDA graph and launch that. Where that fails,
            the engine runs without, and ``losses`` says why.
        kernels: file of the kernels that TensorRT for RTX compiles as it starts, read and kept up
            to date, so that it compiles them once; None for none. TensorRT has them in the plan.

    Attributes:
        captured: whether the execution of every slot is a CUDA graph.

    Raises:
        EngineError: no driver, no library, or the plan is another build's, another GPU's, or
            another graph's.
    """

    backend = "tensorrt"
    on_gpu = True

    def __init__(
        self,
        plan: bytes,
        model: onnx.ModelProto,
        precision: str,
        slots: int = 2,
        spin: bool = False,
        capture: bool = True,
        kernels: Path | None = None,
    ) -> None:
        gpu = probe_gpu()  # before any runtime object: without a driver it would end the process
        trt = load_tensorrt()
        check_driver(gpu, trt.__name__)
        cuda = load_pycuda()
        self.precision = precision
        self.device = f"{gpu}, {trt.__name__} {trt.__version__}"
        super().__init__(slots)
        self._describe(model)
        self._spin = spin
        self._session = _Session(trt, cuda, gpu)
        # Also at the end of the process, before modules are taken apart; whichever of the two comes
        # first.
        self._close = weakref.finalize(self, self._session.close)
        try:
            self._session.load(plan, self.inputs, self.outputs, kernels)
            for _ in range(slots):
                self._session.add_slot(spin, capture)
            self._session.keep_kernels()
        except BaseException as error:
            behind: BaseException | None = error
            while behind is not None:  # frames hold what is to be freed while it can be
                clear_frames(behind.__traceback__)
                behind = behind.__cause__ or behind.__context__
            self._close()
            raise
        self.captured = self._session.captured
        self.losses = tuple(dict.fromkeys(self._session.losses))
        self.device += ", CUDA graphs" if self.captured else ", no CUDA graphs"

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        self._session.start(place, feeds)

    def _finish(self, place: int) -> dict[str, Array]:
        outputs, self.times = self._session.finish(place, self._spin)
        return outputs

    def _free(self) -> None:
        self._close()


def open_engine(request: EngineRequest) -> Engine:
    """The engine that was built and certified for this GPU and this graph.

    Raises:
        EngineError: see ``engines.certificate.open_certified``.
        ModelError: the graph cannot be built, or int8 is asked for and there is no calibration.
    """
    quantization = request.calibration() if request.precision == "int8" else None
    return open_certified(lambda: request.graph(quantization), request.precision)


@dataclass
class _Slot:
    """The memory and the execution of one call.

    ``host`` and ``device`` hold (inputs, outputs); ``views`` are the tensors inside ``host``;
    ``events`` come to pass in pairs, as a part of the call begins and ends: its inputs on their way
    to the device, its graph, its outputs on their way back. ``under_way`` stays true where a call
    was not waited for, because something failed or Ctrl-C came.
    """

    host: tuple[Array, Array]
    device: tuple[Any, Any]
    views: tuple[dict[str, Array], dict[str, Array]]
    execution: Any
    events: tuple[Any, ...]
    graph: CapturedGraph | None = None
    under_way: bool = False

    def free(self) -> None:
        """Let go of all of it now, whoever still holds this slot: an error's traceback may."""
        if self.graph is not None:
            self.graph.close()
        self.graph = self.execution = None
        self.events = self.host = self.device = self.views = ()  # type: ignore[assignment]


@dataclass
class _Streams:
    """Each waits for events of the others alone, so that a copy of one call and the execution of
    another are done at once.
    """

    up: Any
    work: Any
    down: Any

    def synchronize(self) -> None:
        """Wait until all of it is done."""
        for stream in (self.up, self.work, self.down):
            stream.synchronize()

    def free(self) -> None:
        """Let go of them now, whoever still holds this."""
        self.up = self.work = self.down = None


class _Session:
    """Everything that lives on the GPU, and the one place that frees it, in the reverse of the
    order it was made in.

    The primary context, which PyTorch and the CUDA runtime share, is retained once, and made
    current only inside calls: so nothing depends on who used the GPU before, or leaves first.
    """

    def __init__(self, trt: Any, cuda: Any, gpu: Gpu) -> None:
        self._trt, self._cuda, self._gpu = trt, cuda, gpu
        self._process = os.getpid()
        try:
            self._context = cuda.Device(0).retain_primary_context()
        except cuda.Error as error:
            raise self._failed(error) from error
        self._slots: list[_Slot] = []
        self._streams: _Streams | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._kernels: _Kernels | None = None
        self.losses: list[str] = []

    def _failed(self, error: Exception) -> EngineError:
        return EngineError(f"{self._gpu.name} failed: {str(error).splitlines()[0]}")

    @contextmanager
    def _current(self) -> Iterator[_Streams]:
        """The context is current inside. Gives the streams, once they are made."""
        try:
            self._context.push()
            try:
                yield self._streams  # type: ignore[misc]  # who uses them comes behind ``load``
            finally:
                self._cuda.Context.pop()
        except self._cuda.Error as error:
            raise self._failed(error) from error

    @property
    def captured(self) -> bool:
        """Whether the execution of every slot is a CUDA graph."""
        return all(slot.graph is not None for slot in self._slots)

    def load(
        self,
        plan: bytes,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        kernels: Path | None,
    ) -> None:
        """Deserialize the plan and check that it is the graph's."""
        trt = self._trt
        with self._current():
            self._logger, messages = quiet_logger(trt)
            try:
                self._runtime = trt.Runtime(self._logger)
            except TypeError as error:  # its factory gives nothing
                raise cannot_start(trt, "runtime", messages) from error
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                reason = messages[-1] if messages else "it is damaged, or another build's or GPU's"
                raise EngineError(
                    f"{trt.__name__} {trt.__version__} refuses the engine ({reason}): run"
                    f" '{REBUILD}'"
                )
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            sides = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
            found = {
                name: (
                    sides[self._engine.get_tensor_mode(name)],
                    tuple(self._engine.get_tensor_shape(name)),
                )
                for name in names
            }
            check_tensors(found, inputs, outputs)
            self._layouts = Layout.of(inputs), Layout.of(outputs)
            self._names = set(names)
            self._streams = _Streams(*(self._cuda.Stream(NON_BLOCKING) for _ in range(3)))
            if kernels is not None and hasattr(trt, "IRuntimeCache"):
                self._kernels = _Kernels(self._engine, kernels)

    def keep_kernels(self) -> None:
        """Write what was compiled for this plan, for the next start."""
        if self._kernels is None:
            return
        with self._current():
            try:
                self._kernels.keep()
            except OutputError as error:
                self.losses.append(f"the GPU's kernels are compiled anew at each start: {error}")

    def add_slot(self, spin: bool, capture: bool) -> None:
        """Memory, an execution context of its own (a captured graph wants one), and a first run of
        it.
        """
        cuda, trt = self._cuda, self._trt
        flags = cuda.event_flags.DEFAULT if spin else cuda.event_flags.BLOCKING_SYNC
        with self._current() as streams:
            host = tuple(cuda.pagelocked_empty(layout.size, np.uint8) for layout in self._layouts)
            device = tuple(cuda.mem_alloc(layout.size) for layout in self._layouts)
            views = tuple(
                layout.views(block) for layout, block in zip(self._layouts, host, strict=True)
            )
            execution = (
                self._engine.create_execution_context()
                if self._kernels is None
                else self._engine.create_execution_context(runtime_config=self._kernels.config)
            )
            if execution is None:
                raise EngineError(
                    f"{self._gpu.name} has no memory left for another slot: close other programs"
                )
            events = tuple(cuda.Event(flags) for _ in range(6))
            slot = _Slot(host, device, views, execution, events)  # type: ignore[arg-type]
            self._slots.append(slot)
            for layout, block in zip(self._layouts, device, strict=True):
                for name, address in layout.addresses(int(block)).items():
                    if name in self._names and not execution.set_tensor_address(name, address):
                        raise EngineError(f"{trt.__name__} refuses the memory of tensor '{name}'")
            host[0][:] = 0
            cuda.memcpy_htod_async(device[0], host[0], streams.work)
            # Libraries set themselves up at first use, which must not be captured.
            self._execute(slot, streams.work)
            streams.work.synchronize()
            if capture:
                slot.graph = self._captured(slot, streams.work)

    def _captured(self, slot: _Slot, work: Any) -> CapturedGraph | None:
        """None where this engine cannot be captured; it then runs as it did, and ``losses`` says
        why.
        """
        stream = int(work.handle)
        try:
            asked = getattr(slot.execution, "is_stream_capturable", None)
            if asked is not None and not asked(stream):
                raise EngineError(f"{self._trt.__name__} says that this plan cannot be captured")
            return CapturedGraph(stream, lambda: self._execute(slot, work))
        except EngineError as error:
            self.losses.append(
                f"no CUDA graph ({error}): the processor launches every kernel of each call, which"
                " costs time"
            )
            work.synchronize()
            return None

    def _execute(self, slot: _Slot, work: Any) -> None:
        if not slot.execution.execute_async_v3(int(work.handle)):
            raise EngineError(
                f"{self._trt.__name__} failed to run the engine: build it again with '{REBUILD}'"
            )

    def start(self, place: int, feeds: Mapping[str, Array]) -> None:
        """Put one call on the streams."""
        slot = self._slots[place]
        with self._current() as streams:
            if slot.under_way:  # a call that nobody waited for may still use this memory
                streams.synchronize()
            for name, value in feeds.items():
                slot.views[0][name][...] = value
            slot.under_way = True
            slot.events[0].record(streams.up)
            self._cuda.memcpy_htod_async(slot.device[0], slot.host[0], streams.up)
            slot.events[1].record(streams.up)
            streams.work.wait_for_event(slot.events[1])
            slot.events[2].record(streams.work)
            if slot.graph is not None:
                slot.graph.launch()
            else:
                self._execute(slot, streams.work)
            slot.events[3].record(streams.work)
            streams.down.wait_for_event(slot.events[3])
            slot.events[4].record(streams.down)
            self._cuda.memcpy_dtoh_async(slot.host[1], slot.device[1], streams.down)
            slot.events[5].record(streams.down)

    def finish(self, place: int, spin: bool) -> tuple[dict[str, Array], GpuTimes]:
        """Wait for one call, and copy its outputs: the slot's memory is written again by the
        next.
        """
        slot = self._slots[place]
        done = slot.events[-1]
        with self._current():
            if spin:
                while not done.query():
                    pass
            else:
                done.synchronize()
            slot.under_way = False
            begun, ended = slot.events[::2], slot.events[1::2]
            times_ms = [a.time_till(b) for a, b in zip(begun, ended, strict=True)]
        outputs = {name: view.copy() for name, view in slot.views[1].items()}
        return outputs, GpuTimes(*times_ms)

    def close(self) -> None:
        """Free it all, in any thread; in a forked child, where the GPU is not ours, nothing."""
        if self._context is None or os.getpid() != self._process:
            return
        context, self._context = self._context, None
        context.push()
        handle = current_context()
        try:
            with suppress(self._cuda.Error):  # of work that failed; it is over then, too
                if self._streams is not None:
                    self._streams.synchronize()
            while self._slots:
                self._slots.pop().free()
            self._kernels = self._engine = self._runtime = None
            if self._streams is not None:
                self._streams.free()
        finally:
            # While it is current: pycuda gives it back in its own thread alone otherwise.
            context.detach()
            leave_context(handle)


class _Kernels:
    """The kernels that TensorRT for RTX compiles of a plan for the GPU here, and their file.

    The library itself refuses a file of another GPU, driver or build.

    Args:
        engine: the deserialized plan; its context is current.
        path: of the file.
    """

    def __init__(self, engine: Any, path: Path) -> None:
        self.config, self._path = engine.create_runtime_config(), path
        self._cache = self.config.create_runtime_cache()
        try:
            self._kept = read_file(path, "file of kernels", MOST_BYTES) if path.exists() else b""
        except ModelError:  # too large, or not readable: compiled and written again
            self._kept = b""
        if self._kept and not self._cache.deserialize(self._kept):
            self._kept = b""
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write the file, if there is something new.

        Raises:
            OutputError: it cannot be written.
        """
        compiled = bytes(self._cache.serialize())
        if compiled != self._kept:
            with whole_file(self._path) as part:
                part.write_bytes(compiled)
            self._kept = compiled


ALIGNMENT = 256  # bytes: what cudaMalloc aligns to, and TensorRT expects of every tensor


@dataclass(frozen=True)
class Layout:
    """Tensors one behind the other in one block of memory.

    Attributes:
        specs: the tensors.
        offsets: where each begins, in bytes, a multiple of ``ALIGNMENT``.
        size: bytes of the whole block, never 0.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, specs: Sequence[TensorSpec]) -> "Layout":
        """Lay out tensors in their order."""
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += -(-size_of(spec) // ALIGNMENT) * ALIGNMENT
        return cls(tuple(specs), tuple(offsets), max(end, ALIGNMENT))

    def views(self, block: Array) -> dict[str, Array]:
        """The tensors inside a uint8 block of ``size`` bytes, without copying."""
        return {
            spec.name: block[start : start + size_of(spec)].view(spec.dtype).reshape(spec.shape)
            for spec, start in zip(self.specs, self.offsets, strict=True)
        }

    def addresses(self, base: int) -> dict[str, int]:
        """The address of each tensor, where the block begins at ``base``."""
        return {
            spec.name: base + start for spec, start in zip(self.specs, self.offsets, strict=True)
        }


def size_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize


def check_tensors(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """Hold a compiled engine's tensors against those of the graph that it should be of.

    Args:
        found: name to (``input`` or ``output``, shape) as the engine says.
        inputs: of the graph; one that nothing reads may be gone from the engine.
        outputs: of the graph.

    Raises:
        EngineError: it is another graph's engine.
    """
    sides = {
        **{s.name: ("input", s.shape) for s in inputs},
        **{s.name: ("output", s.shape) for s in outputs},
    }
    missing = [s.name for s in outputs if s.name not in found]
    wrong = [name for name, value in found.items() if sides.get(name) != value]
    if missing or wrong:
        name = (missing or wrong)[0]
        raise EngineError(
            f"this engine is of another graph (tensor '{name}' does not fit): run '{REBUILD}'"
        )


def open_certified(graph: Callable[[], onnx.ModelProto], precision: str = "auto") -> Engine:
    """The TensorRT engine that was built and certified for this GPU and this graph.

    Args:
        graph: makes the graph, once it is known that there is something to run it on.
        precision: ``auto`` or one of ``PRECISIONS``.

    Raises:
        EngineError: driver, GPU, library, engine or certificate is missing, or does not fit; the
            message says what to do.
    """
    precision = checked_precision(precision)
    gpu = probe_gpu()
    library = load_tensorrt()
    check_driver(gpu, library.__name__)
    load_pycuda()
    model = graph()
    typed = typed_graph(model, precision, library.__name__, gpu.sm)
    # Built here, or ahead of time for GPUs of this kind and copied into the cache.
    key = key_of(model, typed, library, str(gpu), precision)
    found = find_engine([key, replace(key, target=gpu.sm)])
    if found is None:
        raise EngineError(
            f"no TensorRT engine of this graph is built for {gpu}: run"
            f" '{sightline_command('build', backend='tensorrt', precision=precision)}' with the"
            " same model and head"
        )
    path = found.key.path
    require(certificate_path(path), subject_of(*found), precision)
    return TensorRtEngine(found.plan, model, precision, kernels=kernels_path(path))
