"""Recording a live run: one MP4 for each source, begun and ended while it goes on."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

from engines.base import OutputError
from engines.localizer import ImageBgr
from realtime.frames import FrameRecord
from realtime.sinks import VideoSink

TIME_BASE = Fraction(1, 90000)
RATE_FPS = 25.0  # for the encoder's rate control only: live frames come as they come


class Recorder:
    """A sink that writes pictures to where ``wanted`` says at that moment, or nowhere.

    An error, such as a full disk, ends that recording and nothing else; what was written until then stays.

    Args:
        wanted: the MP4 to write; a change ends a recording and begins the next.
        sources: their names; of several, each gets a file with its name behind the stem.
        failed: gets the path and the error of a recording that has ended by one.
        renamed: gets the wanted path and the one that a recording has, because there is a file of the wanted name.
    """

    def __init__(
        self, wanted: Callable[[], Path | None], sources: list[str], failed: Callable[[Path, Exception], None],
        renamed: Callable[[Path, Path], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self._wanted, self._several, self._failed, self._renamed = wanted, len(sources) > 1, failed, renamed
        self._path: Path | None = None
        self._given_up: Path | None = None
        self._files: dict[str, VideoSink] = {}

    @property
    def needs_picture(self) -> bool:
        return self._wanted() not in (None, self._given_up) or self._path is not None

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; raises nothing."""
        wanted = self._wanted()
        if wanted != self._given_up:
            self._given_up = None
        if wanted != self._path and self._given_up is None:
            self._finish()
            self._path = wanted
        if picture is not None and self._path is not None:
            try:
                self._write(self._path, record, picture)
            except Exception as error:
                self._give_up(self._path, error)

    def _write(self, whole: Path, record: FrameRecord, picture: ImageBgr) -> None:
        source = record.frame.source
        if source not in self._files:
            path = whole.with_stem(f"{whole.stem}_{source}") if self._several else whole
            self._files[source] = file = VideoSink(path, TIME_BASE, RATE_FPS, live=True)
            if file.path != path:
                self._renamed(path, file.path)
        self._files[source].write(record, picture)

    def _finish(self) -> None:
        path, self._path = self._path, None
        for file in self._taken():
            try:
                with file:
                    pass  # leaving closes it
            except Exception as error:
                self._failed(path or file.path, error)

    def _give_up(self, path: Path, error: Exception) -> None:
        self._path, self._given_up = None, path
        for file in self._taken():
            with suppress(Exception), file:
                pass
        self._failed(path, error)

    def _taken(self) -> list[VideoSink]:
        files = list(self._files.values())
        self._files.clear()
        return files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()


def make_writable(path: Path) -> None:
    """Make the folder of a recording, before anything depends on it.

    Raises:
        OutputError: it cannot be made or written, or a folder has the recording's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
