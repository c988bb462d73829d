"""Video packets from a key frame on, and what a decoder makes of them; what is damaged is noticed, never filled in."""

from collections.abc import Generator, Iterator
from itertools import chain, islice

import av
import av.error
from av.container import InputContainer
from av.video.stream import VideoStream

from engines.base import SourceError
from realtime.batch.clip import Segment
from realtime.film import BOUNDED, Film, Packet, film_of, open_film
from realtime.video import reason_of

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
    """Every picture from the segment's key frame to the end of the file, by as many threads as there are.

    Raises:
        av.error.FFmpegError: something is damaged.
        SourceError: the file is not what it was.
    """
    container, packets = _from_key(spec, segment, "AUTO")
    with container:
        for packet in packets:
            if packet.size and packet.is_corrupt:
                raise av.error.InvalidDataError(INVALID_DATA, DAMAGED)
            for picture in packet.decode():
                if picture.is_corrupt:
                    raise av.error.InvalidDataError(INVALID_DATA, DAMAGED)
                yield picture


def decoded_carefully(spec: str, segment: Segment, lost: dict[int, str]) -> Generator[av.VideoFrame, None, None]:
    """Those of the pictures that can be relied on: from one that is damaged to the next key frame, none can.

    A decoder of one thread is used, which says at once what it cannot take.

    Args:
        spec: the file.
        segment: where to begin.
        lost: gets the timestamps of all others, with the reason.

    Raises:
        SourceError: the file is not what it was.
    """
    container, packets = _from_key(spec, segment, "NONE")
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
            if pts is not None and not packet.is_discard:  # what an edit list cuts away is decoded, and not shown
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
    """None where the file ends, or where it is so damaged that no more can be read."""
    try:
        return next(packets, None)
    except av.error.FFmpegError:
        return None


def time_of(item: Packet | av.VideoFrame) -> int | None:
    """Its timestamp; for files that have none, the one that says when it is decoded."""
    return item.dts if item.pts is None else item.pts


def _from_key(spec: str, segment: Segment, threads: str) -> tuple[InputContainer, Iterator[Packet]]:
    """The open file, and its video packets from the segment's key frame on."""
    for seek in (True, False):
        container = open_video(spec)
        film = Film(container, spec, spec)
        stream = film.stream
        stream.thread_type = threads
        packets = container.demux(stream) if segment.key_pts is not None else film.packets()
        first = _found(container, stream, segment, packets, seek)
        if first is not None:
            if _stands_alone(first, stream):
                stream.codec_context.options = {**BOUNDED, **STRICT}
            return container, _without_leading(chain(first, packets), segment.key_pts)
        container.close()
    raise SourceError(f"{spec} has changed: the key frame at {segment.key_pts} is not there any more")


def _stands_alone(packets: list[Packet], stream: VideoStream) -> bool:
    """Whether nothing behind a key frame refers to what is before it; else a strict decoder takes what it misses for damage.

    In H.264 only an IDR picture ends all references (ITU-T H.264, 7.4.1.2.4). A key frame that is none is followed by pictures
    that come out right, but whose lists name more of those before it than a decoder has that begins there.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if not packets or times != sorted(times):
        return False
    return stream.codec_context.codec.canonical_name != "h264" or IDR in _nal_types(bytes(packets[0]), stream)


def _nal_types(content: bytes, stream: VideoStream) -> Iterator[int]:
    """The types of an H.264 packet's units, which lie behind start codes (Annex B), or behind their lengths as in MP4."""
    extra = stream.codec_context.extradata or b""
    if extra[:1] != b"\x01":  # no avcC box (ISO 14496-15, 5.3.3.1)
        yield from (unit[0] & 31 for unit in content.split(b"\0\0\1")[1:] if unit)
        return
    size, place = (extra[4] & 3) + 1, 0
    while place + size < len(content):
        yield content[place + size] & 31
        place += size + int.from_bytes(content[place : place + size], "big")


def _without_leading(packets: Iterator[Packet], key_pts: int | None) -> Iterator[Packet]:
    """Less the pictures that are shown before the key frame, though stored behind it: they need what is before it."""
    for packet in packets:
        if key_pts is None or packet.pts is None or packet.pts >= key_pts:
            yield packet


def _found(
    container: InputContainer, stream: VideoStream, segment: Segment, packets: Iterator[Packet], seek: bool
) -> list[Packet] | None:
    """The packet that decoding begins with, and the next one; None where seeking goes wrong, as it may without an index."""
    if segment.key_pts is None:
        return list(islice(packets, 2))
    before = segment.key_pts if segment.key_dts is None else min(segment.key_pts, segment.key_dts)
    try:
        if seek:
            container.seek(before, stream=stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts == segment.key_pts:
                return [packet, *islice(packets, 1)]
            if seek and packet.dts is not None and segment.key_dts is not None and packet.dts > segment.key_dts:
                return None
    except av.error.FFmpegError:
        pass
    return None
