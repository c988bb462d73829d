"""A source straight through: every frame into an annotated video, a log, a latency plot and a summary; nothing to resume."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.files import write_json
from engines.localizer import Localizer
from engines.text import displayable
from realtime.follow.following import WHOLE_FRAMES, Following, opened
from realtime.follow.options import FollowOptions
from realtime.governed import Governed
from realtime.latency import Run, plot_latency
from realtime.pipeline import run_frames
from realtime.readers import every_frame, names_of
from realtime.sinks import JsonlSink, Sink, VideoSink
from realtime.sources import open_source
from realtime.video import Source

Summary = dict[str, Any]


def process_all(
    specs: Sequence[str], out: Path, localizer: Localizer | Governed, console: Console, video: bool = True,
    following: FollowOptions = WHOLE_FRAMES,
) -> list[Summary]:  # fmt: skip
    """Localize every frame of each source in turn; see ``process``.

    Args:
        specs: see ``realtime.sources.open_source``. Sources of one name get ``_2``, ``_3`` ... behind it.
        out: folder for the results.
        localizer: the engine, or the engines that a budget is held with.
        console: for progress bars.
        video: draw and encode, or only log.
        following: whether and what to follow.

    Returns:
        A summary of each; on Ctrl-C the last is that of the frames so far, with ``interrupted`` true.

    Raises:
        SightlineError: a source cannot be read to its end or a result cannot be written; nothing of that source is left.
    """
    summaries: list[Summary] = []
    for spec, name in zip(specs, names_of(specs), strict=True):
        with open_source(spec) as source:
            summaries.append({"source": displayable(spec), **process(source, out / name, localizer, console, video, following)})
        if summaries[-1]["interrupted"]:
            break
    return summaries


def process(
    source: Source, stem: Path, localizer: Localizer | Governed, console: Console, video: bool,
    following: FollowOptions = WHOLE_FRAMES,
) -> Summary:  # fmt: skip
    """Localize every frame of an open source.

    Writes ``<stem>.mp4`` (with ``video``), ``<stem>.jsonl``, ``<stem>.latency.png`` and ``<stem>.summary.json``; the summary,
    with the ``files`` by kind, is also returned.
    """
    if isinstance(localizer, Governed):
        localizer.begin()
    run, interrupted = Run(), False
    files = {"video": with_ending(stem, ".mp4")} if video else {}
    files["log"] = with_ending(stem, ".jsonl")
    try:
        with ExitStack() as stack:
            sinks: list[Sink] = [stack.enter_context(JsonlSink(files["log"]))]
            if video:
                sinks.append(stack.enter_context(VideoSink(files["video"], source.time_base, source.rate_fps)))
            _run_with_progress(source, localizer, sinks, run, console, opened(following))
    except KeyboardInterrupt:
        interrupted = True
    if run.total_ms:
        files["latency_plot"] = with_ending(stem, ".latency.png")
        plot_latency(run, files["latency_plot"], f"{stem.name}: time per frame")
    files["summary"] = with_ending(stem, ".summary.json")
    engine = localizer.engine
    summary: Summary = {
        **run.summary(), "interrupted": interrupted, "backend": engine.backend, "precision": engine.precision,
        "device": engine.device, "size_px": localizer.size_px, "files": {kind: str(path) for kind, path in files.items()},
        **(localizer.summary() if isinstance(localizer, Governed) else {}),
    }  # fmt: skip
    write_json(files["summary"], summary)
    return summary


def with_ending(stem: Path, ending: str) -> Path:
    """``stem`` with an ending behind it, dots in the stem left alone."""
    return stem.with_name(stem.name + ending)


def _run_with_progress(
    source: Source, localizer: Localizer | Governed, sinks: Sequence[Sink], run: Run, console: Console,
    following: Following | None,
) -> None:  # fmt: skip
    counts = (MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=console) as bar:
        task = bar.add_task(escape(source.name), total=source.frames, fps="")
        with closing(run_frames(every_frame(source), localizer, sinks, run, following=following)) as records:
            for _ in records:
                bar.update(task, advance=1, fps=f"{run.fps:.0f} fps")
