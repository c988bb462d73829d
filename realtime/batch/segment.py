"""The facts of a source (``Clip``), its parts (``Segment``), and the frames of a segment: decoded
exactly as decoding from the start of the file would, with damaged ones reported.
"""

import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from itertools import chain, islice
from typing import Any, Self

import av
import av.error
from av.container import InputContainer
from av.video.stream import VideoStream

from engines.errors import SourceError
from engines.localizer import SMALLEST_PX, ImageBgr
from realtime.capture import ahead
from realtime.frames import NO_IMAGE, Frame, FrameRecord, LoopFrame, LoopFrames
from realtime.sources.colour import ToBgr
from realtime.sources.film import BOUNDED, Film, Packet, decoder_threads, film_of, open_film
from realtime.sources.images import Images, decode_image
from realtime.sources.spec import open_source
from realtime.sources.video import reason_of

Json = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """A run of frames that can be worked on without the ones before it. Its result depends on
    nothing else.

    Attributes:
        index: its place among the segments.
        start_pts, end_pts: frames with ``start_pts <= pts < end_pts`` are its; None for no limit.
        key_pts, key_dts: of the key frame that decoding begins at; None for the start of the file.
        first_frame: number of its first frame in the source.
        frames: how many it has, as far as the file's packets tell.
    """

    index: int
    start_pts: int | None = None
    end_pts: int | None = None
    key_pts: int | None = None
    key_dts: int | None = None
    first_frame: int = 0
    frames: int = 0


@dataclass(frozen=True)
class Clip:
    """The facts of a source. They are small, the same on every machine, and can be JSON.

    Attributes:
        spec: what the user typed.
        name: for logs and files.
        kind: ``video`` or ``images``.
        digest: of the content.
        time_base: unit of the timestamps, in seconds.
        rate_fps: nominal.
        width_px, height_px: of the first picture, upright: all are written in this size.
        pixel_aspect: a pixel's width over its height, upright.
        colour: ``space``, ``range``, ``primaries`` and ``transfer`` as in ITU-T H.273.
        first_pts: of the first frame.
        frames: in the source; the segments may be fewer.
        audio: codecs.
        segments: in order.
        trouble: what is wrong with it, if anything is known before decoding.
        notes: what of it is not read, in words.
        left_out: files among images that are not read, by the reason.
        shifts: see ``realtime.sources.film.Timeline``.
    """

    spec: str
    name: str
    kind: str
    digest: str
    time_base: Fraction
    rate_fps: float
    width_px: int
    height_px: int
    pixel_aspect: Fraction
    colour: Mapping[str, int]
    first_pts: int
    frames: int
    audio: tuple[str, ...]
    segments: tuple[Segment, ...]
    trouble: str = ""
    notes: tuple[str, ...] = ()
    shifts: tuple[int, ...] = (0,)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def selected_frames(self) -> int:
        """How many frames the segments have."""
        return sum(segment.frames for segment in self.segments)

    def pts_s(self, pts: int) -> float:
        """Seconds since the first frame."""
        return float((pts - self.first_pts) * self.time_base)

    def json(self) -> Json:
        """As ``from_json`` reads it."""
        return {
            **asdict(self),
            "time_base": str(self.time_base),
            "pixel_aspect": str(self.pixel_aspect),
        }

    @classmethod
    def from_json(cls, found: Json) -> Self:
        """Read what ``json`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        known = {each.name: found[each.name] for each in fields(cls)}
        known |= {name: Fraction(found[name]) for name in ("time_base", "pixel_aspect")}
        known["segments"] = tuple(Segment(**segment) for segment in found["segments"])
        known |= {name: tuple(found[name]) for name in ("audio", "notes", "shifts")}
        return cls(**known)


STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
"""Without it FFmpeg fills in what it cannot decode and says nothing."""
DAMAGED = "damaged, or built on a damaged frame"
IDR = 5
INVALID_DATA = 0x41444E49  # FFmpeg's AVERROR_INVALIDDATA


def open_video(spec: str) -> InputContainer:
    """Open a video file for reading.

    Raises:
        SourceError: it cannot be opened, or holds no video.
    """
    try:
        container = open_film(spec)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise SourceError(f"cannot open {spec}: {reason_of(error)}") from error
    film_of(container, spec)
    return container


def decoded(spec: str, segment: Segment) -> Generator[av.VideoFrame, None, None]:
    """Every picture from the segment's key frame to the end of the file, by as many threads as
    pay.

    Raises:
        av.error.FFmpegError: something is damaged.
        SourceError: the file is not what it was.
    """
    container, packets = _from_key(spec, segment, decoder_threads)
    with container:
        for packet in packets:
            if packet.size and packet.is_corrupt:
                raise av.error.InvalidDataError(INVALID_DATA, DAMAGED)
            for picture in packet.decode():
                if picture.is_corrupt:
                    raise av.error.InvalidDataError(INVALID_DATA, DAMAGED)
                yield picture


def decoded_carefully(
    spec: str, segment: Segment, lost: dict[int, str]
) -> Generator[av.VideoFrame, None, None]:
    """The pictures that can be relied on. From one that is damaged to the next key frame, none
    can.

    A decoder of one thread is used, which says at once what it cannot take.

    Args:
        spec: the file.
        segment: where to begin.
        lost: gets the timestamps of all others, with the reason.

    Raises:
        SourceError: the file is not what it was.
    """
    container, packets = _from_key(spec, segment, lambda _: "NONE")
    reason, sound_from_pts = "", None
    fed: set[int] = set()  # of packets whose picture has not come out yet
    with container:
        while (packet := _next_packet(packets)) is not None:
            pts, pictures = time_of(packet) if packet.size else None, []
            if packet.size and packet.is_keyframe and not packet.is_corrupt:
                reason, sound_from_pts = "", pts if reason else sound_from_pts
            try:
                pictures = packet.decode()
            except av.error.FFmpegError:
                reason = DAMAGED
            if packet.size and packet.is_corrupt:
                reason = reason or DAMAGED
            if (
                pts is not None and not packet.is_discard
            ):  # what an edit list cuts away is decoded, and not shown
                fed.add(pts)
                if reason or (sound_from_pts is not None and pts < sound_from_pts):
                    lost[pts] = reason or DAMAGED
            for picture in pictures:
                shown = time_of(picture)
                if shown is None and not reason:
                    yield picture
                elif shown is not None:
                    fed.discard(shown)
                    if picture.is_corrupt:
                        reason = lost[shown] = reason or DAMAGED
                    if shown not in lost:
                        lost.update({pts: DAMAGED for pts in fed if pts < shown})
                        yield picture
        lost.update({pts: lost.get(pts, DAMAGED) for pts in fed})


def _next_packet(packets: Iterator[Packet]) -> Packet | None:
    """The next packet; None where the file ends, or is so damaged that no more can be read."""
    try:
        return next(packets, None)
    except av.error.FFmpegError:
        return None


def time_of(item: Packet | av.VideoFrame) -> int | None:
    """Its timestamp; where it has none, the time at which it is decoded."""
    return item.dts if item.pts is None else item.pts


def _from_key(
    spec: str, segment: Segment, threads: Callable[[VideoStream], str]
) -> tuple[InputContainer, Iterator[Packet]]:
    """The open file, and its video packets from the segment's key frame on."""
    for seek in (True, False):
        container = open_video(spec)
        film = Film(container, spec, spec)
        stream = film.stream
        stream.thread_type = threads(stream)
        packets = container.demux(stream) if segment.key_pts is not None else film.packets()
        first = _found(container, stream, segment, packets, seek)
        if first is not None:
            if _stands_alone(first, stream):
                stream.codec_context.options = {**BOUNDED, **STRICT}
            return container, _without_leading(chain(first, packets), segment.key_pts)
        container.close()
    raise SourceError(
        f"{spec} has changed: the key frame at {segment.key_pts} is not there any more"
    )


def _stands_alone(packets: list[Packet], stream: VideoStream) -> bool:
    """Whether nothing behind a key frame refers to what is before it; else a strict decoder takes
    what it misses for damage.

    In H.264 only an IDR picture ends all references (ITU-T H.264, 7.4.1.2.4). A key frame that is
    none is followed by pictures that come out right, but whose lists name more of those before it
    than a decoder has that begins there.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if not packets or times != sorted(times):
        return False
    return stream.codec_context.codec.canonical_name != "h264" or IDR in _nal_types(
        bytes(packets[0]), stream
    )


def _nal_types(content: bytes, stream: VideoStream) -> Iterator[int]:
    """The types of an H.264 packet's units, which lie behind start codes (Annex B), or behind their
    lengths as in MP4.
    """
    extra = stream.codec_context.extradata or b""
    if extra[:1] != b"\x01":  # no avcC box (ISO 14496-15, 5.3.3.1)
        yield from (unit[0] & 31 for unit in content.split(b"\0\0\1")[1:] if unit)
        return
    size, place = (extra[4] & 3) + 1, 0
    while place + size < len(content):
        yield content[place + size] & 31
        place += size + int.from_bytes(content[place : place + size], "big")


def _without_leading(packets: Iterator[Packet], key_pts: int | None) -> Iterator[Packet]:
    """The packets without the pictures that are shown before the key frame, though stored behind
    it: they need what is before it.
    """
    for packet in packets:
        if key_pts is None or packet.pts is None or packet.pts >= key_pts:
            yield packet


def _found(
    container: InputContainer,
    stream: VideoStream,
    segment: Segment,
    packets: Iterator[Packet],
    seek: bool,
) -> list[Packet] | None:
    """The packet that decoding begins with, and the next one; None where seeking goes wrong, as it
    may without an index.
    """
    if segment.key_pts is None:
        return list(islice(packets, 2))
    before = segment.key_pts if segment.key_dts is None else min(segment.key_pts, segment.key_dts)
    try:
        if seek:
            container.seek(before, stream=stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts == segment.key_pts:
                return [packet, *islice(packets, 1)]
            if (
                seek
                and packet.dts is not None
                and segment.key_dts is not None
                and packet.dts > segment.key_dts
            ):
                return None
    except av.error.FFmpegError:
        pass
    return None


@dataclass(frozen=True)
class SegmentEnd:
    """What is known of a segment when its last frame is read.

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
        every: only frames whose number in the source is a multiple of it; the others are decoded
            and left out.

    Yields:
        Its frames in the order of their timestamps, those that cannot be decoded with ``lost`` set;
        then one ``SegmentEnd``.

    Raises:
        SourceError: the file cannot be opened any more.
    """
    return (_read_images if clip.kind == "images" else _read_video)(clip, segment, every)


def _read_images(clip: Clip, segment: Segment, every: int) -> Iterator[Frame | SegmentEnd]:
    with open_source(clip.spec) as source:
        assert isinstance(source, Images)  # as when the clip was planned
        members = source.members[segment.first_frame : segment.first_frame + segment.frames]
        tick = round(1 / (source.rate_fps * source.time_base))
        lost = 0
        trouble = ""
        for number, (name, read) in enumerate(members, segment.first_frame):
            if number % every:
                continue
            start_ns = time.monotonic_ns()
            image = NO_IMAGE
            reason = ""
            try:
                image = decode_image(name, read())
                if min(image.shape[:2]) < SMALLEST_PX:
                    reason = (
                        f"{name} is {image.shape[1]}x{image.shape[0]} pixels: at least"
                        f" {SMALLEST_PX} a side are needed"
                    )
            except OSError as error:
                reason = f"cannot read {name}: {error.strerror}"
            except SourceError as error:
                reason = str(error)
            lost, trouble = lost + bool(reason), trouble or reason
            yield _frame(
                clip,
                segment,
                number,
                number * tick,
                NO_IMAGE if reason else image,
                start_ns,
                reason,
            )
        yield SegmentEnd(segment.index, len(members), lost, trouble=trouble)


def _read_video(clip: Clip, segment: Segment, every: int) -> Iterator[Frame | SegmentEnd]:
    """The frames come from the fastest decoder. From the first sign of damage on, they come
    from one that is careful.
    """
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
    yield SegmentEnd(
        segment.index, given, reading.lost_frames, reading.first_crc, next_crc, reading.trouble
    )


def _frame(
    clip: Clip, segment: Segment, number: int, pts: int, image: ImageBgr, start_ns: int, lost: str
) -> Frame:
    now_ns = time.monotonic_ns()
    return Frame(
        image,
        clip.name,
        number,
        clip.pts_s(pts),
        now_ns,
        (now_ns - start_ns) / 1e6,
        pts=pts,
        time_base=clip.time_base,
        segment=segment.index,
        lost=lost,
    )


@dataclass
class _Reading:
    """Reads one segment from the decoder.

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
        """Each frame in order: (pts, picture, ""), or (pts, None, reason) where it is lost."""
        try:
            yield from self._inside(decoded(self.clip.spec, self.segment))
        except av.error.FFmpegError:
            self.following = None
            yield from self._inside(decoded_carefully(self.clip.spec, self.segment, self._lost))

    def _inside(
        self, pictures: Generator[av.VideoFrame, None, None]
    ) -> Iterator[tuple[int, av.VideoFrame | None, str]]:
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
                self.lost_frames = self.lost_frames + 1
                self.trouble = self.trouble or reason
                self._last_pts = pts
                yield pts, None, reason

    def _pts_of(self, picture: av.VideoFrame) -> int:
        """Its timestamp; where the file has none, from the place in its order and the rate."""
        known = time_of(picture)
        if known is not None:
            return known
        if self._last_pts is None:
            return self.clip.first_pts
        return self._last_pts + max(1, round(1 / (self.clip.rate_fps * self.clip.time_base)))


Read = Callable[[Clip, Segment, int], Iterable[Frame | SegmentEnd]]
"""What gives a segment's frames: ``read_segment``, or something that has them from elsewhere."""
READ_AHEAD_FRAMES = 4


def frames_of(
    clip: Clip,
    segments: Sequence[Segment],
    every: int,
    batch: int,
    ends: dict[int, SegmentEnd],
    read: Read = read_segment,
) -> LoopFrames:
    """Frames for the frame loop, which a thread reads a few frames ahead. A frame that cannot be
    decoded has failed.

    Args:
        clip: whose segments they are.
        segments: any of them, in order.
        every: see ``read_segment``.
        batch: images that an engine call takes. Frames of a segment that follow each other may
            share one.
        ends: gets the end of each segment, by its index.
        read: gives the frames.

    Raises:
        SourceError: the file cannot be opened any more.
    """

    def items() -> Iterator[Frame | SegmentEnd]:
        for segment in segments:
            yield from read(clip, segment, every)

    held: LoopFrame | None = None
    with closing(ahead(items(), READ_AHEAD_FRAMES, _bytes_of)) as found:
        for item in found:
            if isinstance(item, SegmentEnd):
                ends[item.segment] = item
                if held is not None:
                    yield held
                held = None
                continue
            record = FrameRecord(item)
            if item.lost:
                record.outcome, record.cause = "failed", item.lost
            if held is not None:
                both = held.record.outcome == record.outcome == "shown"
                held.batch_with_next = batch > 1 and both
                yield held
            held = LoopFrame(record)


def _bytes_of(item: Frame | SegmentEnd) -> int:
    return item.image_bgr.nbytes if isinstance(item, Frame) else 0
