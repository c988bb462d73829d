"""One object that is tracked: what is known of it from its detections so far."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engines.boxes import overlap
from engines.dense_names import BoxName
from engines.localizer import Detection
from realtime.frames import BoxPx

SEARCHING = "searching"
FOLLOWING = "following"
UNSURE = "unsure"
LOST = "lost"
MOTION_WEIGHT = 8.0
"""What moves by itself scores up to so many times its confidence more."""
ALIKE_IOU, OTHER_IOU = 0.6, 0.3
"""A detection that overlaps the box less than the first is believed more than others, and one that
overlaps it by the second only is taken as it is: the object has grown, or is faster than the flow.
"""
LOST_LOOKS = 8
"""An object that was not found in so many looks in a row is lost."""


@dataclass
class TrackedObject:
    """An object that is tracked.

    Attributes:
        box_px: in the newest frame.
        found: the detection that it took last.
        raw_px: its box.
        confidence: the probability that the box is right.
        mean: of the confidences of its detections, those that were missed counted as 0.
        agreement: the mean overlap of its detections with where it was expected.
        weight: how much the box so far counts against a new detection.
        score: the confidence summed over time.
        looks: in how many it was found.
        missed: in how many in a row it was not.
        moves: how surely it moves by itself.
        track_id: see ``Track``; 0 until it is sure.
        state: see ``Track``.
        seen_s: when it was found last.
        classes: how much speaks for each class, by its number.
    """

    box_px: BoxPx
    found: Detection
    raw_px: BoxPx | None
    mean: float
    score: float
    weight: float
    seen_s: float
    confidence: float = 0.0
    agreement: float = 0.7
    looks: int = 1
    missed: int = 0
    moves: float = 0.0
    track_id: int = 0
    state: str = SEARCHING
    classes: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As ``from_json`` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "TrackedObject":
        """What ``json`` gave."""
        known = dict(stored)
        found = dict(stored["found"])
        box_name = found.pop("box_name")
        known["found"] = Detection(
            **{**found, "box_xyxy_px": tuple(found["box_xyxy_px"])},
            box_name=box_name and BoxName(**box_name),
        )
        known["box_px"] = tuple(stored["box_px"])
        known["raw_px"] = stored["raw_px"] and tuple(stored["raw_px"])
        return cls(**known)

    @property
    def worth(self) -> float:
        """What decides which object is the main one."""
        return self.score * (1 + MOTION_WEIGHT * self.moves)

    def cues(self, size_px: tuple[int, int]) -> list[float]:
        """What its confidence is computed from, in the order of
        ``realtime.tracking.confidence.CUES``.
        """
        x0, y0, x1, y1 = self.box_px
        share = max((x1 - x0) * (y1 - y0), 1.0) / (size_px[0] * size_px[1])
        return [
            self.mean,
            self.agreement,
            math.log(min(self.looks, 20)),
            float(min(self.missed, LOST_LOOKS)),
            math.log(share),
            self.moves,
        ]

    def take(self, found: Detection, confidence: float, pts_s: float) -> None:
        """Go on with a detection."""
        if self.state == LOST:
            self.weight = 0.0
        alike = overlap(self.box_px, found.box_xyxy_px)
        self.agreement += 0.2 * (alike - self.agreement)
        surprise = (ALIKE_IOU - alike) / (ALIKE_IOU - OTHER_IOU)
        self.weight *= 1 - min(max(surprise, 0.0), 1.0)
        self.weight += confidence
        share = confidence / self.weight
        x0, y0, x1, y1 = (
            then + share * (now - then)
            for then, now in zip(self.box_px, found.box_xyxy_px, strict=True)
        )
        self.box_px = (x0, y0, x1, y1)
        self.raw_px = found.box_xyxy_px
        self.seen_s = pts_s
        self.looks += 1
        self.missed = 0
        self.name(found, confidence)

    def name(self, found: Detection, confidence: float) -> None:
        """Let it be called what most of its detections are called."""
        self.classes = {name: 0.95 * weight for name, weight in self.classes.items()}
        key = str(found.class_index)
        self.classes[key] = self.classes.get(key, 0.0) + confidence * found.score
        if max(self.classes, key=self.classes.__getitem__) == key:
            self.found = found
