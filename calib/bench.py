"""Timing without flattery: every call counts, peers take turns with us in the same run, medians and ratios are reported."""

import os
import platform
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.bench_peers import Call, peers
from engines.backends.openvino import OpenVinoEngine, best_precision
from engines.build import WANTED_CLASS, build_graph
from engines.choose import Choice, choose_head, open_localizer
from engines.classifiers import load_classifier
from engines.localizer import ImageBgr
from engines.preprocess import IMAGE
from realtime.frames import FrameRecord
from realtime.latency import Run, percentiles
from realtime.pipeline import every_frame, run_frames
from realtime.sinks import JsonlSink, Sink
from realtime.sources import open_source

WARM_UP_CALLS = 5
REST_S = 0.1


def bench_engine(choice: Choice, seconds: float, console: Console) -> dict[str, Any]:
    """Time one image through the whole graph beside its peers, in turns.

    Args:
        choice: model, weights, size and head; both precisions that the processor has are timed.
        seconds: about how long, warm-up (5 calls of each) not included.
        console: for progress.

    Returns:
        ``engine`` (name), ``calls``, and ``peers``: name, p50_ms, p90_ms and ratio (its median over ours) of each, ours first.
    """
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    head = choose_head(choice, classifier)
    image = np.random.default_rng(0).integers(0, 256, (1, classifier.size_px, classifier.size_px, 3)).astype(np.uint8)
    feed = {IMAGE: image, WANTED_CLASS: np.array([-1])}
    calls: dict[str, Call] = {}
    for precision in dict.fromkeys([best_precision(), "fp32"]):
        engine = OpenVinoEngine(build_graph(classifier, head=head), precision)
        calls[f"Sightline {precision}"] = lambda engine=engine: engine.infer(feed)  # type: ignore[misc]
    calls |= peers(classifier, image)
    times_ms = take_turns(calls, seconds, console, f"{choice.model} at {classifier.size_px} px")
    ours = float(np.median(next(iter(times_ms.values()))))
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "p50_ms": round(float(np.median(values)), 3),
            "p90_ms": percentiles(values)["p90"],
            "ratio": round(float(np.median(values)) / ours, 3),
        }
        for name, values in times_ms.items()
    ]
    return {"engine": f"{choice.model} at {classifier.size_px} px", "calls": len(times_ms[rows[0]["name"]]), "peers": rows}


def take_turns(calls: dict[str, Call], seconds: float, console: Console, title: str) -> "dict[str, array[float]]":
    """Milliseconds of every call, A B C A B C ..., so that a change of the machine's pace meets all alike.

    Between calls the machine rests: the thread pools of PyTorch and ONNX Runtime spin for a while after their work, and
    would otherwise take processor time from whichever peer comes next.
    """
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    start = time.perf_counter()
    for call in calls.values():
        call()
    rounds = max(7, int(seconds / (time.perf_counter() - start + REST_S * len(calls))))
    times_ms = {name: array("d") for name in calls}
    for _ in track(range(rounds), title, console=console):
        for name, call in calls.items():
            time.sleep(REST_S)
            before = time.perf_counter()
            call()
            times_ms[name].append((time.perf_counter() - before) * 1e3)
    return times_ms


def bench_end_to_end(choice: Choice, source: str) -> dict[str, Any]:
    """A whole run from a source to drawn frames and a JSONL log (no encoding), in the terms of ``Run.summary``."""
    localizer, run = open_localizer(choice), Run()
    with tempfile.TemporaryDirectory() as folder, JsonlSink(Path(folder) / "log.jsonl") as log, open_source(source) as frames:
        sinks: list[Sink] = [log, DrawnOnly()]
        for _ in run_frames(every_frame(frames), localizer, sinks, run):
            pass
    summary = run.summary()
    stages = {stage: values["p50"] for stage, values in summary["stages_ms"].items()}
    sides = {
        "source": stages.get("read", 0.0),
        "engine": stages.get("prepare", 0.0) + stages.get("engine", 0.0),
        "sink": stages.get("draw", 0.0) + stages.get("write", 0.0),
    }
    verdict = max(sides, key=lambda side: sides[side])
    engine = localizer.engine
    facts = f"{choice.model} at {localizer.size_px} px, {engine.backend} {engine.precision}"
    return {**summary, "source": source, "verdict": f"{verdict}-limited", "engine": facts, "machine": machine()}


class DrawnOnly:
    """Has every frame drawn, and keeps none."""

    needs_picture = True

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """Nothing to keep."""

    def __enter__(self) -> "DrawnOnly":
        return self

    def __exit__(self, *_: object) -> None: ...


def machine() -> str:
    """Processor, cores and system in words."""
    name = str(openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    versions = f"Python {platform.python_version()}, OpenVINO {openvino.__version__.split('-')[0]}"
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, {versions}"


def peers_table(result: dict[str, Any]) -> Table:
    """The engine's bench as a table for the terminal."""
    table = Table(title=f"{result['engine']}, one image, {result['calls']} calls each, in turns", title_justify="left")
    for column in ("", "p50 ms", "p90 ms", "times ours"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result["peers"]:
        table.add_row(row["name"], f"{row['p50_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['ratio']:.2f} x")
    return table
