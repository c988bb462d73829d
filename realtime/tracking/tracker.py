"""Tracks the objects of one source from frame to frame: which box of this frame is which object of
the last one, and how sure each is. It reads no clock and no file.

1. Optical flow carries each object's box into the new frame.
2. Each object takes one of the detections that overlap it, see ``TrackedObject.take``.
3. A detection that belongs to no object begins a new one.
4. The main object is the one with the most confidence summed over time, of those that are sure
   enough to be shown, if there are any.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engines.boxes import overlap
from engines.confidence import USUAL_LIMITS, Limits
from engines.localizer import Detection, ImageBgr, Localization
from realtime.frames import NO_MAP, BoxPx, Track, Tracked
from realtime.tracking.optical_flow import Motion, MotionState, MotionStep
from realtime.tracking.tracked import (
    FOLLOWING,
    LOST,
    LOST_LOOKS,
    SEARCHING,
    UNSURE,
    TrackedObject,
    confidence_of,
)

STAYS_SURE = 0.8
"""What is followed stays so while its confidence is at least this share of the limit."""
BEGINS = 0.07
"""The least confidence of a detection that begins an object."""
GOES_ON = 0.05
"""The least confidence of a detection that an object takes."""
MATCH_IOU = 0.3
"""The least overlap of a detection with the object that takes it, carried to the frame."""
SAME_IOU = 0.5
"""Two objects that overlap by so much are one."""
STAYS_MAIN = 1.3
"""Another object becomes the main one where its score is so many times as high."""
LOST_LOOKS_NEW = 3
"""An object that has no number yet is lost after so many looks in which it is not found."""
SHORT_LOSS_S = 2.0
"""An object that is found again within this time keeps its number."""
SELECTED, SELECTED_KEPT, LOST_LOOKS_SELECTED = 0.6, 0.99, 50
"""What a user has selected is there: its confidence is at least the first, of which each look in
which the head does not find it leaves the second; it is lost after so many.
"""
MOST_KEPT = 12
"""Objects that are tracked besides those that are asked for."""
LEFT = 0.3
"""An object has left when less than this share of its box is in the frame."""
NOTHING = Localization(None, 0, "", 0.0, NO_MAP)
"""The answer where there is none."""


@dataclass
class _Pending:
    """A frame whose answer is awaited: its motion, when it was, and the box that is selected in
    it.
    """

    step: MotionStep
    pts_s: float
    selected_px: BoxPx | None


class Tracker:
    """Tracks the objects of one source, whose frames are of one size.

    ``see`` is called for each frame in turn, and ``update`` with each answer in the same order.
    Answers of several frames may be awaited at once.

    Args:
        width_px, height_px: size of the frames.
        confidence_model: gives the confidence of a box from its cues.
        most: the largest number of objects that are given.
        selected_px: the box to track from the first frame on; None to track what is found.
        wanted: whether a class or a name is looked for: detections then count by its probability,
            too.
        limits: of the head. An object has a number where it is surer than what is shown.

    Attributes:
        objects: those that have a number and are in the frame, the main one first, as of the last
            answer.
    """

    def __init__(
        self,
        width_px: int,
        height_px: int,
        confidence_model: Callable[[Sequence[float]], float],
        most: int = 1,
        selected_px: BoxPx | None = None,
        wanted: bool = False,
        limits: Limits = USUAL_LIMITS,
    ) -> None:
        self.objects: tuple[Tracked, ...] = ()
        self._size_px = (width_px, height_px)
        self._model = confidence_model
        self._most = most
        self._wanted = wanted
        self._limits = limits
        self._selected_px = selected_px
        self._motion = Motion(width_px, height_px)
        self._pending: deque[_Pending] = deque()
        self._all: list[TrackedObject] = []
        self._main: TrackedObject | None = None
        self._pinned: TrackedObject | None = None
        self._last_id = 0
        self._after: MotionState = self._motion.state  # the last answer's frame

    def choose(self, box_px: BoxPx) -> None:
        """Track what lies in this box of the next frame as the main object."""
        self._selected_px = box_px

    def see(self, image_bgr: ImageBgr, pts_s: float) -> None:
        """Take the next frame, whose answer comes later."""
        step = self._motion.step(image_bgr)
        selected_px = self._selected_px
        if not step.blank:
            self._selected_px = None
        self._pending.append(_Pending(step, pts_s, selected_px))

    def json(self) -> dict[str, Any]:
        """Its state after the last answer, from which ``restore`` goes on."""
        places = {id(each): place for place, each in enumerate(self._all)}
        return {
            "objects": [each.json() for each in self._all],
            "main": places.get(id(self._main)),
            "pinned": places.get(id(self._pinned)),
            "last_id": self._last_id,
            "motion": self._after.json(),
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from a state that ``json`` gave for frames of the same size.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        self._all = [TrackedObject.from_json(each) for each in stored["objects"]]
        self._main, self._pinned = (
            None if stored[name] is None else self._all[stored[name]] for name in ("main", "pinned")
        )
        self._last_id = stored["last_id"]
        self._after = self._motion.state = MotionState.from_json(
            stored["motion"], self._motion.shape
        )

    def update(self, found: Localization | None) -> tuple[Localization, Track]:
        """Take the answer for the oldest frame that is awaited.

        Args:
            found: the answer; None for none.

        Returns:
            The answer with the box of the main object, and what tracking adds to it.
        """
        frame = self._pending.popleft()
        self._after = frame.step.after
        answer = found or NOTHING
        if frame.step.blank:
            for each in self._all:
                each.lose()
        elif not (frame.step.frozen and self._all):
            self._follow(frame, _detections(answer))
        self._forget(frame.pts_s)
        self._order()
        main = self._main
        shown = [each for each in self._all if each.state != LOST]
        self.objects = tuple(self._tracked(each) for each in shown if each.track_id)[: self._most]
        if main is None:
            state = LOST if any(each.track_id for each in self._all) else SEARCHING
            result = replace(answer, box_xyxy_px=None, detections=(), confidence=0.0)
            return result, Track(state, 0.0, 0, None)
        one = self._tracked(main)
        named = main.found
        result = replace(
            answer,
            box_xyxy_px=one.box_xyxy_px,
            class_index=named.class_index,
            class_name=named.class_name,
            score=named.score,
            detections=(),
            confidence=main.confidence,
            box_name=named.box_name,
        )
        return result, one.track

    @property
    def cues(self) -> list[tuple[list[float], BoxPx]]:
        """The cues and the box of each object that is in the frame, for fitting."""
        there = [each for each in self._all if each.state != LOST]
        return [(self._cues_of(each), self._inside(each.box_px)) for each in there]

    def _cues_of(self, each: TrackedObject) -> list[float]:
        total = sum(one.score for one in self._all if one.state != LOST)
        return each.cues(self._size_px, total)

    def _tracked(self, each: TrackedObject) -> Tracked:
        """An object as a record has it."""
        track = Track(each.state, each.confidence, each.track_id, each.raw_px)
        named = each.found
        box = self._inside(each.box_px)
        return Tracked(box, named.class_index, named.class_name, named.score, track, named.box_name)

    def _follow(self, frame: _Pending, detections: Sequence[Detection]) -> None:
        """Bring all objects to a frame."""
        if frame.step.cut:
            self._all = []
        if frame.step.flow is not None:
            for each in self._all:
                each.carry(self._motion.carried(each.box_px, frame.step.flow))
        taken = self._matched(detections)
        for each in self._all:
            detection = taken.get(id(each))
            if detection is not None:
                each.take(detection, self._counted(detection), frame.pts_s)
            elif each.state != LOST:
                each.miss()
        self._begin(detections, {id(each) for each in taken.values()}, frame.pts_s)
        if frame.selected_px is not None:
            self._pin(frame.selected_px, detections, frame.pts_s)
        for each in self._all:
            self._settle(each)

    def _counted(self, detection: Detection) -> float:
        """The confidence of a detection, of the class or the name that is looked for."""
        share = detection.score if detection.wanted_share is None else detection.wanted_share
        return confidence_of(detection) * (share if self._wanted else 1.0)

    def _matched(self, detections: Sequence[Detection]) -> dict[int, Detection]:
        """The detection that each object takes, by the object's ``id``. Those with a higher score
        choose first.
        """
        found: dict[int, Detection] = {}
        left = list(detections)
        for each in sorted(self._all, key=lambda one: (one.state == LOST, -one.score)):
            best, most = None, 0.0
            for detection in left:
                alike = overlap(each.box_px, detection.box_xyxy_px)
                worth = self._counted(detection) * alike
                if alike > MATCH_IOU and worth > most:
                    best, most = detection, worth
            if best is not None:
                found[id(each)] = best
                left.remove(best)
        return found

    def _begin(self, detections: Sequence[Detection], used: set[int], pts_s: float) -> None:
        """Begin objects at detections that no object has."""
        for detection in sorted(detections, key=self._counted, reverse=True):
            confidence = self._counted(detection)
            box = detection.box_xyxy_px
            known = any(overlap(box, each.box_px) > SAME_IOU for each in self._all)
            if id(detection) not in used and confidence >= BEGINS and not known:
                self._all.append(TrackedObject.begun(detection, confidence, pts_s))

    def _pin(self, box_px: BoxPx, detections: Sequence[Detection], pts_s: float) -> None:
        """Make what is in a selected box the main object, whatever else there is."""
        middle = (box_px[0] + box_px[2]) / 2, (box_px[1] + box_px[3]) / 2
        there = [each for each in self._all if each.state != LOST and _holds(each.box_px, *middle)]
        best = max(there, key=lambda each: overlap(each.box_px, box_px), default=None)
        if best is None:
            named = detections[0] if detections else Detection(box_px, 0, "", 0.0)
            found = replace(named, box_xyxy_px=box_px, confidence=None)
            best = TrackedObject.begun(found, confidence_of(found), pts_s)
            self._all.append(best)
        self._pinned = self._main = best

    def _settle(self, each: TrackedObject) -> None:
        """Decide an object's confidence, state and number."""
        most = LOST_LOOKS if each.track_id else LOST_LOOKS_NEW
        if each.missed >= (LOST_LOOKS_SELECTED if each is self._pinned else most):
            each.lose()
        if each.state == LOST and each.missed:
            return
        each.confidence = self._model(self._cues_of(each))
        if each.track_id:  # a sure detection keeps it in view, as where it leaves the frame
            kept = min(each.sure, self._limits.sure_from)
            each.confidence = max(each.confidence, kept)
        if each is self._pinned:
            each.confidence = max(each.confidence, SELECTED * SELECTED_KEPT**each.missed)
        limit = self._limits.shown_from
        if each.confidence >= limit:
            if not each.track_id:
                self._last_id += 1
                each.track_id = self._last_id
            each.state = FOLLOWING
        elif not each.track_id:
            each.state = SEARCHING
        elif each.state != FOLLOWING or each.confidence < STAYS_SURE * limit:
            each.state = UNSURE

    def _forget(self, pts_s: float) -> None:
        """Drop what has been lost for long, what has left the frame, and what is there twice."""
        kept: list[TrackedObject] = []
        for each in sorted(self._all, key=lambda one: (one.state == LOST, -one.score)):
            lost = each.state == LOST
            gone = lost and (not each.track_id or pts_s - each.seen_s > SHORT_LOSS_S)
            left = _area(self._inside(each.box_px)) < LEFT * _area(each.box_px)
            twice = any(
                other.state != LOST and overlap(each.box_px, other.box_px) > SAME_IOU
                for other in kept
            )
            if not gone and not left and not (twice and each is not self._pinned):
                kept.append(each)
        self._all = kept[: MOST_KEPT + self._most]
        if self._pinned not in self._all:
            self._pinned = None

    def _order(self) -> None:
        """Choose the main object, and put it first."""

        def worth(each: TrackedObject) -> tuple[bool, bool, bool, float]:
            stays = STAYS_MAIN if each is self._main else 1.0
            shown = each.confidence >= self._limits.shown_from
            return each.state != LOST, each is self._pinned, shown, each.score * stays

        self._all.sort(key=worth, reverse=True)
        there = self._all and self._all[0].state != LOST
        self._main = self._all[0] if there else None

    def _inside(self, box_px: BoxPx) -> BoxPx:
        """The part of a box that is inside the frame."""
        width, height = self._size_px
        x0, y0, x1, y1 = box_px
        return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)


def _detections(found: Localization) -> list[Detection]:
    """The detections of an answer: its box where it has no list of them."""
    several = list(found.detections)
    if not several and found.box_xyxy_px is not None:
        names = (found.class_index, found.class_name, found.score)
        several = [Detection(found.box_xyxy_px, *names, found.confidence, found.box_name)]
    return [each for each in several if confidence_of(each) >= GOES_ON]


def _area(box_px: BoxPx) -> float:
    return max(box_px[2] - box_px[0], 1.0) * max(box_px[3] - box_px[1], 1.0)


def _holds(box_px: BoxPx, x: float, y: float) -> bool:
    """Whether a point is in a box."""
    return box_px[0] <= x <= box_px[2] and box_px[1] <= y <= box_px[3]
