"""One object that is tracked: what is known of it from its detections so far."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from engines.boxes import overlap
from engines.dense_names import BoxName
from engines.localizer import Detection
from realtime.frames import BoxPx

SEARCHING = "searching"
FOLLOWING = "following"
UNSURE = "unsure"
LOST = "lost"
MEMORY = 0.6
"""The share of its weight that a box keeps from frame to frame: it is a mean over some three."""
SCORE_MEMORY = 0.9
"""The share of its score that an object keeps: confidence is summed over some ten looks."""
LEARNS = 0.2
"""The weight of one look in the mean confidence and the mean overlap."""
ALIKE_IOU, OTHER_IOU = 0.75, 0.3
"""A detection that overlaps the box less than the first is believed more than others, and one that
overlaps it by the second only is taken as it is: the object has grown, or is faster than the flow.
"""
LOST_LOOKS = 8
"""An object that was not found in so many looks in a row is lost."""
TINY = 1e-12
LEAST_SHARE = 0.01
"""A smaller share of all scores tells no more."""
EDGE = 0.01
"""A box that comes so near to an edge of the frame, as a share of its side, reaches it."""
UNKNOWN = 0.5
"""The confidence of a detection of which nothing tells how sure it is."""


@dataclass
class TrackedObject:
    """An object that is tracked.

    Attributes:
        box_px: in the newest frame.
        found: the detection that names it.
        raw_px: the box of the detection that it took last.
        mean: of the confidences of its detections, those that were missed counted as 0.
        score: the confidence summed over time.
        weight: how much the box so far counts against a new detection.
        seen_s: when it was found last.
        confidence: the probability that the box is right.
        agreement: the mean overlap of its detections with where it was expected.
        sure: the confidence of the detection that it took in the newest frame; 0 for none.
        looks: in how many it was found.
        missed: in how many in a row it was not.
        track_id: see ``Track``; 0 until it is sure.
        state: see ``Track``.
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
    sure: float = 0.0
    looks: int = 1
    missed: int = 0
    track_id: int = 0
    state: str = SEARCHING
    classes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begun(cls, found: Detection, confidence: float, pts_s: float) -> Self:
        """An object as its first detection shows it."""
        box = found.box_xyxy_px
        begun = cls(box, found, box, confidence, confidence, confidence, pts_s, sure=confidence)
        begun._name(found, confidence)
        return begun

    def json(self) -> dict[str, Any]:
        """As ``from_json`` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
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

    def cues(self, size_px: tuple[int, int], total: float) -> list[float]:
        """What its confidence is computed from, in the order of
        ``realtime.tracking.confidence.CUES``.

        Args:
            size_px: of the frame.
            total: of the scores of all objects in it.
        """
        x0, y0, x1, y1 = self.box_px
        width, height = size_px
        share = max((x1 - x0) * (y1 - y0), 1.0) / (width * height)
        x, y = EDGE * width, EDGE * height
        edges = (x0 < x, y0 < y, x1 > width - x, y1 > height - y)
        return [
            self.mean,
            self.agreement,
            math.log(min(self.looks, 20)),
            float(min(self.missed, LOST_LOOKS)),
            math.log(share),
            float(sum(edges)),
            math.log(self.score / max(total, self.score, TINY) + LEAST_SHARE),
        ]

    def carry(self, box_px: BoxPx) -> None:
        """Go on to the next frame, where motion alone would have its box be that."""
        self.box_px = box_px
        self.raw_px = self.raw_px and box_px
        self.weight *= MEMORY

    def take(self, found: Detection, confidence: float, pts_s: float) -> None:
        """Go on with a detection."""
        if self.state == LOST:
            self.weight = 0.0
        alike = overlap(self.box_px, found.box_xyxy_px)
        self.agreement += LEARNS * (alike - self.agreement)
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
        self.sure = confidence
        self._count(confidence)
        self._name(found, confidence)

    def miss(self) -> None:
        """Go on without a detection."""
        self.missed += 1
        self.sure = 0.0
        self._count(0.0)

    def lose(self) -> None:
        """It is not in the frame any more, or cannot be seen."""
        self.state = LOST
        self.confidence = 0.0
        self.raw_px = None
        self.missed = max(self.missed, 1)

    def _count(self, confidence: float) -> None:
        """Add a look to what is known of it."""
        self.mean += LEARNS * (confidence - self.mean)
        self.score = SCORE_MEMORY * self.score + confidence

    def _name(self, found: Detection, confidence: float) -> None:
        """Let it be called what most of its detections are called."""
        self.classes = {name: 0.95 * weight for name, weight in self.classes.items()}
        key = str(found.class_index)
        self.classes[key] = self.classes.get(key, 0.0) + confidence * found.score
        if max(self.classes, key=self.classes.__getitem__) == key:
            self.found = found


def confidence_of(found: Detection) -> float:
    """How sure a detection is."""
    return UNKNOWN if found.confidence is None else found.confidence
