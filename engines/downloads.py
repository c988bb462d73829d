"""Files from the web: kept in the user's cache, resumed where they stopped, checked before they count."""

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from engines.base import DownloadError

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 20


@dataclass(frozen=True)
class Download:
    """A file on the web.

    Attributes:
        url: where it is.
        checksum: ``sha256:`` or ``md5:``, and the first or all hexadecimal digits.
        file: the name it is kept under.
    """

    url: str
    checksum: str
    file: str


def cache_dir() -> Path:
    """Where downloads and built engines are kept: ``SIGHTLINE_CACHE``, else ``sightline`` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SIGHTLINE_CACHE") or Path(base) / "sightline")


def downloaded(source: Download, folder: Path) -> Path:
    """The file in ``folder``, where a user may have put it, else from the web; it appears there only with the right checksum.

    A download that stops leaves ``FILE.part`` behind, and the next one goes on from there.

    Raises:
        DownloadError: offline, cut off, or the checksum differs; the message says what to put where.
    """
    target = folder / source.file
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.part")
    by_hand = f"fetch it by hand and put it at {target}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(source.url, part)
        right = _digest(part, source.checksum).startswith(source.checksum)
        if right:
            part.replace(target)
        else:
            part.unlink()
    except (OSError, HTTPException) as error:
        again = f"try again to go on after {_size(part)} bytes, or " if _size(part) else ""
        raise DownloadError(f"cannot download {source.url} ({_reason(error)}): {again}{by_hand}") from error
    if not right:
        raise DownloadError(f"{source.url} came with a checksum that is not {source.checksum}: try again, or {by_hand}")
    return target


def _fetch(url: str, part: Path) -> None:
    """Append what ``part`` lacks; write it anew where the server does not continue files.

    Raises:
        OSError, HTTPException: the server cannot be reached, refuses, or hangs up early.
    """
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            error.close()
            return  # nothing is left to fetch; the checksum tells whether it is the file
        raise
    with reply, _progress() as bar:
        resumed = reply.status == HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        rest = reply.headers["Content-Length"]
        total = have + int(rest) if rest else None
        task = bar.add_task(part.stem, total=total, completed=have)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := reply.read(CHUNK_BYTES):
                file.write(chunk)
                bar.advance(task, len(chunk))
        # A connection that closes early looks to ``read`` like the end of the file.
        if total is not None and _size(part) < total:
            raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path, checksum: str) -> str:
    """The file's checksum in the notation of ``Download``, by the same algorithm as ``checksum``."""
    algorithm = checksum.partition(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _reason(error: Exception) -> str:
    """``HTTP Error 404: Not Found``, or the system's words under urllib's."""
    return str(error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)) or type(error).__name__


def _progress() -> Progress:
    """On standard error: standard output belongs to ``--json``."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))
