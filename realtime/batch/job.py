"""What is known of one source's work on disk: a manifest, a record for each segment that is done, and what came of it.

Every file of it is written whole, so that a run can be killed at any moment: the next one goes on with the segments that have
no record.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engines.base import OutputError
from engines.files import whole_file
from realtime.batch.clip import Clip, Segment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = ".sightline"
MANIFEST = "manifest.json"


class Job:
    """The work on one source.

    Args:
        out: folder of the results; ``out/.sightline/NAME`` is the job's own.
        name: of the results.
        source_digest, settings_digest: what is there of other content or settings does not count.
        size_of: a result's size, -1 where it is not there; for results that lie elsewhere.

    Attributes:
        folder: for the segments' files.
        source_digest: as given.
        clip: the plan, once there is one.
        summary: of a job whose results are all there, else None.
    """

    def __init__(
        self, out: Path, name: str, source_digest: str, settings_digest: str, size_of: Callable[[Path], int] | None = None
    ) -> None:
        self.folder = out / FOLDER / name
        self.source_digest = source_digest
        self._key = {"source": source_digest, "settings": settings_digest}
        manifest = _read(self.folder / MANIFEST)
        same = {key: manifest.get(key) for key in self._key} == self._key
        self.clip = _clip_of(manifest) if same else None
        self._sizes: dict[str, int] = manifest.get("results", {}) if same else {}
        size_of = size_of or _size
        there = bool(self._sizes) and all(size_of(out / name) == size for name, size in self._sizes.items())
        self.summary: dict[str, Any] | None = manifest.get("summary") if there else None
        if there:
            self._tidy()  # a run may have been killed before it could

    def begin(self, clip: Clip) -> None:
        """Keep a plan; what was done by another is thrown away.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.clip, self.summary = clip, None
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
        except OSError as error:
            raise OutputError(f"cannot clear {self.folder}: {error.strerror}") from error
        self._write({"clip": clip.json()})

    def record(self, segment: Segment) -> dict[str, Any] | None:
        """What was written when the segment was done; None if it is not, or one of its files is not whole."""
        record = _read(self.folder / f"{segment.index:05d}.json")
        pieces = record.get("pieces", {}).values()
        whole = bool(pieces) and all(_size(self.folder / piece["file"]) == piece["bytes"] for piece in pieces)
        return record if whole else None

    def todo(self) -> list[Segment]:
        """Segments that are not done."""
        return [segment for segment in self._segments if self.record(segment) is None]

    def records(self) -> list[dict[str, Any]]:
        """Those of all segments, in order; all must be done."""
        found = [self.record(segment) for segment in self._segments]
        return [record for record in found if record is not None]

    def end(self, out: Path, files: Sequence[Path], summary: dict[str, Any]) -> None:
        """The results are there: the pieces are thrown away.

        Raises:
            OutputError: the manifest cannot be written.
        """
        self._sizes = {str(path.relative_to(out)): path.stat().st_size for path in files}
        self._write({"results": self._sizes, "summary": summary})
        self._tidy()

    def _tidy(self) -> None:
        """Throw away what was needed until the results were there."""
        for path in self.folder.iterdir():
            if path.name != MANIFEST:
                with suppress(OSError):
                    path.unlink()

    def discard(self) -> None:
        """Throw away a job of which no frame was of use."""
        if not any(record["outcomes"].get("shown") for record in self.records()):
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _segments(self) -> Sequence[Segment]:
        return self.clip.segments if self.clip else ()

    def _write(self, more: dict[str, Any]) -> None:
        with whole_file(self.folder / MANIFEST) as part:
            part.write_text(json.dumps({**self._key, **more}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def alone(out: Path, name: str) -> Iterator[None]:
    """No other run works on that job meanwhile, where the system has such locks; they end with the process.

    Raises:
        OutputError: another one does, or the folder cannot be written.
    """
    path = out / FOLDER / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run works on {out / name}: wait for it, or use another --out") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # unless a job is there
                path.parent.rmdir()


def _clip_of(manifest: dict[str, Any]) -> Clip | None:
    try:
        return Clip.from_json(manifest["clip"])
    except (KeyError, TypeError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _size(path: Path) -> int:
    """-1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
