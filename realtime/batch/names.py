"""Names of results: the source's name, with a number behind it where another's files have that
name.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engines.errors import OutputError
from engines.files import file_key, numbered
from engines.text import displayable, shown
from realtime.batch.job import Job, alone
from realtime.sources.spec import kind_of, name_of
from realtime.written import FOLDER, Look, stamp_of, without_written


def with_ending(stem: Path, ending: str) -> Path:
    """``stem`` with an ending behind it, dots in the stem left alone."""
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
        self._out, self._notify, self._look, self._fetch = out, notify, look, fetch
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
        """The job of a source, the one that there is or a new one.

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
        """No other run works on that job meanwhile; what is known of it now.

        Raises:
            OutputError: another one does, or did so while the name was chosen.
        """
        with alone(self._out, job.name):
            now = job.again()
            if now.found == "other":
                raise OutputError(
                    f"another run has just taken the name {self._out / job.name}: run the same"
                    " command again"
                )
            yield now


def place_of(spec: str) -> str:
    """By what a source is known again: a file's path without links, or its address."""
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
