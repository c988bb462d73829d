"""Tracks the objects of one source from frame to frame: which box of this frame is which object of
the last one, how sure each is, and what the engine sees next. It reads no clock and no file.

1. Optical flow carries each object's box into the new frame.
2. Each object takes the surest detection that overlaps it. Its box goes towards that one: both are
   averaged, weighted by the confidences so far and by this one.
3. A detection that belongs to no object begins a new one.
4. The main object is the one with the most confidence summed over time.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from engines.boxes import overlap, shared, shifted
from engines.localizer import SMALLEST_PX, Detection, ImageBgr, Localization
from realtime.frames import NO_MAP, BoxPx, Track, Tracked
from realtime.tracking.optical_flow import Map, Motion, MotionState, MotionStep
from realtime.tracking.tracked import (
    FOLLOWING,
    LOST,
    LOST_LOOKS,
    SEARCHING,
    UNSURE,
    TrackedObject,
)

SURE = 0.5
"""The confidence from which on an object is followed, and has a number."""
NO_LONGER_SURE = 0.4
"""The confidence below which it is not sure any more."""
BEGINS = 0.2
"""The least confidence of a detection that begins an object."""
GOES_ON = 0.05
"""The least confidence of a detection that an object takes."""
UNKNOWN = 0.5
"""The confidence of a detection of which nothing tells how sure it is."""
MATCH_IOU = 0.3
"""The least overlap of a detection with the object that takes it, carried to the frame."""
MATCH_POWER = 0.2
"""How much the overlap counts besides the confidence where an object takes one of several."""
SAME_IOU = 0.45
"""Two objects that overlap by so much are one."""
WITHIN = 0.85
"""A weaker object with this share of it in another one's box, and of similar size, is a part of
it.
"""
MEMORY = 0.8
"""The share of its weight that a box keeps from frame to frame: it is a mean over some five."""
SCORE_MEMORY = 0.95
"""The share of its score that an object keeps: confidence is summed over some twenty looks."""
STAYS_MAIN = 1.3
"""Another object becomes the main one where its score is so many times as high."""
LOST_LOOKS_NEW = 3
"""So is one that has no number yet, after so many."""
SHORT_LOSS_S = 2.0
"""An object that is found again within this time keeps its number."""
SELECTED, SELECTED_KEPT, LOST_LOOKS_SELECTED = 0.6, 0.99, 50
"""What a user has selected is there: its confidence is at least the first, of which each look in
which the head does not find it leaves the second; it is lost after so many.
"""
MOST_KEPT = 12
"""Objects that are tracked besides those that are asked for."""
WINDOW = 2.0
"""A window is so many times as wide and as high as a box, in the frame's shape."""
LEAST_WINDOW = 0.2
LARGEST_WINDOW = 0.75
"""A window with a larger share of the frame's sides shows no more than the frame does."""
LOOK_CLOSER = 0.5
"""Objects that the head is less sure of, in the mean, are looked at through a window."""
EDGE = 0.02
"""A box that comes so near to an edge of its window is cut off there."""
COVERED = 0.3
"""What moves is an object's already where it overlaps its box by so much, or where so much of it is
in the box of one that moves.
"""
MOVES = 0.3
"""From this on, what is in a box moves by itself."""
LEFT = 0.3
"""An object has left when less than this share of its box is in the frame."""
NOTHING = Localization(None, 0, "", 0.0, NO_MAP)
"""The answer where there is none."""


@dataclass
class _Pending:
    """A frame whose answer is awaited: its motion, what the engine sees of it, when it was, and the
    box that is selected in it.
    """

    step: MotionStep
    window_px: BoxPx
    pts_s: float
    selected_px: BoxPx | None


class Tracker:
    """Tracks the objects of one source, whose frames are of one size.

    ``window`` is called for each frame in turn, and ``update`` with each answer in the same order.
    Answers of several frames may be awaited at once.

    Args:
        width_px, height_px: size of the frames.
        confidence_model: gives the confidence of a box from its cues.
        most: the largest number of objects that are given.
        selected_px: the box to track from the first frame on; None to track what is found.
        wanted: whether a class or a name is looked for: detections then count by its probability,
            too.

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
    ) -> None:
        self.objects: tuple[Tracked, ...] = ()
        self._size_px = (width_px, height_px)
        self._whole_px = (0.0, 0.0, float(width_px), float(height_px))
        self._model = confidence_model
        self._most = most
        self._wanted = wanted
        self._selected_px = selected_px
        self._motion = Motion(width_px, height_px)
        self._pending: deque[_Pending] = deque()
        self._all: list[TrackedObject] = []
        self._main: TrackedObject | None = None
        self._pinned: TrackedObject | None = None
        self._last_id = 0
        self._after: MotionState = self._motion.state  # the last answer's frame
        self._frames = 0
        self._answered = 0  # of the frames
        self._first_frame = 0  # of those since a cut
        self._saw_window = False
        self._turn = 0

    def choose(self, box_px: BoxPx) -> None:
        """Track what lies in this box of the next frame as the main object."""
        self._selected_px = box_px

    def look_whole(self) -> None:
        """Let the engine see whole frames until there is an answer for one of the next frames: at a
        border of segments, a run that begins there must not see other windows than one that goes
        on.
        """
        self._first_frame = self._frames

    def window(self, image_bgr: ImageBgr, pts_s: float) -> BoxPx:
        """Choose what the engine sees of the next frame: the window, in whole pixels.

        Every other frame may be seen through one: around an object that is not sure, or around
        what moves by itself and is no object yet.
        """
        step = self._motion.step(image_bgr)
        selected_px = self._selected_px
        if not step.blank:
            self._selected_px = None
        if step.flow is None:
            self._first_frame = self._frames
        window_px = self._whole_px
        whole_is_due = selected_px is not None or self._saw_window or step.frozen
        if self._answered > self._first_frame and not whole_is_due:
            targets = self._targets(step)
            if targets:
                window_px = self._around(targets[self._turn % len(targets)])
                self._turn += 1
        self._saw_window = window_px != self._whole_px
        self._frames += 1
        self._pending.append(_Pending(step, window_px, pts_s, selected_px))
        return window_px

    def json(self) -> dict[str, Any]:
        """Its state after the last answer, from which ``restore`` goes on."""
        places = {id(each): place for place, each in enumerate(self._all)}
        return {
            "objects": [each.json() for each in self._all],
            "main": places.get(id(self._main)),
            "pinned": places.get(id(self._pinned)),
            "last_id": self._last_id,
            "turn": self._turn,
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
        self._turn = stored["turn"]
        self._after = self._motion.state = MotionState.from_json(
            stored["motion"], self._motion.shape
        )

    def _targets(self, step: MotionStep) -> list[BoxPx]:
        """Boxes in the newest frame that are worth a closer look."""
        steps = [*(frame.step for frame in self._pending), step]
        found, boxes = list[BoxPx](), list[BoxPx]()
        visible = [each for each in self._all if each.state != LOST]
        for place, each in enumerate(visible):
            box = each.box_px
            for one in steps:
                box = box if one.flow is None else self._motion.carried(box, one.flow)
            boxes.append(box)
            if place < self._most and each.mean < LOOK_CLOSER:
                found.append(box)
        moving = [box for box in boxes if self._motion.moves(box, step.after.evidence) > MOVES]
        for blob in self._motion.blobs():
            known = any(overlap(blob, box) > COVERED for box in boxes)
            if not known and all(float(shared(blob, box)) < COVERED for box in moving):
                found.append(blob)
        return [box for box in found if max(self._shares(box)) * WINDOW < LARGEST_WINDOW]

    def _shares(self, box_px: BoxPx) -> tuple[float, float]:
        """Width and height of a box as shares of the frame's."""
        width, height = self._size_px
        return (box_px[2] - box_px[0]) / width, (box_px[3] - box_px[1]) / height

    def _around(self, box_px: BoxPx) -> BoxPx:
        """The window around a box: in the frame's shape, and moved into the frame."""
        share = max(LEAST_WINDOW, WINDOW * max(self._shares(box_px)))
        edges: list[tuple[int, int]] = []
        for low, high, size in zip(box_px[:2], box_px[2:], self._size_px, strict=True):
            length = min(size, max(SMALLEST_PX, round(share * size)))
            start = min(max(round((low + high - length) / 2), 0), size - length)
            edges.append((start, start + length))
        (x0, x1), (y0, y1) = edges
        return float(x0), float(y0), float(x1), float(y1)

    def update(self, found: Localization | None) -> tuple[Localization, Track]:
        """Take the answer for the oldest frame that is awaited.

        Args:
            found: the answer for the window, in the window's pixels; None for none.

        Returns:
            The answer in the frame's pixels, with the box of the main object and with the map at
            the window's place; and what tracking adds to it.
        """
        frame = self._pending.popleft()
        self._after = frame.step.after
        self._answered += 1
        answer = found or NOTHING
        if frame.step.blank:
            for each in self._all:
                self._lose(each)
        elif not (frame.step.frozen and self._all):
            self._follow(frame, self._detections(answer, frame.window_px))
        self._forget(frame.pts_s)
        self._order()
        main = self._main
        shown = [each for each in self._all if each.state != LOST]
        self.objects = tuple(
            self._tracked(each, frame.window_px) for each in shown if each.track_id
        )[: self._most]
        map_hw = self._placed(answer.map_hw, frame.window_px)
        if main is None:
            state = LOST if any(each.track_id for each in self._all) else SEARCHING
            result = replace(answer, box_xyxy_px=None, map_hw=map_hw, detections=(), confidence=0.0)
            return result, Track(state, frame.window_px, 0.0, 0, None)
        one = self._tracked(main, frame.window_px)
        named = main.found
        result = Localization(
            one.box_xyxy_px,
            named.class_index,
            named.class_name,
            named.score,
            map_hw,
            (),
            main.confidence,
            named.box_name,
        )
        return result, one.track

    @property
    def cues(self) -> list[float] | None:
        """Those of the main object, for fitting; None where there is none."""
        return None if self._main is None else self._main.cues(self._size_px)

    def _tracked(self, each: TrackedObject, window_px: BoxPx) -> Tracked:
        """An object as a record has it."""
        track = Track(each.state, window_px, each.confidence, each.track_id, each.raw_px)
        named = each.found
        box = self._inside(each.box_px)
        return Tracked(box, named.class_index, named.class_name, named.score, track, named.box_name)

    def _detections(self, found: Localization, window_px: BoxPx) -> list[Detection]:
        """The detections in the frame's pixels, without those that the window cuts off."""
        several = list(found.detections)
        if not several and found.box_xyxy_px is not None:
            several = [
                Detection(
                    found.box_xyxy_px,
                    found.class_index,
                    found.class_name,
                    found.score,
                    found.confidence,
                    found.box_name,
                )
            ]
        in_frame = [
            replace(each, box_xyxy_px=shifted(each.box_xyxy_px, *window_px[:2])) for each in several
        ]
        return [
            each
            for each in in_frame
            if _confidence(each) >= GOES_ON and not self._cut_off(each.box_xyxy_px, window_px)
        ]

    def _cut_off(self, box_px: BoxPx, window_px: BoxPx) -> bool:
        """Whether a box reaches an edge of its window that is no edge of the frame."""
        for low, high, first, last, size in zip(
            box_px[:2], box_px[2:], window_px[:2], window_px[2:], self._size_px, strict=True
        ):
            near = EDGE * (last - first)
            if (first > 0 and low < first + near) or (last < size and high > last - near):
                return True
        return False

    def _follow(self, frame: _Pending, detections: Sequence[Detection]) -> None:
        """Bring all objects to a frame."""
        step = frame.step
        if step.cut:
            self._all = []
        for each in self._all:
            if step.flow is not None:
                each.box_px = self._motion.carried(each.box_px, step.flow)
                if each.raw_px is not None:
                    each.raw_px = each.box_px
            each.weight *= MEMORY
        taken = self._matched(detections)
        for each in self._all:
            detection = taken.get(id(each))
            if detection is not None:
                confidence = self._counted(detection)
                each.take(detection, confidence, frame.pts_s)
                self._count(each, confidence, step)
            elif each.state != LOST and self._is_seen(each.box_px, frame.window_px):
                each.missed += 1
                self._count(each, 0.0, step)
        self._begin(detections, {id(each) for each in taken.values()}, frame)
        for each in self._all:
            self._settle(each)

    def _counted(self, detection: Detection) -> float:
        """The confidence of a detection, of the class or the name that is looked for."""
        share = detection.score if detection.wanted_share is None else detection.wanted_share
        return _confidence(detection) * (share if self._wanted else 1.0)

    def _count(self, each: TrackedObject, confidence: float, step: MotionStep) -> None:
        """Add a look to what is known of an object."""
        each.moves += 0.2 * (self._motion.moves(each.box_px, step.after.evidence) - each.moves)
        each.mean += 0.2 * (confidence - each.mean)
        each.score = SCORE_MEMORY * each.score + confidence

    def _matched(self, detections: Sequence[Detection]) -> dict[int, Detection]:
        """The detection that each object takes, by the object's ``id``: the best pairs first."""
        pairs: list[tuple[float, int, int]] = []
        for place, each in enumerate(self._all):
            for number, detection in enumerate(detections):
                alike = overlap(each.box_px, detection.box_xyxy_px)
                if alike > MATCH_IOU:
                    worth = self._counted(detection) * alike**MATCH_POWER
                    pairs.append((worth / 2 if each.state == LOST else worth, place, number))
        found: dict[int, Detection] = {}
        used = set[int]()
        for _, place, number in sorted(pairs, reverse=True):
            key = id(self._all[place])
            if key not in found and number not in used:
                found[key] = detections[number]
                used.add(number)
        return found

    def _is_seen(self, box_px: BoxPx, window_px: BoxPx) -> bool:
        """Whether the engine saw what is in a box."""
        return window_px == self._whole_px or (
            float(shared(box_px, window_px)) > WITHIN and not self._cut_off(box_px, window_px)
        )

    def _begin(self, detections: Sequence[Detection], used: set[int], frame: _Pending) -> None:
        """Begin objects: at a selected box, and at detections that no object has."""
        for detection in sorted(detections, key=self._counted, reverse=True):
            confidence = self._counted(detection)
            box = detection.box_xyxy_px
            if (
                id(detection) in used
                or confidence < BEGINS
                or any(self._is_same(box, each.box_px) for each in self._all)
            ):
                continue
            moves = self._motion.moves(box, frame.step.after.evidence)
            self._all.append(
                TrackedObject(
                    box,
                    detection,
                    box,
                    confidence,
                    confidence,
                    confidence,
                    frame.pts_s,
                    moves=moves,
                )
            )
            self._all[-1].name(detection, confidence)
        if frame.selected_px is not None:
            self._pin(frame.selected_px, detections, frame.pts_s)

    def _pin(self, box_px: BoxPx, detections: Sequence[Detection], pts_s: float) -> None:
        """Make what is in a selected box the main object, whatever else there is."""
        middle = (box_px[0] + box_px[2]) / 2, (box_px[1] + box_px[3]) / 2
        there = [each for each in self._all if each.state != LOST and _holds(each.box_px, *middle)]
        best = max(there, key=lambda each: overlap(each.box_px, box_px), default=None)
        if best is None:
            named = detections[0] if detections else Detection(box_px, 0, "", 0.0)
            best = TrackedObject(box_px, named, box_px, UNKNOWN, UNKNOWN, UNKNOWN, pts_s)
            self._all.append(best)
        self._pinned = self._main = best
        best.confidence = max(best.confidence, SURE)

    @staticmethod
    def _is_same(box_px: BoxPx, other_px: BoxPx) -> bool:
        """Whether two boxes are of one object."""
        return overlap(box_px, other_px) > SAME_IOU

    def _settle(self, each: TrackedObject) -> None:
        """Decide an object's confidence, state and number."""
        most = LOST_LOOKS if each.track_id else LOST_LOOKS_NEW
        if each.missed >= (LOST_LOOKS_SELECTED if each is self._pinned else most):
            self._lose(each)
            return
        if each.missed == 0 or each.state != LOST:
            sure = self._model(each.cues(self._size_px))
            if each is self._pinned:
                sure = max(sure, SELECTED * SELECTED_KEPT**each.missed)
            each.confidence = sure
            if each.state == LOST:
                each.state = SEARCHING
            if each.confidence >= SURE:
                if not each.track_id:
                    self._last_id += 1
                    each.track_id = self._last_id
                each.state = FOLLOWING
            elif each.track_id and (each.state != FOLLOWING or each.confidence < NO_LONGER_SURE):
                each.state = UNSURE

    def _lose(self, each: TrackedObject) -> None:
        """An object that is not in the frame any more, or cannot be seen."""
        each.state = LOST
        each.confidence = 0.0
        each.raw_px = None

    def _forget(self, pts_s: float) -> None:
        """Drop what has been lost for long, what has left the frame, and what is there twice."""
        kept: list[TrackedObject] = []
        for each in sorted(self._all, key=lambda one: (one.state == LOST, -one.score)):
            lost = each.state == LOST
            gone = lost and (not each.track_id or pts_s - each.seen_s > SHORT_LOSS_S)
            x0, y0, x1, y1 = self._inside(each.box_px)
            left = (x1 - x0) * (y1 - y0) < LEFT * _area(each.box_px)
            twice = any(
                other.state != LOST and self._is_same(each.box_px, other.box_px) for other in kept
            )
            if not gone and not left and not (twice and each is not self._pinned):
                kept.append(each)
        self._all = kept[: MOST_KEPT + self._most]
        if self._pinned not in self._all:
            self._pinned = None

    def _order(self) -> None:
        """Choose the main object, and put it first."""
        shown = [each for each in self._all if each.state != LOST]
        if not shown:
            self._main = None
            return

        def worth(each: TrackedObject) -> tuple[bool, float]:
            stays = STAYS_MAIN if each is self._main else 1.0
            return each is self._pinned, each.worth * stays

        self._main = max(shown, key=worth)
        self._all.sort(key=lambda each: (each.state == LOST, each is not self._main, -each.worth))

    def _inside(self, box_px: BoxPx) -> BoxPx:
        """The part of a box that is inside the frame."""
        width, height = self._size_px
        x0, y0, x1, y1 = box_px
        return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)

    def _placed(self, map_hw: Map, window_px: BoxPx) -> Map:
        """The map of a window as one of the whole frame: 0 outside the window."""
        if window_px == self._whole_px or not map_hw.size:
            return map_hw
        h, w = self._motion.shape
        width, height = self._size_px
        x0, x1 = (round(edge * w / width) for edge in window_px[::2])
        y0, y1 = (round(edge * h / height) for edge in window_px[1::2])
        whole = np.zeros((h, w), np.float32)
        size = (max(x1 - x0, 1), max(y1 - y0, 1))
        whole[y0 : y0 + size[1], x0 : x0 + size[0]] = cv2.resize(map_hw, size)
        return whole


def _confidence(detection: Detection) -> float:
    """How sure a detection is."""
    return UNKNOWN if detection.confidence is None else detection.confidence


def _area(box_px: BoxPx) -> float:
    return max((box_px[2] - box_px[0]) * (box_px[3] - box_px[1]), 1.0)


def _holds(box_px: BoxPx, x: float, y: float) -> bool:
    """Whether a point is in a box."""
    return box_px[0] <= x <= box_px[2] and box_px[1] <= y <= box_px[3]
