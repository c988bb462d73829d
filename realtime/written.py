"""Knows which files of a folder Sightline wrote. All others are the user's and are never replaced.

``FOLDER/NAME/manifest.json`` belongs to the results called NAME. ``results`` and ``earlier`` give
size and time of change of each file as it was written; ``claims`` names files that a run was about
to write when it ended.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engines.files import read_object

FOLDER = ".sightline"
MANIFEST = "manifest.json"
Stamp = tuple[int, int]
"""A file's size in bytes, and when it was last changed, in ns; 0 where that is not known."""
Look = Callable[[Path], Stamp | None]
"""Gives a file's stamp; None where there is nothing of that name."""
CLOCK_NS = 2_000_000_000  # file systems keep times as coarsely as that


def stamp_of(path: Path) -> Stamp | None:
    """Of what has that name on this machine, be it a file, a folder or a link that leads
    nowhere.
    """
    try:
        found = path.stat() if path.exists() else path.lstat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def stamps_of(manifest: Mapping[str, Any], *kinds: str) -> dict[str, Stamp]:
    """What a manifest says of files, by name; what is damaged is left out. An older one knows only
    sizes.
    """
    found: dict[str, Stamp] = {}
    for kind in kinds:
        entries = manifest.get(kind)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            match entry:
                case int(size) | [int(size)]:
                    found[name] = size, 0
                case [int(size), int(changed_ns)]:
                    found[name] = size, changed_ns
    return found


def same_stamp(one: Stamp | None, other: Stamp | None) -> bool:
    """Whether a file is as it was."""
    if one is None or other is None or one[0] != other[0]:
        return False
    return not one[1] or not other[1] or abs(one[1] - other[1]) <= CLOCK_NS


def written_names(manifest: Mapping[str, Any]) -> set[str]:
    """Names of all files that a manifest speaks of."""
    claims = manifest.get("claims")
    claimed = (name for name in claims if isinstance(name, str)) if isinstance(claims, list) else ()
    return {*stamps_of(manifest, "earlier", "results"), *claimed}


def is_written(manifest: Mapping[str, Any], path: Path, look: Look = stamp_of) -> bool:
    """Whether what has that name now is what the manifest's results wrote there, and nobody changed
    it since.
    """
    claims = manifest.get("claims")
    if isinstance(claims, list) and path.name in claims:
        return True
    return same_stamp(stamps_of(manifest, "earlier", "results").get(path.name), look(path))


def written_in(folder: Path) -> frozenset[str]:
    """Names of the files of a folder that Sightline wrote there."""
    return frozenset(_written(folder))


def _written(folder: Path) -> Iterator[str]:
    for path in folder.glob(f"{FOLDER}/*/{MANIFEST}"):
        manifest = read_object(path)
        yield from (name for name in written_names(manifest) if is_written(manifest, folder / name))


def without_written(paths: Iterable[Path]) -> list[Path]:
    """The paths but those that Sightline wrote."""
    known: dict[Path, frozenset[str]] = {}
    kept = []
    for path in paths:
        if path.parent not in known:
            known[path.parent] = written_in(path.parent)
        if path.name not in known[path.parent]:
            kept.append(path)
    return kept
