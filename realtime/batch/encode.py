"""Runs segments through the frame loop into files: rows, video and record of each segment."""

import base64
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from engines.files import digest_of_file, read_object, whole_file
from engines.localizer import ImageBgr, Localizer
from realtime.annotate import Look, draw, jpeg_of
from realtime.batch.options import Settings
from realtime.batch.segment import Clip, Read, Segment, SegmentEnd, frames_of, read_segment
from realtime.capture import AHEAD_BYTES
from realtime.events import Event, EventFinder, rules_for, surest, thumbnail
from realtime.file_sinks import JsonlSink, VideoSink
from realtime.frames import BoxPx, FrameRecord
from realtime.pipeline import run_frames
from realtime.statistics import Run, WaitingTimes
from realtime.tracking.options import State, opened, shown_from

REPRODUCIBLE = {"threads": "4", "mbtree": "0", "crf": "23"}
"""Settings of x264 with which the same pictures give the same bytes on every machine.

What it writes depends on the number of threads. Its macroblock tree depends on the processor's
instructions, and with AVX-512 now and then on memory that is not initialised: the last macroblock
of a picture then gets another quantizer (x264 core 165). Without the tree, quality 23 is what 21 is
with it; files are a sixth larger.
"""
WAITING_PICTURES = 4
HEAT = Look(box=False, heat_map="over", alpha=0.6)
STRIP_PICTURES, STRIP_HEIGHT_PX = 12, 200
THUMBNAILS = 60  # of a segment


class EncoderThread:
    """A thread that does one piece of work after the other. Up to ``WAITING_PICTURES`` of them wait
    for it. Its first error is raised by a later call here.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def post(self, work: Callable[[], None], size_bytes: int = 0) -> None:
        """Have a piece of work done later. This call waits while too much is waiting.

        Args:
            work: is called.
            size_bytes: what it keeps in memory.

        Raises:
            Exception: something posted before failed.
        """
        while self._waiting and (
            len(self._waiting) >= WAITING_PICTURES
            or self._waiting[0][0].done()
            or sum(size for _, size in self._waiting) + size_bytes > AHEAD_BYTES
        ):
            self._waiting.popleft()[0].result()
        self._waiting.append((self._pool.submit(work), size_bytes))

    def finish(self) -> None:
        """Wait until all that was posted is done.

        Raises:
            Exception: something posted before failed.
        """
        while self._waiting:
            self._waiting.popleft()[0].result()

    def close(self) -> None:
        """End the thread. Work that has not begun is not done."""
        self._pool.shutdown(cancel_futures=True)


class PieceVideo(VideoSink):
    """A piece of a video: it begins at 0, in the source's unit of time, with the source's shape,
    colours and pixels.

    Attributes:
        base_pts: the source's timestamp of its first frame.
    """

    def __init__(self, path: Path, clip: Clip, base_pts: int) -> None:
        super().__init__(path, piece_time_base(clip), clip.rate_fps)
        self.base_pts, self._clip = base_pts, clip
        self._to_yuv = VideoReformatter()
        space, full = clip.colour["space"], clip.colour["range"] == ColorRange.JPEG
        self._space = (
            Colorspace(space)
            if space in {int(known) for known in Colorspace}
            else Colorspace.ITU601
        )
        self._range = ColorRange.JPEG if full else ColorRange.MPEG

    def _pts_of(self, record: FrameRecord) -> int:
        assert record.frame.pts is not None  # all frames of files have one
        return (record.frame.pts - self.base_pts) * self._clip.time_base.numerator

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        found: av.VideoFrame = self._to_yuv.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=self._space,
            dst_color_range=self._range,
            threads=1,
        )
        return found

    def _open_stream(self, picture: ImageBgr) -> av.VideoStream:
        clip = self._clip
        stream = super()._open_stream(np.empty((clip.height_px, clip.width_px, 3), np.uint8))
        context = stream.codec_context
        context.sample_aspect_ratio = clip.pixel_aspect
        context.colorspace, context.color_range = clip.colour["space"], int(self._range)
        context.color_primaries, context.color_trc = (
            clip.colour["primaries"],
            clip.colour["transfer"],
        )
        stream.options = {**stream.options, **REPRODUCIBLE}
        return stream


def piece_time_base(clip: Clip) -> Fraction:
    """The unit of time of a piece, which MP4 can count in: the source's, or a whole part of it."""
    return Fraction(1, clip.time_base.denominator)


class Pieces:
    """One segment's files as they grow. ``finish`` gives them their names. The record gets its name
    last: it says that the others are there.

    Attributes:
        finished: it has.
    """

    def __init__(
        self, clip: Clip, segment: Segment, settings: Settings, folder: Path, strip: frozenset[int]
    ) -> None:
        self.segment = segment
        self._clip = clip
        self._settings = settings
        self._folder = folder
        self._strip = strip
        self._rows = JsonlSink(self._path(".jsonl"))
        self._video: PieceVideo | None = None
        self._heat: PieceVideo | None = None
        self._pictures: list[dict[str, Any]] = []
        self._outcomes: Counter[str] = Counter()
        self._finder = EventFinder(
            replace(rules_for(photos=clip.kind == "images"), begins_after_s=0.0)
        )
        self._events: list[Event] = []
        self.finished = False

    def add_picture(self, record: FrameRecord, picture: ImageBgr) -> None:
        """Encode a drawing."""
        assert record.frame.pts is not None
        self._video = self._video or PieceVideo(self._path(".mp4"), self._clip, record.frame.pts)
        self._video.write(record, picture)

    def add_heat(self, record: FrameRecord) -> None:
        """Encode the heat map over the frame."""
        assert record.frame.pts is not None
        assert record.found is not None
        self._heat = self._heat or PieceVideo(self._path(".heat.mp4"), self._clip, record.frame.pts)
        self._heat.write(record, draw(record.frame.image_bgr, record.found, look=HEAT))

    def add_row(self, record: FrameRecord) -> None:
        """Log a frame. Keep a small picture of it, if it is one of those for the film strip, and of
        each object where it is surest.
        """
        row = record.row()
        self._rows.write_row(row)
        changes = self._finder.add(row, partial(thumbnail, record.frame.image_bgr))
        self._events += [event for change, event in changes if change == "began"]
        self._outcomes[record.outcome] += 1
        if record.frame.index in self._strip and record.found is not None:
            self._pictures.append(_small(record))

    def finish(self, end: SegmentEnd, known: dict[str, Any]) -> None:
        """Close all files, and write the record.

        Raises:
            OutputError: something cannot be written.
        """
        written: dict[str, Any] = {"rows": self._closed(self._rows)}
        for kind, video in (("video", self._video), ("heat_video", self._heat)):
            if video is not None:
                written[kind] = {**self._closed(video), "base_pts": video.base_pts}
        record = {
            **asdict(end),
            "source": self._clip.digest,
            "outcomes": dict(self._outcomes),
            "pieces": written,
            **known,
            "strip": self._pictures,
            "events": [_pictured(event) for event in surest(self._events, THUMBNAILS)],
        }
        with whole_file(self._path(".json")) as part:
            part.write_text(
                json.dumps({"digest": record_digest(record), **record}) + "\n", encoding="utf-8"
            )
        self.finished = True

    def abandon(self) -> None:
        """Close all files, and leave none of them."""
        for sink in (self._rows, self._video, self._heat):
            if sink is not None:
                with suppress(Exception):
                    sink.__exit__(OSError, OSError(), None)

    def _path(self, ending: str) -> Path:
        return self._folder / f"{self.segment.index:05d}{ending}"

    def _closed(self, sink: JsonlSink | VideoSink) -> dict[str, Any]:
        with sink:
            pass  # leaving closes it
        return {"file": sink.path.name, "digest": digest_of_file(sink.path)}


def read_record(folder: Path, clip: Clip, segment: Segment) -> dict[str, Any] | None:
    """The record of a segment that is done.

    Returns:
        None where it is not done, or where its record or one of its files is not what was written.
    """
    record = read_object(folder / f"{segment.index:05d}.json")
    stored_digest = record.pop("digest", None)
    if (
        stored_digest is None
        or stored_digest != record_digest(record)
        or (record["source"], record["segment"]) != (clip.digest, segment.index)
    ):
        return None
    try:
        same = all(
            digest_of_file(folder / piece["file"]) == piece["digest"]
            for piece in record["pieces"].values()
        )
    except OSError:
        return None
    return record if same else None


def record_digest(record: Mapping[str, Any]) -> str:
    """The digest of a record's content, by which damage is noticed."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=20).hexdigest()


def strip_frames(clip: Clip, every: int) -> frozenset[int]:
    """The numbers of the frames that the film strip shows, evenly over what is selected."""
    first, count = clip.segments[0].first_frame, clip.selected_frames
    places = (first + (2 * k + 1) * count // (2 * STRIP_PICTURES) for k in range(STRIP_PICTURES))
    return frozenset(place + -place % every for place in places)


def _small(record: FrameRecord) -> dict[str, Any]:
    """The drawing at the film strip's height, as a JPEG in base64."""
    frame, found = record.frame, record.found
    assert found is not None
    height, width = frame.image_bgr.shape[:2]
    scale = STRIP_HEIGHT_PX / height
    size = (max(1, round(width * scale)), STRIP_HEIGHT_PX)
    small = np.asarray(cv2.resize(frame.image_bgr, size, interpolation=cv2.INTER_AREA), np.uint8)
    objects = tuple(
        replace(each, box_xyxy_px=each.box_xyxy_px and _scaled(each.box_xyxy_px, scale))
        for each in record.objects or ()
    )
    others = tuple(
        replace(each, box_xyxy_px=_scaled(each.box_xyxy_px, scale)) for each in found.detections
    )
    box_px = None if found.box_xyxy_px is None else _scaled(found.box_xyxy_px, scale)
    found = replace(found, box_xyxy_px=box_px, detections=others)
    jpeg = jpeg_of(draw(small, found, objects=objects), 88)
    return {
        "frame": frame.index,
        "pts_s": frame.pts_s,
        "jpeg": base64.b64encode(jpeg).decode(),
    }


def _pictured(event: Event) -> dict[str, Any]:
    return {
        "key": event.key,
        "begin_s": event.begin_s,
        "end_s": event.end_s,
        "confidence": event.confidence,
        "jpeg": event.picture,
    }


def _scaled(box_px: BoxPx, scale: float) -> BoxPx:
    x0, y0, x1, y1 = (edge * scale for edge in box_px)
    return x0, y0, x1, y1


def run_segments(
    clip: Clip,
    segments: Sequence[Segment],
    localizer: Localizer,
    settings: Settings,
    folder: Path,
    read: Read = read_segment,
    states: Mapping[int, State] | None = None,
) -> Generator[FrameRecord, None, None]:
    """Work on segments of a clip, one after the other.

    Of each, ``folder`` gets ``NNNNN.jsonl`` (rows), ``NNNNN.mp4`` and ``NNNNN.heat.mp4`` (where the
    settings want them), and
    last ``NNNNN.json``: it is done when that is there. They depend on clip, segment and settings
        only, but for times in rows.

    Args:
        clip: whose segments they are.
        segments: any of them, in order.
        localizer: finds.
        settings: what is wanted.
        folder: on a local disk.
        read: gives the frames.
        states: with tracking, what is known at the end of the segments before these that are done,
            by their numbers.

    Yields:
        Each record when its frame is finished; its image may still be needed.

    Raises:
        SourceError: the source cannot be read any more.
        OutputError: a file cannot be written.
    """
    run, ends = WaitingTimes(), dict[int, SegmentEnd]()
    localizer.expect(clip.width_px, clip.height_px)
    known = dict(states or {})
    with _SegmentWriter(clip, segments, settings, folder, ends, run, localizer, known) as writer:
        frames = frames_of(clip, segments, settings.every, localizer.batch, ends, read)
        options = settings.following.for_source(clip.kind == "images")
        following = opened(options, localizer, known)
        yield from run_frames(frames, localizer, writer.sinks, run, following=following)
        if following is not None:
            following.end()
        writer.finish_before(None)


class _SegmentWriter:
    """Hands records to the pieces of their segments, and closes those that are complete."""

    def __init__(
        self,
        clip: Clip,
        segments: Sequence[Segment],
        settings: Settings,
        folder: Path,
        ends: dict[int, SegmentEnd],
        run: Run,
        localizer: Localizer,
        states: Mapping[int, State],
    ) -> None:
        self._states = states
        self._clip = clip
        self._settings = settings
        self._folder = folder
        self._ends = ends
        self._run = run
        self._left, self._open = list(segments), dict[int, Pieces]()
        self._strip, self._localizer = strip_frames(clip, settings.every), localizer
        self._since_s, self._totals = time.monotonic(), _totals(run)
        self.encoder = EncoderThread()
        self.sinks: list[_Pictures | _Rows] = (
            [_Pictures(self), _Rows(self)] if settings.draws else [_Rows(self)]
        )

    def pieces(self, index: int) -> Pieces:
        """The files of a segment."""
        if index not in self._open:
            segment = next(segment for segment in self._left if segment.index == index)
            self._open[index] = Pieces(
                self._clip, segment, self._settings, self._folder, self._strip
            )
        return self._open[index]

    def finish_before(self, index: int | None) -> None:
        """Close the segments before this one, or all of them."""
        while self._left and (index is None or self._left[0].index < index):
            pieces, end = self.pieces(self._left[0].index), self._ends[self._left[0].index]
            del self._left[0]
            known = {**self._measured(), "tracking": self._states.get(pieces.segment.index)}
            self.encoder.post(partial(pieces.finish, end, known))
            self._open = {place: each for place, each in self._open.items() if not each.finished}
        if index is None:
            self.encoder.finish()

    def add_heat(self, record: FrameRecord) -> None:
        """Draw and encode a frame's heat map."""
        self.encoder.post(
            partial(self.pieces(record.frame.segment).add_heat, record),
            record.frame.image_bgr.nbytes,
        )

    @property
    def wants_heat(self) -> bool:
        return self._settings.heat_video

    def _measured(self) -> dict[str, Any]:
        """How long it took since the last segment was complete, and what was waited for."""
        now_s, totals = time.monotonic(), _totals(self._run)
        spent = {
            kind: {side: ms - self._totals[kind][side] for side, ms in sides.items()}
            for kind, sides in totals.items()
        }
        wall_s = now_s - self._since_s
        self._since_s = now_s
        self._totals = totals
        return {
            "wall_s": wall_s,
            **spent,
            "device": self._localizer.engine.device,
            "shown_from": shown_from(
                self._settings.following.for_source(self._clip.kind == "images"), self._localizer
            ),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.encoder.close()
        for pieces in self._open.values():
            if not pieces.finished:
                pieces.abandon()


def _totals(run: Run) -> dict[str, dict[str, float]]:
    """How long the loop has waited and worked up to now, in milliseconds."""
    return {"idle_ms": dict(run.idle_ms), "work_ms": dict(run.work_ms)}


class _Pictures:
    """The sink that takes drawings."""

    needs_picture = True

    def __init__(self, writer: _SegmentWriter) -> None:
        self._writer = writer

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if picture is not None:
            pieces = self._writer.pieces(record.frame.segment)
            self._writer.encoder.post(lambda: pieces.add_picture(record, picture), picture.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the writer closes


class _Rows(_Pictures):
    """The sink that takes what is known of every frame."""

    needs_picture = False

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        writer, segment = self._writer, record.frame.segment
        writer.finish_before(segment)
        writer.pieces(segment).add_row(record)
        if writer.wants_heat and record.found is not None:
            writer.add_heat(record)
