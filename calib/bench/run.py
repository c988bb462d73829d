"""The ``bench`` command: which source, networks and peers are timed, and the result as JSON."""

import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from rich.console import Console

from calib.bench.compare import print_comparison
from calib.bench.detector import Detector, detector_calls
from calib.bench.gpu import bench_gpu
from calib.bench.history import check_history, go_on
from calib.bench.machine import Peaks, Work, count_work, machine, measure_peaks, roofline_point
from calib.bench.profile import bench_profile, plot_profile, print_profile
from calib.bench.report import check_plots, plot_bench, print_bench
from calib.bench.screen import bench_screen, print_screen
from calib.bench.turns import (
    PEERS,
    THREADS,
    USUAL_PEERS,
    WARM_UP_CALLS,
    Call,
    Task,
    bench_end_to_end,
    engine_call,
    peers,
    row_of,
    take_turns,
)
from calib.precision.calibrate import rough_quantization
from engines.backends.openvino import OpenVinoEngine, best_precision, has_vnni
from engines.backends.registry import gpu_backends
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.choose import choose_head, choose_quantization, chosen_spec
from engines.engine import Engine
from engines.errors import EngineError, SightlineError
from engines.head import Heuristic
from engines.int8 import Quantization
from engines.maps import PIXELS, MapSpec, method_of
from engines.networks.registry import DEFAULT_MODEL, NETWORKS, Classifier
from engines.options import ADVANCED, LOOK_AT, NETWORK, OUTPUT, SPEED, EngineOptions, Option
from realtime.statistics import Run, percentiles


@dataclass(frozen=True)
class Variant:
    """One of our own rows: a graph, and the engine that runs it."""

    graph: onnx.ModelProto
    engine: Engine


def bench(
    source: str,
    choices: Sequence[EngineOptions],
    seconds: float,
    console: Console,
    sizes_px: Sequence[int] = (),
    batches: Sequence[int] = (),
    detector: Detector | None = None,
    all_rows: bool = False,
) -> tuple[dict[str, Any], Run]:
    """Time everything.

    The first choice runs end to end. Each choice runs beside its peers. Then come the sweeps of the
    first choice, and the roofline.

    Where the backend is one for GPUs, each choice is timed in trtexec's words and beside
    peers on that GPU, and there is no roofline, which is the processor's.

    Args:
        source: any source; one that ends is run again until the figures have settled.
        choices: networks, at least one.
        seconds: time limit of all that is timed on the processor (end to end, each network, the
            sweep), building included; on a GPU, of each part.
        console: for progress.
        sizes_px: input sides to time the first network at.
        batches: batch sizes, likewise.
        detector: a peer of every network that runs on the processor.
        all_rows: time every depth and every peer, and not the usual ones alone.

    Returns:
        (the result, as ``--json`` prints it; the frames of the run end to end, for plots).
    """
    if choices[0].backend in gpu_backends():
        engines = [bench_gpu(choice, batches, seconds, console) for choice in choices]
        whole, run = bench_end_to_end(choices[0], source, seconds, console)
        return {
            **whole,
            "peers": engines[0]["peers"],
            "not_available": engines[0]["not_available"],
            "engines": engines,
        }, run
    left, end_s = 1 + len(choices) + bool(sizes_px or batches), time.perf_counter() + seconds

    def next_s() -> float:
        """The next part's time limit: an equal share of what is left."""
        nonlocal left
        left -= 1
        return max(0.0, end_s - time.perf_counter()) / (left + 1)

    whole, run = bench_end_to_end(choices[0], source, min(next_s(), seconds / 3), console)
    with console.status("measuring this machine's peaks ..."):
        peaks = measure_peaks()
    engines = []
    points = []
    for choice in choices:
        engine, works = bench_engine(choice, next_s(), console, detector, all_rows)
        engines.append(engine)
        points += [_point(engine, name, *work, peaks) for name, work in works.items()]
    result = {
        **whole,
        "peers": engines[0]["peers"],
        "not_available": engines[0]["not_available"],
        "engines": engines,
    }
    if sizes_px or batches:
        result["sweep"] = sweep(choices[0], sizes_px, batches, next_s(), console)
    result["roofline"] = {**peaks.report(), "points": points}
    return result, run


def _point(
    engine: dict[str, Any], name: str, precision: str, work: Work, peaks: Peaks
) -> dict[str, Any]:
    achieved_ms = next(row["p50_ms"] for row in engine["peers"] if row["name"] == name)
    return {
        "network": engine["engine"],
        "name": name,
        **roofline_point(work, precision, peaks, achieved_ms),
    }


def choices(models: str, choice: EngineOptions) -> list[EngineOptions]:
    """The networks that ``--models lite0,vgg16`` names.

    A network without weights takes the shipped ones, or random ones: the speed is the same.

    Given weights are those of the one network named, or of all whose weights are not shipped.
    """
    names = [name.strip() for name in models.split(",")]

    def weights(name: str) -> str | None:
        shipped = name in NETWORKS and NETWORKS[name].shipped is not None
        given = choice.weights if len(names) == 1 or not shipped else None
        return given or (None if shipped else "random")

    return [replace(choice, model=name, weights=weights(name)) for name in names]


def whole_numbers(text: str, option: str) -> list[int]:
    """Read ``96,128`` as numbers. An empty text holds none.

    Raises:
        SightlineError: it is anything else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise SightlineError(
            f"{option} {text}: write whole numbers with commas between them, like 96,128",
            option=option,
        )
    return [int(part) for part in parts]


def variants(
    classifier: Classifier, choice: EngineOptions, all_rows: bool = True
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Our rows by name. The first is what a user gets, and peers are compared with it.

    Peers differentiate down to the pixels. So do some rows, whatever the head reads; their names
    say how deep each goes. Without ``all_rows`` there is one of those, in fp32.

    Returns:
        (name to variant, name to why OpenVINO refuses it).

    Raises:
        EngineError: OpenVINO refuses the first.
    """
    head, objective = (
        choose_head(choice, classifier),
        method_of(choice.method, classifier.network.classless).objective,
    )
    best, spec = best_precision(), head.spec if head else MapSpec(objective)
    deep = head if spec.layer == PIXELS else Heuristic(MapSpec(objective))
    calibrated = choose_quantization(replace(choice, precision="auto"), classifier, spec)
    ranges = calibrated or rough_quantization(classifier, spec.objective)
    shallow, pixels = (partial(build_graph, classifier, head=each) for each in (head, deep))
    usual = [
        (f"Sightline int8, to {spec.layer}", (partial(shallow, quantization=ranges), "int8")),
        (f"Sightline {best}, to {spec.layer}", (shallow, best)),
    ]
    rows = {
        **dict(usual if calibrated and has_vnni() else usual[::-1]),
        "Sightline fp32, to pixels": (pixels, "fp32"),
    }
    if all_rows:
        last = MapSpec(layer=classifier.last_layer(), signal="gradcam")
        rows |= {
            "Sightline int8, to pixels": (partial(pixels, quantization=ranges), "int8"),
            f"Sightline {best}, to pixels": (pixels, best),
            f"Sightline {best}, Grad-CAM at {last.layer}": (
                partial(build_graph, classifier, last),
                best,
            ),
        }
    found: dict[str, Variant] = {}
    refused: dict[str, str] = {}
    for name, (build, precision) in rows.items():
        graph = build()
        try:
            found[name] = Variant(graph, OpenVinoEngine(graph, precision, THREADS))
        except EngineError as error:
            if not found:
                raise
            refused[name] = str(error)
    return found, refused


def quantization_for_timing(
    choice: EngineOptions, classifier: Classifier, spec: MapSpec
) -> Quantization:
    """The network's calibration, or a rough one that serves for timing only."""
    found = choose_quantization(replace(choice, precision="auto"), classifier, spec)
    return found or rough_quantization(classifier, spec.objective)


BUILDING = 0.5
"""Share of a network's time from which on no other peer is built, so that the others are timed."""


def bench_engine(
    choice: EngineOptions,
    seconds: float,
    console: Console,
    detector: Detector | None = None,
    all_rows: bool = False,
) -> tuple[dict[str, Any], dict[str, tuple[str, Work]]]:
    """Time one image through the whole graph beside its peers.

    They take turns, on one thread each, until all have settled or the time is over.

    Args:
        choice: model, weights, method, size and head; every precision that the processor has is
            timed.
        seconds: time limit, building included.
        console: for progress.
        detector: timed on a photo, beside ours from the same photo to the box.
        all_rows: see ``bench``.

    Returns:
        (``engine`` (name), ``calls``, ``warm_up_calls``, ``stability``, ``peers`` (see ``row_of``,
        ours first) and ``not_available`` (name and why); precision and work of each of our rows by
        name).
    """
    classifier = choice.classifier()
    title, begin_s = f"{choice.model} at {classifier.size_px} px", time.perf_counter()
    image = (
        np.random.default_rng(0)
        .integers(0, 256, (1, classifier.size_px, classifier.size_px, 3))
        .astype(np.uint8)
    )
    with console.status(f"{title}: building and compiling, peers too ..."):
        ours, refused = variants(classifier, choice, all_rows)
        names = tuple(PEERS) if all_rows else USUAL_PEERS
        task = Task(classifier, image, next(iter(ours.values())).graph)
        others, missing = peers(task, names, begin_s + BUILDING * seconds)
    feed = {IMAGE: image, WANTED_CLASS: np.array([-1])}
    calls = {name: engine_call(variant.engine, feed) for name, variant in ours.items()} | others
    if detector is not None:
        calls |= detector_calls(detector, replace(choice, threads=THREADS))
    left_s = max(0.0, begin_s + seconds - time.perf_counter())
    samples_ms, stability = take_turns(calls, left_s, console, title)
    first = next(iter(samples_ms.values()))
    rows = [row_of(name, values, first) for name, values in samples_ms.items()]
    works = {
        name: (variant.engine.precision, count_work(variant.graph))
        for name, variant in ours.items()
    }
    return {
        "engine": title,
        "threads": THREADS,
        "calls": len(first),
        "warm_up_calls": WARM_UP_CALLS,
        "stability": stability,
        "peers": rows,
        "not_available": [{"name": name, "why": why} for name, why in (refused | missing).items()],
    }, works


def sweep(
    choice: EngineOptions,
    sizes_px: Sequence[int],
    batches: Sequence[int],
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    """Time one image at each input size, and at the usual size in each batch, all in turns.

    The map where the network's usual head reads it, no head: one network at every size. Engine
    only, in 8 bits.

    Returns:
        ``network``, ``size_px``, ``precision``, ``stability`` and ``points``: ``size_px``,
        ``batch``, ``ms_per_image``, ``p90_ms_per_image``.

    Raises:
        ModelError: the network does not take one of the sizes.
    """
    usual = choice.classifier()
    usual_px, spec = usual.size_px, chosen_spec(choice, choose_head(choice, usual), usual)
    cells = dict.fromkeys(
        [*((size_px, 1) for size_px in sizes_px), *((usual_px, batch) for batch in batches)]
    )
    calls: dict[str, Call] = {}
    with console.status("building every size and batch ..."):
        for size_px, batch in cells:
            classifier = replace(choice, size_px=size_px).classifier()
            ranges = quantization_for_timing(choice, classifier, spec)
            engine = OpenVinoEngine(
                build_graph(classifier, spec, batch=batch, quantization=ranges), threads=THREADS
            )
            images = (
                np.random.default_rng(0)
                .integers(0, 256, (batch, size_px, size_px, 3))
                .astype(np.uint8)
            )
            calls[f"{size_px} {batch}"] = engine_call(
                engine, {IMAGE: images, WANTED_CLASS: np.full(batch, -1)}
            )
    samples_ms, stability = take_turns(calls, seconds, console, "sizes and batches")
    points = []
    for (size_px, batch), values in zip(cells, samples_ms.values(), strict=True):
        found = percentiles(array("d", [value / batch for value in values]))
        points.append(
            {
                "size_px": size_px,
                "batch": batch,
                "ms_per_image": found["p50"],
                "p90_ms_per_image": found["p90"],
            }
        )
    facts = {
        "network": choice.model,
        "size_px": usual_px,
        "layer": spec.layer,
        "precision": "int8",
        "calls": len(values),
    }
    return {**facts, "stability": stability, "points": points}


@dataclass(frozen=True)
class BenchOptions:
    """What ``calib.bench.run.bench`` times, or which results ``bench compare`` compares."""

    what: Annotated[
        list[str] | None,
        Option(
            "What to run end to end, demo:300 unless told (a file called compare: ./compare)."
            " Or two results of --json.",
            None,
            metavar="[SOURCE] | compare A.json B.json",
        ),
    ] = None
    models: Annotated[
        str,
        Option("Networks to time; the first one end to end too.", NETWORK, ("models", "model")),
    ] = DEFAULT_MODEL
    seconds: Annotated[
        float,
        Option(
            "Time limit of everything, where it has not settled before; on a GPU, of each part.",
            LOOK_AT,
            min=0.1,
        ),
    ] = 75.0
    all_rows: Annotated[
        bool,
        Option(
            "Time every depth and every peer: torch.compile, Captum, Grad-CAM and others. That"
            " takes minutes: raise --seconds.",
            LOOK_AT,
            ("all",),
        ),
    ] = False
    sizes: Annotated[
        str, Option("Also time the first network at these input sides: 96,128,224.", NETWORK)
    ] = ""
    batches: Annotated[str, Option("Also time it with so many images in a call: 1,2,4.", SPEED)] = (
        ""
    )
    detector: Annotated[
        Path | None,
        Option(
            "A small detector as a peer: FILE.onnx of a YOLOX with COCO's 80 classes, which you"
            " have.",
            LOOK_AT,
        ),
    ] = None
    profile: Annotated[
        bool,
        Option(
            "Where one image's time goes: each operator and the costliest nodes of the first"
            " network, forward and backward.",
            LOOK_AT,
        ),
    ] = False
    plots: Annotated[Path | None, Option("Folder for pictures of everything.", OUTPUT)] = None
    history: Annotated[
        Path | None,
        Option("JSONL of this machine's benches to go on with; a picture is drawn beside.", OUTPUT),
    ] = None
    screen: Annotated[
        bool,
        Option(
            "Glass to glass: show codes on this screen, watch them through a camera (0 unless"
            " told; to try it: loop:100).",
            LOOK_AT,
        ),
    ] = False
    across_machines: Annotated[bool, Option("Compare what was not measured alike.", ADVANCED)] = (
        False
    )


def bench_chosen(
    options: BenchOptions, choice: EngineOptions, console: Console, as_json: bool
) -> bool:
    """Time, or compare two results. Print the outcome, draw it, and write it as JSON.

    Returns:
        Whether, of two results, something of ours is slower in the second.

    Raises:
        SightlineError: what is asked for cannot be run or compared.
    """
    source, *others = options.what or ["0" if options.screen else "demo:300"]
    if source == "compare":
        return print_comparison(others, options.across_machines, console, as_json)
    if others:
        raise SightlineError(
            f"bench runs one source, not also {others[0]}; to compare two results: bench compare"
            " A.json B.json"
        )
    chosen = choices(options.models, choice)
    if options.plots:
        check_plots(options.plots, (source, *choice.inputs))
    if options.history:
        if options.profile or options.screen or choice.backend in gpu_backends():
            raise SightlineError(
                "a history is kept of benches on the processor only",
                option=("history", "profile", "screen", "backend"),
            )
        check_history(options.history, machine())
    if options.detector and (options.profile or options.screen or choice.backend in gpu_backends()):
        raise SightlineError(
            "a detector is timed beside networks on the processor only",
            option=("detector", "profile", "screen", "backend"),
        )
    if options.profile:
        result = bench_profile(chosen[0], options.seconds, console)
        print_profile(result, console)
        if options.plots:
            plot_profile(result, options.plots / "profile.png")
            console.print(f"wrote {options.plots / 'profile.png'}")
    elif options.screen:
        result = bench_screen(source, chosen[0], options.seconds, console)
        print_screen(result, console)
    else:
        lists = whole_numbers(options.sizes, "sizes"), whole_numbers(options.batches, "batches")
        detector = Detector(options.detector, threads=THREADS) if options.detector else None
        result, run = bench(
            source, chosen, options.seconds, console, *lists, detector, options.all_rows
        )
        print_bench(result, console)
        for picture in plot_bench(result, run, options.plots) if options.plots else ():
            console.print(f"wrote {picture}")
        for path in go_on(options.history, result) if options.history else ():
            console.print(f"wrote {path}")
    if as_json:
        print(json.dumps(result))
    return False
