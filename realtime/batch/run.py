"""Runs a batch on this machine: source after source, segment after segment. Finished segments are
not done again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from engines.errors import OutputError, SourceError
from engines.files import write_json
from engines.localizer import Localizer
from engines.text import shown
from realtime import direct
from realtime.batch.encode import run_segments
from realtime.batch.job import Job, as_sightline_error, ends_run, failed
from realtime.batch.merge import UnsafeCutError, endings, merge_job
from realtime.batch.names import Naming, overview_path, place_of, without_results
from realtime.batch.options import Settings, settings_digest
from realtime.batch.plan import digest_of, make_plan
from realtime.sources.spec import can_be_cut, is_there, name_of, open_source

Summary = dict[str, Any]


@dataclass
class _Bars:
    """Progress of the file and of all files, in frames."""

    progress: Progress
    overall: TaskID
    file: TaskID

    def look(self, name: str) -> None:
        """Its content is read, to know it again, and its packets, to cut it."""
        self.progress.reset(
            self.file,
            description=f"{escape(name)}: looking through it",
            total=None,
            fps="",
            visible=True,
        )

    def begin(self, name: str, total: int, done: int) -> None:
        self.progress.reset(
            self.file, description=escape(name), total=total, completed=done, fps="", visible=True
        )

    def advance(self, fps: float) -> None:
        self.progress.update(self.file, advance=1, fps=f"{fps:.0f} fps")


def process_all(
    specs: Sequence[str],
    out: Path,
    localizer: Localizer,
    console: Console,
    settings: Settings = Settings(),
    inputs: Sequence[str | Path] = (),
) -> list[Summary]:
    """Localize every frame of each source in turn.

    Of each, ``out`` gets ``NAME.mp4``, ``NAME.heat.mp4``, ``NAME.jsonl``, ``NAME.parquet``,
    ``NAME.latency.png``, ``NAME.report.html`` and ``NAME.summary.json``, as far as the settings
    want them, and ``summary.json`` of all. A run that was killed goes on where it was when it is
    begun again; sources whose results are there, of the same content and settings, are not worked
    on again. Cameras, streams and ``demo:`` cannot be read twice and go straight through
    (``realtime.direct``).

    Args:
        specs: see ``realtime.sources.spec.open_source``. ``Naming`` says what results are called
            where a name is taken. Results of earlier runs among several sources are left out.
        out: folder for the results.
        localizer: the engine, or the engines that a budget is held with.
        console: for progress bars.
        settings: what is wanted.
        inputs: other files that the run reads.

    Returns:
        A summary of each. Of one that could not be read, ``error`` says why; on Ctrl-C the last has
        ``interrupted`` true.

    Raises:
        SightlineError: a source is not there, or not one of them could be worked on.
        OutputError: the place of the results is full; what is there stays, and the run can be
            continued.
    """
    for spec in specs:
        if can_be_cut(spec) and not is_there(spec):
            open_source(spec).close()  # the error says what is missing
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    notify = partial(say, style="yellow")
    specs = without_results(specs, notify)
    naming = Naming(out, notify, [*specs, *inputs])
    overview = overview_path(out, notify)
    summaries: list[Summary] = []
    errors: list[Exception] = []
    with _progress(console) as progress:
        overall = progress.add_task("all", total=len(specs), fps="", visible=len(specs) > 1)
        bars = _Bars(progress, overall, progress.add_task("", total=None, fps="", visible=False))
        for spec in specs:
            try:
                summary = _process(spec, naming, out, localizer, console, settings, bars)
            except Exception as error:  # whatever it is, the other sources go on
                if ends_run(error):
                    raise
                errors.append(error)
                summary = _said_failed(spec, error, say) if len(specs) > 1 else failed(error)
            summaries.append({"source": shown(spec), **summary})
            progress.advance(overall)
            if summary["interrupted"]:
                break
    if len(errors) == len(specs) > 0:
        raise as_sightline_error(errors[0])
    write_json(overview, summaries)
    return summaries


def _said_failed(spec: str, error: Exception, say: Callable[..., None]) -> Summary:
    summary = failed(error)
    say(shown(f"{spec}: {summary['error']}"), style="red")
    return summary


def _progress(console: Console) -> Progress:
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console)


def _process(
    spec: str,
    naming: Naming,
    out: Path,
    localizer: Localizer,
    console: Console,
    settings: Settings,
    bars: _Bars,
) -> Summary:
    if not can_be_cut(spec):
        bars.progress.stop()  # it has its own
        summary = direct.process(
            spec, naming, out, localizer, console, settings.video, settings.following
        )
        bars.progress.start()
        return summary
    bars.look(name_of(spec))
    digests = digest_of(spec), settings_digest(settings, localizer)
    found = naming.job(spec, endings(settings).values(), *digests, place_of(spec))
    if found.summary is not None:
        return {**found.summary, "skipped": True}
    localizer.begin()
    try:
        with naming.holding(found) as job:
            try:
                return _finish(job, spec, out, localizer, settings, bars)
            except UnsafeCutError:  # rare: what looks like a key frame is none
                job.begin(make_plan(spec, job.source_digest, settings.window, whole=True))
                return _finish(job, spec, out, localizer, settings, bars)
            except SourceError:
                job.discard()
                raise
    except OutputError as error:
        raise OutputError(
            f"{error}; what is done stays there: mend that and run the same command to go on"
        ) from error
    except KeyboardInterrupt:
        return {"frames": 0, "failed": 0, "interrupted": True}


def _finish(
    job: Job,
    spec: str,
    out: Path,
    localizer: Localizer,
    settings: Settings,
    bars: _Bars,
) -> Summary:
    """Do the segments that are not done, and merge."""
    if job.clip is None:
        job.begin(make_plan(spec, job.source_digest, settings.window, settings.whole))
    clip, todo = job.clip, job.todo()
    assert clip is not None  # it was just made
    resumed = len(clip.segments) - len(todo)
    left = sum(segment.frames for segment in todo)
    bars.begin(job.name, clip.selected_frames, clip.selected_frames - left)
    start_s = time.monotonic()
    with closing(run_segments(clip, todo, localizer, settings, job.folder)) as records:
        for count, _ in enumerate(records, start=1):
            bars.advance(count / max(1e-3, time.monotonic() - start_s))
    engine = localizer.engine
    facts = {
        "backend": engine.backend,
        "precision": engine.precision,
        "device": engine.device,
        "size_px": localizer.size_px,
    }
    facts["segments_resumed"] = resumed
    facts |= localizer.summary()
    summary, files = merge_job(job, clip, settings, out, facts)
    job.end(files, summary)
    return summary
