"""Runs a batch on a cluster: gives segments of all sources to free workers, and merges a source
when its last is done.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.errors import EngineError, OutputError, SightlineError, SourceError
from engines.files import whole_file, write_json
from engines.text import shown
from realtime.batch.cluster.storage import Digests, Store, identity, is_shared, local_path
from realtime.batch.cluster.worker import Opened, find_digest, find_plan
from realtime.batch.job import Job, as_sightline_error, ends_run, failed
from realtime.batch.merge import UnsafeCutError, endings, merge_job
from realtime.batch.names import Naming, overview_path, place_of, without_results
from realtime.batch.options import Settings
from realtime.batch.segment import Clip, Segment
from realtime.capture import names_of
from realtime.sources.spec import can_be_cut, is_there, open_source
from realtime.written import MANIFEST

QUEUED = 2
"""Segments that a worker has at a time: one that it works on, one so that it need not wait."""
MOST_LOST = 5
"""So many workers in a row may die before they are ready."""

Ref = Any


class LostError(Exception):
    """The process or machine that worked on it is gone."""


class RemoteWorker(Protocol):
    """A ``realtime.batch.cluster.worker.Worker`` somewhere: calls give references, for
    ``Cluster.get``.
    """

    def open(self) -> Ref: ...

    def work(self, clip: Clip, segment: Segment) -> Ref: ...


class Cluster(Protocol):
    """What a batch needs of a cluster; see ``realtime.batch.cluster.ray``."""

    def room(self) -> int: ...

    def start_worker(self) -> RemoteWorker: ...

    def stop_worker(self, worker: Any) -> None: ...

    def task(self, function: Callable[..., Any], *arguments: Any) -> Ref: ...

    def wait(self, refs: list[Ref], timeout_s: float) -> list[Ref]: ...

    def get(self, ref: Ref) -> Any: ...


@dataclass(eq=False)
class WorkerHandle:
    """A worker as it is known here.

    Attributes:
        worker: does segments.
        ready: its engine is.
        segments: that it has, the one that it works on first.
        source: name of the source that it worked on last, which it may have a copy of.
        blamed: the segment that it died of, or with.
    """

    worker: RemoteWorker
    ready: bool = False
    segments: deque[Segment] = field(default_factory=deque)
    source: str = ""
    blamed: Segment | None = None


@dataclass
class WorkerPool:
    """Workers.

    Args:
        cluster: where they are.
        most: at most so many; None for as many as there is room for.
        console: gets what a user should know.

    Attributes:
        opened: what the first one said of itself; all others must give the same results.
        lost: how many died.
    """

    cluster: Cluster
    most: int | None
    console: Console
    opened: Opened | None = None
    lost: int = 0
    handles: list[WorkerHandle] = field(default_factory=list)
    _lost_unready: int = 0

    def start_worker(self, segments: int) -> dict[Ref, WorkerHandle]:
        """Hire until there are enough for ``segments``, or no room is left.

        Returns:
            The new ones, by a reference to what they will say of themselves, for ``open``.

        Raises:
            EngineError: the cluster has no room for a single one.
        """
        room = self.cluster.room() if self.most is None else self.most
        if not room and not self.handles:
            raise EngineError(
                "the cluster has no free processor or GPU for a worker: ask for fewer threads, or"
                " add machines",
                option="threads",
            )
        found = {}
        first = (
            1 if self.opened is None else room
        )  # the others, when it is known that the engine can be opened
        while len(self.handles) < min(room, first, max(1, segments)):
            handle = WorkerHandle(self.cluster.start_worker())
            self.handles.append(handle)
            found[handle.worker.open()] = handle
        return found

    def open(self, handle: WorkerHandle, ref: Ref) -> None:
        """Hear what a new worker says.

        Raises:
            SightlineError: the first one's engine cannot be opened, or workers keep dying before
                theirs is.
        """
        try:
            opened: Opened = self.cluster.get(ref)
        except LostError as error:
            self.lose(handle)
            self._lost_unready += 1
            if self._lost_unready >= MOST_LOST:
                raise EngineError(
                    f"{MOST_LOST} workers in a row died while they opened their engine: {error}"
                ) from error
            return
        except SightlineError as error:
            if self.opened is None:
                raise
            self._refuse(handle, str(error))
            return
        self._lost_unready = 0
        if self.opened is None:
            self.opened = opened
            self.console.print(
                f"workers: {opened.backend} {opened.precision} at {opened.size_px} px, the first on"
                f" {opened.device}",
                style="dim",
                soft_wrap=True,
            )
        if opened.settings_digest != self.opened.settings_digest:
            self._refuse(
                handle,
                f"it would give other results ({opened.backend} {opened.precision} on"
                f" {opened.device})",
            )
            return
        handle.ready = True

    def _refuse(self, handle: WorkerHandle, why: str) -> None:
        """Keep its place, so that no other of its kind is started, but give it nothing."""
        self.console.print(f"a worker is not used: {why}", style="yellow", soft_wrap=True)
        self.cluster.stop_worker(handle.worker)

    def lose(self, handle: WorkerHandle) -> None:
        """It is gone."""
        if handle in self.handles:
            handle.blamed = handle.segments[0] if handle.segments else None
            self.handles.remove(handle)
            self.lost += 1
            self.cluster.stop_worker(handle.worker)

    def free(self) -> WorkerHandle | None:
        """The one with the least to do, if it can take another segment."""
        found = min(
            (handle for handle in self.handles if handle.ready),
            key=lambda handle: len(handle.segments),
            default=None,
        )
        return found if found and len(found.segments) < QUEUED else None


Summary = dict[str, Any]


@dataclass(eq=False)
class Source:
    """One source on its way.

    Attributes:
        place: among the sources.
        spec: what the user typed.
        name: of its results.
        ident: of the file on shared storage, see ``realtime.batch.cluster.storage.identity``.
        digest: of its content, when it is known.
        job: what is known of its work, when there is something.
        todo: segments that nobody has.
        out: how many somebody has.
        resumed: how many were done when it began.
        tries: of each segment, how many workers died of it.
        over: its summary is written.
        lock: keeps other runs away from its job.
    """

    place: int
    spec: str
    name: str
    ident: str = ""
    digest: str = ""
    job: Job | None = None
    todo: deque[Segment] = field(default_factory=deque)
    out: int = 0
    resumed: int = 0
    tries: Counter[int] = field(default_factory=Counter)
    over: bool = False
    lock: ExitStack = field(default_factory=ExitStack)

    @property
    def where(self) -> str:
        """Its name on every machine."""
        return self.spec if is_shared(self.spec) else str(Path(self.spec).absolute())

    @property
    def clip(self) -> Clip:
        assert self.job is not None
        assert self.job.clip is not None
        return replace(
            self.job.clip, spec=self.where
        )  # it may have been planned on another machine

    def completed(self, summary: Summary) -> Summary:
        """A summary that says of what it is."""
        return {"source": shown(self.spec), **summary}


MOST_TRIES = 3
"""A segment whose worker died so often is what kills them: its source is given up."""
TICK_S = 1.0


def process_across(
    specs: Sequence[str],
    out: str,
    cluster: Cluster,
    console: Console,
    settings: Settings = Settings(),
    most: int | None = None,
    inputs: Sequence[str | Path] = (),
) -> list[Summary]:
    """Localize every frame of all sources; results, errors and resuming as in
    ``realtime.batch.run.process_all``.

    Args:
        specs: files that every machine can open by this name, or addresses on shared storage.
        out: folder of this machine, or an address.
        cluster: where workers are.
        console: for progress and what a user should know.
        settings: what is wanted.
        most: workers; None for as many as there is room for.
        inputs: other files that the run reads.

    Raises:
        SightlineError: see there; or no worker can be had.
    """
    for spec in specs:
        if is_shared(spec):
            continue
        if not can_be_cut(spec):
            raise SourceError(
                f"{spec} cannot be read by several at once: use no cluster", option="ray"
            )
        if not is_there(spec):
            open_source(spec).close()
    completed = partial(
        console.print, style="yellow", markup=False, highlight=False, soft_wrap=True
    )
    try:
        store, specs = Store(out), without_results(specs, completed)
        naming = Naming(store.folder, completed, [*specs, *inputs], store.stamp, store.get_folder)
        overview = overview_path(store.folder, completed, store.stamp, store.read)
        summaries = _Across(
            specs, store, naming, WorkerPool(cluster, most, console), console, settings
        ).run()
        write_json(overview, summaries)
        store.put([overview])
        return summaries
    except OutputError as error:
        raise OutputError(
            f"{error}; what is done stays there: mend that and run the same command to go on"
        ) from error


class _Across:
    """The loop that waits for results, and says what becomes of each."""

    def __init__(
        self,
        specs: Sequence[str],
        store: Store,
        naming: Naming,
        pool: WorkerPool,
        console: Console,
        settings: Settings,
    ) -> None:
        self._store, self._pool, self._console, self._settings = store, pool, console, settings
        self._sources = [
            Source(*item) for item in zip(range(len(specs)), specs, names_of(specs), strict=True)
        ]
        self._fresh, self._open = deque(self._sources), list[Source]()
        self._summaries, self._errors = dict[int, Summary](), list[Exception]()
        self._then = dict[Ref, Callable[[Ref], None]]()
        self._merging, self._merges = (
            ThreadPoolExecutor(1, thread_name_prefix="merge"),
            dict[int, Future[Summary]](),
        )
        self._digests = Digests(store)
        self._naming = naming
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=console)
        self._bar = self._progress.add_task("workers open their engine", total=0)
        self._planned = 0

    def run(self) -> list[Summary]:
        """All of it."""
        try:
            with self._progress:
                self._digests.fetch()
                while len(self._summaries) < len(self._sources):
                    self._step()
        except KeyboardInterrupt:
            for source in self._sources:
                self._summaries.setdefault(
                    source.place, source.completed({"frames": 0, "failed": 0, "interrupted": True})
                )
        finally:
            self._merging.shutdown(cancel_futures=True)
            for source in self._open:
                source.lock.close()
        if self._errors and len(self._errors) == len(self._sources):
            raise as_sightline_error(self._errors[0])
        return [self._summaries[place] for place in sorted(self._summaries)]

    def _step(self) -> None:
        waiting = sum(len(source.todo) for source in self._open)
        for ref, new in self._pool.start_worker(
            waiting + sum(source.out for source in self._open) + len(self._fresh)
        ).items():
            self._then[ref] = partial(self._pool.open, new)
        looking = sum(source.job is None for source in self._open)
        ready = sum(handle.ready for handle in self._pool.handles)
        while (
            self._fresh
            and self._pool.opened
            and looking < 2 + ready
            and waiting < 2 * QUEUED * (1 + ready)
        ):
            self._look(self._fresh.popleft())
            looking += 1
        while (handle := self._pool.free()) and (source := self._next_for(handle)):
            self._assign(handle, source)
        for ref in self._pool.cluster.wait(list(self._then), 0.1 if self._merges else TICK_S):
            self._then.pop(ref)(ref)
        for place in [place for place, merged in self._merges.items() if merged.done()]:
            self._merged(self._sources[place], self._merges.pop(place))
        self._progress.update(
            self._bar, description=f"{len(self._pool.handles)} workers, {len(self._open)} files"
        )

    def _next_for(self, handle: WorkerHandle) -> Source | None:
        """The source that it worked on last, which is on its machine already; else the one that
        fewest work on.
        """
        sources = [source for source in self._open if source.todo]
        return min(
            sources,
            key=lambda source: (source.name != handle.source, source.out, source.place),
            default=None,
        )

    def _look(self, source: Source) -> None:
        """Find out its digest, and then its plan."""
        self._open.append(source)
        self._go_on(source, partial(self._find_digest, source))

    def _find_digest(self, source: Source) -> None:
        if is_shared(source.spec):
            source.ident = identity(source.spec)
            known = self._digests.find(source.name, source.ident)
            if known is not None:
                self._begin(source, known)
                return
        self._ask(source, find_digest, self._begin, source.where)

    def _go_on(self, source: Source, step: Callable[[], None]) -> None:
        """Take a source's next step; whatever goes wrong with it, the others go on."""
        try:
            step()
        except Exception as error:
            self._fail(source, error)

    def _ask(
        self,
        source: Source,
        function: Callable[..., Any],
        then: Callable[[Source, Any], None],
        *arguments: Any,
    ) -> None:
        """Have a task done for a source."""

        def on_result(ref: Ref) -> None:
            try:
                found = self._pool.cluster.get(ref)
            except LostError as error:
                self._fail(
                    source, SourceError(f"{source.spec}: whoever looked through it died: {error}")
                )
            except Exception as error:
                self._fail(source, error)
            else:
                self._go_on(source, partial(then, source, found))

        self._then[self._pool.cluster.task(function, *arguments)] = on_result

    def _begin(self, source: Source, digest: str) -> None:
        assert self._pool.opened is not None
        source.digest = digest
        if source.ident and self._digests.find(source.name, source.ident) is None:
            self._digests.keep(source.name, source.ident, digest)
        where = source.spec if source.ident else place_of(source.spec)
        found = self._naming.job(
            source.spec,
            endings(self._settings).values(),
            digest,
            self._pool.opened.settings_digest,
            where,
        )
        source.job = source.lock.enter_context(self._naming.holding(found))
        if source.job.summary is not None:
            self._finish(source, {**source.job.summary, "skipped": True})
        elif source.job.clip is None:
            self._ask(
                source,
                find_plan,
                self._planned_anew,
                source.where,
                digest,
                self._settings.window,
                self._settings.whole,
            )
        else:
            self._work_on(source)

    def _planned_anew(self, source: Source, clip: Clip) -> None:
        assert source.job is not None
        self._store.drop_all_but(source.job.folder, [MANIFEST])
        source.job.begin(clip)
        self._store.put([source.job.folder / MANIFEST])
        self._work_on(source)

    def _work_on(self, source: Source) -> None:
        assert source.job is not None
        source.todo.extend(source.job.todo())
        source.resumed = len(source.clip.segments) - len(source.todo)
        self._planned += source.clip.selected_frames
        left = sum(segment.frames for segment in source.todo)
        self._progress.update(
            self._bar, total=self._planned, advance=source.clip.selected_frames - left
        )
        self._merge_if_done(source)

    def _assign(self, handle: WorkerHandle, source: Source) -> None:
        segment = source.todo.popleft()
        handle.segments.append(segment)
        handle.source, source.out = source.name, source.out + 1
        self._then[handle.worker.work(source.clip, segment)] = partial(
            self._worked, handle, source, segment
        )

    def _worked(self, handle: WorkerHandle, source: Source, segment: Segment, ref: Ref) -> None:
        """Keep what came of a segment; its record last, which says that it is done."""
        source.out -= 1
        try:
            files: dict[str, bytes] = self._pool.cluster.get(ref)
            handle.segments.remove(segment)
        except LostError as error:
            self._pool.lose(handle)
            self._again(source, segment, error, handle.blamed is segment)
            return
        except OutputError as error:  # its disk is full
            handle.segments.remove(segment)
            self._again(source, segment, error, True)
            return
        except Exception as error:
            handle.segments.remove(segment)
            self._fail(source, error)
            return
        if not source.over:
            self._go_on(source, partial(self._keep, source, segment, files))

    def _keep(self, source: Source, segment: Segment, files: dict[str, bytes]) -> None:
        assert source.job is not None
        for name in sorted(files, key=lambda name: name.endswith(".json")):
            with whole_file(source.job.folder / name) as part:
                part.write_bytes(files[name])
            self._store.put([source.job.folder / name])
        self._progress.advance(self._bar, segment.frames)
        self._merge_if_done(source)

    def _again(self, source: Source, segment: Segment, error: Exception, blamed: bool) -> None:
        """Another has to do it, unless it seems to be what workers die of."""
        source.tries[segment.index] += blamed
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

    def _merge_if_done(self, source: Source) -> None:
        if not source.over and not source.todo and not source.out:
            self._merges[source.place] = self._merging.submit(self._merge, source)

    def _merge(self, source: Source) -> Summary:
        """On a thread, beside everything else."""
        job, out, opened = source.job, self._store.folder, self._pool.opened
        assert job is not None
        assert opened is not None
        clip = source.clip
        if clip.audio:  # it is copied
            clip = replace(clip, spec=local_path(clip.spec))
        facts = {**opened.facts, "segments_resumed": source.resumed}
        summary, files = merge_job(job, clip, self._settings, out, facts)
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

    def _merged(self, source: Source, merged: "Future[Summary]") -> None:
        try:
            summary = merged.result()
        except UnsafeCutError:  # rare: what looks like a key frame is none
            self._planned -= source.clip.selected_frames
            self._ask(
                source,
                find_plan,
                self._planned_anew,
                source.where,
                source.digest,
                self._settings.window,
                True,
            )
        except Exception as error:
            self._fail(source, error)
        else:
            self._finish(source, summary)

    def _finish(self, source: Source, summary: Summary) -> None:
        source.over = True
        source.lock.close()
        self._open.remove(source)
        self._summaries[source.place] = source.completed(summary)

    def _fail(self, source: Source, error: Exception) -> None:
        """It is of no use; the others go on.

        Raises:
            Exception: the error, where it is one of all sources.
        """
        if ends_run(error):
            raise error
        if source.over:
            return
        self._errors.append(error)
        if source.job is not None and source.job.clip is not None:
            source.job.discard()
        source.todo.clear()
        summary = failed(error)
        line = shown(f"{source.spec}: {summary['error']}")
        self._console.print(line, style="red", soft_wrap=True, markup=False, highlight=False)
        self._finish(source, summary)
