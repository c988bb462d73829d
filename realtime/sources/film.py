"""The video stream of an open file as players present it, and its packets on one timeline.

Files that were joined end to end begin their timestamps anew, or go on in another stream; pictures
of a cover are no video.
"""

import os
import select
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import av
import av.error
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition
from av.video.stream import VideoStream

from engines.errors import SourceError

if TYPE_CHECKING:
    Packet: TypeAlias = av.Packet[Any]  # av's own annotation; the class itself takes no parameters
else:
    Packet = av.Packet

VIDEO_PIXELS = 2**26
"""Of a frame, of which a decoder keeps up to 17: 8K has 33 million, and the H.264, HEVC and AV1
levels up to 6.2 end at 36.
"""
BOUNDED = {"max_pixels": str(VIDEO_PIXELS)}
"""For decoders: no picture is larger, whatever its header or a later one says. FFmpeg's own limit
is 16384 x 16384.
"""
COVER = Disposition.attached_pic | Disposition.timed_thumbnails
LESSER = (
    Disposition.dub
    | Disposition.comment
    | Disposition.visual_impaired
    | Disposition.hearing_impaired
    | Disposition.dependent
)
LONGEST_STEP_S = 10
"""In formats whose timestamps may jump, a longer step forward is a new beginning too, as FFmpeg has
it .
"""
SHORTEST_RUN = (
    3  # packets of a stream between those of others, on the mean, where they follow each other
)
LOOK_PACKETS = 512
HELD_PACKETS = 8  # between a joint and the packet that is marked for it
FEW_PIXELS = 1 << 19
"""Of so small a picture, one thread decodes 600 and more a second, and threads that decode pictures
side by side take a sixth more processor time (measured: H.264 of 480p).
"""
WHAT_TO_GIVE = "give a video file, a folder of images or a camera number"


def open_film(
    source: "str | Pipe",
    demuxing: dict[str, str] | None = None,
    timeout: float | tuple[float, float] | None = None,
) -> InputContainer:
    """Open a video file, an address or a pipe; ``demuxing`` and ``timeout`` are those of
    ``av.open``.

    Raises:
        av.error.FFmpegError, OSError, ValueError: it cannot be opened.
    """
    kind = "apng" if isinstance(source, str) and _is_animated_png(source) else None
    return av.open(source, mode="r", format=kind, options=demuxing or {}, timeout=timeout)


def _is_animated_png(spec: str) -> bool:
    """FFmpeg takes an animated PNG for a picture, unless it is told: its ``acTL`` chunk is before
    the pixels.
    """
    try:
        with Path(spec).open("rb") as file:
            return (
                file.read(8) == b"\x89PNG\r\n\x1a\n"
                and b"acTL" in file.read(4096).split(b"IDAT")[0]
            )
    except OSError:
        return False


def film_of(container: InputContainer, where: str) -> VideoStream:
    """The video stream that players show: never a cover picture, the default one before others,
    else the first.

    Raises:
        SourceError: there is none, or its pictures are too large; ``where`` names the file.
    """
    videos = _films(container)
    if not videos:
        unknown = any(stream.codec_context is None for stream in container.streams.video)
        what = "only a cover picture and no video" if container.streams.video else "no video"
        what = "only video of an unknown kind" if unknown else what
        container.close()
        raise SourceError(f"{where} holds {what}: {WHAT_TO_GIVE}")
    film = max(videos, key=_rank)
    size_px = film.codec_context.width, film.codec_context.height
    if any(size_px):  # else nothing of it was seen at the start
        try:
            check_pixels(where, *size_px, VIDEO_PIXELS)
        except SourceError:
            container.close()
            raise
    film.codec_context.options = BOUNDED
    return film


def _films(container: InputContainer) -> list[VideoStream]:
    known = (
        stream for stream in container.streams.video if stream.codec_context is not None
    )  # None: no decoder takes it
    return [stream for stream in known if not stream.disposition & COVER]


def _rank(stream: VideoStream) -> tuple[bool, bool, bool]:
    has_size = stream.codec_context.width > 0  # else nothing of it was seen at the start
    return has_size, bool(stream.disposition & Disposition.default), not stream.disposition & LESSER


def presented_frames(container: InputContainer, stream: VideoStream) -> int:
    """How many frames the file's header promises to show; 0 where it does not say.

    In MP4 and MOV an edit list may cut frames away, which the count in the header still has: the
    index tells.
    """
    entries = stream.index_entries
    if not stream.frames or "mov" not in container.format.name or not len(entries):
        return stream.frames
    return min(stream.frames, sum(not entry.is_discard for entry in entries))


def decoder_threads(stream: VideoStream) -> str:
    """How threads decode a file's stream together, in PyAV's word: pictures side by side, or where
    these are small, parts of a picture, of which most files have one.
    """
    return "SLICE" if stream.width * stream.height <= FEW_PIXELS else "AUTO"


class Timeline:
    """Timestamps that go on where those of the file begin anew.

    Attributes:
        shifts: by how much the timestamps of each run of packets are moved, in the stream's unit;
            the first is 0.
    """

    def __init__(self, stream: VideoStream, jumps: bool) -> None:
        unit, rate = stream.time_base or Fraction(1, 90000), stream.average_rate or Fraction(25)
        self.shifts = [0]
        self._jumps, self._second = jumps, round(1 / unit)
        self._usual = max(1, round(1 / (rate * unit)))
        self._last_dts: int | None = None
        self._end_dts = self._end_pts = 0

    def place(self, packet: Packet, anew: bool = False) -> bool:
        """Move a packet onto it; whether time begins anew with it."""
        dts = _dts(packet)
        if dts is None:
            return False
        pts = dts if packet.pts is None else packet.pts
        begins = self._last_dts is not None and (anew or self._is_jump(self._last_dts, packet))
        if (
            begins
        ):  # decoding times go on without a gap, and no picture is shown before the last one
            self.shifts.append(max(self._end_dts, self._end_pts - max(0, pts - dts)) - dts)
        self._last_dts, shift = dts, self.shifts[-1]
        length = packet.duration or self._usual
        self._end_dts, self._end_pts = (
            dts + shift + length,
            max(self._end_pts, pts + shift + length),
        )
        if shift:
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift
        return begins

    def jumps(self, before: Packet, packet: Packet) -> bool:
        """Whether time begins anew between two packets that were not moved yet."""
        dts = _dts(before)
        return dts is not None and self._is_jump(dts, packet)

    def _is_jump(self, before_dts: int, packet: Packet) -> bool:
        dts = _dts(packet)
        if dts is None or not self._jumps:
            return False
        if packet.is_keyframe:
            return dts < before_dts or dts > before_dts + LONGEST_STEP_S * self._second
        return dts < before_dts - self._second


def _dts(packet: Packet) -> int | None:
    return packet.pts if packet.dts is None else packet.dts


class Film:
    """The video of an open container.

    Args:
        container: open.
        where: names it in messages.
        again: its path, where it can be opened once more, for what goes on in another stream.
        live: no packet can be held back.

    Attributes:
        stream: see ``film_of``.
        timeline: of the packets that were given.
        end_s: when the last packet that was read ends, by the file's own timestamps.
        left_out: other video streams, in words. Where streams may follow each other, known when
            packets are given.

    Raises:
        SourceError: it holds no video.
    """

    def __init__(
        self, container: InputContainer, where: str, again: str | None = None, live: bool = False
    ) -> None:
        self.stream = film_of(container, where)
        self._patient = not live
        self.end_s = 0.0
        self._container = container
        self._again = again
        self._others = [stream for stream in _films(container) if stream is not self.stream]
        jumps = bool(Flags(container.format.flags) & Flags.ts_discont)
        self.timeline = Timeline(self.stream, jumps)
        self.left_out = [] if jumps and again else [_not_read(each) for each in self._others]

    @property
    def joined(self) -> bool:
        """Whether time began anew in it, so far."""
        return len(self.timeline.shifts) > 1

    def packets(self, to_the_end: bool = False) -> Iterator[Packet]:
        """Its packets on one timeline; where time begins anew, an empty one first, which empties
        the decoder.

        Args:
            to_the_end: read all other streams too, for ``end_s``.

        Raises:
            av.error.FFmpegError: the file is damaged.
        """
        runs = self._runs()
        if runs:
            yield from self._in_turn(runs)
            return
        packets = self._container.demux(*([] if to_the_end else [self.stream]))
        yield from self._placed(self._forgiven(self._own(packets), False), self.stream)

    def _own(self, packets: Iterator[Packet]) -> Iterator[Packet]:
        for packet in packets:
            if packet.pts is not None and packet.time_base is not None:
                self.end_s = max(
                    self.end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base)
                )
            if packet.stream is self.stream:
                yield packet

    def _placed(
        self, packets: Iterator[Packet], stream: VideoStream, anew: bool = False
    ) -> Iterator[Packet]:
        for packet in packets:
            if packet.size and self.timeline.place(packet, anew):
                yield _last(stream)
                stream.codec_context.flush_buffers()
            anew = anew and not packet.size
            yield packet

    def _forgiven(self, packets: Iterator[Packet], ends_at_joint: bool) -> Iterator[Packet]:
        """FFmpeg takes a joint for a loss, as transport packets' counters do not go on: packets
        right before one are whole.
        """
        held: list[Packet] = []
        for packet in packets:
            joint = bool(held) and self.timeline.jumps(held[-1], packet)
            if joint or len(held) == HELD_PACKETS:
                yield from _whole(held) if joint else held
                held.clear()
            if held or (packet.is_corrupt and self._patient):
                held.append(packet)
            else:
                yield packet
        yield from _whole(held) if ends_at_joint else held

    def _runs(self) -> "list[_Run]":
        """Which stream goes on where, if they follow each other; empty where they lie beside each
        other, which is told.
        """
        if self.left_out or not self._others or self._again is None:
            return []
        wanted, places = (
            [self.stream.index, *(each.index for each in self._others)],
            list[tuple[int, int]](),
        )
        with open_film(self._again) as container:
            for packet in container.demux(*(container.streams[index] for index in wanted)):
                if packet.size and packet.pos is not None:
                    places.append((packet.pos, packet.stream.index))
                if len(places) % LOOK_PACKETS == LOOK_PACKETS - 1 and not _follow(_runs_of(places)):
                    break
        runs = _runs_of(places)
        if _follow(runs):
            return runs if len({run.stream for run in runs}) > 1 else []
        self.left_out += [_not_read(each) for each in self._others]
        return []

    def _in_turn(self, runs: "list[_Run]") -> Iterator[Packet]:
        """Each run from a reader of its own: what is left of a stream where another begins comes
        out of FFmpeg much later.
        """
        assert self._again is not None
        for run in runs:
            with open_film(self._again) as container:
                stream = container.streams[run.stream]
                assert isinstance(stream, VideoStream)
                stream.thread_type = self.stream.thread_type
                stream.codec_context.options = self.stream.codec_context.options
                packets = self._forgiven(_inside(container.demux(stream), run), run is not runs[-1])
                yield from self._placed(packets, stream, anew=run is not runs[0])


@dataclass
class _Run:
    """Packets of one stream with no other stream's between them: where in the file they lie, and
    how many there are.
    """

    stream: int
    first_byte: int
    last_byte: int
    packets: int = 0


def _runs_of(places: list[tuple[int, int]]) -> list[_Run]:
    """From (byte, stream) of each packet."""
    runs: list[_Run] = []
    for byte, stream in sorted(places):
        if not runs or runs[-1].stream != stream:
            runs.append(_Run(stream, byte, byte))
        runs[-1].last_byte, runs[-1].packets = byte, runs[-1].packets + 1
    return runs


def _follow(runs: list[_Run]) -> bool:
    """Whether streams follow each other; packets of those beside each other alternate."""
    return all(
        sum(run.packets for run in runs if run.stream == stream)
        >= SHORTEST_RUN * sum(run.stream == stream for run in runs)
        for stream in {run.stream for run in runs}
    )


def _inside(packets: Iterator[Packet], run: _Run) -> Iterator[Packet]:
    """Those of a run, and what empties the decoder behind them."""
    byte = -1
    for packet in packets:
        byte = byte if packet.pos is None else packet.pos
        if not packet.size or run.first_byte <= byte <= run.last_byte:
            yield packet


def _whole(packets: list[Packet]) -> list[Packet]:
    for packet in packets:
        packet.is_corrupt = False
    return packets


def _not_read(stream: VideoStream) -> str:
    context = stream.codec_context
    return (
        f"another video stream of the file, number {stream.index}"
        f" ({context.width}x{context.height}), is not read"
    )


def _last(stream: VideoStream) -> Packet:
    """An empty packet: a decoder gives out what it still has."""
    packet = Packet()
    packet.stream = stream
    return packet


STDIN = "-"
WRITER_S = 10.0  # for the first byte of a named pipe, which may have nobody who writes to it
SILENCE_S = 60.0  # of a pipe that gave something, or of standard input, whose writer is there


def is_pipe(spec: str) -> bool:
    """Whether a source is standard input or a file that cannot be read again, such as a named
    pipe.
    """
    if spec == STDIN:
        return True
    try:
        mode = Path(spec).stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


class Pipe:
    """A pipe's content, for ``av.open``; it never waits for ever.

    Args:
        spec: see ``is_pipe``.

    Raises:
        SourceError: it cannot be opened, it is a terminal, or nothing comes for too long; ``read``
            raises the last one.
    """

    def __init__(self, spec: str) -> None:
        self.name = "standard input" if spec == STDIN else spec
        try:
            self._file = (
                os.dup(0)
                if spec == STDIN
                else os.open(spec, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            )
        except OSError as error:
            raise SourceError(f"cannot open {self.name}: {error.strerror}") from error
        if os.isatty(self._file):
            self.close()
            raise SourceError(
                f"{self.name} is a terminal: send a video into it, as in 'cat clip.ts | sightline"
                " stream -'"
            )
        self._patience_s = (
            WRITER_S if stat.S_ISFIFO(os.fstat(self._file).st_mode) and spec != STDIN else SILENCE_S
        )

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        self._wait()
        while True:
            try:
                found = os.read(self._file, size)
            except BlockingIOError:
                time.sleep(0.01)
                self._wait()
                continue
            self._patience_s = SILENCE_S
            return found

    def _wait(self) -> None:
        if not hasattr(select, "poll"):  # Windows: reading waits
            return
        watch = select.poll()
        watch.register(self._file, select.POLLIN)
        if not watch.poll(1000 * self._patience_s):
            what = (
                "nobody writes to it" if self._patience_s == WRITER_S else "its writer has stopped"
            )
            raise SourceError(f"{self.name}: nothing came for {self._patience_s:g} s: {what}")

    def close(self) -> None:
        """Release it."""
        os.close(self._file)


def check_pixels(what: str, width_px: int, height_px: int, most: int) -> None:
    """Refuse a picture before memory is taken for it.

    Raises:
        SourceError: it has more than ``most`` pixels.
    """
    if not 0 < width_px * height_px <= most:
        size = f"{width_px}x{height_px} pixels"
        raise SourceError(
            f"{what} is {size}: from 1 to {most / 1e6:.0f} million can be read; scale it"
        )
