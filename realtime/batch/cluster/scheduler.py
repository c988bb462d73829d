"""Runs a batch on a cluster: gives the segments of all sources to free workers, and merges a source
when its last segment is done.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.errors import OutputError, SourceError
from engines.files import whole_file, write_json
from engines.text import shown
from realtime.batch.cluster.storage import Digests, Store, identity, is_shared, local_path
from realtime.batch.cluster.worker import (
    QUEUED,
    Cluster,
    LostError,
    Ref,
    WorkerHandle,
    WorkerPool,
    find_digest,
    find_plan,
)
from realtime.batch.job import (
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
from realtime.batch.options import Settings
from realtime.batch.segment import Clip, Segment
from realtime.capture import names_of
from realtime.sources.spec import can_be_cut, is_there, open_source
from realtime.written import MANIFEST

Summary = dict[str, Any]
MOST_TRIES = 3
"""A source is given up when so many workers died of one of its segments."""
TICK_S = 1.0
MERGE_TICK_S = 0.1


@dataclass(eq=False)
class ClusterSource:
    """A source of a batch on a cluster, and how far its work is.

    Attributes:
        place: its place among the sources.
        spec: what the user typed.
        name: of its results.
        stored_as: the identity of the file on shared storage, see
            ``realtime.batch.cluster.storage.identity``; empty for other files.
        digest: of its content, once it is known.
        job: what is known of its work, once there is something.
        todo: segments that no worker has.
        assigned: how many segments workers have.
        resumed: how many segments were done when this run began.
        tries: of each segment, how many workers died of it.
        finished: whether its summary is known.
        lock: keeps other runs away from its job.
    """

    place: int
    spec: str
    name: str
    stored_as: str = ""
    digest: str = ""
    job: Job | None = None
    todo: deque[Segment] = field(default_factory=deque)
    assigned: int = 0
    resumed: int = 0
    tries: Counter[int] = field(default_factory=Counter)
    finished: bool = False
    lock: ExitStack = field(default_factory=ExitStack)

    @property
    def path(self) -> str:
        """What every machine opens it by."""
        return self.spec if is_shared(self.spec) else str(Path(self.spec).absolute())

    @property
    def clip(self) -> Clip:
        """Its plan, which another machine may have made, with ``path`` as the source."""
        assert self.job is not None
        assert self.job.clip is not None
        return replace(self.job.clip, spec=self.path)

    def completed(self, summary: Summary) -> Summary:
        """A summary with the source in it."""
        return {"source": shown(self.spec), **summary}


def process_across(
    specs: Sequence[str],
    out: str,
    cluster: Cluster,
    console: Console,
    settings: Settings = Settings(),
    most: int | None = None,
    inputs: Sequence[str | Path] = (),
) -> list[Summary]:
    """Localize every frame of all sources on a cluster. Results, errors and how a run is resumed
    are those of ``realtime.batch.run.process_all``.

    Args:
        specs: files that every machine can open by this name, or addresses on shared storage.
        out: folder of this machine, or an address.
        cluster: where workers are.
        console: for progress and what a user should know.
        settings: what is wanted.
        most: workers; None for as many as there is room for.
        inputs: other files that the run reads.

    Raises:
        SightlineError: see ``process_all``; or no worker can be started.
    """
    for spec in specs:
        if is_shared(spec):
            continue
        if not can_be_cut(spec):
            raise SourceError(
                f"{spec} cannot be read by several at once: use no cluster", option="ray"
            )
        if not is_there(spec):
            open_source(spec).close()  # the error says what is missing
    notify = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    try:
        store = Store(out)
        specs = without_results(specs, notify)
        naming = Naming(store.folder, notify, [*specs, *inputs], store.stamp, store.get_folder)
        overview = overview_path(store.folder, notify, store.stamp, store.read)
        pool = WorkerPool(cluster, most, console)
        summaries = _Scheduler(specs, store, naming, pool, console, settings).run()
        write_json(overview, summaries)
        store.put([overview])
        return summaries
    except OutputError as error:
        raise OutputError(
            f"{error}; what is done stays there: mend that and run the same command to go on"
        ) from error


class _Scheduler:
    """Waits for results of tasks and workers, and does with each what comes next."""

    def __init__(
        self,
        specs: Sequence[str],
        store: Store,
        naming: Naming,
        pool: WorkerPool,
        console: Console,
        settings: Settings,
    ) -> None:
        self._store = store
        self._pool = pool
        self._console = console
        self._settings = settings
        self._naming = naming
        self._digests = Digests(store)
        self._sources = [
            ClusterSource(place, spec, name)
            for place, (spec, name) in enumerate(zip(specs, names_of(specs), strict=True))
        ]
        self._not_begun = deque(self._sources)
        self._under_way = list[ClusterSource]()
        self._summaries = dict[int, Summary]()
        self._errors = list[Exception]()
        self._callbacks = dict[Ref, Callable[[Ref], None]]()
        self._merger = ThreadPoolExecutor(1, thread_name_prefix="merge")
        self._merges = dict[int, Future[Summary]]()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=console)
        self._bar = self._progress.add_task("workers open their engine", total=0)
        self._planned_frames = 0

    def run(self) -> list[Summary]:
        """Work on all sources; their summaries, in order."""
        try:
            with self._progress:
                self._digests.fetch()
                while len(self._summaries) < len(self._sources):
                    self._start_workers()
                    self._begin_sources()
                    self._assign_segments()
                    self._take_results()
        except KeyboardInterrupt:
            for source in self._sources:
                self._summaries.setdefault(
                    source.place, source.completed({"frames": 0, "failed": 0, "interrupted": True})
                )
        finally:
            self._merger.shutdown(cancel_futures=True)
            for source in self._under_way:
                source.lock.close()
        if self._errors and len(self._errors) == len(self._sources):
            raise as_sightline_error(self._errors[0])
        return [self._summaries[place] for place in sorted(self._summaries)]

    @property
    def _waiting_segments(self) -> int:
        return sum(
            min(len(source.todo), 1) if self._is_in_order(source) else len(source.todo)
            for source in self._under_way
            if source.todo
        )

    def _is_in_order(self, source: ClusterSource) -> bool:
        return self._settings.in_order(source.clip)

    def _start_workers(self) -> None:
        """Start as many workers as have something to do."""
        assigned = sum(source.assigned for source in self._under_way)
        wanted = self._waiting_segments + assigned + len(self._not_begun)
        for ref, handle in self._pool.start_workers(wanted).items():
            self._callbacks[ref] = partial(self._pool.add, handle)

    def _begin_sources(self) -> None:
        """Begin so many sources that the workers do not run out of segments."""
        ready = sum(handle.ready for handle in self._pool.handles)
        while (
            self._not_begun
            and self._pool.opened
            and sum(source.job is None for source in self._under_way) < 2 + ready
            and self._waiting_segments < 2 * QUEUED * (1 + ready)
        ):
            source = self._not_begun.popleft()
            self._under_way.append(source)
            self._step(source, partial(self._find_digest, source))

    def _assign_segments(self) -> None:
        """Give segments to workers that can take one."""
        while (handle := self._pool.free_worker()) and (source := self._next_for(handle)):
            segment = source.todo.popleft()
            source.assigned += 1
            handle.segments.append(segment)
            handle.source = source.name
            assert source.job is not None
            states = source.job.states([segment]) if self._is_in_order(source) else {}
            ref = handle.worker.work(source.clip, segment, states)
            self._callbacks[ref] = partial(self._segment_ended, handle, source, segment)

    def _next_for(self, handle: WorkerHandle) -> ClusterSource | None:
        """The source that the worker worked on last, since its machine has a copy already; else the
        one that the fewest workers work on. Where segments are done in order, one worker at a time
        works on a source.
        """
        sources = [
            source
            for source in self._under_way
            if source.todo and not (source.assigned and self._is_in_order(source))
        ]
        return min(
            sources,
            key=lambda source: (source.name != handle.source, source.assigned, source.place),
            default=None,
        )

    def _take_results(self) -> None:
        """Wait for results, and go on with each."""
        timeout_s = MERGE_TICK_S if self._merges else TICK_S
        for ref in self._pool.cluster.wait(list(self._callbacks), timeout_s):
            self._callbacks.pop(ref)(ref)
        for place in [place for place, merged in self._merges.items() if merged.done()]:
            self._merge_ended(self._sources[place], self._merges.pop(place))
        self._progress.update(
            self._bar,
            description=f"{len(self._pool.handles)} workers, {len(self._under_way)} files",
        )

    def _step(self, source: ClusterSource, step: Callable[[], None]) -> None:
        """Take a source's next step. Whatever goes wrong with it, the other sources go on."""
        try:
            step()
        except Exception as error:
            self._fail(source, error)

    def _ask(
        self,
        source: ClusterSource,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        on_result: Callable[[ClusterSource, Any], None],
    ) -> None:
        """Have some process of the cluster call a function for a source.

        Args:
            source: fails where the function does.
            function: is called there.
            arguments: of the function.
            on_result: is called here with the source and the result.
        """

        def on_end(ref: Ref) -> None:
            try:
                found = self._pool.cluster.get(ref)
            except LostError as error:
                self._fail(
                    source, SourceError(f"{source.spec}: whoever looked through it died: {error}")
                )
            except Exception as error:
                self._fail(source, error)
            else:
                self._step(source, partial(on_result, source, found))

        self._callbacks[self._pool.cluster.task(function, *arguments)] = on_end

    def _find_digest(self, source: ClusterSource) -> None:
        """Have the digest of its content found, unless an earlier run did and the file is the
        same.
        """
        if is_shared(source.spec):
            source.stored_as = identity(source.spec)
            known = self._digests.find(source.name, source.stored_as)
            if known is not None:
                self._begin(source, known)
                return
        self._ask(source, find_digest, (source.path,), self._begin)

    def _begin(self, source: ClusterSource, digest: str) -> None:
        """Find its job, now that its digest is known: it is done, planned, or neither."""
        assert self._pool.opened is not None
        source.digest = digest
        if source.stored_as and self._digests.find(source.name, source.stored_as) is None:
            self._digests.keep(source.name, source.stored_as, digest)
        found = self._naming.job(
            source.spec,
            endings(self._settings).values(),
            digest,
            self._pool.opened.settings_digest,
            source.spec if source.stored_as else place_of(source.spec),
        )
        source.job = source.lock.enter_context(self._naming.holding(found))
        if source.job.summary is not None:
            self._finish(source, {**source.job.summary, "skipped": True})
        elif source.job.clip is None:
            self._find_plan(source, whole=False)
        else:
            self._work_on(source)

    def _find_plan(self, source: ClusterSource, whole: bool) -> None:
        """Have it cut into segments, or into one."""
        arguments = (source.path, source.digest, self._settings.window, whole)
        self._ask(source, find_plan, arguments, self._plan_found)

    def _plan_found(self, source: ClusterSource, clip: Clip) -> None:
        """Keep a plan, in place of what there was."""
        assert source.job is not None
        self._store.drop_all_but(source.job.folder, [MANIFEST])
        source.job.begin(clip)
        self._store.put([source.job.folder / MANIFEST])
        self._work_on(source)

    def _work_on(self, source: ClusterSource) -> None:
        """Let workers have its segments that are not done."""
        assert source.job is not None
        source.todo.extend(source.job.todo())
        source.resumed = len(source.clip.segments) - len(source.todo)
        self._planned_frames += source.clip.selected_frames
        left = sum(segment.frames for segment in source.todo)
        self._progress.update(
            self._bar, total=self._planned_frames, advance=source.clip.selected_frames - left
        )
        self._merge_if_done(source)

    def _segment_ended(
        self, handle: WorkerHandle, source: ClusterSource, segment: Segment, ref: Ref
    ) -> None:
        """Keep what came of a segment, or have it done again."""
        source.assigned -= 1
        try:
            files: dict[str, bytes] = self._pool.cluster.get(ref)
            handle.segments.remove(segment)
        except LostError as error:
            self._pool.remove(handle)
            self._retry(source, segment, error, handle.lost_with is segment)
            return
        except OutputError as error:  # the disk of its machine is full
            handle.segments.remove(segment)
            self._retry(source, segment, error, True)
            return
        except Exception as error:
            handle.segments.remove(segment)
            self._fail(source, error)
            return
        if not source.finished:
            self._step(source, partial(self._keep, source, segment, files))

    def _keep(self, source: ClusterSource, segment: Segment, files: dict[str, bytes]) -> None:
        """Write a segment's files; its record is the last one, since it says that all are there."""
        assert source.job is not None
        for name in sorted(files, key=lambda name: name.endswith(".json")):
            with whole_file(source.job.folder / name) as part:
                part.write_bytes(files[name])
            self._store.put([source.job.folder / name])
        self._progress.advance(self._bar, segment.frames)
        self._merge_if_done(source)

    def _retry(
        self, source: ClusterSource, segment: Segment, error: Exception, counts: bool
    ) -> None:
        """Give a segment to another worker; its source fails when too many died of it.

        Args:
            source: whose it is.
            segment: was not finished.
            error: why.
            counts: whether the worker seems to have died of it, and not of another segment.
        """
        source.tries[segment.index] += counts
        if source.tries[segment.index] < MOST_TRIES:
            source.todo.appendleft(segment)
            return
        at_s = 0.0 if segment.start_pts is None else source.clip.pts_s(segment.start_pts)
        self._fail(
            source,
            SourceError(
                f"{source.spec}: its part at {at_s:.0f} s was lost {MOST_TRIES} times: {error}"
            ),
        )

    def _merge_if_done(self, source: ClusterSource) -> None:
        if not source.finished and not source.todo and not source.assigned:
            self._merges[source.place] = self._merger.submit(self._merge, source)

    def _merge(self, source: ClusterSource) -> Summary:
        """Write the results of a source, on the merging thread; its summary."""
        job = source.job
        opened = self._pool.opened
        assert job is not None
        assert opened is not None
        clip = source.clip
        if clip.audio:  # it is copied
            clip = replace(clip, spec=local_path(clip.spec))
        facts = {**opened.facts, "segments_resumed": source.resumed}
        summary, files = merge_job(job, clip, self._settings, self._store.folder, facts)
        if self._store.address:
            summary["files"] = {
                kind: shown(self._store.name(Path(path))) for kind, path in summary["files"].items()
            }
            write_json(files[-1], summary)
        self._store.put([job.folder / MANIFEST, *files])
        job.end(files, summary)
        self._store.put([job.folder / MANIFEST])
        self._store.drop_all_but(job.folder, [MANIFEST])
        for path in files if self._store.address else ():
            path.unlink()
        return summary

    def _merge_ended(self, source: ClusterSource, merged: "Future[Summary]") -> None:
        try:
            summary = merged.result()
        except UnsafeCutError:  # rare: what looks like a key frame is none
            self._planned_frames -= source.clip.selected_frames
            self._find_plan(source, whole=True)
        except Exception as error:
            self._fail(source, error)
        else:
            self._finish(source, summary)

    def _finish(self, source: ClusterSource, summary: Summary) -> None:
        source.finished = True
        source.lock.close()
        self._under_way.remove(source)
        self._summaries[source.place] = source.completed(summary)

    def _fail(self, source: ClusterSource, error: Exception) -> None:
        """Give up a source; the others go on.

        Raises:
            Exception: the error, where the other sources would fail by it, too.
        """
        if ends_run(error):
            raise error
        if source.finished:
            return
        self._errors.append(error)
        if source.job is not None and source.job.clip is not None:
            source.job.discard()
        source.todo.clear()
        summary = failed(error)
        line = shown(f"{source.spec}: {summary['error']}")
        self._console.print(line, style="red", soft_wrap=True, markup=False, highlight=False)
        self._finish(source, summary)
