"""Shared storage by address, such as ``s3://bucket/film.mp4``: fetches sources and stores whole
results.

A put of an object store is atomic; on other storage a file gets its name when it is complete.
"""

import hashlib
import json
import os
import posixpath
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.downloads import cache_dir
from engines.errors import OutputError, SightlineError, SourceError, install_extra
from engines.files import whole_file
from realtime.written import Stamp, stamp_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "sftp", "file", "memory"}
)
"""Of addresses that are files. Others, such as ``rtsp://`` and ``http://``, are streams."""
MOST_CACHED_GB = 50.0
IN_USE_S = 3600.0
"""A fetched file is not thrown away before it has lain untouched so long."""


def is_shared(spec: str) -> bool:
    """Whether it is the address of a file on shared storage."""
    return "://" in spec and spec.split("://", 1)[0].lower() in SCHEMES


def filesystem(address: str) -> "tuple[AbstractFileSystem, str]":
    """What reads and writes it, and its path there. For ``s3://`` that is s3fs where it is
    installed, else pyarrow.

    Raises:
        SightlineError: a package is missing, or the storage is not there.
    """
    try:
        import fsspec
    except ImportError as error:
        raise SightlineError(f"{address} needs fsspec: {install_extra('cluster')}") from error
    try:
        found, path = fsspec.url_to_fs(address)
        return found, str(path)
    except ImportError as error:
        if address.split("://", 1)[0].lower() not in ("s3", "s3a"):
            raise SightlineError(f"{address} needs another package: {error}") from error
        return _arrow_s3(), address.split("://", 1)[1]
    except (OSError, ValueError) as error:
        raise SightlineError(f"cannot reach {address}: {error}") from error


def _arrow_s3() -> "AbstractFileSystem":
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    found: AbstractFileSystem = ArrowFSWrapper(
        S3FileSystem(
            endpoint_override=os.environ.get("AWS_ENDPOINT_URL"), allow_bucket_creation=True
        )
    )
    return found


def expanded(specs: Sequence[str]) -> list[str]:
    """``specs``, addresses with ``*`` in them replaced by the files they match, in order.

    Raises:
        SourceError: one matches nothing.
    """
    found = []
    for spec in specs:
        if not (is_shared(spec) and any(sign in spec for sign in "*?[")):
            found.append(spec)
            continue
        files, pattern = filesystem(spec)
        matches = sorted(str(match) for match in files.glob(pattern))
        if not matches:
            raise SourceError(f"{spec} matches no file")
        scheme = spec.split("://", 1)[0]
        found += [f"{scheme}://{match.removeprefix(f'{scheme}://')}" for match in matches]
    return found


def identity(spec: str) -> str:
    """What tells a file on shared storage from a later one of its name: etag or time of change, and
    size.

    Raises:
        SourceError: it is not there.
    """
    files, path = filesystem(spec)
    try:
        info = files.info(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {spec}: {error}") from error
    if info.get("type") == "directory":
        raise SourceError(f"{spec} is a folder: name its files, as in {spec.rstrip('/')}/*.mp4")
    known = {
        name: str(info[name])
        for name in ("ETag", "etag", "LastModified", "mtime", "created")
        if info.get(name)
    }
    return hashlib.blake2b(
        json.dumps([spec, info.get("size"), known]).encode(), digest_size=20
    ).hexdigest()


def local_path(spec: str) -> str:
    """Where ``spec`` can be opened on this machine: itself, or a copy in the cache, fetched once by
    whoever comes first.

    Raises:
        SourceError: it cannot be fetched.
    """
    if not is_shared(spec):
        return spec
    from filelock import FileLock

    folder = cache_dir() / "fetched" / identity(spec)
    target = folder / posixpath.basename(spec)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not target.exists():
            _fetch(spec, target)
            _forget(cache_dir() / "fetched", target)
        os.utime(target)
    return str(target)


def _fetch(spec: str, target: Path) -> None:
    files, path = filesystem(spec)
    try:
        with whole_file(target) as part:
            files.get_file(path, str(part))
    except (OSError, ValueError, OutputError) as error:
        raise SourceError(f"cannot fetch {spec}: {error}") from error


def _forget(cache: Path, keep: Path) -> None:
    """Throw away what has lain longest, until what is left is within ``SIGHTLINE_FETCHED_GB``."""
    limit = float(os.environ.get("SIGHTLINE_FETCHED_GB") or MOST_CACHED_GB) * 1e9
    files = sorted(
        (path for path in cache.glob("*/[!.]*") if path != keep),
        key=lambda path: path.stat().st_mtime,
    )
    total = sum(path.stat().st_size for path in (*files, keep))
    for path in files:
        if total > limit and time.time() - path.stat().st_mtime > IN_USE_S:
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


class Store:
    """Where results go: a folder here, or an address with a folder of this machine before it.

    Args:
        out: folder or address.

    Attributes:
        folder: to write in; ``put`` takes it from there.

    Raises:
        SightlineError: the storage is not there.
    """

    def __init__(self, out: str) -> None:
        self.address = out.rstrip("/") if is_shared(out) else ""
        if self.address:
            self._files, self._root = filesystem(self.address)
            name = hashlib.blake2b(self.address.encode(), digest_size=10).hexdigest()
            self.folder = cache_dir() / "results" / name
        else:
            self.folder = Path(out)

    def stamp(self, path: Path) -> Stamp | None:
        """What is known of the result that was written to ``path``; at an address its size only.
        None where there is none.
        """
        if not self.address:
            return stamp_of(path)
        try:
            self._files.invalidate_cache()
            return int(self._files.size(self._there(path)) or 0), 0
        except OSError:
            return None

    def read(self, path: Path) -> bytes:
        """The content of what was written to ``path``.

        Raises:
            OSError: it cannot be read.
        """
        return bytes(self._files.cat_file(self._there(path))) if self.address else path.read_bytes()

    def name(self, path: Path) -> str:
        """Of a file of ``folder``, where it belongs."""
        return (
            f"{self.address}/{path.relative_to(self.folder).as_posix()}"
            if self.address
            else str(path)
        )

    def put(self, paths: Iterable[Path]) -> None:
        """Bring files of ``folder`` to where they belong, one after the other.

        Raises:
            OutputError: one cannot be written.
        """
        for path in paths if self.address else ():
            try:
                self._put(path)
            except (OSError, ValueError) as error:
                raise OutputError(f"cannot write {self.name(path)}: {error}") from error

    def _put(self, path: Path) -> None:
        there = self._there(path)
        self._files.makedirs(posixpath.dirname(there), exist_ok=True)
        if self.address.startswith(
            ("file://", "sftp://", "hdfs://")
        ):  # whose files grow under their name
            self._files.put_file(str(path), there + ".part")
            self._files.mv(there + ".part", there)
        else:
            self._files.put_file(str(path), there)

    def get_folder(self, folder: Path) -> None:
        """Fetch the files of a folder under ``folder`` that are not here in their size, as a run on
        another machine left them.

        Raises:
            OutputError: they cannot be read.
        """
        if not self.address:
            return
        try:
            for there, info in self._files_in(folder).items():
                here = folder / posixpath.basename(there)
                if not here.exists() or here.stat().st_size != info["size"]:
                    with whole_file(here) as part:
                        self._files.get_file(there, str(part))
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot read {self.address}: {error}") from error

    def drop_all_but(self, folder: Path, keep: Sequence[str]) -> None:
        """Remove what lies in a folder at the address, but for files of these names.

        Raises:
            OutputError: it cannot be removed.
        """
        if not self.address:
            return
        try:
            for there in self._files_in(folder):
                if posixpath.basename(there) not in keep:
                    self._files.rm_file(there)
        except OSError as error:
            raise OutputError(f"cannot clear {self.address}: {error}") from error

    def _files_in(self, folder: Path) -> dict[str, dict[str, Any]]:
        """What lies in a folder at the address now: of each file, what is known of it."""
        self._files.invalidate_cache()
        root = self._there(folder)
        return self._files.find(root, detail=True) if self._files.exists(root) else {}

    def _there(self, path: Path) -> str:
        return posixpath.join(self._root, path.relative_to(self.folder).as_posix())


class Digests:
    """What the content of sources on shared storage was found to be, so that it need not be fetched
    to know it is done.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._folder = store, store.folder / ".sightline" / ".digests"

    def find(self, name: str, ident: str) -> str | None:
        """The digest; None where it is not known."""
        path = self._folder / f"{name}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return str(found["digest"]) if found.get("identity") == ident else None

    def fetch(self) -> None:
        """Learn what other machines found."""
        self._store.get_folder(self._folder)

    def keep(self, name: str, ident: str, digest: str) -> None:
        """Remember one."""
        path = self._folder / f"{name}.json"
        with whole_file(path) as part:
            part.write_text(
                json.dumps({"identity": ident, "digest": digest}) + "\n", encoding="utf-8"
            )
        self._store.put([path])
