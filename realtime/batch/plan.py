"""Cuts a source into segments at key frames. It reads packets, and decodes only the first picture.

Where a segment ends depends on the file alone, never on the machine: results of one machine, of
many, and of a run that was interrupted are the same.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np

from engines.errors import SourceError
from engines.files import digest_of_file
from engines.localizer import ImageBgr
from realtime.batch.segment import Clip, Segment, open_video
from realtime.sources.colour import BT709, is_mapped, is_on_its_side
from realtime.sources.film import Film, Packet, presented_frames
from realtime.sources.images import Images, decode_image
from realtime.sources.spec import name_of, open_source
from realtime.sources.video import reason_of

SEGMENT_S = 10.0
"""A segment ends at the first key frame after so long."""
SEGMENT_IMAGES = 1000
CUT_OFF_S = 1.0  # a file that ends so much earlier than its header says is cut off
PLAIN_COLOUR = {"space": 2, "range": 0, "primaries": 2, "transfer": 2}  # all unspecified


@dataclass(frozen=True)
class Window:
    """The part of a source that is wanted, in seconds since its first frame; None for its end."""

    start_s: float = 0.0
    end_s: float | None = None


ALL = Window()


def digest_of(spec: str) -> str:
    """The digest of a source's whole content.

    Raises:
        SourceError: it cannot be read.
    """
    with open_source(spec) as source:
        return _images_digest(source) if isinstance(source, Images) else file_digest(Path(spec))


def make_plan(spec: str, digest: str, window: Window = ALL, whole: bool = False) -> Clip:
    """Cut a source into segments.

    Args:
        spec: a video file, or images; see ``realtime.sources.spec.SourceKind.can_be_cut``.
        digest: see ``digest_of``.
        window: what of it is wanted.
        whole: one segment, as is done where key frames turn out not to be ones.

    Raises:
        SourceError: it cannot be read, holds no frame, or the window lies behind its end.
    """
    with open_source(spec) as source:
        clip = (
            _plan_images(spec, digest, source, window)
            if isinstance(source, Images)
            else _plan_video(spec, digest, window, whole)
        )
    if not clip.segments:
        raise SourceError(
            f"{spec} is over before the start that is asked for: it is {clip.frames} frames long",
            option="start_s",
        )
    return clip


def _images_digest(source: Images) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name, read in source.members:
        try:
            content = read()
        except (SourceError, OSError) as error:
            content = str(error).encode()
        digest.update(
            f"{Path(name).name}\0{len(content)}\0".encode("utf-8", "surrogatepass") + content
        )
    return digest.hexdigest()


def _first_image(source: Images) -> ImageBgr:
    reason: Exception | None = None
    for name, read in source.members:
        try:
            return decode_image(name, read())
        except (SourceError, OSError) as error:
            reason = reason or error
    raise SourceError(str(reason))


def _plan_images(spec: str, digest: str, source: Images, window: Window) -> Clip:
    tick, count = round(1 / (source.rate_fps * source.time_base)), len(source.members)
    start = max(0, int(np.ceil(window.start_s * source.rate_fps - 1e-9)))
    end = (
        count
        if window.end_s is None
        else min(count, int(np.ceil(window.end_s * source.rate_fps - 1e-9)))
    )
    spans = [
        (begin, min(end, begin + SEGMENT_IMAGES)) for begin in range(start, end, SEGMENT_IMAGES)
    ]
    segments = tuple(
        Segment(place, begin * tick, behind * tick, None, None, begin, behind - begin)
        for place, (begin, behind) in enumerate(spans)
    )
    height, width = _first_image(source).shape[:2]
    return Clip(
        spec,
        source.name,
        "images",
        digest,
        source.time_base,
        source.rate_fps,
        width,
        height,
        Fraction(1),
        PLAIN_COLOUR,
        0,
        count,
        (),
        segments,
        notes=tuple(source.look_closer()),
        left_out=source.left_out,
    )


def _plan_video(spec: str, digest: str, window: Window, whole: bool) -> Clip:
    picture = _first_picture(spec)
    with open_video(spec) as container:
        film = Film(container, spec, spec)
        stream = film.stream
        time_base, rate = (
            stream.time_base or Fraction(1, 90000),
            stream.average_rate or Fraction(25),
        )
        first_pts = picture.pts if picture.pts is not None else (picture.dts or 0)
        start_pts = first_pts + _ticks(window.start_s, time_base) if window.start_s > 0 else None
        end_pts = None if window.end_s is None else first_pts + _ticks(window.end_s, time_base)
        cuts = _Cuts(round(SEGMENT_S / time_base), start_pts, end_pts)
        trouble = ""
        try:
            for packet in film.packets(to_the_end=True):
                if packet.size:
                    cuts.add(packet)
        except av.error.FFmpegError as error:
            trouble = f"is damaged: {reason_of(error)}"
        promised_s = container.duration / av.time_base if container.duration else 0.0
        begin_s = max(0.0, (container.start_time or 0) / av.time_base)
        promised = presented_frames(container, stream)
        if promised > cuts.count:
            trouble = trouble or f"is cut off: {cuts.count} of {promised} frames are there"
        elif film.end_s and promised_s + begin_s - film.end_s > CUT_OFF_S and not film.joined:
            trouble = (
                trouble
                or f"is cut off: {film.end_s - begin_s:.1f} of {promised_s:.1f} seconds are there"
            )
        notes = tuple(film.left_out + _sound_left_out(film, len(container.streams.audio)))
        turned = is_on_its_side(picture)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        return Clip(
            spec,
            name_of(spec),
            "video",
            digest,
            time_base,
            float(rate),
            picture.height if turned else picture.width,
            picture.width if turned else picture.height,
            1 / aspect if turned else aspect,
            _colour_of(picture),
            first_pts,
            cuts.count,
            tuple(each.codec_context.codec.canonical_name for each in container.streams.audio),
            cuts.segments(whole or film.joined),
            trouble,
            notes,
            tuple(film.timeline.shifts),
        )


def _sound_left_out(film: Film, tracks: int) -> list[str]:
    return (
        [f"of {tracks} sound tracks the first is kept, since the file is joined"]
        if film.joined and tracks > 1
        else []
    )


def file_digest(path: Path) -> str:
    """The digest of a file's whole content.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return digest_of_file(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


class _Cuts:
    """Counts packets between key frames that are far enough apart."""

    def __init__(self, shortest_ticks: int, start_pts: int | None, end_pts: int | None) -> None:
        self.count = 0
        self._shortest = shortest_ticks
        self._start = start_pts
        self._end = end_pts
        self._cuts: list[_Cut] = []
        self._sound = True  # every packet has its time, and lies behind the last key frame but one

    def add(self, packet: Packet) -> None:
        if packet.is_discard:  # cut away by the file's edit list
            return
        self.count += 1
        pts = packet.pts
        if pts is None:
            self._sound = False
            return
        if not self._cuts:
            self._cuts.append(_Cut(pts, None))
        elif (
            packet.is_keyframe
            and not packet.is_corrupt
            and pts - self._cuts[-1].pts >= self._shortest
        ):
            self._cuts.append(_Cut(pts, packet.dts))
        last = len(self._cuts) - 1
        if (
            last and pts < self._cuts[last].pts
        ):  # shown before the key frame, though stored behind it
            last -= 1
            self._sound &= not last or pts >= self._cuts[last].pts
        cut = self._cuts[last]
        cut.frames += 1
        cut.before += self._start is not None and pts < self._start
        cut.behind += self._end is not None and pts >= self._end

    def segments(self, whole: bool) -> tuple[Segment, ...]:
        """The segments that have frames in the window."""
        cuts = self._cuts
        if whole or not self._sound:
            sums = [
                sum(getattr(cut, name) for cut in cuts) for name in ("frames", "before", "behind")
            ]
            cuts = [_Cut(0, None, *sums)]
            cuts[0].frames = self.count
        return tuple(self._inside(cuts))

    def _inside(self, cuts: "list[_Cut]") -> Iterator[Segment]:
        number, index = 0, 0
        for place, cut in enumerate(cuts):
            inside = cut.frames - cut.before - cut.behind
            if inside > 0:
                start = self._start if place == 0 or cut.before else cut.pts
                end = cuts[place + 1].pts if place + 1 < len(cuts) and not cut.behind else self._end
                key_pts, key_dts = (cut.pts, cut.dts) if place else (None, None)
                yield Segment(index, start, end, key_pts, key_dts, number + cut.before, inside)
                index += 1
            number += cut.frames


@dataclass
class _Cut:
    """A key frame, how many frames follow it, and how many of these are before and behind the
    window.
    """

    pts: int
    dts: int | None
    frames: int = 0
    before: int = 0
    behind: int = 0


def _first_picture(spec: str) -> av.VideoFrame:
    """The first frame that can be decoded.

    Raises:
        SourceError: there is none.
    """
    reason = "the file is empty or cut off"
    with open_video(spec) as container:
        try:
            for packet in Film(container, spec, spec).packets():
                try:
                    for picture in packet.decode():
                        return picture
                except av.error.FFmpegError as error:
                    reason = reason_of(error)
        except av.error.FFmpegError as error:
            reason = reason_of(error)
    raise SourceError(f"{spec} holds no frame: {reason}")


def _colour_of(picture: av.VideoFrame) -> dict[str, int]:
    if is_mapped(picture):
        return dict(BT709)
    found = (picture.colorspace, picture.color_range, picture.color_primaries, picture.color_trc)
    names = ("space", "range", "primaries", "transfer")
    return {
        n: PLAIN_COLOUR[n] if value is None else int(value)
        for n, value in zip(names, found, strict=True)
    }


def _ticks(seconds: float, time_base: Fraction) -> int:
    return int(np.ceil(float(Fraction(seconds) / time_base) - 1e-6))
