"""The timed loops of the bench: frames a second from source to drawn frame, and engine calls that
alternate with the peers'.

Peers are other libraries that run the same network on the same image, timed in the same run. On the
processor each has one thread, and its processor time counts: other programs hardly change it.
"""

import os
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from rich.console import Console

from calib.bench.compare import (
    LEAST_BLOCKS,
    WINDOW_FRAMES,
    WINDOW_ROUNDS,
    WINDOWS,
    Rule,
    interval,
    mean,
    until_settled,
    window_values,
)
from calib.bench.machine import Neighbours, ThreadTimes, machine
from engines.backends.openvino import OpenVinoEngine, best_precision
from engines.build import IMAGE, WANTED_CLASS, append_preprocessing
from engines.choose import open_localizer
from engines.engine import Array, Engine
from engines.errors import install_extra, install_packages, sightline_command
from engines.graph import Graph, needed
from engines.localizer import ImageBgr, Localizer
from engines.networks.registry import Classifier
from engines.options import EngineOptions
from realtime.frames import FrameRecord
from realtime.sinks import Sink
from realtime.statistics import Run, percentiles

if TYPE_CHECKING:
    from calib.bench.torch_peers import TorchPeers


Call = Callable[[], object]
RECIPRO_CAM = "Recipro-CAM after its paper, at the last maps, OpenVINO"


@dataclass(frozen=True)
class Task:
    """The work of one image.

    Attributes:
        classifier: the network.
        image_nhwc_bgr: uint8 ``[1, S, S, 3]``.
        graph: our whole graph.
    """

    classifier: Classifier
    image_nhwc_bgr: Array
    graph: onnx.ModelProto

    @cached_property
    def torch(self) -> "TorchPeers":
        """The peers of PyTorch. They share a network."""
        from calib.bench.torch_peers import TorchPeers  # only where PyTorch is installed

        return TorchPeers(self.classifier, self.image_nhwc_bgr)


def onnxruntime_whole(task: Task) -> Call:
    """Our own graph in ONNX Runtime. It gives the graph's outputs in their order."""
    feed = {IMAGE: task.image_nhwc_bgr, WANTED_CLASS: np.array([-1])}
    session = _session(task.graph)
    return lambda: session.run(None, feed)


def onnxruntime_forward(task: Task) -> Call:
    """The class scores alone in ONNX Runtime."""
    feed, session = {IMAGE: task.image_nhwc_bgr}, _session(forward_graph(task.classifier))
    return lambda: session.run(None, feed)


def forward_graph(classifier: Classifier) -> onnx.ModelProto:
    """The network without a backward pass: uint8 image to class scores."""
    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.shape, classifier.preprocessing)
    scores = classifier.append(graph, x).scores
    graph.output(scores, graph.fresh("scores"))  # a network from a file may have taken the name
    return graph.model()


def recipro_cam(task: Task) -> Call:
    """Recipro-CAM at the last maps, on OpenVINO, as its paper has it.

    Byun & Lee 2022, "Recipro-CAM: fast gradient-free visual explanations for convolutional neural
    networks": what follows the last maps sees them once for each cell, with all others at zero, and
    the class's scores are the map. Written here after the paper: Intel's own, openvino_xai 1.1,
    reads ``openvino.runtime``, which OpenVINO 2026.4 lacks.
    """
    engine = OpenVinoEngine(recipro_cam_graph(task.classifier), best_precision(), threads=1)
    return engine_call(engine, {IMAGE: task.image_nhwc_bgr})


def recipro_cam_graph(classifier: Classifier) -> onnx.ModelProto:
    """The network, and ``map`` ``[h, w]``: the best class's score of each cell alone.

    Raises:
        ModelError: what follows the last maps does not take several at once, or reads more.
    """
    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.shape, classifier.preprocessing)
    forward = classifier.append(graph, x)
    height, width = graph.shape(forward.last)[2:]
    cells = height * width
    one_each = np.eye(cells, dtype=np.float32).reshape(cells, 1, height, width)
    alone = graph.add("Mul", forward.last, graph.constant(one_each), hint="cells_alone")
    names = {forward.last: alone}
    for node in needed(list(graph.nodes), [forward.scores]):
        if names.keys().isdisjoint(node.input):
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = graph.fresh(f"{node.output[0]}_of_cells")
        del copy.input[:], copy.output[:]
        copy.input.extend(names.get(name, name) for name in node.input)
        copy.output.append(copy.name)
        if node.op_type == "Reshape":
            shape = [cells, *graph.shape(node.output[0])[1:]]
            copy.input[1] = graph.constant(shape, np.int64)
        graph.append(copy)
        names[node.output[0]] = copy.name
    best = graph.add("ArgMax", forward.scores, axis=1, keepdims=0)
    column = graph.add("Gather", names[forward.scores], best, axis=1, hint="scores_of_cells")
    size = graph.constant([height, width], np.int64)
    graph.output(graph.add("Reshape", column, size, hint="cells_map"), "map")
    return graph.model()


PEERS: dict[str, Callable[[Task], Call]] = {
    "torch eager forward + autograd": lambda task: task.torch.autograd(),
    "torch.compile forward + autograd": lambda task: task.torch.compiled(),
    "Captum Saliency": lambda task: task.torch.captum_saliency(),
    "pytorch-grad-cam GradCAM": lambda task: task.torch.grad_cam(),
    RECIPRO_CAM: recipro_cam,
    "ONNX Runtime, our graph": onnxruntime_whole,
    "torch eager forward only": lambda task: task.torch.forward(),
    "ONNX Runtime forward only": onnxruntime_forward,
}
"""Name to what makes the call; everything in fp32 but Recipro-CAM, which has our precision."""
USUAL_PEERS = (
    "ONNX Runtime forward only",
    "torch eager forward only",
    "torch eager forward + autograd",
)
"""The others take long to build, or do the same by another name."""
MORE_TIME = sightline_command("bench", seconds="300")


def peers(
    task: Task, names: Iterable[str], end_s: float = float("inf")
) -> tuple[dict[str, Call], dict[str, str]]:
    """Make the peers of these names, and call each once, because some compile only then. At
    ``end_s`` (of ``time.perf_counter``) no other one is begun.

    Returns:
        (name to a call that does one image's work, name to why there is none).
    """
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in names:
        if time.perf_counter() > end_s:
            missing[name] = f"there was no time left to build it: {MORE_TIME}"
            continue
        make = PEERS[name]
        try:
            call = make(task)
            call()
        except ImportError as error:
            module = (error.name or "").partition(".")[0]
            missing[name] = f"{module or error} is not installed: {_install(module)}"
        except (
            Exception
        ) as error:  # whatever stops a peer, the others are still measured, and its row says why
            missing[name] = _first_line(error)
        else:
            found[name] = call
    return found, missing


def _install(module: str) -> str:
    if (
        module == "pytorch_grad_cam"
    ):  # no extra brings it: it would bring torchvision, which it does not need here
        return install_packages("grad-cam", options="--no-deps")
    return install_extra("bench")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def _session(model: onnx.ModelProto) -> "onnxruntime.InferenceSession":  # type: ignore[name-defined]  # noqa: F821
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


WARM_UP_CALLS = 5
FRAMES = Rule(WINDOW_FRAMES, "frames")


def bench_end_to_end(
    choice: EngineOptions, source: str, seconds: float, console: Console
) -> tuple[dict[str, Any], Run]:
    """Time the way from a source to drawn frames and a JSONL log, without encoding.

    A source that ends is run again and again, until its frames have settled or the time is up. What
    settles is the processor time that all threads take for a frame.

    Returns:
        (``Run.summary``, and ``processor_ms_per_frame`` (``p50``, ``low``, ``high``: the median of
        windows and its interval), ``processor_share`` (of each stage), ``fps_alone`` (what the
        processors would give if nothing else ran), ``windows``, ``passes``, ``warm_up_calls``,
        ``stability``, ``source``, ``engine``, ``machine``; every frame's times).
    """
    localizer = open_localizer(choice, streams=0, batch=0)
    with (
        closing(localizer.engine),
        console.status(f"{source}: until {FRAMES}, {seconds:g} s at most ..."),
    ):
        warm_up(localizer)
        neighbours = Neighbours()
        timed = _repeated(source, localizer, seconds, time.perf_counter)
    run, busy_elsewhere = timed.run, neighbours.share()
    summary = run.summary()
    if timed.intervals_ms:
        summary["fps"] = round(1e3 * summary["frames"] / sum(timed.intervals_ms), 2)
    windows = {
        "processor_ms_per_frame": window_values(timed.counted_ms, WINDOW_FRAMES, mean),
        "ms_per_frame": window_values(timed.intervals_ms, WINDOW_FRAMES, mean),
        "latency_ms": window_values(run.total_ms, WINDOW_FRAMES),
    }
    if each_ms := windows["processor_ms_per_frame"]:
        low, high = interval(each_ms)
        middle = float(np.median(each_ms))
        figures = {"p50": middle, "low": low, "high": high}
        summary["processor_ms_per_frame"] = {n: round(v, 3) for n, v in figures.items()}
        summary["fps_alone"] = round(1e3 * (os.cpu_count() or 1) / max(middle, 1e-9), 1)
    summary["processor_share"] = timed.threads.shares()
    summary["verdict"] = verdict(summary, timed, busy_elsewhere)
    stability = FRAMES.report({PER_FRAME: timed.counted_ms}, timed.settled, seconds)
    return {
        **summary,
        "windows": {name: [round(v, 4) for v in values] for name, values in windows.items()},
        "passes": timed.passes,
        "warm_up_calls": WARM_UP_CALLS,
        "source": source,
        "stability": {**stability, "busy_elsewhere": busy_elsewhere},
        "engine": engine_facts(choice, localizer),
        "machine": machine(),
    }, run


PER_FRAME = "processor time of a frame"
CROWDED = 0.85
"""From this share on that is busy, the processors are what stages wait for."""
LIMITED = {"read": "source", "engine": "engine", "prepare": "prepare", "draw, write": "drawing"}
"""What ``Run.verdict`` calls each of ``ThreadTimes``."""


def verdict(summary: Mapping[str, Any], timed: "Timed", busy_elsewhere: float | None) -> str:
    """What limits the frames a second. Where the processors are busy all the time, each stage waits
    for a processor. So the stage that takes most of them limits. Else it is what the loop waits
    for, see ``Run.verdict``.
    """
    passed_ms = sum(timed.intervals_ms) * (os.cpu_count() or 1)
    own = sum(timed.processor_ms) / max(passed_ms, 1e-9)
    shares = summary["processor_share"]
    if not shares or own + (busy_elsewhere or 0.0) < CROWDED:
        return str(summary["verdict"])
    return f"{LIMITED[max(shares, key=lambda stage: shares[stage])]}-limited"


def warm_up(localizer: Localizer) -> None:
    """Make calls that do not count: the first ones allocate, and some engines compile."""
    blank = np.zeros((localizer.size_px, localizer.size_px, 3), np.uint8)
    for _ in range(WARM_UP_CALLS):
        localizer.localize([blank])


@dataclass
class Timed:
    """What running a source again and again gave.

    Attributes:
        run: every frame's stages.
        intervals_ms: from one finished frame to the next.
        processor_ms: that all threads took meanwhile.
        threads: which of them took it.
        passes: begun.
        settled: whether the processor time of a frame did.
    """

    run: Run
    intervals_ms: "array[float]"
    processor_ms: "array[float]"
    threads: ThreadTimes
    passes: int = 0
    settled: bool = False

    @property
    def counted_ms(self) -> "array[float]":
        """``processor_ms`` without the first window, in which memory is allocated, where there are
        more.
        """
        short = len(self.processor_ms) < WINDOWS * WINDOW_FRAMES
        return self.processor_ms[0 if short else WINDOW_FRAMES :]


def _repeated(
    source: str, localizer: Localizer, seconds: float, clock: Callable[[], float]
) -> Timed:
    """Run a source again and again until it has settled or the time is over.

    Opening the source is not counted. The first frame of a pass counts from the moment it is asked
    for.
    """
    # Only where they are used: timing a GPU needs no PyAV.
    from realtime.capture import every_frame, joined
    from realtime.file_sinks import JsonlSink
    from realtime.pipeline import run_frames
    from realtime.sources.spec import open_source

    timed = Timed(Run(), array("d"), array("d"), ThreadTimes(_stage_of))
    begin, more = clock(), True
    with tempfile.TemporaryDirectory() as folder, JsonlSink(Path(folder) / "log.jsonl") as log:
        sinks: list[Sink] = [log, DrawnOnly()]
        while more:
            before, timed.passes = len(timed.intervals_ms), timed.passes + 1
            with (
                open_source(source) as frames,
                closing(
                    run_frames(joined(every_frame(frames)), localizer, sinks, timed.run)
                ) as loop,
            ):
                last, spent_s = clock(), time.process_time()
                for _ in loop:
                    now, spent_now_s = clock(), time.process_time()
                    timed.intervals_ms.append((now - last) * 1e3)
                    timed.processor_ms.append((spent_now_s - spent_s) * 1e3)
                    last, spent_s = now, spent_now_s
                    if len(timed.intervals_ms) % WINDOW_FRAMES == 0:
                        timed.threads.look()
                        timed.settled = FRAMES.settled({PER_FRAME: timed.counted_ms})
                    if timed.settled or now - begin >= seconds:
                        more = False
                        break
                timed.threads.look()
                more = more and not frames.live and len(timed.intervals_ms) > before
    return timed


def _stage_of(name: str | None) -> str:
    """What a thread of the frame loop does; None are the libraries' own."""
    if name is None:
        return "engine"
    if name == "engine":  # it feeds the engine
        return "prepare"
    return "read" if name.startswith("read") else "draw, write"


class DrawnOnly:
    """Makes the loop draw every frame, and keeps none."""

    needs_picture = True

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """Nothing to keep."""

    def __enter__(self) -> "DrawnOnly":
        return self

    def __exit__(self, *_: object) -> None: ...


def engine_facts(choice: EngineOptions, localizer: Localizer) -> str:
    """Network, size, backend and precision in words, and what the processor lacks."""
    engine = localizer.engine
    what = f"{choice.model} at {localizer.size_px} px, {engine.backend} {engine.precision}"
    return "; ".join([what, *getattr(engine, "losses", ())])


TURNS = Rule(1, "rounds", paired=True)
THREADS = 1
"""Of every engine that takes turns on the processor. Several would wait busily for each other where
other programs have the processors, and that would count.
"""


def row_of(name: str, samples_ms: Sequence[float], first_ms: Sequence[float]) -> dict[str, Any]:
    """A row of the result.

    It holds ``name``, ``p50_ms``, ``p90_ms``, ``ratio`` (the median over the rounds of its time
    over ours), ``ratio_low`` and ``ratio_high`` (see ``interval``), ``windows_ms`` (medians) and
    every sample.
    """
    found = percentiles(array("d", samples_ms))
    ratios = np.asarray(samples_ms) / np.asarray(first_ms)
    low, high = interval(ratios.tolist())
    return {
        "name": name,
        "p50_ms": found["p50"],
        "p90_ms": found["p90"],
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
        "windows_ms": [round(value, 4) for value in window_values(samples_ms, WINDOW_ROUNDS)],
        "samples_ms": [round(value, 4) for value in samples_ms],
    }


def engine_call(engine: Engine, feed: Mapping[str, Array]) -> Call:
    """A call that runs the engine once."""
    return lambda: engine.infer(feed)


def take_turns(
    calls: Mapping[str, Call],
    seconds: float,
    console: Console,
    title: str,
    clock: Callable[[], float] = time.process_time,
    least: int = LEAST_BLOCKS,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time calls in turns, in every round each once, so that all meet the same pace of the machine.

    Every round has an order of its own, for what a call leaves behind for the next one.

    Args:
        calls: name to what does one image's work.
        seconds: time limit.
        console: for progress.
        title: of the progress.
        clock: what times a call, in seconds: the processor time of all threads, or for work that
            is done elsewhere the time that passes.
        least: rounds, whatever the time limit is: with fewer nothing is known of how sure they are.

    Returns:
        (milliseconds of every call by name, whether they settled in the terms of
        ``Rule.report``).
    """
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()

    names, order = list(calls), np.random.default_rng(0)

    def one_round() -> dict[str, float]:
        times_ms = dict.fromkeys(names, 0.0)
        for name in order.permutation(names):
            before = clock()
            calls[name]()
            times_ms[name] = (clock() - before) * 1e3
        return times_ms

    with console.status(
        f"{title}: {len(calls)} in turns, until {TURNS}, {seconds:.0f} s at most ...",
        refresh_per_second=1,
    ):
        neighbours = Neighbours()
        samples_ms, stable = until_settled(
            one_round, TURNS, seconds, time.perf_counter, least=least
        )
    report = TURNS.report(samples_ms, stable, seconds)
    return samples_ms, {**report, "busy_elsewhere": neighbours.share()}
