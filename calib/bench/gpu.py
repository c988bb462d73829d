"""The GPU part of the bench: times as trtexec reports them, the GPU's clocks, and the peers on the
same GPU.
"""

import threading
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calib.bench.compare import WINDOW_FRAMES, Rule, until_settled
from calib.bench.machine import Neighbours
from calib.bench.turns import WARM_UP_CALLS, Call, forward_graph, row_of, take_turns
from engines.build import IMAGE, WANTED_CLASS
from engines.choose import open_localizer
from engines.engine import Array, Engine
from engines.errors import EngineError, install_packages
from engines.networks.registry import Classifier
from engines.options import EngineOptions
from realtime.statistics import percentiles

PERIOD_S = 0.2
REASONS = {
    "nvmlClocksEventReasonGpuIdle": "idle",
    "nvmlClocksEventReasonApplicationsClocksSetting": "clocks set by an application",
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonDisplayClockSetting": "display clock",
}
"""Why a GPU runs below its highest clock: constant of the library to words."""


class GpuClocks:
    """Watches GPU 0 from a thread of its own, between entering and leaving.

    Args:
        load: gives the management library (package nvidia-ml-py); for tests.
    """

    def __init__(self, load: Callable[[], ModuleType] | None = None) -> None:
        self._load = load or _pynvml
        self._samples: list[tuple[int, int, int, int, int]] = []
        self._stop = threading.Event()
        self._why_not: str | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GpuClocks":
        try:
            self._library = self._load()
        except ImportError:
            self._why_not = f"nvidia-ml-py is not installed: {install_packages('nvidia-ml-py')}"
            return self
        try:
            self._library.nvmlInit()
            self._gpu = self._library.nvmlDeviceGetHandleByIndex(0)
            self._highest_mhz = self._library.nvmlDeviceGetMaxClockInfo(
                self._gpu, self._library.NVML_CLOCK_SM
            )
            self._sample()
        except self._library.NVMLError as error:
            self._why_not = str(error)
            return self
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._library.nvmlShutdown()

    def report(self) -> Mapping[str, Any]:
        """``sm_mhz``, ``memory_mhz`` (least, median, most), ``highest_sm_mhz``, ``celsius``,
        ``watts`` (most), ``held_back``.

        ``held_back`` maps a reason in words to the share of samples in which it was there.
        ``not_available`` alone where the library is missing or does not answer.
        """
        if self._why_not is not None:
            return {"not_available": self._why_not}
        sm_mhz, memory_mhz, celsius, milliwatts, reasons = np.array(self._samples, np.int64).T
        held_back = {
            words: float(np.mean(reasons & getattr(self._library, name) != 0))
            for name, words in REASONS.items()
        }
        return {
            "sm_mhz": _spread(sm_mhz),
            "memory_mhz": _spread(memory_mhz),
            "highest_sm_mhz": self._highest_mhz,
            "celsius": int(celsius.max()),
            "watts": round(float(milliwatts.max()) / 1e3, 1),
            "held_back": {words: round(share, 2) for words, share in held_back.items() if share},
            "samples": len(self._samples),
        }

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self._sample()
            except self._library.NVMLError:
                return  # what was seen before still holds

    def _sample(self) -> None:
        nvml, gpu = self._library, self._gpu
        self._samples.append(
            (
                nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
                nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
                nvml.nvmlDeviceGetPowerUsage(gpu),
                nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
            )
        )


def _spread(values: Any) -> dict[str, int]:
    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _pynvml() -> ModuleType:
    import pynvml  # the optional package nvidia-ml-py

    return pynvml  # type: ignore[no-any-return]


WARM_UP_S = 0.2  # as trtexec
CALLS = Rule(WINDOW_FRAMES, "calls")
WORDS = {
    "enqueue_ms": "Enqueue",
    "h2d_ms": "H2D",
    "compute_ms": "GPU Compute",
    "d2h_ms": "D2H",
    "latency_ms": "Latency",
    "host_ms": "Host",
}


def open_gpu(choice: EngineOptions, batch: int = 1) -> Engine:
    """Open the engine of a choice whose backend is one for GPUs.

    Raises:
        EngineError: it does not run on a GPU here.
    """
    engine = open_localizer(choice, batch=batch).engine
    if not engine.on_gpu:
        raise EngineError(
            f"backend {choice.backend} is timed on GPUs, and this machine has none: leave it out",
            option="backend",
        )
    return engine


def feed_of(engine: Engine) -> dict[str, Array]:
    """Inputs of an engine: noise as the image, and no class."""
    (shape,) = (spec.shape for spec in engine.inputs if spec.name == IMAGE)
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return {IMAGE: image, WANTED_CLASS: np.full(shape[0], -1)}


def bench_gpu(
    choice: EngineOptions, batches: Sequence[int], seconds: float, console: Console
) -> dict[str, Any]:
    """Time one network on the GPU.

    Each batch size is timed in trtexec's words. Then one image is timed in turns with the peers.

    Args:
        choice: the network; its backend is one for GPUs.
        batches: images per call, besides 1; each needs an engine built for it.
        seconds: time limit of each batch, and of the turns; compiling and warm-up not included.
        console: for progress.

    Returns:
        As ``calib.bench.run.bench_engine``, and ``gpu``: for each batch what ``time_calls`` gives,
        ``batch``, ``images_per_s``, ``device`` and ``clocks`` (see ``GpuClocks.report``).

    Raises:
        EngineError: an engine is not there, or runs on no GPU.
    """
    timed, engine = [], open_gpu(choice)
    title = f"{choice.model} at {feed_of(engine)[IMAGE].shape[1]} px, {engine.device}"
    for batch in dict.fromkeys([1, *batches]):
        engine = engine if batch == 1 else open_gpu(choice, batch)
        with (
            console.status(f"{title}, batch {batch}: until {CALLS}, {seconds:g} s at most ..."),
            GpuClocks() as clocks,
        ):
            times = time_calls(engine, feed_of(engine), seconds)
        images_per_s = round(batch * times["throughput_per_s"], 1)
        timed.append(
            {
                "batch": batch,
                "images_per_s": images_per_s,
                "device": engine.device,
                **times,
                "clocks": clocks.report(),
            }
        )
        engine.close()
    with ExitStack() as engines:
        with console.status(f"{title}: peers ..."):
            calls, missing = gpu_calls(choice, engines)
        samples_ms, stability = take_turns(calls, seconds, console, title, time.perf_counter)
    first = next(iter(samples_ms.values()))
    return {
        "engine": title,
        "calls": len(next(iter(samples_ms.values()))),
        "warm_up_calls": WARM_UP_CALLS,
        "stability": stability,
        "peers": [row_of(name, values, first) for name, values in samples_ms.items()],
        "not_available": [{"name": name, "why": why} for name, why in missing.items()],
        "gpu": timed,
    }


def time_calls(engine: Engine, feed: Mapping[str, Array], seconds: float) -> dict[str, Any]:
    """Run an engine with all its slots busy until its times have settled.

    Returns:
        ``calls``, ``throughput_per_s``, ``stability``, and for each of ``WORDS`` its percentiles.

    Raises:
        EngineError: the engine measures no GPU.
    """
    end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < end:
        engine.infer(feed)
    if engine.times is None:
        raise EngineError("this engine runs on no GPU: there are no events to time it with")
    under_way: deque[tuple[int, float, float]] = deque()

    def submit() -> None:
        before = time.perf_counter()
        ticket = engine.submit(feed)
        under_way.append((ticket, before, (time.perf_counter() - before) * 1e3))

    def one_call() -> dict[str, float]:
        while len(under_way) < engine.slots:
            submit()
        ticket, before, enqueue_ms = under_way.popleft()
        engine.collect(ticket)
        times = engine.times
        assert times is not None
        return {
            "enqueue_ms": enqueue_ms,
            "h2d_ms": times.h2d_ms,
            "compute_ms": times.compute_ms,
            "d2h_ms": times.d2h_ms,
            "latency_ms": times.h2d_ms + times.compute_ms + times.d2h_ms,
            "host_ms": (time.perf_counter() - before) * 1e3,
        }

    start, neighbours = time.perf_counter(), Neighbours()
    series, stable = until_settled(one_call, CALLS, seconds, time.perf_counter)
    passed_s = time.perf_counter() - start
    while under_way:
        engine.collect(under_way.popleft()[0])
    calls = len(series["host_ms"])
    stability = {**CALLS.report(series, stable, seconds), "busy_elsewhere": neighbours.share()}
    found = {name: percentiles(array("d", values)) for name, values in series.items()}
    return {
        "calls": calls,
        "throughput_per_s": round(calls / passed_s, 1),
        "stability": stability,
        **found,
    }


def gpu_calls(choice: EngineOptions, engines: ExitStack) -> tuple[dict[str, Call], dict[str, str]]:
    """Our engine, the same engine type without a backward pass, and PyTorch's peers on the GPU.

    Each call takes and gives host memory.

    Args:
        choice: its backend is one for GPUs.
        engines: closes ours.

    Returns:
        (name to call, ours first; name to why there is none).
    """
    classifier = choice.classifier()
    engine = engines.enter_context(closing(open_gpu(choice)))
    feed = feed_of(engine)
    precision = engine.precision
    calls: dict[str, Call] = {f"Sightline {choice.backend} {precision}": lambda: engine.infer(feed)}
    makers: dict[str, Callable[[], Call]] = {}
    if choice.backend == "tensorrt":
        makers[f"TensorRT {'fp16' if precision == 'int8' else precision} forward only"] = partial(
            tensorrt_forward, classifier, precision, feed, engines
        )
    makers |= {
        f"torch {way} {dtype} {work}": partial(torch_peer, classifier, feed[IMAGE], dtype, method)
        for dtype in ("fp32", "fp16")
        for way, work, method in TORCH_PEERS
    }
    missing = {}
    for name, make in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other libraries, about themselves
                call = make()
                call()
        except (
            Exception
        ) as error:  # whatever stops a peer, the others are still measured, and its row says why
            missing[name] = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        else:
            calls[name] = call
    return calls, missing


TORCH_PEERS = (
    ("eager", "forward + autograd", "autograd"),
    ("CUDA graph", "forward + autograd", "captured_autograd"),
    ("compile", "forward + autograd", "compiled"),
    ("eager", "forward only", "forward"),
    ("CUDA graph", "forward only", "captured_forward"),
)


def torch_peer(classifier: Classifier, image_nhwc_bgr: Array, dtype: str, method: str) -> Call:
    """Make one of ``calib.bench.torch_peers.TorchPeers``'s calls on the GPU."""
    from calib.bench.torch_peers import TorchPeers  # only where PyTorch is installed
    from engines.backends.torch_reference import exact_floats

    exact = exact_floats()  # "fp32" of all rows is the same
    with exact_floats():
        call: Call = getattr(TorchPeers(classifier, image_nhwc_bgr, "cuda", dtype), method)()
    return exact(call)


def tensorrt_forward(
    classifier: Classifier, precision: str, feed: Mapping[str, Array], engines: ExitStack
) -> Call:
    """An engine that gives the class scores alone, by the same library in the same precision.

    In place of int8 it is fp16, which needs no calibration.

    Raises:
        EngineError: it cannot be built or run.
    """
    from engines.backends.cuda import probe_gpu
    from engines.backends.tensorrt import TensorRtEngine, load_tensorrt
    from engines.backends.tensorrt_build import Build, build_plan
    from engines.typed_graph import typed_graph

    library, precision = load_tensorrt(), "fp16" if precision == "int8" else precision
    graph = typed_graph(forward_graph(classifier), precision, library.__name__, probe_gpu().sm)
    engine = engines.enter_context(
        closing(TensorRtEngine(build_plan(graph, Build(library)), graph, precision))
    )
    image = {IMAGE: feed[IMAGE]}
    return lambda: engine.infer(image)


def gpu_table(title: str, timed: Sequence[Mapping[str, Any]]) -> Table:
    """A table with the median and 99th percentile of each time, and a column for each batch."""
    table = Table(title=title, title_justify="left")
    table.add_column("milliseconds")
    for times in timed:
        table.add_column(f"batch {times['batch']}: p50", justify="right")
        table.add_column("p99", justify="right")
    for name, words in WORDS.items():
        table.add_row(words, *(f"{times[name][p]:.3f}" for times in timed for p in ("p50", "p99")))
    for words, name in (("Throughput, calls/s", "throughput_per_s"), ("images/s", "images_per_s")):
        table.add_row(words, *(text for times in timed for text in (f"{times[name]:.1f}", "")))
    table.caption, table.caption_justify = (
        "; ".join(dict.fromkeys(clocks_in_words(times["clocks"]) for times in timed)),
        "left",
    )
    return table


def clocks_in_words(clocks: Mapping[str, Any]) -> str:
    """What ``GpuClocks.report`` gives, as one line."""
    if "not_available" in clocks:
        return f"clocks unknown: {clocks['not_available']}"
    sm, held_back = clocks["sm_mhz"], clocks["held_back"]
    reasons = ", ".join(f"{words} in {100 * share:.0f} %" for words, share in held_back.items())
    return (
        f"SM clock {sm['least']} to {sm['most']} of {clocks['highest_sm_mhz']} MHz,"
        f" {clocks['celsius']} °C, {clocks['watts']:.0f} W, "
        + (f"held back by {reasons} of the samples" if reasons else "not held back")
    )
