"""The frame, the record of a frame (what became of it, when, and how long each stage took), and the
columns of a log.

``python -m realtime.frames`` prints the columns as the table of ``docs/batch.md``.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from engines.dense_names import BoxName
from engines.localizer import Detection, ImageBgr, Labelled, Localization
from engines.networks.network import NO_CLASSES
from engines.text import displayable

BoxPx = tuple[float, float, float, float]
NO_IMAGE: ImageBgr = np.empty((0, 0, 3), np.uint8)
ENDED = "the run ended"
NO_MAP = np.empty((0, 0), np.float32)
STAGES = ("read", "wait", "prepare", "engine", "draw", "write")
"""The timed parts of a frame's way, in their order."""


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    Attributes:
        image_bgr: uint8 ``[height, width, 3]``.
        source: the source's name.
        index: number of the frame in its source, from 0.
        pts_s: presentation time in seconds since the source's first frame.
        captured_ns: ``time.monotonic_ns()`` when it was complete.
        read_ms: how long it was decoded; waiting for a camera does not count.
        truth_xyxy_px: the true box where it is known (``demo:``).
        damaged: parts of it were lost on the way, and the decoder filled them in.
        pts, time_base: the source's own timestamp and its unit in seconds; ``batch`` sets them.
        segment: the part of the file that it belongs to, see ``realtime.batch``.
        lost: why it could not be decoded. Its image is empty then.
    """

    image_bgr: ImageBgr
    source: str
    index: int
    pts_s: float
    captured_ns: int
    read_ms: float
    truth_xyxy_px: BoxPx | None = None
    damaged: bool = False
    pts: int | None = None
    time_base: Fraction = Fraction(1, 90000)
    segment: int = 0
    lost: str = ""


@dataclass(frozen=True)
class Track:
    """What tracking adds to an answer, see ``realtime.tracking.tracker``.

    Attributes:
        state: ``searching`` (nothing is sure yet), ``following``, ``unsure`` (what was followed is
            less sure than it was) or ``lost`` (what was followed is not found any more).
        confidence: probability that the box is right (IoU over 0.5).
        track_id: the object's number, from 1; 0 while none is tracked.
        raw_xyxy_px: the box that the head found, before it was averaged with those before it; where
            it was not found in this frame, the box that optical flow carried; None for none.
    """

    state: str
    confidence: float
    track_id: int
    raw_xyxy_px: BoxPx | None


@dataclass(frozen=True)
class Tracked(Labelled):
    """One of several objects that are tracked.

    Attributes:
        box_xyxy_px: in the frame; None where it is not sure enough to be shown.
        class_index, class_name, score: of the last answer that was about this object.
        track: what tracking says of it.
        box_name, unsure: see ``engines.localizer.Detection``.
    """

    box_xyxy_px: BoxPx | None
    class_index: int
    class_name: str
    score: float
    track: Track
    box_name: BoxName | None = None
    unsure: bool = False

    @property
    def confidence(self) -> float:
        """Probability that the box is right, see ``Track``."""
        return self.track.confidence

    def row(self) -> dict[str, Any]:
        """Its entry in the column ``objects`` of a log."""
        return row_of(self, TRACKED_COLUMNS)


@dataclass
class FrameRecord:
    """What became of one captured frame, when, and how long each stage took.

    Attributes:
        frame: what was captured.
        outcome: ``shown`` (also while it is under way), ``dropped`` or ``failed``; ``cause`` says
            why.
        found: what the engine answered.
        stages_ms: how long each stage took, in their order.
        total_ms: from the start of its reading until it was written.
        preset: the name of the preset that the engine ran with; empty without a latency budget.
        began_ns: when each stage began, on the clock of ``captured_ns``.
        track: what tracking says of the object, or of the first of several; None without tracking.
        objects: where several may be tracked, each of them; None where it is one or none.
    """

    frame: Frame
    outcome: str = "shown"
    cause: str = ""
    found: Localization | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    total_ms: float = 0.0
    preset: str = ""
    began_ns: dict[str, int] = field(default_factory=dict)
    track: Track | None = None
    objects: tuple[Tracked, ...] | None = None

    @property
    def shown_boxes(self) -> int:
        """How many boxes of it are shown: 0 where nothing is sure enough."""
        if self.outcome != "shown" or self.found is None:
            return 0
        if self.objects is not None:
            return sum(each.box_xyxy_px is not None for each in self.objects)
        if self.found.box_xyxy_px is None:
            return 0
        return max(1, len(self.found.detections)) if self.track is None else 1

    @property
    def age_ms(self) -> float:
        """The time from capture to display, in milliseconds."""
        return max(0.0, self.total_ms - self.frame.read_ms)

    def fail(self, error: BaseException | None) -> None:
        """A frame that is under way is not shown: it failed with an error, or is dropped where the
        run ended without one.
        """
        if self.outcome != "shown":
            return
        failed = isinstance(error, Exception)
        self.outcome = "failed" if failed else "dropped"
        self.cause = str(error) if failed else ENDED

    def release(self) -> None:
        """Forget the image and the map, so that records can be kept."""
        self.frame = replace(self.frame, image_bgr=NO_IMAGE)
        if self.found is not None:
            self.found = replace(self.found, map_hw=NO_MAP)

    def row(self) -> dict[str, Any]:
        """The record as one row of a log, by the table ``COLUMNS``."""
        return row_of(self, COLUMNS)


@dataclass(frozen=True)
class View:
    """What the engine is to see of a frame.

    Attributes:
        image_bgr: the part that it sees.
        tracker: of ``realtime.tracking.options.Following``, which gets the answer; None for none.
    """

    image_bgr: ImageBgr
    tracker: Any = None


@dataclass
class LoopFrame:
    """A frame on its way through the frame loop: its record, and what the loop alone needs.

    Attributes:
        record: of the frame.
        batch_with_next: the next frame is there already, and both may go into one engine call.
        view: what the engine sees of it; None until it is prepared, and where that failed.
    """

    record: FrameRecord
    batch_with_next: bool = False
    view: View | None = None

    @property
    def asks_engine(self) -> bool:
        """Whether the engine sees it: it is under way."""
        return self.record.outcome == "shown" and self.view is not None


LoopFrames = Generator[LoopFrame, None, None]
"""Frames for the loop, the dropped ones too, in their order."""


ABSENT: Any = object()
"""What a column reads where a row is to lack it. In a Parquet file, it is null there."""


@dataclass(frozen=True)
class Column:
    """One column of a log. The JSON row, the Parquet schema and the documents are made from it.

    Attributes:
        name: the key in the JSON row, and the name in the Parquet file.
        type: an Arrow type: ``string``, ``bool``, ``int32``, ``int64``, ``float64``,
            ``list<int64>`` or ``list<float64>``. Empty where a later column of the same name
            declares it.
        read: gives the value, which JSON must be able to hold; or ``ABSENT``.
        meaning: one sentence for the documents.
        parts: of a list of objects: the columns of each object; ``type`` is empty then.
    """

    name: str
    type: str
    read: Callable[[Any], Any]
    meaning: str
    parts: "tuple[Column, ...]" = ()


def row_of(value: object, columns: Sequence[Column]) -> dict[str, Any]:
    """A value as a row: each column's name with what it reads, in their order."""
    read = ((column.name, column.read(value)) for column in columns)
    return {name: found for name, found in read if found is not ABSENT}


def columns_table() -> str:
    """The columns as a Markdown table."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for column in COLUMNS:
        kind = "list of objects" if column.parts else column.type
        if kind:
            lines.append(f"| `{column.name}` | {kind} | {column.meaning} |")
    return "\n".join(lines) + "\n"


Found = Detection | Localization | Tracked


def _edge(place: int, value: Found) -> float | None:
    box_px = value.box_xyxy_px
    return None if box_px is None else round(box_px[place], 3)


def _score(value: Found) -> float | None:
    return None if value.class_name in NO_CLASSES else round(value.score, 6)


def _label(value: Found) -> str | None:
    if value.box_xyxy_px is None:
        return None
    return displayable(value.label)


def _sure(value: Found) -> bool | None:
    if value.box_xyxy_px is None or value.confidence is None:
        return None
    return not value.unsure


def _edges(box_px: BoxPx | None, digits: int | None = None) -> list[float] | None:
    return None if box_px is None else [round(edge, digits) for edge in box_px]


OBJECT_COLUMNS = (
    Column("class_id", "int32", lambda found: found.class_index, "Number of the class."),
    Column("class_name", "string", lambda found: displayable(found.class_name), "Its name."),
    Column("score", "float64", _score, "Score of the class; null where none is scored."),
    Column(
        "label",
        "string",
        _label,
        "What is written beside the box: `dog`, `object`; null where no box is shown.",
    ),
    Column(
        "sure",
        "bool",
        _sure,
        "Whether the box is sure, or else drawn dashed; null where there is no box, or nothing"
        " tells.",
    ),
    Column("x0", "float64", partial(_edge, 0), "Left edge of the box, in pixels of the frame."),
    Column("y0", "float64", partial(_edge, 1), "Upper edge of the box."),
    Column("x1", "float64", partial(_edge, 2), "Right edge of the box."),
    Column("y1", "float64", partial(_edge, 3), "Lower edge of the box."),
)
"""Of a ``Detection``, a ``Localization`` and a ``Tracked``."""

DETECTION_COLUMNS = (
    *OBJECT_COLUMNS,
    Column(
        "confidence",
        "float64",
        lambda found: ABSENT if found.confidence is None else round(found.confidence, 4),
        "Probability that the box is right, by a dense head.",
    ),
)
"""Of a ``Detection``."""

TRACK_COLUMNS = (
    Column(
        "state",
        "string",
        lambda track: track.state,
        "With tracking: `searching`, `following`, `unsure` or `lost`.",
    ),
    Column(
        "confidence",
        "float64",
        lambda track: round(track.confidence, 4),
        "Probability that the box is right (IoU over 0.5), where it is known.",
    ),
    Column(
        "track_id",
        "int64",
        lambda track: track.track_id,
        "With tracking: number of the object, from 1; 0 while there is none.",
    ),
    Column(
        "raw",
        "list<float64>",
        lambda track: _edges(track.raw_xyxy_px, 3),
        "With tracking: the box before it was averaged with those before; null for none.",
    ),
)
"""Of a ``Track``."""


def _of_track(read: Callable[[Track], Any], value: FrameRecord | Tracked) -> Any:
    return ABSENT if value.track is None else read(value.track)


def _of_answer(read: Callable[[Localization], Any], record: FrameRecord) -> Any:
    return None if record.found is None else read(record.found)


def _of_timestamp(read: Callable[[Frame], Any], record: FrameRecord) -> Any:
    return ABSENT if record.frame.pts is None else read(record.frame)


def _of_stage(stage: str, record: FrameRecord) -> Any:
    return round(record.stages_ms[stage], 4) if stage in record.stages_ms else ABSENT


def _confidence(record: FrameRecord) -> Any:
    confidence = record.found.confidence if record.found else None
    return ABSENT if confidence is None else round(confidence, 4)


def _detections(record: FrameRecord) -> Any:
    several = record.found.detections if record.found else ()
    return [row_of(each, DETECTION_COLUMNS) for each in several] if len(several) > 1 else ABSENT


def _objects(record: FrameRecord) -> Any:
    return ABSENT if record.objects is None else [each.row() for each in record.objects]


_ANSWER = tuple(replace(each, read=partial(_of_answer, each.read)) for each in OBJECT_COLUMNS)
_TRACK = tuple(replace(each, read=partial(_of_track, each.read)) for each in TRACK_COLUMNS)
TRACKED_COLUMNS = (*OBJECT_COLUMNS, *_TRACK)
"""Of a ``Tracked``."""

COLUMNS: tuple[Column, ...] = (
    Column("source", "string", lambda record: record.frame.source, "Name of the source."),
    Column("frame", "int64", lambda record: record.frame.index, "Number of the frame, from 0."),
    Column(
        "pts_s",
        "float64",
        lambda record: round(record.frame.pts_s, 6),
        "Its time in the source, in seconds since the first frame.",
    ),
    Column(
        "pts",
        "int64",
        partial(_of_timestamp, lambda frame: frame.pts),
        "With `batch`: the source's own timestamp.",
    ),
    Column(
        "time_base_num",
        "int64",
        partial(_of_timestamp, lambda frame: frame.time_base.numerator),
        "With `batch`: numerator of the timestamp's unit in seconds.",
    ),
    Column(
        "time_base_den",
        "int64",
        partial(_of_timestamp, lambda frame: frame.time_base.denominator),
        "With `batch`: denominator of the timestamp's unit.",
    ),
    Column(
        "captured_ns",
        "int64",
        lambda record: record.frame.captured_ns,
        "When the frame was complete, in nanoseconds of the machine's monotonic clock.",
    ),
    Column("outcome", "string", lambda record: record.outcome, "`shown`, `dropped` or `failed`."),
    Column("cause", "string", lambda record: displayable(record.cause), "Why it is not shown."),
    *_ANSWER[:3],
    Column("confidence", "", _confidence, "The column below; the value is the same."),
    *_ANSWER[3:],
    Column(
        "boxes",
        "int32",
        lambda record: record.shown_boxes if record.outcome == "shown" else None,
        "How many boxes are shown; 0 where nothing is sure.",
    ),
    *(
        Column(
            f"{stage}_ms",
            "float64",
            partial(_of_stage, stage),
            f"Time of the stage `{stage}`, in milliseconds.",
        )
        for stage in STAGES
    ),
    Column(
        "total_ms",
        "float64",
        lambda record: round(record.total_ms, 4),
        "From the start of its reading until it was written, in milliseconds.",
    ),
    Column(
        "rung",
        "string",
        lambda record: record.preset or None,
        "With a latency budget: the preset that the engine ran with.",
    ),
    Column("detections", "", _detections, "All that was found, if several.", DETECTION_COLUMNS),
    *_TRACK,
    Column("objects", "", _objects, "The objects that are tracked, if several.", TRACKED_COLUMNS),
)
"""The columns of a log, in the order of the JSON row. This is the only place that names them."""


if __name__ == "__main__":
    print(columns_table(), end="")
