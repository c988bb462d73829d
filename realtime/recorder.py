"""Recording a live run: one MP4 for each source, begun and ended while it goes on."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

from engines.localizer import ImageBgr
from realtime.frames import FrameRecord
from realtime.sinks import VideoSink

TIME_BASE = Fraction(1, 90000)
RATE_FPS = 25.0  # for the encoder's rate control only: live frames come as they come


class Recorder:
    """A sink that writes pictures to where ``wanted`` says at that moment, or nowhere.

    Args:
        wanted: the MP4 to write; a change ends a recording and begins the next.
        sources: their names; of several, each gets a file with its name behind the stem.
    """

    def __init__(self, wanted: Callable[[], Path | None], sources: list[str]) -> None:
        self._wanted, self._several = wanted, len(sources) > 1
        self._path: Path | None = None
        self._files: dict[str, VideoSink] = {}

    @property
    def needs_picture(self) -> bool:
        return self._wanted() is not None or self._path is not None

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if self._wanted() != self._path:
            self._finish()
            self._path = self._wanted()
        if picture is None or self._path is None:
            return
        source = record.frame.source
        if source not in self._files:
            path = self._path.with_stem(f"{self._path.stem}_{source}") if self._several else self._path
            self._files[source] = VideoSink(path, TIME_BASE, RATE_FPS, live=True)
        self._files[source].write(record, picture)

    def _finish(self) -> None:
        while self._files:
            with self._files.popitem()[1]:
                pass  # leaving closes it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()
