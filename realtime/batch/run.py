"""Runs a batch on this machine: source after source, segment after segment. Finished segments are
not done again. ``batch_chosen`` chooses between this machine and a cluster.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
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

from engines.errors import InputError, OutputError, SourceError
from engines.files import write_json
from engines.localizer import Localizer
from engines.options import EngineOptions
from engines.text import shown
from realtime import live
from realtime.batch.cluster.storage import expanded, is_shared
from realtime.batch.cluster.worker import ATTACHED, attached
from realtime.batch.encode import run_segments
from realtime.batch.job import (
    MOST_BEGUN,
    Job,
    Naming,
    as_sightline_error,
    ends_run,
    failed,
    overview_path,
    place_of,
    without_results,
)
from realtime.batch.merge import UnsafeCutError, endings, merge_job
from realtime.batch.options import Scale, Settings, settings_digest
from realtime.batch.plan import digest_of, make_plan
from realtime.batch.report import write_index
from realtime.latency_budget import open_within
from realtime.sources.spec import can_be_cut, first_size_px, is_there, name_of, open_source

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

    Of each, ``out`` gets ``NAME.mp4`` or ``NAME.boxes.mkv``, ``NAME.heat.mp4``, ``NAME.jsonl``,
    ``NAME.parquet``,
    ``NAME.events.jsonl``, ``NAME.latency.png``, ``NAME.report.html`` and ``NAME.summary.json``, as
    far as the settings want them, and ``summary.json`` of all; of several, ``index.html`` leads to
    the reports. A run that was killed goes on where it was when it is begun again; sources whose
    results are there, of the same content and settings, are not worked on again. A source that two
    runs in a row died of is left to the end, so that the others are done. Cameras, streams and
    ``demo:`` cannot be read twice and go straight through (``realtime.live``).

    Args:
        specs: see ``realtime.sources.spec.open_source``. ``Naming`` says what results are called
            where a name is taken. Results of earlier runs among several sources are left out.
        out: folder for the results.
        localizer: the engine, or the engines that a budget is held with.
        console: for progress bars.
        settings: what is wanted.
        inputs: other files that the run reads.

    Returns:
        A summary of each, in order. Of one that could not be read, ``error`` says why; on Ctrl-C
        that of the one under way has ``interrupted`` true, and those that were not begun are
        missing.

    Raises:
        SightlineError: a source is not there, or not one of them could be worked on.
        OutputError: the place of the results is full; what is there stays, and the run can be
            continued.
    """
    for spec in specs:
        if can_be_cut(spec) and not is_there(spec):
            open_source(spec).close()  # the error says what is missing
    with _progress(console) as progress:
        overall = progress.add_task("all", total=len(specs), fps="", visible=len(specs) > 1)
        bars = _Bars(progress, overall, progress.add_task("", total=None, fps="", visible=False))
        batch = _Batch(specs, out, localizer, console, settings, inputs, bars)
        batch.run()
    if len(batch.errors) == len(batch.specs) > 0:
        raise as_sightline_error(batch.errors[0])
    summaries = batch.write_overview()
    batch.write_index(summaries)
    return summaries


def _progress(console: Console) -> Progress:
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console)


class _Batch:
    """The sources of a batch, worked on one after the other.

    Attributes:
        specs: the sources, without results of earlier runs.
        errors: of the sources that failed.
    """

    def __init__(
        self,
        specs: Sequence[str],
        out: Path,
        localizer: Localizer,
        console: Console,
        settings: Settings,
        inputs: Sequence[str | Path],
        bars: _Bars,
    ) -> None:
        self._out = out
        self._localizer = localizer
        self._console = console
        self._settings = settings
        self._bars = bars
        self._say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        notify = partial(self._say, style="yellow")
        self.specs = without_results(specs, notify)
        self._naming = Naming(out, notify, [*self.specs, *inputs])
        self._overview = overview_path(out, notify)
        self._summaries = dict[int, Summary]()
        self._deadly = list[tuple[int, Job]]()
        self.errors = list[Exception]()

    def run(self) -> None:
        """Work on all of them; those that earlier runs died of come last.

        Raises:
            OutputError: the place of the results is full.
        """
        for place, spec in enumerate(self.specs):
            if not self._attempt(place, partial(self._process, place, spec)):
                return
        if self._deadly:  # this run may die of them, too
            self.write_overview()
        for place, job in sorted(self._deadly, key=lambda each: each[1].runs_died):
            if not self._attempt(place, partial(self._work, self.specs[place], job)):
                return

    def write_overview(self) -> list[Summary]:
        """Write the summaries of all sources so far; they are also returned, in order."""
        summaries = [self._summaries[place] for place in sorted(self._summaries)]
        write_json(self._overview, summaries)
        return summaries

    def write_index(self, summaries: Sequence[Summary]) -> None:
        """Write the page that leads to the reports of several sources."""
        if len(self.specs) < 2:
            return
        path = write_index(self._out, summaries)
        if path is None:
            place = self._out / "index.html"
            self._say(shown(f"no index of the reports: {place} is another's file"), style="yellow")
        else:
            self._say(shown(f"all of them: {path}"))

    def _attempt(self, place: int, step: Callable[[], Summary | None]) -> bool:
        """Take a step with a source; false where the run was interrupted. Whatever goes wrong with
        it, the other sources go on.
        """
        spec = self.specs[place]
        try:
            summary = step()
        except Exception as error:
            if ends_run(error):
                raise
            self.errors.append(error)
            summary = failed(error)
            if len(self.specs) > 1:
                self._say(shown(f"{spec}: {summary['error']}"), style="red")
        if summary is None:
            return True
        self._summaries[place] = {"source": shown(spec), **summary}
        self._bars.progress.advance(self._bars.overall)
        return not summary["interrupted"]

    def _process(self, place: int, spec: str) -> Summary | None:
        """The summary of a source; None where it is left to the end."""
        if not can_be_cut(spec):
            return self._process_directly(spec)
        settings = self._settings
        self._bars.look(name_of(spec))
        digests = digest_of(spec), settings_digest(settings, self._localizer)
        job = self._naming.job(spec, endings(settings).values(), *digests, place_of(spec))
        if job.summary is not None:
            return {**job.summary, "skipped": True}
        if job.runs_died >= MOST_BEGUN:
            self._say(
                shown(
                    f"{spec}: the last {job.runs_died} runs ended while they worked on it (a crash,"
                    " or too little memory): it is done after the others"
                ),
                style="yellow",
            )
            self._deadly.append((place, job))
            return None
        return self._work(spec, job)

    def _process_directly(self, spec: str) -> Summary:
        """The summary of a source that cannot be read twice."""
        self._bars.progress.stop()  # it has its own
        summary = live.process(
            spec,
            self._naming,
            self._out,
            self._localizer,
            self._console,
            self._settings.draws,
            self._settings.following,
        )
        self._bars.progress.start()
        return summary

    def _work(self, spec: str, found: Job) -> Summary:
        """Do what is left of a job, and give its summary."""
        self._localizer.begin()
        try:
            with self._naming.holding(found) as job, job.under_way():
                try:
                    return self._finish(spec, job)
                except UnsafeCutError:  # rare: what looks like a key frame is none
                    window = self._settings.window
                    job.begin(make_plan(spec, job.source_digest, window, whole=True))
                    return self._finish(spec, job)
                except SourceError:
                    job.discard()
                    raise
        except OutputError as error:
            raise OutputError(
                f"{error}; what is done stays there: mend that and run the same command to go on"
            ) from error
        except KeyboardInterrupt:
            return {"frames": 0, "failed": 0, "interrupted": True}

    def _finish(self, spec: str, job: Job) -> Summary:
        """Do the segments that are not done, and merge."""
        settings, localizer = self._settings, self._localizer
        if job.clip is None:
            job.begin(make_plan(spec, job.source_digest, settings.window))
        clip, todo = job.clip, job.todo()
        assert clip is not None  # it was just made
        resumed = len(clip.segments) - len(todo)
        left = sum(segment.frames for segment in todo)
        self._bars.begin(job.name, clip.selected_frames, clip.selected_frames - left)
        start_s = time.monotonic()
        states = job.states(todo) if settings.in_order(clip) else None
        work = run_segments(clip, todo, localizer, settings, job.folder, states=states)
        with closing(work) as records:
            for count, _ in enumerate(records, start=1):
                self._bars.advance(count / max(1e-3, time.monotonic() - start_s))
        engine = localizer.engine
        facts = {
            "backend": engine.backend,
            "precision": engine.precision,
            "device": engine.device,
            "size_px": localizer.size_px,
            "segments_resumed": resumed,
            **localizer.summary(),
        }
        summary, files = merge_job(job, clip, settings, self._out, facts)
        job.end(files, summary)
        return summary


def batch_chosen(
    specs: Sequence[str],
    out: str,
    settings: Settings,
    scale: Scale,
    choice: EngineOptions,
    budget_ms: float | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Work through sources, here or on a cluster; see ``process_all`` and
    ``realtime.batch.cluster.scheduler.process_across``.

    Raises:
        InputError: the options contradict each other.
        SightlineError: see there.
    """
    settings.check(specs)
    settings, choice = settings.beside(choice)
    inputs = [path for field in ATTACHED if isinstance(path := getattr(choice, field), str)]
    if scale.ray is None:
        for spec in (*specs, out):
            if is_shared(spec):
                raise InputError(
                    f"{spec} is on shared storage, which clusters work with: use the cluster auto,"
                    " or local",
                    option="ray",
                )
        if scale.workers is not None:
            raise InputError("workers are for clusters: name one", option=("workers", "ray"))
        images, first_px = settings.images(specs), first_size_px(specs)
        localizer = open_within(choice, budget_ms, console, 0, images, first_px)
        return process_all(specs, Path(out), localizer, console, settings, inputs)
    if budget_ms is not None:
        raise InputError(
            "a budget is measured on one machine: leave it away, or the cluster",
            option=("budget_ms", "ray"),
        )
    from realtime.batch.cluster.ray import Cluster
    from realtime.batch.cluster.scheduler import process_across

    specs = expanded(specs)
    settings = replace(settings, batch=settings.images(specs))
    with Cluster(scale.ray, choice, attached(choice), settings) as cluster:
        return process_across(specs, out, cluster, console, settings, scale.workers, inputs)
