"""Runs a source in one go to an annotated video, a log, a latency plot and a summary. It cannot be
resumed.
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.files import write_json
from engines.localizer import Localizer
from engines.options import EngineOptions
from engines.text import shown
from realtime.batch.job import Naming, with_ending
from realtime.capture import every_frame
from realtime.documents import course_of, plot_latency
from realtime.file_sinks import JsonlSink, VideoSink
from realtime.latency_budget import open_within
from realtime.pipeline import run_frames
from realtime.sinks import Sink
from realtime.sources.spec import kind_of, open_source
from realtime.sources.video import Source, SourceOptions
from realtime.statistics import Run
from realtime.tracking.options import WHOLE_FRAMES, Following, FollowOptions, opened

Summary = dict[str, Any]


def demo_chosen(
    frames: int, out: Path, choice: EngineOptions, budget_ms: float | None, console: Console
) -> list[Summary]:
    """Open the engine that is chosen, and localize the demo's clip of so many frames.

    Raises:
        SightlineError: the engine cannot be opened, or see ``process_all``.
    """
    localizer = open_within(choice, budget_ms, console, streams=0)
    return process_all([f"demo:{frames}"], out, localizer, console)


def process_all(
    specs: Sequence[str],
    out: Path,
    localizer: Localizer,
    console: Console,
    video: bool = True,
    following: FollowOptions = WHOLE_FRAMES,
) -> list[Summary]:
    """Localize every frame of each source in turn; see ``process``.

    Args:
        specs: see ``realtime.sources.spec.open_source``.
        out: folder for the results.
        localizer: the engine, or the engines that a budget is held with.
        console: for progress bars and names.
        video: draw and encode, or only log.
        following: whether and what to follow.

    Returns:
        A summary of each; on Ctrl-C the last is that of the frames so far, with ``interrupted``
        true.

    Raises:
        SightlineError: a source cannot be read to its end or a result cannot be written; nothing of
            that source is left.
    """
    naming = Naming(
        out,
        partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True),
        specs,
    )
    summaries: list[Summary] = []
    for spec in specs:
        found = process(spec, naming, out, localizer, console, video, following)
        summaries.append({"source": shown(spec), **found})
        if summaries[-1]["interrupted"]:
            break
    return summaries


def process(
    spec: str,
    naming: Naming,
    out: Path,
    localizer: Localizer,
    console: Console,
    video: bool,
    following: FollowOptions = WHOLE_FRAMES,
) -> Summary:
    """Localize every frame of a source.

    Writes ``NAME.mp4`` (with ``video``), ``NAME.jsonl``, ``NAME.latency.png`` and
    ``NAME.summary.json``; the summary, with the ``files`` by kind, is also returned. What a camera
    showed does not come again: each run gets a name that is free. The demo's results are
        renewed.
    """
    endings = {"video": ".mp4"} if video else {}
    endings |= {"log": ".jsonl", "latency_plot": ".latency.png", "summary": ".summary.json"}
    kind = kind_of(spec)
    with open_source(spec, SourceOptions(poll=False)) as source:
        found = naming.job(spec, endings.values(), kind.name if kind.repeats else uuid4().hex)
        with naming.holding(found) as job:
            files = {kind: with_ending(out / job.name, ending) for kind, ending in endings.items()}
            job.claim(files.values())
            try:
                summary = _process(source, files, localizer, console, following)
            except BaseException:
                job.discard()
                raise
            job.end([Path(path) for path in summary["files"].values()], summary)
    return summary


def _process(
    source: Source,
    files: dict[str, Path],
    localizer: Localizer,
    console: Console,
    following: FollowOptions,
) -> Summary:
    localizer.begin()
    run, interrupted = Run(), False
    try:
        with ExitStack() as stack:
            sinks: list[Sink] = [stack.enter_context(JsonlSink(files["log"]))]
            if "video" in files:
                sinks.append(
                    stack.enter_context(
                        VideoSink(files["video"], source.time_base, source.rate_fps)
                    )
                )
            _run_with_progress(source, localizer, sinks, run, console, opened(following))
    except KeyboardInterrupt:
        interrupted = True
    if run.total_ms:
        title = f"{files['log'].stem}: time per frame"
        plot_latency(run.times, course_of(run), files["latency_plot"], title)
    else:
        files.pop("latency_plot")
    engine = localizer.engine
    summary: Summary = {
        **run.summary(),
        "interrupted": interrupted,
        "backend": engine.backend,
        "precision": engine.precision,
        "device": engine.device,
        "size_px": localizer.size_px,
        "files": {kind: str(path) for kind, path in files.items()},
        **localizer.summary(),
    }
    write_json(files["summary"], summary)
    return summary


def _run_with_progress(
    source: Source,
    localizer: Localizer,
    sinks: Sequence[Sink],
    run: Run,
    console: Console,
    following: Following | None,
) -> None:
    counts = (MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=console) as bar:
        task = bar.add_task(escape(source.name), total=source.frames, fps="")
        with closing(
            run_frames(every_frame(source), localizer, sinks, run, following=following)
        ) as records:
            for _ in records:
                bar.update(task, advance=1, fps=f"{run.fps:.0f} fps")
