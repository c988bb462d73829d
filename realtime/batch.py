"""Whole files: every frame of a source into an annotated video, a log, a latency plot and a summary."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.files import whole_file
from engines.localizer import Localizer
from realtime.latency import Run, plot_latency
from realtime.pipeline import every_frame, run_frames
from realtime.sinks import JsonlSink, Sink, VideoSink
from realtime.sources import Source, open_source


def process(spec: str, out: Path, localizer: Localizer, console: Console, video: bool = True) -> dict[str, Any]:
    """Localize every frame of one source.

    Writes ``<stem>.mp4`` (unless ``video`` is False), ``<stem>.jsonl``, ``<stem>.latency.png`` and ``<stem>.summary.json``.

    Args:
        spec: see ``realtime.sources.open_source``.
        out: folder for the results.
        localizer: the engine.
        console: for the progress bar.
        video: draw and encode, or only log.

    Returns:
        The summary, with ``files`` by kind. On Ctrl-C that of the frames so far, with ``interrupted`` true.

    Raises:
        SightlineError: the source cannot be read to its end or a result cannot be written; then nothing is left behind.
    """
    run, interrupted = Run(), False
    with open_source(spec) as source:
        files = {"log": out / f"{source.name}.jsonl"}
        if video:
            files = {"video": out / f"{source.name}.mp4", **files}
        try:
            with ExitStack() as stack:
                sinks: list[Sink] = [stack.enter_context(JsonlSink(files["log"]))]
                if video:
                    sinks.append(stack.enter_context(VideoSink(files["video"], source.time_base, source.rate_fps)))
                _run_with_progress(source, localizer, sinks, run, console)
        except KeyboardInterrupt:
            interrupted = True
        name = source.name
    summary: dict[str, Any] = {"source": spec, **run.summary(), "interrupted": interrupted, **_engine_facts(localizer)}
    if run.total_ms:
        files["latency_plot"] = out / f"{name}.latency.png"
        plot_latency(run, files["latency_plot"], f"{name}: time per frame")
    files["summary"] = out / f"{name}.summary.json"
    summary["files"] = {kind: str(path) for kind, path in files.items()}
    with whole_file(files["summary"]) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _run_with_progress(source: Source, localizer: Localizer, sinks: Sequence[Sink], run: Run, console: Console) -> None:
    counts = (MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=console) as bar:
        task = bar.add_task(source.name, total=source.frames, fps="")
        for _ in run_frames(every_frame(source), localizer, sinks, run):
            bar.update(task, advance=1, fps=f"{run.fps:.0f} fps")


def _engine_facts(localizer: Localizer) -> dict[str, Any]:
    engine = localizer.engine
    return {
        "backend": engine.backend,
        "precision": engine.precision,
        "device": engine.device,
        "size_px": localizer.size_px,
    }
