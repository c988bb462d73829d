"""Tracks several objects of one source, each with a tracker of its own. The engine looks for one of
them in each frame.

The boxes of the others are propagated along the optical flow, which is computed once for all. A
tracker ignores what moves within the box of another object, or as another object does. While there
are fewer objects than asked for, one tracker searches the rest of the frame.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from engines.boxes import overlap, shared, shifted, with_margin
from engines.localizer import Detection, ImageBgr, Localization
from realtime.frames import BoxPx, Track, Tracked
from realtime.tracking.confidence import CuesToConfidence
from realtime.tracking.optical_flow import Motion, MotionHistory, MotionStep
from realtime.tracking.tracker import (
    HELD,
    NOTHING,
    PATIENCE_FRAMES,
    SEARCHING,
    Tracker,
    TrackIds,
)
from realtime.tracking.vote_grid import VoteGrid

SAME_IOU = 0.5
"""Two boxes with more than this IoU are of one object."""
SAME_SHARE = 0.8
"""So are two boxes of which the smaller one has more than this share in the other."""
MARGIN = 0.3
"""No other object begins nearer to a tracked box than this share of its sides, because it might be
a leg of that object.
"""
YOUNG_FRAMES = 10
"""An object is new for so many frames."""
NEAR = 0.25
"""Another box is near if it is within this share of a box's sides."""
READY_VOTES = 1.5
"""A tracker that searches looks where there are more votes than this, else at the whole frame."""
WHOLE_LOOKS = 8
"""Nevertheless, it looks at the whole frame every so many times."""
REACH = 0.5
"""A lost object is not found again farther away than this share of the frame's width."""
GIVEN_LOOKS = 4
"""A selected or detected object is looked at so many times before its tracker may be given up."""


@dataclass
class _TrackSlot:
    """A tracker and its turns.

    Attributes:
        tracker: of one object.
        waited: frames since the engine last looked for its object.
        looks: how often the engine has looked for its object.
        frames: how many frames it has tracked its object for.
        denied: how many looks in a row have shown only objects of other trackers.
        given: whether it began at a box, which was selected or detected.
    """

    tracker: Tracker
    waited: int = 0
    looks: int = 0
    frames: int = 0
    denied: int = 0
    given: bool = False

    @property
    def held(self) -> bool:
        """Whether its object is tracked."""
        return self.tracker.state in HELD

    @property
    def ready(self) -> bool:
        """Whether there is a place to look at: of a tracked object, or one with many votes."""
        return self.held or self.given or float(self.tracker.votes.max()) > READY_VOTES


@dataclass
class _PendingFrame:
    """A frame whose answer is awaited.

    Attributes:
        slots: those that take part in it.
        looking: the one whose object the engine looks for.
        window_px: what the engine sees; None for nothing.
    """

    slots: tuple[_TrackSlot, ...]
    looking: _TrackSlot
    window_px: BoxPx | None


class MultiTracker:
    """Tracks several objects through the frames of one source, all of one size.

    It is used as ``Tracker`` is. The first of its objects is the main one: the one that is tracked
    longest, or the one that the user has selected.

    Args:
        width_px, height_px: size of the frames.
        confidence_model: gives the confidence of a box.
        most: the largest number of objects.
        selected_px: the box to track from the first frame on; None to track what is found.

    Attributes:
        objects: every object that is tracked, as of the last answer.
    """

    def __init__(
        self,
        width_px: int,
        height_px: int,
        confidence_model: CuesToConfidence,
        most: int,
        selected_px: BoxPx | None = None,
    ) -> None:
        self.objects: tuple[Tracked, ...] = ()
        self._size_px = (width_px, height_px)
        self._confidence_model = confidence_model
        self._most = most
        self._motion = Motion(width_px, height_px)
        self._track_ids = TrackIds(REACH * width_px)
        self._vote_grid = VoteGrid(self._motion, width_px, height_px)
        self._history = MotionHistory(self._motion)
        self._slots = [self._new_slot(selected_px)]
        self._pending: deque[_PendingFrame] = deque()
        self._map = self._vote_grid.empty

    def choose(self, box_px: BoxPx) -> None:
        """Track what lies in this box of the next frame as the main object."""
        x, y = (box_px[0] + box_px[2]) / 2, (box_px[1] + box_px[3]) / 2
        for slot, (x0, y0, x1, y1) in self._held():
            if x0 <= x <= x1 and y0 <= y <= y1:
                self._slots.remove(slot)
                self._slots.insert(0, slot)
                return
        held = [slot for slot in self._slots if slot.held]
        self._slots = [self._new_slot(box_px), *held][: self._most]

    def window(self, image_bgr: ImageBgr, pts_s: float) -> BoxPx | None:
        """Choose what the engine sees of the next frame, see ``Tracker.window``."""
        step = self._motion.step(image_bgr)
        self._history.add(step)
        self._hide()
        looking = max(self._slots, key=lambda slot: slot.waited)
        window = None
        for slot in self._slots:
            look = slot is looking
            slot.waited = 0 if look else slot.waited + 1
            slot.looks += look
            slot.frames += slot.held
            whole = None
            if len(self._slots) > 1:
                whole = not slot.ready or (not slot.held and slot.looks % WHOLE_LOOKS == 0)
            own_step = self._own_step(slot, step)
            window = slot.tracker.window_after(own_step, pts_s, look, whole) or window
        self._pending.append(_PendingFrame(tuple(self._slots), looking, window))
        return window

    def update(self, found: Localization | None) -> tuple[Localization, Track]:
        """Take the answer for the oldest frame that is awaited, see ``Tracker.update``.

        Returns:
            The main object, with the newest map; and what tracking adds to it, with the window that
            the engine saw, whichever object that was for.
        """
        frame = self._pending.popleft()
        window = frame.window_px
        others: tuple[Detection, ...] = ()
        if found is not None and window is not None:
            self._map = self._vote_grid.placed(found.map_hw, window)
            found, others = self._answer_for(frame.looking, found, window)
        held = [slot for slot, _ in self._held()]
        tracks: dict[int, Track] = {}
        for slot in frame.slots:
            _, tracks[id(slot)] = slot.tracker.update(found if slot is frame.looking else None)
        self._merge()
        for slot in held:
            if not slot.held:
                slot.frames = 0
                slot.tracker.forget()
        self._refill(others)
        self.objects = tuple(
            _tracked(slot.tracker, tracks[id(slot)])
            for slot, _ in self._held()
            if id(slot) in tracks
        )
        first = self._slots[0]
        track = tracks.get(id(first)) or Track(first.tracker.state, None, 0.0, 0, None)
        main = replace(first.tracker.found or NOTHING, map_hw=self._map, detections=())
        return main, replace(track, window_xyxy_px=window)

    def _new_slot(self, selected_px: BoxPx | None = None) -> _TrackSlot:
        """A slot with a new tracker, which begins at a box if there is one."""
        tracker = Tracker(
            *self._size_px,
            self._confidence_model,
            selected_px,
            self._motion,
            self._track_ids,
            every_frame=True,
        )
        return _TrackSlot(tracker, given=selected_px is not None)

    def _held(self) -> list[tuple[_TrackSlot, BoxPx]]:
        """The slots whose object is tracked, each with its box."""
        return [
            (slot, slot.tracker.box_px) for slot in self._slots if slot.held and slot.tracker.box_px
        ]

    def _hide(self) -> None:
        """Give each tracker the cells of other objects."""
        held = self._held()
        for slot in self._slots:
            others = [box for other, box in held if other is not slot]
            hidden: NDArray[np.bool_] = np.zeros(self._motion.shape, np.bool_)
            for box in others:
                self._mark(hidden, box, True, 0.0 if slot.held else MARGIN)
            if slot.held and slot.tracker.box_px:
                self._mark(hidden, slot.tracker.box_px, False)
            slot.tracker.hidden = hidden if others else None

    def _mark(
        self, cells: NDArray[np.bool_], box_px: BoxPx, value: bool, margin: float = 0.0
    ) -> None:
        """Set the cells ``[h, w]`` of a box to a value."""
        x0, y0, x1, y1 = self._vote_grid.cells(with_margin(box_px, margin))
        cells[y0:y1, x0:x1] = value

    def _own_step(self, slot: _TrackSlot, step: MotionStep) -> MotionStep:
        """The step as a tracker sees it, in which only what moves as its object does is evidence.

        What moves otherwise is evidence against it while the object is new, because a box may then
        hold two objects, and while another box is near. At other times it is no evidence at all.
        Otherwise legs would be lost.
        """
        box = slot.tracker.box_px
        if step.flow is None or box is None:
            return step
        alike = self._history.alike(self._vote_grid.cells(box), slot.tracker.votes)
        others = [other for another, other in self._held() if another is not slot]
        against = slot.frames <= YOUNG_FRAMES or any(
            overlap(with_margin(box, NEAR), other) for other in others
        )
        share = 2 * alike - 1 if against else alike
        own = np.where(step.evidence > 0, step.evidence * share, step.evidence)
        return replace(step, rate=lambda: (own, step.moving))

    def _answer_for(
        self, looking: _TrackSlot, found: Localization, window_px: BoxPx
    ) -> tuple[Localization | None, tuple[Detection, ...]]:
        """Choose the detection that the tracker that looks is given.

        Detections of other trackers' objects are left out. If that leaves none, there is no answer.
        After several such looks in a row, the answer is that there is no object.

        Args:
            looking: the slot of the tracker.
            found: the answer for the window.
            window_px: what the engine saw of the frame.

        Returns:
            The answer for the tracker; and the other detections, in the frame, unless the object of
            the tracker is held.
        """
        if found.box_xyxy_px is None:
            return found, ()
        first = Detection(found.box_xyxy_px, found.class_index, found.class_name, found.score)
        free: list[tuple[Detection, BoxPx]] = []
        mine = looking.tracker.box_px if looking.held else None
        for each in found.detections or (first,):
            box = shifted(each.box_xyxy_px, *window_px[:2])
            theirs = max(
                (overlap(box, other) for slot, other in self._held() if slot is not looking),
                default=0.0,
            )
            if theirs <= max(SAME_IOU, overlap(box, mine) if mine else 0.0):
                free.append((each, box))
        looking.denied = 0 if free else looking.denied + 1
        if not free:
            no_object = looking.denied > PATIENCE_FRAMES
            return replace(found, box_xyxy_px=None) if no_object else None, ()
        if mine is not None:
            free.sort(key=lambda pair: -overlap(pair[1], mine))
        best = free[0][0]
        answer = replace(
            found,
            box_xyxy_px=best.box_xyxy_px,
            class_index=best.class_index,
            class_name=best.class_name,
        )
        if looking.held:
            return answer, ()
        return answer, tuple(replace(each, box_xyxy_px=box) for each, box in free[1:])

    def _merge(self) -> None:
        """Of two trackers whose boxes are of one object, the newer one gives up."""
        for (one, a), (other, b) in combinations(self._held(), 2):
            if (
                one.held
                and other.held
                and (overlap(a, b) > SAME_IOU or float(shared(a, b)) > SAME_SHARE)
            ):
                max(one, other, key=lambda slot: slot.tracker.track_id).tracker.give_up()

    def _refill(self, others: Sequence[Detection]) -> None:
        """Drop the slots without an object, and fill them again.

        Detections that no tracker has get a new slot each. One more slot searches if there is room.
        The last slot is never dropped.

        Args:
            others: detections in the frame.
        """
        kept = [
            slot for slot in self._slots if slot.held or (slot.given and slot.looks < GIVEN_LOOKS)
        ]
        rest = [slot for slot in self._slots if slot not in kept]
        boxes = [box for _, box in self._held()]
        for each in others:
            if (
                boxes
                and len(kept) < self._most
                and all(overlap(each.box_xyxy_px, box) < SAME_IOU for box in boxes)
            ):
                kept.append(self._new_slot(each.box_xyxy_px))
                boxes.append(each.box_xyxy_px)
        if boxes and len(kept) < self._most:
            searching = [
                slot for slot in rest if slot.tracker.state == SEARCHING and not slot.given
            ]
            kept.append(searching[0] if searching else self._new_slot())
        self._slots = kept or rest[:1]


def _tracked(tracker: Tracker, track: Track) -> Tracked:
    """An object as a record has it."""
    found = tracker.found or NOTHING
    return Tracked(tracker.box_px, found.class_index, found.class_name, found.score, track)
