"""Clips of events: a few seconds of video around what came into view, of a live run or cut out of a
video. Each is a whole file or none.
"""

import io
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import av
import av.error
import numpy as np
from av.video.frame import PictureType

from engines.errors import OutputError
from engines.files import make_folder, new_file, put_in_place, whole_file
from engines.localizer import ImageBgr
from engines.text import file_name, in_words
from realtime.events import Event, surest
from realtime.file_sinks import RATE_FPS, TIME_BASE, fitted, open_h264
from realtime.frames import FrameRecord
from realtime.sources.video import reason_of

BEFORE_S, AFTER_S = 3.0, 2.0
"""So much of the time before and after an event is in its clip."""
LONGEST_S = 120.0
"""A clip of a longer event ends then."""
KEY_FRAMES_S = 1.0


class _Encoded(NamedTuple):
    """A picture as it was encoded, and its time in ``TIME_BASE``."""

    pts: int
    is_key: bool
    content: bytes


class _Ring:
    """Encodes the pictures of one source, and keeps the last seconds of them.

    Args:
        keep_s: how many.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep = round(keep_s / TIME_BASE)
        self._container = av.open(io.BytesIO(), "w", format="mp4")  # nothing is written to it
        self.stream: av.VideoStream | None = None
        self.pictures: deque[_Encoded] = deque()
        self._last_pts, self._next_key_pts = -1, 0

    def add(self, pts_s: float, picture: ImageBgr) -> list[_Encoded]:
        """Encode a picture. Returns what came out of the encoder."""
        if self.stream is None:
            height, width = picture.shape[:2]
            rate = Fraction(RATE_FPS).limit_denominator(1001)
            self.stream = open_h264(self._container, (width, height), rate, TIME_BASE, live=True)
            self._container.start_encoding()
        image = np.ascontiguousarray(fitted(picture, self.stream.width, self.stream.height))
        frame = av.VideoFrame.from_numpy_buffer(image, format="bgr24")
        self._last_pts = max(round(Fraction(pts_s) / TIME_BASE), self._last_pts + 1)
        frame.pts, frame.time_base = self._last_pts, TIME_BASE
        if self._last_pts >= self._next_key_pts:  # however few pictures a second there are
            frame.pict_type = PictureType.I
            self._next_key_pts = self._last_pts + round(KEY_FRAMES_S / TIME_BASE)
        found = [
            _Encoded(packet.pts or 0, packet.is_keyframe, bytes(packet))
            for packet in self.stream.encode(frame)
        ]
        self.pictures += found
        while len(self.pictures) > 1 and self._can_do_without_the_first():
            self.pictures.popleft()
        return found

    def _can_do_without_the_first(self) -> bool:
        """Whether a later key frame is old enough to begin with."""
        oldest = self._last_pts - self._keep
        keys = (each for place, each in enumerate(self.pictures) if place and each.is_key)
        first = next(keys, None)
        return first is not None and first.pts <= oldest


class _Clip:
    """The clip of an event that is under way.

    Args:
        path: of it, where nothing is yet.
        ring: of its source.
        begin_s: of the event.
    """

    def __init__(self, path: Path, ring: _Ring, begin_s: float) -> None:
        assert ring.stream is not None
        self.path = new_file(path)
        self._part = self.path.with_name(f".{self.path.name}.part")
        self._last = round((begin_s + LONGEST_S) / TIME_BASE)
        self._container = av.open(str(self._part), "w", format="mp4")
        self._stream = self._container.add_stream_from_template(ring.stream)
        self._stream.time_base = TIME_BASE
        wanted = round((begin_s - BEFORE_S) / TIME_BASE)
        keys = [place for place, each in enumerate(ring.pictures) if each.is_key]
        first = max((p for p in keys if ring.pictures[p].pts <= wanted), default=keys[0])
        self._base = ring.pictures[first].pts
        for each in list(ring.pictures)[first:]:
            self.add(each)

    def add(self, picture: _Encoded) -> None:
        """Take the next picture."""
        if picture.pts > self._last:
            return
        packet = av.Packet(picture.content)
        packet.pts = packet.dts = picture.pts - self._base
        packet.time_base, packet.is_keyframe = TIME_BASE, picture.is_key
        packet.stream = self._stream
        self._container.mux(packet)

    def finish(self) -> None:
        """Give the clip its name.

        Raises:
            OSError, av.error.FFmpegError: it cannot be written.
        """
        self._container.close()
        put_in_place(self._part, self.path)

    def discard(self) -> None:
        """Leave nothing of it."""
        with suppress(Exception):
            self._container.close()
        for path in (self._part, self.path):
            with suppress(OSError):
                path.unlink()


class EventClips:
    """A sink that writes a clip of each event of a live run, from ``BEFORE_S`` before it came into
    view until ``AFTER_S`` after it was seen last, which is when it counts as ended.

    What goes wrong ends the clips and nothing else.

    Args:
        folder: for the clips; they are new files.
        begins_after_s: see ``EventRules``; the pictures are kept for so much longer.
        notify: gets a line where clips end by an error.

    Attributes:
        written: the clips that are whole.
    """

    def __init__(self, folder: Path, begins_after_s: float, notify: Callable[[str], None]) -> None:
        self._folder = folder
        self._keep_s = BEFORE_S + begins_after_s + KEY_FRAMES_S
        self._notify = notify
        self._rings: dict[str, _Ring] = {}
        self._open: dict[tuple[str, int], _Clip] = {}
        self.written: list[Path] = []
        self.needs_picture = True
        try:
            make_folder(folder)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from error

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; raises nothing."""
        if picture is None or not self.needs_picture:
            return
        source = record.frame.source
        with self._guarded():
            if source not in self._rings:
                self._rings[source] = _Ring(self._keep_s)
            for encoded in self._rings[source].add(record.frame.pts_s, picture):
                for (of, _), clip in self._open.items():
                    if of == source:
                        clip.add(encoded)

    def begin(self, event: Event) -> None:
        """Begin the clip of an event; raises nothing."""
        ring = self._rings.get(event.source)
        if not self.needs_picture or ring is None or not ring.pictures:
            return
        now = time.strftime("%Y%m%d-%H%M%S")
        stem = f"{_in_file_name(event.source)}-{now}-{_in_file_name(event.name)}"
        with self._guarded():
            path = self._folder / f"{stem}.mp4"
            self._open[event.source, event.number] = _Clip(path, ring, event.begin_s)

    def end(self, event: Event) -> Path | None:
        """End the clip of an event, and give its file; None where there is none. Raises nothing."""
        clip = self._open.get((event.source, event.number))
        if clip is None:
            return None
        with self._guarded():
            clip.finish()
            del self._open[event.source, event.number]
            self.written.append(clip.path)
            return clip.path
        return None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, OutputError, av.error.FFmpegError) as error:
            self.needs_picture = False
            self._discard()
            reason = reason_of(error) if isinstance(error, OSError) else in_words(error)
            self._notify(f"the clips of events have ended: {reason}; the run goes on")

    def _discard(self) -> None:
        for clip in self._open.values():
            clip.discard()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()  # those whose events have no end: the run failed


MOST_CLIPS = 100


def clips_of(events: Sequence[Event], stem: Path) -> dict[int, Path]:
    """The files of clips by the numbers of their events, ``STEM.event7.person.mp4``, of the surest
    where there are very many.
    """
    names = {each.number: _in_file_name(each.name) for each in surest(events, MOST_CLIPS)}
    return {
        number: stem.with_name(f"{stem.name}.event{number}.{name}.mp4")
        for number, name in names.items()
    }


def cut_clips(
    events: Sequence[Event], clips: Mapping[int, Path], video: Path, first_s: float
) -> None:
    """Cut clips out of a video of all frames, with ``BEFORE_S`` and ``AFTER_S`` around each event.

    Args:
        events: with the numbers of ``clips``, and others.
        clips: the files.
        video: with the frames drawn.
        first_s: time in the source of the first frame of the video.

    Raises:
        OutputError: see ``cut_clip``.
    """
    shift_s = begin_of(video) - first_s
    for each in events:
        if each.number in clips:
            begin_s = each.begin_s + shift_s
            end_s = min(each.end_s, each.begin_s + LONGEST_S) + shift_s
            cut_clip(video, begin_s - BEFORE_S, end_s + AFTER_S, clips[each.number])


def begin_of(video: Path) -> float:
    """The time of a video's first picture, in seconds of the video."""
    with av.open(str(video)) as found:
        pictures = found.streams.video[0]
        return float((pictures.start_time or 0) * (pictures.time_base or Fraction(0)))


def _in_file_name(name: str) -> str:
    return file_name(re.sub(r"[^\w.-]+", "-", name))


def cut_clip(video: Path, begin_s: float, end_s: float, path: Path) -> None:
    """Copy a part of a video, with its sound, whole or not at all. It begins at the last key frame
    before ``begin_s``; times are those of the video.

    Raises:
        OutputError: it cannot be read or written.
    """
    try:
        with (
            av.open(str(video)) as given,
            whole_file(path) as part,
            av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as made,
        ):
            _copy(given, made, begin_s, end_s)
    except av.error.FFmpegError as error:
        raise OutputError(f"cannot write {path}: {reason_of(error)}") from error


def _copy(
    given: av.container.InputContainer,
    made: av.container.OutputContainer,
    begin_s: float,
    end_s: float,
) -> None:
    pictures = given.streams.video[0]
    wanted = [pictures, *given.streams.audio]
    copies = {stream.index: made.add_stream_from_template(stream) for stream in wanted}
    assert pictures.time_base is not None
    given.seek(max(0, int(begin_s / pictures.time_base)), stream=pictures, backward=True)
    origin_s: Fraction | None = None
    for packet in given.demux(*wanted):
        if packet.pts is None or packet.dts is None or packet.time_base is None:
            continue
        at_s = packet.dts * packet.time_base
        if packet.stream is pictures:
            if at_s > end_s:
                return
            origin_s = at_s if origin_s is None else origin_s
        if origin_s is None or at_s < origin_s:
            continue  # sound before the first picture
        shift = round(origin_s / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = copies[packet.stream.index]
        made.mux(packet)
