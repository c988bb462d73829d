"""The frame, and the record of a frame: what became of it, when, and how long each stage took."""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from engines.localizer import Detection, ImageBgr, Localization
from engines.text import displayable

BoxPx = tuple[float, float, float, float]
NO_IMAGE: ImageBgr = np.empty((0, 0, 3), np.uint8)
ENDED = "the run ended"
NO_MAP = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    Attributes:
        image_bgr: uint8 ``[height, width, 3]``.
        source: the source's name.
        index: number of the frame in its source, from 0.
        pts_s: presentation time in seconds since the source's first frame.
        captured_ns: ``time.monotonic_ns()`` when it was complete.
        read_ms: what decoding it took, waiting for a camera not counted.
        truth_xyxy_px: the true box where it is known (``demo:``).
        damaged: parts of it were lost on the way, and the decoder filled them in.
        pts, time_base: the source's own timestamp and its unit in seconds, where whole files are
            worked through.
        segment: which part of the file it is of, see ``realtime.batch``.
        lost: why it could not be decoded; its image is empty then.
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
        state: ``searching`` (nothing is known yet), ``following``, ``widened`` (not sure: a larger
            window), ``lost``.
        window_xyxy_px: what the engine saw of the frame; None where it was not asked, and the last
            answer was carried along.
        confidence: probability that the box is right (IoU over 0.5).
        track_id: counts objects from 1; 0 while none is followed.
        raw_xyxy_px: the box before it was calmed; None where the frame shows nothing.
    """

    state: str
    window_xyxy_px: BoxPx | None
    confidence: float
    track_id: int
    raw_xyxy_px: BoxPx | None

    def row(self) -> dict[str, Any]:
        """Its part of a log row."""
        raw = [round(edge, 3) for edge in self.raw_xyxy_px] if self.raw_xyxy_px else None
        window = [round(edge) for edge in self.window_xyxy_px] if self.window_xyxy_px else None
        return {
            "state": self.state,
            "confidence": round(self.confidence, 4),
            "track_id": self.track_id,
            "window": window,
            "raw": raw,
        }


@dataclass(frozen=True)
class Tracked:
    """One of several objects that are followed.

    Attributes:
        box_xyxy_px: in the frame; None where it is not sure enough to be shown.
        class_index, class_name, score: of the last answer that was about it.
        track: what following says of it.
    """

    box_xyxy_px: BoxPx | None
    class_index: int
    class_name: str
    score: float
    track: Track

    def row(self) -> dict[str, Any]:
        """Its entry in a log row's ``objects``."""
        return {**_object_row(self), **self.track.row()}


@dataclass
class FrameRecord:
    """The ledger's row of one captured frame: what became of it, when, and what each stage took.

    Attributes:
        frame: what was captured.
        outcome: ``shown`` (also while it is under way), ``dropped`` or ``failed``; ``cause`` says
            why.
        found: what the engine answered.
        stages_ms: what each stage took, in a frame's order; ``began_ns`` says when each began, on
            ``captured_ns``'s clock.
        total_ms: from the start of its reading until it was written.
        preset: the settings that made it, where a latency budget chooses them.
        followed: the next record is there already and of another source: both can go into one
            engine call.
        track: what following knows of it; None without ``--follow``. Of several objects, of the
            first.
        objects: where several are followed, each of them; None where it is one or none.
        tracker: who follows it, see ``realtime.tracking.options``; ``view_px`` is the size of what
            the engine sees of it.
        propagated: the engine need not see it: the last answer is carried along.
    """

    frame: Frame
    outcome: str = "shown"
    cause: str = ""
    found: Localization | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    total_ms: float = 0.0
    preset: str = ""
    began_ns: dict[str, int] = field(default_factory=dict)
    followed: bool = False
    track: Track | None = None
    objects: tuple[Tracked, ...] | None = None
    tracker: Any = None
    view_px: tuple[int, int] | None = None
    propagated: bool = False

    @property
    def age_ms(self) -> float:
        """From capture to display."""
        return max(0.0, self.total_ms - self.frame.read_ms)

    def fail(self, error: BaseException | None) -> None:
        """It is not shown, because of an error; or dropped, if there was none and the run just
        ended.
        """
        if self.outcome == "shown":
            failed = isinstance(error, Exception)
            self.outcome, self.cause = ("failed", str(error)) if failed else ("dropped", ENDED)

    def release(self) -> None:
        """Let go of the image and the map, so that records can be kept."""
        self.frame = replace(self.frame, image_bgr=NO_IMAGE)
        if self.found is not None:
            self.found = replace(self.found, map_hw=NO_MAP)

    def row(self) -> dict[str, Any]:
        """One row of the per-frame log, flat; ``detections``, every one found, is there only when
        they are several, ``objects`` only where several may be followed, and ``confidence`` where
        it is known.
        """
        found = self.found
        several = found.detections if found and len(found.detections) > 1 else ()
        unit = self.frame.time_base
        exact = {
            "pts": self.frame.pts,
            "time_base_num": unit.numerator,
            "time_base_den": unit.denominator,
        }
        return {
            "source": self.frame.source,
            "frame": self.frame.index,
            "pts_s": round(self.frame.pts_s, 6),
            **({} if self.frame.pts is None else exact),
            "captured_ns": self.frame.captured_ns,
            "outcome": self.outcome,
            "cause": displayable(self.cause),
            "class_id": found.class_index if found else None,
            "class_name": displayable(found.class_name) if found else None,
            "score": round(found.score, 6) if found else None,
            **(
                {"confidence": round(found.confidence, 4)}
                if found and found.confidence is not None
                else {}
            ),
            **_corners(found.box_xyxy_px if found else None),
            **{f"{stage}_ms": round(value, 4) for stage, value in self.stages_ms.items()},
            "total_ms": round(self.total_ms, 4),
            "rung": self.preset or None,
            **({"detections": [_object_row(each) for each in several]} if several else {}),
            **(self.track.row() if self.track else {}),
            **({} if self.objects is None else {"objects": [each.row() for each in self.objects]}),
        }


def _object_row(found: Detection | Tracked) -> dict[str, Any]:
    named = {
        "class_id": found.class_index,
        "class_name": displayable(found.class_name),
        "score": round(found.score, 6),
    }
    return {**named, **_corners(found.box_xyxy_px)}


def _corners(box_px: BoxPx | None) -> dict[str, float | None]:
    names = "x0", "y0", "x1", "y1"
    return (
        dict.fromkeys(names)
        if box_px is None
        else {k: round(v, 3) for k, v in zip(names, box_px, strict=True)}
    )
