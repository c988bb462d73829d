"""Drives pycuda and the CUDA driver without TensorRT: a PyTorch function stands in a plan's place.

``calib.bench.gpu_day`` runs this on a machine with a GPU. The tests run it on a stand-in for the
driver.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import cv2
import numpy as np
import onnx

import realtime
from engines.backends import tensorrt as backend
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.choose import choose_head
from engines.engine import Array, Engine, TensorSpec
from engines.errors import EngineError
from engines.localizer import ImageBgr
from engines.networks.registry import Classifier
from engines.options import EngineOptions

if TYPE_CHECKING:
    from torch import Tensor

PHOTO = Path(realtime.__file__).parent / "assets" / "chelsea.jpg"
PART_PX = 200
OPENINGS = 200


COMPILE_IN_PARALLEL = """
import setuptools._distutils.ccompiler as compiler, concurrent.futures, os, sys, runpy

def compile(self, sources, output_dir=None, macros=None, include_dirs=None, debug=0,
            extra_preargs=None, extra_postargs=None, depends=None):
    macros, objects, extra, options, build = self._setup_compile(
        output_dir, macros, include_dirs, sources, depends, extra_postargs)
    arguments = self._get_cc_args(options, debug, extra_preargs)
    def one(name):
        if name in build:
            self._compile(name, *build[name], arguments, extra, options)
    list(concurrent.futures.ThreadPoolExecutor(os.cpu_count()).map(one, objects))
    return objects

compiler.CCompiler.compile = compile
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
"""Runs pycuda's own ``setup.py`` with all processors in place of one."""


def build_pycuda(archive: Path) -> Path:
    """Compile pycuda in a folder of its own, and make it importable.

    Raises:
        EngineError: the archive or NVIDIA's compiler is missing, or the compilation fails.
    """
    root = Path(tempfile.mkdtemp(prefix="pycuda-"))
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    (source,) = root.glob("pycuda-*")
    places = [Path(place) for place in ("/usr/local/cuda", "/usr")]
    cuda = next((place for place in places if (place / "bin" / "nvcc").exists()), None)
    if cuda is None:
        raise EngineError("NVIDIA's compiler nvcc is not there: install the CUDA toolkit")
    flags = {"CFLAGS": "-O1 -w", "CXXFLAGS": "-O1 -w"}
    flags |= {"LIBRARY_PATH": f"{cuda}/lib64/stubs:{cuda}/lib64"}
    environment = {**os.environ, "PATH": f"{cuda}/bin:{os.environ['PATH']}", **flags}
    configure = ["configure.py", f"--cuda-root={cuda}", "--no-cuda-enable-curand"]
    for arguments in (configure, ["-c", COMPILE_IN_PARALLEL]):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise EngineError((done.stderr or done.stdout)[-1500:])
    sys.path.insert(0, str(source))
    return source


def pictures(size_px: int, count: int) -> list[ImageBgr]:
    """Parts of a photo, ``[S, S, 3]``; each is another one. The demo's clip would need PyAV."""
    photo = np.asarray(cv2.imread(str(PHOTO), cv2.IMREAD_COLOR), np.uint8)
    height, width = photo.shape[:2]
    found = []
    for index in range(count):
        x = 37 * index % (width - PART_PX)
        y = 23 * index % (height - PART_PX)
        part = photo[y : y + PART_PX, x : x + PART_PX]
        found.append(np.asarray(cv2.resize(part, (size_px, size_px)), np.uint8))
    return found


def feed(images: Sequence[ImageBgr], wanted_class: int = -1) -> dict[str, Array]:
    """The inputs of one call."""
    stacked = np.ascontiguousarray(np.stack(images))
    return {IMAGE: stacked, WANTED_CLASS: np.full(len(images), wanted_class)}


def in_flight(engine: Engine, feeds: Sequence[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
    """The outputs of each call in order, with all slots of the engine busy."""
    waiting: deque[Any] = deque()
    for each in feeds:
        if len(waiting) == engine.slots:
            yield engine.collect(waiting.popleft())
        waiting.append(engine.submit(each))
    while waiting:
        yield engine.collect(waiting.popleft())


def p50_p99(values: Array | Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in np.percentile(values, [50, 99])]


def call_ms(call: Callable[[], object], times: int) -> list[float]:
    for _ in range(min(5, times)):
        call()
    samples_ms = []
    for _ in range(times):
        before = time.perf_counter()
        call()
        samples_ms.append((time.perf_counter() - before) * 1e3)
    return p50_p99(samples_ms)


def timed(engine: Engine, feeds: Mapping[str, Array], seconds: float) -> dict[str, Any]:
    """Keep all slots busy. The first fifth of the calls is left out.

    Returns:
        ``images_per_s``, and median and 99th percentile in milliseconds of each part of a call.
    """
    rows: list[tuple[float, ...]] = []
    waiting: deque[tuple[Any, float, float]] = deque()
    begin = time.perf_counter()
    while len(rows) < 5 or time.perf_counter() - begin < seconds:
        while len(waiting) < engine.slots:
            before = time.perf_counter()
            ticket = engine.submit(feeds)
            waiting.append((ticket, before, (time.perf_counter() - before) * 1e3))
        ticket, before, enqueue_ms = waiting.popleft()
        engine.collect(ticket)
        gpu = engine.times
        parts_ms = (gpu.h2d_ms, gpu.compute_ms, gpu.d2h_ms) if gpu else (0.0, 0.0, 0.0)
        rows.append((enqueue_ms, *parts_ms, (time.perf_counter() - before) * 1e3))
    passed_s = time.perf_counter() - begin
    for ticket, _, _ in waiting:
        engine.collect(ticket)
    columns = np.array(rows[len(rows) // 5 :]).T
    names = ("enqueue_ms", "h2d_ms", "compute_ms", "d2h_ms", "host_ms")
    times_ms = {name: p50_p99(values) for name, values in zip(names, columns, strict=True)}
    return {"images_per_s": round(len(rows) * len(feeds[WANTED_CLASS]) / passed_s, 1), **times_ms}


def outputs_of(image_nhwc: "Tensor", wanted: "Tensor", map_hw: tuple[int, int]) -> dict[str, Any]:
    """What the stand-in for a plan computes: cheap values that depend on every input."""
    from torch.nn import functional

    pixels_nchw = image_nhwc.permute(0, 3, 1, 2).float()
    maps_nhw = functional.adaptive_avg_pool2d(pixels_nchw, map_hw).mean(1)
    flat = maps_nhw.flatten(1)
    return {
        "class_index": wanted + 7,
        "score": flat.mean(1),
        "logit": flat.amax(1),
        "map": maps_nhw,
        "box_xyxy": flat[:, :4] / 255,
    }


def tensor_on_gpu(address: int, spec: TensorSpec) -> "Tensor":
    """The GPU's memory at an address, as a tensor."""
    import torch

    interface = {"shape": spec.shape, "typestr": spec.dtype.str, "data": (address, False)}
    raw = SimpleNamespace(__cuda_array_interface__={**interface, "version": 3})
    return torch.as_tensor(raw, device="cuda")


def run_on_stream(handle: int, work: Callable[[], None]) -> None:
    """Put work of PyTorch on a stream that another library made."""
    import torch

    with torch.cuda.stream(torch.cuda.ExternalStream(handle)):  # type: ignore[no-untyped-call]
        work()


class PlanStandIn:
    """Stands in TensorRT's place: as much of the library, of a plan and of its executions as
    ``engines.backends.tensorrt`` uses.

    Args:
        inputs, outputs: tensors of the graph.
        tensor_at: gives the memory at an address as a tensor.
        run_on: puts work on the stream with a handle.
    """

    __name__ = "tensorrt_rtx"
    __version__ = "stand-in"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")

    class ILogger:
        """The base class of loggers."""

        ERROR = 1

        def __init__(self) -> None: ...

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        tensor_at: Callable[[int, TensorSpec], "Tensor"] = tensor_on_gpu,
        run_on: Callable[[int, Callable[[], None]], None] = run_on_stream,
    ) -> None:
        self.specs = {spec.name: spec for spec in (*inputs, *outputs)}
        _, height, width = self.specs["map"].shape
        self.map_hw = (height, width)
        self.num_io_tensors = len(self.specs)
        self._inputs = {spec.name for spec in inputs}
        self._tensor_at = tensor_at
        self._run_on = run_on

    def Runtime(self, _: object) -> SimpleNamespace:  # noqa: N802
        """Reads plans; there is one, whatever the bytes are."""
        return SimpleNamespace(deserialize_cuda_engine=lambda _: self)

    def get_tensor_name(self, index: int) -> str:
        return [*self.specs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._inputs else "output"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape

    def create_execution_context(self) -> SimpleNamespace:
        """Memory of its own for each execution."""
        tensors: dict[str, Tensor] = {}

        def set_tensor_address(name: str, address: int) -> bool:
            tensors[name] = self._tensor_at(address, self.specs[name])
            return address % 256 == 0

        def compute() -> None:
            found = outputs_of(tensors[IMAGE], tensors[WANTED_CLASS], self.map_hw)
            for name, value in found.items():
                if name in tensors:
                    tensors[name].copy_(value)

        def execute(handle: int) -> bool:
            self._run_on(handle, compute)
            return True

        return SimpleNamespace(set_tensor_address=set_tensor_address, execute_async_v3=execute)


@dataclass(frozen=True)
class Driven:
    """A graph whose plan is a stand-in.

    Attributes:
        model: the graph, for names, types and shapes.
        library: in TensorRT's place.
        size_px: input side.
    """

    model: onnx.ModelProto
    library: PlanStandIn
    size_px: int

    @classmethod
    def of(cls, classifier: Classifier, choice: EngineOptions, **how: Any) -> "Driven":
        """Of a network; ``how`` are arguments of ``PlanStandIn``."""
        from engines.backends.torch_reference import TorchEngine

        head = choose_head(choice, classifier)
        reference = TorchEngine(classifier, head=head)
        library = PlanStandIn(reference.inputs, reference.outputs, **how)
        return cls(build_graph(classifier, head=head), library, classifier.size_px)

    @contextmanager
    def installed(self) -> Iterator[list[Any]]:
        """TensorRT is the stand-in inside. Gives the CUDA graphs that are captured."""
        captured: list[Any] = []
        capture = backend.CapturedGraph  # type: ignore[attr-defined]  # imported there

        def counted(stream: int, enqueue: Callable[[], None]) -> Any:
            captured.append(capture(stream, enqueue))
            return captured[-1]

        with (
            patch.object(backend, "load_tensorrt", lambda ahead=False: self.library),
            patch.object(backend, "CapturedGraph", counted),
        ):
            yield captured

    def open(self, slots: int = 2, spin: bool = False, capture: bool = True) -> Any:
        """The engine."""
        return backend.TensorRtEngine(b"", self.model, "fp32", slots, spin, capture)

    def check(self, engine: Engine, calls: int) -> None:
        """Noise through all slots; every output must be that of its own input.

        Raises:
            AssertionError: one is not.
        """
        import torch

        order = np.random.default_rng(0)
        shape = (self.size_px, self.size_px, 3)
        noise = [order.integers(0, 256, shape).astype(np.uint8) for _ in range(calls)]
        feeds = [feed([image], index) for index, image in enumerate(noise)]
        for fed, got in zip(feeds, in_flight(engine, feeds), strict=True):
            image, wanted = torch.from_numpy(fed[IMAGE]), torch.from_numpy(fed[WANTED_CLASS])
            for name, value in outputs_of(image, wanted, self.library.map_hw).items():
                if name in got:
                    np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-4, atol=1e-3)


def check_sessions(driven: Driven, calls: int = 50, timed_calls: int = 300) -> dict[str, Any]:
    """Run every kind of engine, also fed from another thread.

    Raises:
        AssertionError: an output is wrong, or a CUDA graph was not captured.
    """
    found: dict[str, Any] = {}
    fed = feed(pictures(driven.size_px, 1))
    kinds = [(c, s, n) for c in (True, False) for s in (True, False) for n in (1, 2, 3)]
    for capture, spin, slots in kinds:
        what = f"capture {capture} spin {spin} slots {slots}"
        with driven.installed() as captured:
            engine = driven.open(slots, spin, capture)
            driven.check(engine, calls)
            assert len(captured) == (slots if capture else 0), f"{what}: {len(captured)} captured"
            found[f"{what}: call p50, p99 ms"] = call_ms(partial(engine.infer, fed), timed_calls)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(driven.check, engine, min(20, calls)).result()
            driven.check(engine, min(5, calls))
            engine.close()
    return found


def lost_mib(driven: Driven) -> float:
    """GPU memory that is gone after many openings, closed here, in another thread, or not at all.

    PyTorch uses the same context all the while. What it keeps for itself does not count: it keeps
    memory for each stream that it ever saw.

    Raises:
        AssertionError: PyTorch's own memory was changed.
    """
    import torch

    kept = torch.ones(1000, device="cuda")
    held: list[int] = []
    fed = feed(pictures(driven.size_px, 1))
    with driven.installed() as captured:
        for index in range(OPENINGS):
            engine = driven.open()
            engine.infer(fed)
            if index % 3 == 0:
                closing = threading.Thread(target=engine.close)
                closing.start()
                closing.join()
            elif index % 3 == 1:
                engine.close()
            del engine
            captured.clear()
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            held.append(total - free - torch.cuda.memory_reserved())
    assert float(kept.sum()) == 1000
    return (held[-1] - held[20]) / 2**20
