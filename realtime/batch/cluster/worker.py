"""Workers: each has an engine in a process of its own, takes segments and returns the files of
their results. The worker pool starts them on a cluster and knows what each of them does.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from rich.console import Console

from engines.choose import open_localizer
from engines.downloads import cache_dir
from engines.errors import EngineError, SightlineError
from engines.files import whole_file
from engines.localizer import Localizer
from engines.networks.onnx_file import files_beside
from engines.networks.sidecars import sidecars_of
from engines.options import EngineOptions
from realtime.batch.cluster.storage import local_path
from realtime.batch.encode import run_segments
from realtime.batch.options import Settings, settings_digest
from realtime.batch.plan import Window, digest_of, make_plan
from realtime.batch.segment import Clip, Read, Segment, read_segment
from realtime.tracking.options import State

ATTACHED = ("model", "weights", "head", "calibration", "labels")
"""Fields of ``EngineOptions`` that may name a file."""
AttachedFiles = Mapping[str, tuple[str, bytes]]


@dataclass(frozen=True)
class Opened:
    """What a worker says of itself when its engine is ready.

    Attributes:
        settings_digest: two workers with the same give the same results.
        backend, precision, device, size_px: of its engine.
    """

    settings_digest: str
    backend: str
    precision: str
    device: str
    size_px: int

    @property
    def facts(self) -> dict[str, str | int]:
        """Of the engine, for a summary."""
        return {name: value for name, value in asdict(self).items() if name != "settings_digest"}


class Worker:
    """An engine, and what it is asked to do with frames.

    Args:
        choice: of the engine, as the user made it on his machine.
        attached: the files that it names, see ``attached``.
        settings: what is wanted.
        read: gives the frames of a segment.
    """

    def __init__(
        self,
        choice: EngineOptions,
        attached: AttachedFiles,
        settings: Settings,
        read: Read = read_segment,
    ) -> None:
        self._choice = choice
        self._attached = attached
        self._settings = settings
        self._read = read
        self._localizer: Localizer | None = None

    def open(self) -> Opened:
        """Compile the engine.

        Raises:
            SightlineError: see ``engines.choose.open_localizer``.
        """
        batch = 1 if self._settings.batch is None else self._settings.batch
        choice = unpacked(self._choice, self._attached)
        found = open_localizer(choice, streams=0, batch=batch)
        self._localizer, engine = found, found.engine
        digest = settings_digest(self._settings, found)
        return Opened(digest, engine.backend, engine.precision, engine.device, found.size_px)

    def work(self, clip: Clip, segment: Segment, states: Mapping[int, State]) -> dict[str, bytes]:
        """Do a segment; see ``run_segments``.

        Returns:
            The content of each file by its name.

        Raises:
            SourceError: the source cannot be read here.
            OutputError: this machine's temporary folder is full.
        """
        assert self._localizer is not None  # it was opened
        here = replace(clip, spec=local_path(clip.spec))
        with TemporaryDirectory(prefix="sightline-") as folder:
            for _ in run_segments(
                here, [segment], self._localizer, self._settings, Path(folder), self._read, states
            ):
                pass
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def find_digest(spec: str) -> str:
    """Of a source's content, wherever it lies; see ``digest_of``."""
    return digest_of(local_path(spec))


def find_plan(spec: str, digest: str, window: Window, whole: bool) -> Clip:
    """The plan of a source, wherever it lies; see ``make_plan``."""
    return replace(make_plan(local_path(spec), digest, window, whole), spec=spec)


def attached(choice: EngineOptions) -> dict[str, tuple[str, bytes]]:
    """Name and content of each file that ``choice`` names, to go along to other machines: by the
    option, and beside its file by ``OPTION/NAME``.
    """
    named = {name: getattr(choice, name) for name in ATTACHED}
    found = {
        name: (Path(path).name, Path(path).read_bytes())
        for name, path in named.items()
        if isinstance(path, str) and Path(path).is_file()
    }
    if "model" in found:  # what lies beside it says what it takes, or holds its weights
        path = Path(choice.model)
        beside = {place.name: place for place in sidecars_of(path)} | files_beside(path)
        found.update({f"model/{n}": (n, place.read_bytes()) for n, place in beside.items()})
    return found


def unpacked(choice: EngineOptions, files: AttachedFiles) -> EngineOptions:
    """``choice`` with files that are on this machine."""
    paths = {}
    for option in files.keys() & set(ATTACHED):
        together = [files[key] for key in sorted(files) if key.partition("/")[0] == option]
        digest = hashlib.blake2b(b"".join(content for _, content in together), digest_size=20)
        folder = cache_dir() / "carried" / digest.hexdigest()
        for name, content in together:
            if not (folder / name).exists():
                with whole_file(folder / name) as part:
                    part.write_bytes(content)
        paths[option] = str(folder / files[option][0])
    return replace(choice, **paths)  # type: ignore[arg-type]


QUEUED = 2
"""Segments that a worker has at a time: one that it works on, and one that waits for it."""
MOST_LOST = 5
"""So many workers in a row may die before they are ready."""

Ref = Any
"""A reference to a result that is not there yet, for ``Cluster.get``."""


class LostError(Exception):
    """The process or the machine that worked on it is gone."""


class RemoteWorker(Protocol):
    """A ``Worker`` in another process. Its calls return at once, with a reference."""

    def open(self) -> Ref: ...

    def work(self, clip: Clip, segment: Segment, states: Mapping[int, State]) -> Ref: ...


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
    """What is known here of a worker.

    Attributes:
        worker: does the segments.
        ready: whether its engine is ready.
        segments: those that it has; it works on the first.
        source: name of the source that it worked on last. It may have a copy of that.
        lost_with: the segment that it worked on when it died.
    """

    worker: RemoteWorker
    ready: bool = False
    segments: deque[Segment] = field(default_factory=deque)
    source: str = ""
    lost_with: Segment | None = None


@dataclass
class WorkerPool:
    """The workers of a batch.

    Args:
        cluster: where they are.
        most: at most so many; None for as many as there is room for.
        console: gets what a user should know.

    Attributes:
        opened: what the first worker said of itself. All others must give the same results.
        handles: the workers.
    """

    cluster: Cluster
    most: int | None
    console: Console
    opened: Opened | None = None
    handles: list[WorkerHandle] = field(default_factory=list)
    _lost_unready: int = 0

    def start_workers(self, segments: int) -> dict[Ref, WorkerHandle]:
        """Start workers until there is one for each of ``segments``, or no room is left.

        Until the first one's engine is open, it stays the only one: the others would fail, too.

        Returns:
            The new workers, each by a reference to its ``Opened``, for ``add``.

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
        allowed = room if self.opened else 1
        started = {}
        while len(self.handles) < min(room, allowed, max(1, segments)):
            handle = WorkerHandle(self.cluster.start_worker())
            self.handles.append(handle)
            started[handle.worker.open()] = handle
        return started

    def add(self, handle: WorkerHandle, ref: Ref) -> None:
        """Use a new worker, unless its engine could not be opened or would give other results.

        Args:
            handle: the worker.
            ref: its ``Opened``, or the error, is there.

        Raises:
            SightlineError: the first worker's engine cannot be opened, or several workers in a row
                died before their engines were ready.
        """
        try:
            opened: Opened = self.cluster.get(ref)
        except LostError as error:
            self.remove(handle)
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

    def _refuse(self, handle: WorkerHandle, reason: str) -> None:
        """Stop a worker. Its handle stays, so that no other one is started in its place."""
        self.console.print(f"a worker is not used: {reason}", style="yellow", soft_wrap=True)
        self.cluster.stop_worker(handle.worker)

    def remove(self, handle: WorkerHandle) -> None:
        """Forget a worker that is gone. ``lost_with`` says which segment it worked on."""
        if handle in self.handles:
            handle.lost_with = handle.segments[0] if handle.segments else None
            self.handles.remove(handle)
            self.cluster.stop_worker(handle.worker)

    def free_worker(self) -> WorkerHandle | None:
        """The worker with the fewest segments; None where none can take another one."""
        found = min(
            (handle for handle in self.handles if handle.ready),
            key=lambda handle: len(handle.segments),
            default=None,
        )
        return found if found and len(found.segments) < QUEUED else None
