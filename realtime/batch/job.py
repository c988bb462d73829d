"""The job of one source: its folder, its manifest, which of its segments are done, and the name of
its results.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from engines.errors import OutputError, SightlineError, SourceError
from engines.files import file_key, numbered, read_object, whole_file
from engines.text import MASK, displayable, in_words, masked, shown
from realtime.batch.encode import read_record
from realtime.batch.segment import Clip, Segment
from realtime.sources.spec import kind_of, name_of
from realtime.written import (
    FOLDER,
    MANIFEST,
    Look,
    Stamp,
    is_written,
    stamp_of,
    stamps_of,
    without_written,
    written_names,
)

USER_AND_PASSWORD = re.compile(r"(?<=://)([^/?#:@]*):[^/?#]*@")
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Results of no source can be written any more: the disk or the quota is full, or the file system
became read-only.
"""


BEGUN = "begun.json"
MOST_BEGUN = 2
"""After so many runs that ended while they worked on a source, the other sources come first."""


def ends_run(error: Exception) -> bool:
    """Whether the sources that are left would fail by this error, too."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return (
        isinstance(error, OutputError | OSError)
        and isinstance(cause, OSError)
        and cause.errno in FULL_ERRNOS
    )


def failed(error: BaseException) -> dict[str, str | int | bool]:
    """The summary of a source that failed."""
    return {"error": in_words(error), "frames": 0, "failed": 0, "interrupted": False}


def as_sightline_error(error: Exception) -> SightlineError:
    """An error of any kind as one that the command line shows in one line. One that is not a
    ``SightlineError`` is a defect of ours; its text says of what kind it is.
    """
    return error if isinstance(error, SightlineError) else SourceError(in_words(error))


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Job:
    """The work on one source.

    Args:
        out: folder of the results; ``out/.sightline/NAME`` is the job's own.
        name: of the results.
        source_digest, settings_digest: what is there of other content or settings does not count.
        where: the source's path or address, by which it is known when its content has changed. The
            manifest holds it without secrets, and a digest of it where it has any.
        look: what is known of a result; for results that lie elsewhere.

    Attributes:
        name, folder: of the results; for the segments' files.
        source_digest: as given.
        clip: the plan, once there is one.
        summary: of a job whose results are all there, else None.
        found: there was a job of this name already: "same" source, the same "path" with other
            content, "other", or "" for none.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        source_digest: str,
        settings_digest: str,
        where: str = "",
        look: Look = stamp_of,
    ) -> None:
        self.name, self.folder = name, out / FOLDER / name
        self.source_digest = source_digest
        self._look = look
        self._out = out
        self._key = {"source": source_digest, "settings": settings_digest}
        self._where = where
        self._place = _place(where)
        self._manifest = manifest = read_object(self.folder / MANIFEST)
        same = {key: manifest.get(key) for key in self._key} == self._key
        clip = _clip_of(manifest) if same else None
        if clip is not None and MASK in clip.spec:
            clip = replace(clip, spec=where)
        self.clip = clip
        results = stamps_of(manifest, "results") if same else {}
        there = bool(results) and all(
            (look(out / file) or (-1,))[0] == size for file, (size, _) in results.items()
        )
        summary = manifest.get("summary") if there else None
        self.summary: dict[str, Any] | None = summary if isinstance(summary, dict) else None
        if self.summary is not None:
            self._tidy()  # a run may have been killed before it could

    def reloaded(self) -> Self:
        """The same job, read from the disk again."""
        return type(self)(
            self._out, self.name, self.source_digest, self._key["settings"], self._where, self._look
        )

    @property
    def found(self) -> str:
        """See the attributes of ``Job``."""
        if not isinstance(self._manifest.get("source"), str):
            return ""
        if self._manifest["source"] == self.source_digest:
            return "same"
        if not self._where:
            return "other"
        known = {key: self._manifest.get(key) for key in self._place}
        unmasked = self._manifest.get("path") == self._where  # as earlier versions wrote it
        return "path" if unmasked or known == self._place else "other"

    def may_write(self, path: Path) -> bool:
        """Whether a result may have that name: nothing has it, or what this job wrote, or a file
        that is empty.
        """
        stamp = self._look(path)
        return (
            stamp is None
            or (stamp[0] == 0 and path.is_file())
            or is_written(self._manifest, path, self._look)
        )

    @property
    def runs_died(self) -> int:
        """How many runs in a row died while they worked on it, and had finished nothing more of it:
        crashed, or were killed for want of memory.
        """
        begun = read_object(self.folder / BEGUN)
        times = begun.get("times")
        same = {key: begun.get(key) for key in self._key} == self._key
        more = begun.get("segments") != self._finished
        return times if isinstance(times, int) and same and not more else 0

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Keep a record meanwhile that the work was begun; only the end of the process leaves it.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = self.folder / BEGUN
        record = {**self._key, "times": self.runs_died + 1, "segments": self._finished}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            yield
        finally:
            with suppress(OSError):  # the folder stays where something is in it
                path.unlink(missing_ok=True)
                self.folder.rmdir()

    @property
    def _finished(self) -> int:
        """Segments that have a record, damaged ones too: to read them all would take long."""
        return len(list(self.folder.glob("[0-9]*.json"))) if self.clip else 0

    def begin(self, clip: Clip) -> None:
        """Keep a plan, and remove what was done by an earlier one.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.clip, self.summary = clip, None
        try:
            for path in self.folder.iterdir() if self.folder.exists() else ():
                if path.name not in (MANIFEST, BEGUN):
                    path.unlink()
        except OSError as error:
            raise OutputError(f"cannot clear {self.folder}: {error.strerror}") from error
        self._write({"clip": _without_secrets(clip)})

    def record(self, segment: Segment) -> dict[str, Any] | None:
        """What was written when the segment was done; None if it is not, or what was written is
        damaged.
        """
        return read_record(self.folder, self.clip, segment) if self.clip else None

    def todo(self) -> list[Segment]:
        """The segments that are not done."""
        return [segment for segment in self._segments if self.record(segment) is None]

    def states(self, segments: Sequence[Segment]) -> dict[int, Any]:
        """What tracking knew at the end of the segments before these, by their numbers, as
        ``run_segments`` needs it; those that are not done are left out.
        """
        before = {segment.index - 1 for segment in segments}
        found = {each.index: self.record(each) for each in self._segments if each.index in before}
        return {index: record["tracking"] for index, record in found.items() if record}

    def records(self) -> list[dict[str, Any]]:
        """The records of all segments, in order. All segments must be done.

        Raises:
            OutputError: one has been damaged since.
        """
        found = [self.record(segment) for segment in self._segments]
        if None in found:
            raise OutputError(
                f"{self.folder}: what was written there was changed or damaged by something else"
            )
        return [record for record in found if record is not None]

    def claim(self, files: Iterable[Path]) -> None:
        """Keep the names of results that are about to be written, so that they are known as ours
        even if the run is killed meanwhile.

        Raises:
            OutputError: one of them belongs to somebody else by now, or the folder cannot be
                written.
        """
        paths = list(files)
        for path in paths:
            if not self.may_write(path):
                raise OutputError(f"{path} has appeared, and is not Sightline's: move it away")
        more = {"clip": _without_secrets(self.clip)} if self.clip else {}
        self._write({**more, "claims": [path.name for path in paths]})

    def end(self, files: Sequence[Path], summary: dict[str, Any]) -> None:
        """Keep which results are there, and remove the pieces.

        Raises:
            OutputError: the manifest cannot be written.
        """
        stamps = {path.name: self._look(path) for path in files}
        self._write({"results": stamps, "summary": summary})
        self._tidy()

    def _tidy(self) -> None:
        """Remove what was needed until the results were there."""
        for path in self.folder.iterdir():
            if path.name != MANIFEST:
                with suppress(OSError):
                    path.unlink()

    def discard(self) -> None:
        """Remove the job, unless one of its frames was shown or it has results of earlier runs."""
        records = filter(None, map(self.record, self._segments))
        if not any(record["outcomes"].get("shown") for record in records) and not self._earlier():
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _segments(self) -> Sequence[Segment]:
        return self.clip.segments if self.clip else ()

    def _earlier(self) -> dict[str, Stamp]:
        """Files that this job wrote before and that are still as they were: they stay its own."""
        found = {}
        for name in written_names(self._manifest):
            stamp = self._look(self._out / name)
            if stamp is not None and is_written(self._manifest, self._out / name, self._look):
                found[name] = stamp
        return found

    def _write(self, more: dict[str, Any]) -> None:
        new = {**self._key, **self._place, "earlier": self._earlier(), **more}
        with whole_file(self.folder / MANIFEST) as part:
            part.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
        self._manifest = json.loads(json.dumps(new))


@contextmanager
def only_run_on(out: Path, name: str) -> Iterator[None]:
    """Keep other runs from that job meanwhile, where the system has locks of files. Such a lock
    ends with the process.

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
            raise OutputError(
                f"another run works on {out / name}: wait for it, or use another folder",
                option="out",
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # unless a job is there
                path.parent.rmdir()


def _place(where: str) -> dict[str, str]:
    """What the manifest says of a source's path or address.

    An address with secrets cannot be known again by what is left without them: two containers of
    one storage may look alike then. So a digest of the address is kept, without its password, which
    may change.
    """
    path = masked(where)
    if path == where:
        return {"path": where}
    named = USER_AND_PASSWORD.sub(r"\1@", where)
    return {"path": path, "place": hashlib.blake2b(named.encode(), digest_size=20).hexdigest()}


def _without_secrets(clip: Clip) -> dict[str, Any]:
    return {**clip.json(), "spec": masked(clip.spec)}


def _clip_of(manifest: dict[str, Any]) -> Clip | None:
    try:
        return Clip.from_json(manifest["clip"])
    except (KeyError, TypeError, ValueError):
        return None


def with_ending(stem: Path, ending: str) -> Path:
    """``stem`` with an ending behind it. Dots in the stem are left alone."""
    return stem.with_name(stem.name + ending)


class Naming:
    """Gives each source of a run a name of its own in a folder, the same one whenever it is run
    again.

    Results keep to a source by its content, and by its path where its content has changed. No name
    is given under which a file would be replaced that is not this source's result.

    Args:
        out: folder of the results.
        notify: gets a line where a name is another than the source's.
        inputs: files that the run reads.
        look: what is known of a result, see ``Job``.
        fetch: gets what other machines left in a job's folder.
    """

    def __init__(
        self,
        out: Path,
        notify: Callable[[str], None],
        inputs: Iterable[str | Path] = (),
        look: Look = stamp_of,
        fetch: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._out = out
        self._notify = notify
        self._look = look
        self._fetch = fetch
        self._inputs = {key for path in inputs if (key := file_key(path))}
        self._given: set[str] = set()

    def job(
        self,
        spec: str,
        endings: Collection[str],
        digest: str,
        settings_digest: str = "",
        where: str = "",
    ) -> Job:
        """The job of a source: the one that there is, or a new one.

        Args:
            spec: of the source, as typed.
            endings: of the files to be written.
            digest: see ``Job``; of what can be read once only, something that never was.
            settings_digest: likewise.
            where: likewise.
        """
        base, renewed = name_of(spec), None
        for name in numbered(base):
            files = [with_ending(self._out / name, ending) for ending in endings]
            if any(file.name.casefold() in self._given for file in files):
                continue
            self._fetch(self._out / FOLDER / name)
            job = Job(self._out, name, digest, settings_digest, where, self._look)
            usable = all(
                job.may_write(file) and file_key(file) not in self._inputs for file in files
            )
            if job.found == "same" and (usable or job.summary is not None):
                break
            if job.found == "path" and usable and renewed is None:
                renewed = job
            if not job.found and usable:
                job = renewed or job
                break
        self._given |= {with_ending(Path(job.name), ending).name.casefold() for ending in endings}
        if job.name != base:
            source = shown(spec)
            self._notify(
                f"{source}: its results are called {job.name}, because {base} is taken in"
                f" {self._out}"
            )
        return job

    @contextmanager
    def holding(self, job: Job) -> Iterator[Job]:
        """Keep other runs from a job meanwhile. Gives the job as it is on the disk now.

        Raises:
            OutputError: another one does, or did so while the name was chosen.
        """
        with only_run_on(self._out, job.name):
            now = job.reloaded()
            if now.found == "other":
                raise OutputError(
                    f"another run has just taken the name {self._out / job.name}: run the same"
                    " command again"
                )
            yield now


def place_of(spec: str) -> str:
    """What a source is known again by: a file's path without links, or its address."""
    return spec if kind_of(spec).address else os.path.realpath(spec)


def without_results(specs: Sequence[str], notify: Callable[[str], None]) -> list[str]:
    """The sources but those that are results of earlier runs, as ``*.mp4`` finds them; all, where
    they are nothing else.
    """
    files = [Path(spec) for spec in specs if Path(spec).is_file()]
    results = {str(path) for path in files} - {str(path) for path in without_written(files)}
    kept = [spec for spec in specs if str(Path(spec)) not in results]
    if not kept or not results:
        return list(specs)
    for name in sorted(results):
        notify(
            f"{displayable(name)} is left out: it is a result of Sightline's (to work on it, name"
            " it alone)"
        )
    return kept


def overview_path(
    out: Path,
    notify: Callable[[str], None],
    look: Look = stamp_of,
    read: Callable[[Path], bytes] = Path.read_bytes,
) -> Path:
    """Where the summary of all sources goes: ``summary.json``, or with a number where that is a
    file of the user's.
    """
    paths = (out / f"{name}.json" for name in numbered("summary"))
    found = next(path for path in paths if look(path) is None or _is_overview(path, read))
    if found.stem != "summary":
        notify(
            f"the summary of all sources is called {found.name}: {out / 'summary.json'} is not"
            " Sightline's"
        )
    return found


def _is_overview(path: Path, read: Callable[[Path], bytes]) -> bool:
    """Whether it is a list such as ``process_all`` gives."""
    try:
        found = json.loads(read(path) or b"[]")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, list) and all(
        isinstance(each, dict) and {"source", "frames"} <= each.keys() for each in found
    )
