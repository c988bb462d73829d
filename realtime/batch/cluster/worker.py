"""A worker: one engine in a process of its own. It takes a segment and returns the files of its
result.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from engines.choose import open_localizer
from engines.downloads import cache_dir
from engines.files import whole_file
from engines.localizer import Localizer
from engines.options import EngineOptions
from realtime.batch.cluster.storage import local_path
from realtime.batch.decode import Read, read_segment
from realtime.batch.encode import run_segments
from realtime.batch.options import Settings, settings_digest
from realtime.batch.plan import Window, digest_of, make_plan
from realtime.batch.segment import Clip, Segment

ATTACHED = ("model", "weights", "head", "calibration")
"""Fields of a ``EngineOptions`` that may name a file."""
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
        self._choice, self._attached, self._settings, self._read = choice, attached, settings, read
        self._localizer: Localizer | None = None

    def open(self) -> Opened:
        """Compile the engine.

        Raises:
            SightlineError: see ``engines.choose.open_localizer``.
        """
        found = open_localizer(
            unpacked(self._choice, self._attached), streams=0, batch=self._settings.batch
        )
        self._localizer, engine = found, found.engine
        digest = settings_digest(self._settings, found)
        return Opened(digest, engine.backend, engine.precision, engine.device, found.size_px)

    def work(self, clip: Clip, segment: Segment) -> dict[str, bytes]:
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
                here, [segment], self._localizer, self._settings, Path(folder), self._read
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
    """Name and content of each file that ``choice`` names, to go along to other machines."""
    named = {field: getattr(choice, field) for field in ATTACHED}
    return {
        field: (Path(path).name, Path(path).read_bytes())
        for field, path in named.items()
        if isinstance(path, str) and Path(path).is_file()
    }


def unpacked(choice: EngineOptions, files: AttachedFiles) -> EngineOptions:
    """``choice`` with files that are on this machine."""
    paths = {}
    for field, (name, content) in files.items():
        path = cache_dir() / "carried" / hashlib.blake2b(content, digest_size=20).hexdigest() / name
        if not path.exists():
            with whole_file(path) as part:
                part.write_bytes(content)
        paths[field] = str(path)
    return replace(choice, **paths)  # type: ignore[arg-type]
