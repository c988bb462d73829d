"""The state of a live run that the page, the snapshot address and the window read and change."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from engines.choose import class_index
from engines.confidence import USUAL_LIMITS, Limits
from engines.errors import InputError, OutputError
from engines.localizer import ImageBgr, Localizer
from engines.text import displayable, in_words
from realtime.annotate import Look, jpeg_of, outlines_of
from realtime.capture import Connection
from realtime.file_sinks import Recording
from realtime.frames import FrameRecord
from realtime.statistics import LiveRun
from realtime.tracking.options import Following

WATCHED_S = 5.0
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Settings(Look):
    """What can be changed while a run goes on: the look, and these. The loop reads it for each
    frame.

    Attributes:
        class_index: look for this class or name, see ``Localizer.look_for``; None for the
            likeliest.
        min_score: no box that is less sure than this; None for the head's own limit.
        record: the MP4 that the pictures are written to; None while nothing is recorded. Of several
            sources, each has its own: its name is put behind the stem.
        page_recording: what the page records besides.
    """

    class_index: int | None = None
    min_score: float | None = None
    record: Path | None = None
    page_recording: Recording | None = None

    @property
    def recording(self) -> Recording | None:
        """What ``record`` asks for."""
        return None if self.record is None else Recording(self.record)


@dataclass(frozen=True)
class Recorded:
    """A file that is being written, or was.

    Attributes:
        recording: that it belongs to.
        source: that it shows.
        path: of the file.
    """

    recording: Recording
    source: str
    path: Path


@dataclass(frozen=True)
class Shown:
    """The newest picture of a source: drawn on, uint8 BGR, not to be written to. ``number`` counts
    them from 1.
    """

    number: int
    record: FrameRecord
    picture: ImageBgr

    @cached_property
    def jpeg(self) -> bytes:
        """The picture as a JPEG, encoded once for all who ask."""
        return jpeg_of(self.picture, JPEG_QUALITY)


def labels_in(record: FrameRecord) -> list[str]:
    """The labels of the boxes in a picture, as they are drawn, the main one first."""
    if record.found is None:
        return []
    outlines = outlines_of(record.found, record.objects or ())
    return [displayable(each.text) for each in reversed(outlines)]


class Session:
    """A sink of the loop, and the one object that everything around the loop holds; every method
    may be called from any thread.

    To read: ``newest`` or ``wait_newer`` give the last picture of a source with its record,
        ``rolling`` the figures of the last
    seconds, ``connections`` how each source is doing. Frames are drawn only while somebody asks for
    pictures, so watching costs nothing to those who do not; a slow viewer misses pictures and holds
    nothing up.

    To steer: ``change(heat_map="off")`` replaces ``settings`` from the next frame on, ``look_for``
        does so by a class's name,
    ``change(record=PATH)`` and ``change(record=None)`` start and stop a recording, ``stop`` ends
    the run.

    Args:
        connections: of the sources.
        live_run: of the run.
        class_names: that the network knows.
        settings: at first.
        stop: ends the run.
        following: of the run; None where nothing is followed.
        notify: gets a line that a user should know of.
        limits: of the head's confidence, see ``Localizer.limits``.
        names: of boxes, see ``Localizer.names``.

    Attributes:
        closed: the run has ended; nothing more comes.
        trouble: why the last recording has ended, if not because it was asked to.
        recorded: the files of all recordings of this run, the oldest first.
        page_errors: how many requests over HTTP ended by a defect of Sightline.
    """

    def __init__(
        self,
        connections: list[Connection],
        live_run: LiveRun,
        class_names: tuple[str, ...],
        settings: Settings = Settings(),
        stop: Callable[[], None] = lambda: None,
        following: Following | None = None,
        notify: Callable[[str], None] = lambda _: None,
        limits: Limits | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        self.limits = following.limits if following else limits
        self.connections = connections
        self.class_names, self.names = class_names, names
        self.settings = settings
        self.stop = stop
        self.live_run, self.following = live_run, following
        self._changed = threading.Condition()
        self._newest: dict[str, Shown] = {}
        self._asked_s = -WATCHED_S
        self.closed = threading.Event()
        self.trouble = ""
        self.recorded: list[Recorded] = []
        self.page_errors = 0
        self._notify = notify

    @property
    def needs_picture(self) -> bool:
        """Whether anybody has asked for a picture lately."""
        return time.monotonic() - self._asked_s < WATCHED_S

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if picture is not None and record.outcome == "shown":
            with self._changed:
                last = self._newest.get(record.frame.source)
                self._newest[record.frame.source] = Shown(
                    last.number + 1 if last else 1, record, picture
                )
                self._changed.notify_all()

    def newest(self, source: str) -> Shown | None:
        """The last picture of a source, if there is one yet."""
        self._asked_s = time.monotonic()
        return self._newest.get(source)

    def wait_newer(self, source: str, than: int = 0, timeout_s: float = 2.0) -> Shown | None:
        """The last picture of a source as soon as its number is greater than ``than``; None when
        the time is up.
        """
        self._asked_s = time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: self._number(source) > than or self.closed.is_set(), timeout_s
            )
            found = self._newest.get(source)
        return found if found and found.number > than else None

    def snapshot(self, source: str, timeout_s: float = 2.0) -> bytes | None:
        """The newest picture of a source as a JPEG, not older than ``WATCHED_S``; None if there is
        none in time.
        """
        found = self.newest(source)
        if found is None or time.monotonic_ns() - found.record.frame.captured_ns > WATCHED_S * 1e9:
            found = self.wait_newer(source, found.number if found else 0, timeout_s)
        return found.jpeg if found else None

    def objects(self, source: str) -> list[dict[str, Any]]:
        """The entry of each tracked object in the log, as of the newest picture."""
        found = self._newest.get(source)
        return [each.row() for each in found.record.objects or ()] if found else []

    def _number(self, source: str) -> int:
        return self._newest[source].number if source in self._newest else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.closed.set()
            self._changed.notify_all()

    def rolling(self) -> dict[str, Any]:
        """The figures of the last seconds, see ``LiveRun.rolling``."""
        return self.live_run.rolling()

    def change(self, **changes: Any) -> Settings:
        """Replace fields of ``settings`` and return them all.

        Raises:
            OutputError: the recording's name does not end in .mp4.
            InputError: a value is out of its range, see ``realtime.annotate.Look``; or a least
                confidence is asked for where nothing tells how sure boxes are.
        """
        least = changes.get("min_score")
        if least is not None and not 0 <= least <= 1:
            raise InputError(f"min_score goes from 0 to 1, not {least}")
        if least and self.limits is None:
            raise InputError("nothing tells how sure these boxes are: all are shown")
        record = changes.get("record")
        if record is not None and Path(record).suffix.lower() != ".mp4":
            raise OutputError(f"recording {record}: the name must end in .mp4; rename it")
        with self._changed:
            self.settings = replace(self.settings, **changes)
            if record is not None or changes.get("page_recording") is not None:
                self.trouble = ""
            return self.settings

    def recording_begun(self, recording: Recording, source: str, path: Path) -> None:
        """From now on a file is written of a source."""
        with self._changed:
            self.recorded = [*self.recorded, Recorded(recording, source, path)]

    def recording_failed(self, recording: Recording, trouble: str) -> None:
        """A recording has ended by an error. Another one may be started."""
        with self._changed:
            self.trouble = trouble
            if self.settings.recording == recording:
                self.settings = replace(self.settings, record=None)
            if self.settings.page_recording == recording:
                self.settings = replace(self.settings, page_recording=None)

    def swapped(self, localizer: Localizer) -> None:
        """Another localizer is in use: take over what it knows of its boxes, and no longer look for
        what it does not know.
        """
        with self._changed:
            self.names = localizer.names
            self.limits = localizer.limits
            if self.following is not None:
                self.limits = self.following.limits = localizer.limits or USUAL_LIMITS
            wanted, known = self.settings.class_index, len(self.class_names) + len(self.names)
            if wanted is not None and wanted >= known:
                self.settings = replace(self.settings, class_index=None)

    def page_failed(self, error: Exception) -> None:
        """A request was not answered because of a defect; the first one is told."""
        with self._changed:
            self.page_errors += 1
            first = self.page_errors == 1
        if first:
            self._notify(
                f"a request to the page failed ({in_words(error)}): this is a defect of"
                " Sightline; the run goes on, and more of them are only counted"
            )

    def look_for(self, wanted: str | None) -> int | None:
        """Look for a class or a name of boxes from the next frame on; None or an empty text for the
        likeliest.

        Returns:
            See ``index_of``.

        Raises:
            ModelError: see there.
        """
        return self.change(class_index=self.index_of(wanted) if wanted else None).class_index

    def index_of(self, wanted: str) -> int:
        """The index of a class or of a name of boxes, see ``engines.choose.class_index``.

        Raises:
            ModelError: nothing fits, or several do.
        """
        return class_index(wanted, self.class_names, self.names)

    def select(self, source: str | None, point: tuple[float, float]) -> None:
        """Follow what is at a point of the next frame, in shares of its width and height; of the
        first source if none is named.

        Raises:
            InputError: nothing is followed in this run, or there is no such source.
        """
        if self.following is None:
            raise InputError(
                "nothing is followed in this run: start it with follow", option="follow"
            )
        names = [each.name for each in self.connections]
        if source is not None and source not in names:
            raise InputError(f"there is no source '{source}': there is {', '.join(names)}")
        self.following.select(source or names[0], point)
