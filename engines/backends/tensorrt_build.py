"""Builds a TensorRT plan from an ONNX graph, with or without the target GPU. The caller passes the
library in.

One way for TensorRT 10, 11 and TensorRT for RTX: the network is strongly typed, so precision is
what the graph says, and none of what TensorRT 11 took away (precision flags, calibrators) is used.
API: docs.nvidia.com/deeplearning/tensorrt, Python API, Builder, BuilderConfig, OnnxParser,
ProgressMonitor.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engines.backends.cuda import check_driver, probe_gpu
from engines.errors import EngineError, ModelError, install_packages
from engines.files import whole_file


@dataclass
class Build:
    """How to build.

    Attributes:
        trt: the library, ``tensorrt`` or ``tensorrt_rtx``.
        target: ``sm89`` and the like for a GPU that is not here (TensorRT for RTX only); None for
            the one that is.
        timing_cache: file of measured kernels that is read and kept up to date; None for none.
        console: for the progress bar; None for none.
    """

    trt: Any
    target: str | None = None
    timing_cache: Path | None = None
    console: Console | None = None
    messages: list[str] = field(default_factory=list)


def build_plan(model: onnx.ModelProto, build: Build) -> bytes:
    """Parse a graph and compile it.

    Raises:
        ModelError: the parser refuses a node; the message names it.
        EngineError: the graph cannot be compiled for that GPU, or there is none.
        KeyboardInterrupt: Ctrl-C, once TensorRT has let go.
    """
    trt = build.trt
    logger = _logger(trt, build.messages)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # its factory gives nothing where it needs a GPU and finds none
        raise cannot_start(trt, "builder", build.messages) from error
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise ModelError(f"{trt.__name__} cannot read the graph: {_parser_error(parser)}")
    if not network.num_outputs:
        raise ModelError(f"{trt.__name__} cannot read the graph: it has no output")
    config = builder.create_builder_config()
    _configure(config, build)
    with _progress(build) as monitor:
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        reason = build.messages[-1] if build.messages else "it says no reason"
        raise EngineError(f"{trt.__name__} cannot build for {build.target or 'this GPU'}: {reason}")
    _keep_timings(config, build)
    return bytes(plan)


def cannot_start(trt: Any, what: str, messages: Sequence[str]) -> EngineError:
    """Why a library gives no builder or runtime: no GPU, an old driver, or what it says itself."""
    try:
        check_driver(probe_gpu(), trt.__name__)
        reason = messages[-1] if messages else "it says no reason; try nvidia-smi"
    except EngineError as error:
        reason = str(error)
    return EngineError(f"the {what} of {trt.__name__} {trt.__version__} does not start: {reason}")


def network_flags(trt: Any) -> int:
    """Strong typing has to be asked for in TensorRT 10, and is the only kind since."""
    old = trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if old else 0


def targets(trt: Any) -> list[str]:
    """The compute capabilities that can be built for with no GPU: ``sm75`` ...; none but with
    TensorRT for RTX.
    """
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return [name.lower() for name in names if name.startswith("SM")]


def _configure(config: Any, build: Build) -> None:
    trt = build.trt
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32; who wants speed asks for fp16
    if build.target is not None:
        known = targets(trt)
        if build.target not in known:
            can = (
                f"it can for {', '.join(known)}"
                if known
                else f"only tensorrt_rtx can: {install_packages('tensorrt_rtx')}"
            )
            raise EngineError(
                f"{trt.__name__} cannot build for {build.target} ahead of time: {can}"
            )
    if hasattr(trt, "ComputeCapability"):
        # Always said: what TensorRT for RTX builds for by itself leaves Turing out, and builds for
        # cards that are not here.
        config.num_compute_capabilities = 1
        target = getattr(trt.ComputeCapability, (build.target or "current").upper())
        config.set_compute_capability(target, 0)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # Memory that is had while a call runs cannot be captured in a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if build.timing_cache is not None and has_timing_cache(trt):
        old = build.timing_cache.read_bytes() if build.timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(old), False)


def has_timing_cache(trt: Any) -> bool:
    """TensorRT for RTX chooses kernels when it runs, and measures none when it builds."""
    return str(trt.__name__) == "tensorrt"


def _keep_timings(config: Any, build: Build) -> None:
    cache = (
        config.get_timing_cache() if build.timing_cache and has_timing_cache(build.trt) else None
    )
    if cache is not None and build.timing_cache is not None:
        with whole_file(build.timing_cache) as part:
            part.write_bytes(bytes(cache.serialize()))


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it says no reason"
    error = parser.get_error(0)
    where = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_name() else ""
    return where + str(error.desc()).strip().splitlines()[0]


def _logger(trt: Any, messages: list[str]) -> Any:
    """Keeps errors for the one line that a failure becomes, and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(" ".join(message.split()))

    return Logger()


def quiet_logger(trt: Any) -> tuple[Any, list[str]]:
    """(logger, the errors that it was told), for the runtime."""
    messages: list[str] = []
    return _logger(trt, messages), messages


@contextmanager
def _progress(build: Build) -> Iterator[Any]:
    """TensorRT's own account of its phases, as bars; None without a console."""
    if build.console is None:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=build.console, transient=True) as bars:
        yield _monitor(build.trt, bars)


def _monitor(trt: Any, bars: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """One bar a phase. Called from TensorRT's threads, which rich allows; an exception must not
        reach them.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._tasks: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            indent = "" if parent_phase is None else "  "
            self._tasks[phase_name] = bars.add_task(indent + phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._tasks:
                    bars.update(self._tasks[phase_name], completed=step + 1)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted  # False asks TensorRT to stop

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._tasks:
                bars.remove_task(self._tasks.pop(phase_name))

    return Monitor()
