"""Segments through the frame loop: decode ─► engine ─► draw ─► encode, all at once, and no pause between one and the next."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engines.localizer import ImageBgr, Localizer
from realtime.batch.clip import Clip, Segment
from realtime.batch.decode import SegmentEnd, read_segment
from realtime.batch.pieces import Behind, Pieces, strip_frames
from realtime.batch.settings import Settings
from realtime.follow.following import opened
from realtime.frames import Frame, FrameRecord
from realtime.governed import Governed
from realtime.inbox import Records
from realtime.latency import Run
from realtime.pipeline import run_frames
from realtime.readers import ahead

READ_AHEAD_FRAMES = 4
FOLLOWING_CALLS = 2
"""Under way at once where something is followed: where to look depends on what is known by then, and not on the machine.
Engines that take one call only are asked one after the other."""

Read = Callable[[Clip, Segment, int], Iterable[Frame | SegmentEnd]]
"""What gives a segment's frames: ``read_segment``, or something that has them from elsewhere."""


def run_segments(
    clip: Clip, segments: Sequence[Segment], localizer: Localizer | Governed, settings: Settings, folder: Path,
    read: Read = read_segment,
) -> Generator[FrameRecord, None, None]:  # fmt: skip
    """Work on segments of a clip, one after the other.

    Of each, ``folder`` gets ``NNNNN.jsonl`` (rows), ``NNNNN.mp4`` and ``NNNNN.heat.mp4`` (where the settings want them), and
    last ``NNNNN.json``: it is done when that is there. They depend on clip, segment and settings only, but for times in rows.

    Args:
        clip: whose segments they are.
        segments: any of them, in order.
        localizer: finds.
        settings: what is wanted.
        folder: on a local disk.
        read: gives the frames.

    Yields:
        Each record when its frame is finished; its image may still be needed.

    Raises:
        SourceError: the source cannot be read any more.
        OutputError: a file cannot be written.
    """
    run, ends = _Waiting(), dict[int, SegmentEnd]()

    def frames() -> Iterator[Frame | SegmentEnd]:
        for segment in segments:
            yield from read(clip, segment, settings.every)

    with _Writer(clip, segments, settings, folder, ends, run, localizer) as writer:
        records = _records(ahead(frames(), READ_AHEAD_FRAMES, _bytes_of), ends, localizer.batch)
        following = opened(settings.following)
        under_way = min(FOLLOWING_CALLS, localizer.engine.slots) if following else 0
        yield from run_frames(records, localizer, writer.sinks, run, under_way, following=following)
        writer.finish_before(None)


def _bytes_of(item: Frame | SegmentEnd) -> int:
    return item.image_bgr.nbytes if isinstance(item, Frame) else 0


class _Waiting(Run):
    """What the loop waited for; what frames took is in the rows, and would not fit in memory for every length."""

    def add(self, record: FrameRecord) -> None:
        """Nothing is kept."""


def _records(items: Iterator[Frame | SegmentEnd], ends: dict[int, SegmentEnd], batch: int) -> Records:
    """Records of the frames. Frames of a segment that follow each other may share an engine call, if that takes several."""
    held: FrameRecord | None = None
    for item in items:
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
            held.followed = batch > 1 and held.outcome == record.outcome == "shown"
            yield held
        held = record


class _Writer:
    """Hands records to the pieces of their segments, and closes those that are complete."""

    def __init__(
        self, clip: Clip, segments: Sequence[Segment], settings: Settings, folder: Path, ends: dict[int, SegmentEnd], run: Run,
        localizer: Localizer | Governed,
    ) -> None:  # fmt: skip
        self._clip, self._settings, self._folder, self._ends, self._run = clip, settings, folder, ends, run
        self._left, self._open = list(segments), dict[int, Pieces]()
        self._strip, self._localizer = strip_frames(clip, settings.every), localizer
        self._since_s, self._totals = time.monotonic(), _totals(run)
        self.behind = Behind()
        self.sinks: list[_Pictures | _Rows] = [_Pictures(self), _Rows(self)] if settings.video else [_Rows(self)]

    def pieces(self, index: int) -> Pieces:
        """Of a segment."""
        if index not in self._open:
            segment = next(segment for segment in self._left if segment.index == index)
            self._open[index] = Pieces(self._clip, segment, self._settings, self._folder, self._strip)
        return self._open[index]

    def finish_before(self, index: int | None) -> None:
        """Close the segments before this one, or all of them."""
        while self._left and (index is None or self._left[0].index < index):
            pieces, end = self.pieces(self._left[0].index), self._ends[self._left[0].index]
            del self._left[0]
            self.behind.post(partial(pieces.finish, end, self._measured()))
            self._open = {place: each for place, each in self._open.items() if not each.finished}
        if index is None:
            self.behind.finish()

    def add_heat(self, record: FrameRecord) -> None:
        """Draw and encode a frame's heat map."""
        self.behind.post(partial(self.pieces(record.frame.segment).add_heat, record), record.frame.image_bgr.nbytes)

    @property
    def wants_heat(self) -> bool:
        return self._settings.heat_video

    def _measured(self) -> dict[str, Any]:
        """Since the last segment was complete: how long it took, and what was waited for."""
        now_s, totals = time.monotonic(), _totals(self._run)
        spent = {kind: {side: ms - self._totals[kind][side] for side, ms in sides.items()} for kind, sides in totals.items()}
        wall_s, self._since_s, self._totals = now_s - self._since_s, now_s, totals
        return {"wall_s": wall_s, **spent, "device": self._localizer.engine.device}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.behind.close()
        for pieces in self._open.values():
            if not pieces.finished:
                pieces.abandon()


def _totals(run: Run) -> dict[str, dict[str, float]]:
    """What the loop waited for and what it did, in milliseconds, up to now."""
    return {"idle_ms": dict(run.idle_ms), "work_ms": dict(run.work_ms)}


class _Pictures:
    """The sink that takes drawings."""

    needs_picture = True

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if picture is not None:
            pieces = self._writer.pieces(record.frame.segment)
            self._writer.behind.post(lambda: pieces.add_picture(record, picture), picture.nbytes)

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
