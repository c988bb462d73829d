"""The frames of one segment, exactly those that decoding from the start of the file gives.

Decoding begins at the segment's key frame. Pictures that are stored behind it but shown before it may need the frames before
it: they belong to the segment before, whose decoding goes on until a frame of the next segment comes out. That frame is decoded
twice, and both must be equal: where they are not, the key frame is none (``realtime.batch.merge`` looks).
"""

import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import av
import av.error

from engines.base import SourceError
from engines.localizer import SMALLEST_PX, ImageBgr
from realtime.batch.clip import Clip, Segment
from realtime.batch.packets import decoded, decoded_carefully, time_of
from realtime.colour import ToBgr
from realtime.frames import NO_IMAGE, Frame
from realtime.sources import Images, decode_image, open_source


@dataclass(frozen=True)
class SegmentEnd:
    """What comes behind a segment's last frame.

    Attributes:
        segment: its index.
        frames: that were found, skipped ones included.
        lost: of these, could not be decoded.
        first_crc, next_crc: of the first frame and of the one behind the last, where there is one.
        trouble: the first reason for a loss.
    """

    segment: int
    frames: int
    lost: int
    first_crc: int | None = None
    next_crc: int | None = None
    trouble: str = ""


def read_segment(clip: Clip, segment: Segment, every: int = 1) -> Iterator[Frame | SegmentEnd]:
    """Decode a segment.

    Args:
        clip: whose.
        segment: one of its segments.
        every: only frames whose number in the source is a multiple of it; the others are decoded and left out.

    Yields:
        Its frames in the order of their timestamps, those that cannot be decoded with ``lost`` set; then one ``SegmentEnd``.

    Raises:
        SourceError: the file cannot be opened any more.
    """
    return (_read_images if clip.kind == "images" else _read_video)(clip, segment, every)


def _read_images(clip: Clip, segment: Segment, every: int) -> Iterator[Frame | SegmentEnd]:
    with open_source(clip.spec) as source:
        assert isinstance(source, Images)  # as when the clip was planned
        members = source.members[segment.first_frame : segment.first_frame + segment.frames]
        tick, lost, trouble = round(1 / (source.rate_fps * source.time_base)), 0, ""
        for number, (name, read) in enumerate(members, segment.first_frame):
            if number % every:
                continue
            start_ns, image, reason = time.monotonic_ns(), NO_IMAGE, ""
            try:
                image = decode_image(name, read())
                if min(image.shape[:2]) < SMALLEST_PX:
                    reason = f"{name} is {image.shape[1]}x{image.shape[0]} pixels: at least {SMALLEST_PX} a side are needed"
            except OSError as error:
                reason = f"cannot read {name}: {error.strerror}"
            except SourceError as error:
                reason = str(error)
            lost, trouble = lost + bool(reason), trouble or reason
            yield _frame(clip, segment, number, number * tick, NO_IMAGE if reason else image, start_ns, reason)
        yield SegmentEnd(segment.index, len(members), lost, trouble=trouble)


def _read_video(clip: Clip, segment: Segment, every: int) -> Iterator[Frame | SegmentEnd]:
    """Frame by frame from a decoder with many threads; from the first sign of damage on, again, from one that is careful."""
    reading, given = _Reading(clip, segment), 0
    to_bgr = ToBgr()
    start_ns = time.monotonic_ns()
    for pts, picture, reason in reading.pictures():
        number = segment.first_frame + given
        given += 1
        wanted = number % every == 0
        image = NO_IMAGE
        if picture is not None and (wanted or given == 1):
            image = to_bgr(picture)
            if given == 1:
                reading.first_crc = zlib.crc32(image.data)
        if wanted:
            yield _frame(clip, segment, number, pts, image, start_ns, reason)
        start_ns = time.monotonic_ns()
    next_crc = None if reading.following is None else zlib.crc32(to_bgr(reading.following).data)
    yield SegmentEnd(segment.index, given, reading.lost_frames, reading.first_crc, next_crc, reading.trouble)


def _frame(clip: Clip, segment: Segment, number: int, pts: int, image: ImageBgr, start_ns: int, lost: str) -> Frame:
    now_ns = time.monotonic_ns()
    return Frame(
        image, clip.name, number, clip.pts_s(pts), now_ns, (now_ns - start_ns) / 1e6, pts=pts, time_base=clip.time_base,
        segment=segment.index, lost=lost,
    )  # fmt: skip


@dataclass
class _Reading:
    """A segment on its way out of the decoder.

    Attributes:
        lost_frames, trouble, first_crc: see ``SegmentEnd``.
        following: the first frame behind the segment.
    """

    clip: Clip
    segment: Segment
    lost_frames: int = 0
    trouble: str = ""
    first_crc: int | None = None
    following: av.VideoFrame | None = None
    _last_pts: int | None = None
    _lost: dict[int, str] = field(default_factory=dict)

    def pictures(self) -> Iterator[tuple[int, av.VideoFrame | None, str]]:
        """(pts, picture, "") of each frame; (pts, None, why) of those that are lost. In order."""
        try:
            yield from self._inside(decoded(self.clip.spec, self.segment))
        except av.error.FFmpegError:
            self.following = None
            yield from self._inside(decoded_carefully(self.clip.spec, self.segment, self._lost))

    def _inside(self, pictures: Generator[av.VideoFrame, None, None]) -> Iterator[tuple[int, av.VideoFrame | None, str]]:
        start_pts, end_pts = self.segment.start_pts, self.segment.end_pts
        with closing(pictures):
            for picture in pictures:
                pts = self._pts_of(picture)
                if self._last_pts is not None and pts <= self._last_pts:
                    continue  # given before the damage was noticed
                if start_pts is not None and pts < start_pts:
                    continue
                yield from self._lost_before(pts if end_pts is None else min(pts, end_pts))
                if end_pts is not None and pts >= end_pts:
                    self.following = picture
                    return
                self._last_pts = pts
                yield pts, picture, ""
        yield from self._lost_before(end_pts)

    def _lost_before(self, end_pts: int | None) -> Iterator[tuple[int, None, str]]:
        for pts in sorted(pts for pts in self._lost if end_pts is None or pts < end_pts):
            reason = self._lost.pop(pts)
            given = self._last_pts is not None and pts <= self._last_pts
            if not given and (self.segment.start_pts is None or pts >= self.segment.start_pts):
                self.lost_frames, self.trouble, self._last_pts = self.lost_frames + 1, self.trouble or reason, pts
                yield pts, None, reason

    def _pts_of(self, picture: av.VideoFrame) -> int:
        """Its timestamp; where the file has none, from the place in its order and the rate."""
        known = time_of(picture)
        if known is not None:
            return known
        if self._last_pts is None:
            return self.clip.first_pts
        return self._last_pts + max(1, round(1 / (self.clip.rate_fps * self.clip.time_base)))
