"""Chooses the files of a folder, glob or archive that are read as images, and names the others with
the reason.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".bmp",
        ".dib",
        ".webp",
        ".gif",
        ".avif",
        ".tif",
        ".tiff",
        ".jp2",
    }
    | {".pbm", ".pgm", ".ppm", ".pnm", ".heic", ".heif"}
)
VIDEO_SUFFIXES = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".ts",
        ".m2ts",
        ".mts",
        ".mpg",
        ".mpeg",
        ".vob",
        ".wmv",
        ".flv",
        ".3gp",
    }
    | {".ogv", ".mjpeg", ".mjpg", ".h264", ".hevc", ".y4m"}
)
ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
NAMES_IN_LINE = 4
MOST_NAMES = 1000
"""Of files in subfolders, which are looked for by name only."""
HIDDEN = "hidden"
SUBFOLDER = "in a subfolder (FOLDER/**/* reads those too)"
VIDEO = "a video (name it by itself)"
ARCHIVE = "an archive (name it by itself)"
OTHER = "no image by its name"
LeftOut = Mapping[str, Sequence[str]]
"""Names by the reason why they are not read."""


def why_not(name: str, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> str:
    """Why a file is not read; empty if it is."""
    path = PurePath(name)
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return HIDDEN
    if suffix in suffixes:
        return ""
    return VIDEO if suffix in VIDEO_SUFFIXES else ARCHIVE if suffix in ARCHIVE_SUFFIXES else OTHER


def left_out(names: Iterable[str], folders: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Those of the names that are not read, and images and videos in folders that are not
    entered.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        reason = why_not(name)
        if reason:
            found.setdefault(reason, []).append(name)
    for folder in sorted(folders):
        reason = HIDDEN if folder.name.startswith(".") else SUBFOLDER
        inside = [f"{folder.name}/"] if reason == HIDDEN else list(_media_in(folder))
        if inside:
            found.setdefault(reason, []).extend(inside[: MOST_NAMES - len(found.get(reason, ()))])
    return found


def _media_in(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            if why_not(name) in ("", VIDEO):
                yield (Path(place) / name).relative_to(folder.parent).as_posix()


def in_words(found: LeftOut, read: int) -> list[str]:
    """One line that counts and names them; none if there are none."""
    count = sum(len(names) for names in found.values())
    if not count:
        return []
    parts = []
    for reason, names in found.items():
        shown = ", ".join(names[:NAMES_IN_LINE])
        more = f" and {len(names) - NAMES_IN_LINE} more" if len(names) > NAMES_IN_LINE else ""
        parts.append(f"{len(names)} {reason}: {shown}{more}")
    return [f"{count} of {count + read} files are not read: {'; '.join(parts)}"]


def several_in_words(counts: Mapping[str, int]) -> list[str]:
    """One line that names files of several pictures, given how many each file holds; none if there
    are none.
    """
    several = [f"{PurePath(name).name} ({count})" for name, count in counts.items() if count > 1]
    if not several:
        return []
    more = f" and {len(several) - NAMES_IN_LINE} more" if len(several) > NAMES_IN_LINE else ""
    return [
        f"of {len(several)} files with several pictures the first is read:"
        f" {', '.join(several[:NAMES_IN_LINE])}{more}"
    ]
