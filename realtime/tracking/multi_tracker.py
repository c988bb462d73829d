"""Tracks several objects of one source, each with a tracker of its own. The engine looks for one of
them in each frame.

The boxes of the others are propagated with the motion, which is computed once for all. A tracker
ignores what moves within the box of another object, or as another object does. While there are
fewer objects than asked for, one tracker searches the rest.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from engines.boxes import overlap, shared
from engines.localizer import Detection, ImageBgr, Localization
from realtime.frames import BoxPx, Track, Tracked
from realtime.tracking.confidence import CuesToConfidence
from realtime.tracking.geometry import Numbers, moved, widened
from realtime.tracking.optical_flow import Motion, MotionHistory, Step
from realtime.tracking.tracker import HELD, NOTHING, PATIENCE_FRAMES, SEARCHING, Tracker
from realtime.tracking.vote_grid import VoteGrid

SAME_IOU, SAME_SHARE = 0.5, 0.8
"""Of two boxes, or of the smaller one that lies in the other, from which on they are one
object's.
"""
MARGIN = 0.3
"""Of the sides of a followed box: no other object begins so near; it might be a leg of that one."""
YOUNG_FRAMES, NEAR = 10, 0.25
"""An object is new for so long; another box is near within such a share of its sides."""
READY_VOTES = 1.5
"""Who searches and has so many votes somewhere looks there, else at the whole frame."""
WHOLE_LOOKS = 8
"""Even so, it looks at the whole frame every so many times."""
REACH = 0.5
"""Of the frame's width: an object that was lost is not found again farther away."""
GIVEN_LOOKS = 4
"""What was pointed out has so many looks to become sure."""


@dataclass
class _TrackSlot:
    """A tracker, and its turns: frames since it was looked for, looks in all, frames that it has
    followed something for, looks in a row that showed another's object; ``given``: its place was
    pointed out.
    """

    tracker: Tracker
    waited: int = 0
    looks: int = 0
    frames: int = 0
    denied: int = 0
    given: bool = False

    @property
    def held(self) -> bool:
        return self.tracker.state in HELD

    @property
    def ready(self) -> bool:
        """It has found something, or votes for something."""
        return self.held or self.given or float(self.tracker.votes.max()) > READY_VOTES


@dataclass
class _Pending:
    """A frame whose answer is awaited: who takes part in it, and who looks where."""

    slots: tuple[_TrackSlot, ...]
    looking: _TrackSlot
    window_px: BoxPx | None


class MultiTracker:
    """Follows up to so many objects through the frames of one source, all of one size.

    Used as ``Tracker`` is. The first of its objects is the main one: the longest followed, or what
    the user chose.

    Args:
        width_px, height_px: of the frames.
        confidence_model: says how sure a box is.
        most: objects.
        selected_px: the box to follow from the first frame on; None for what is found.
    """

    def __init__(
        self,
        width_px: int,
        height_px: int,
        confidence_model: CuesToConfidence,
        most: int,
        selected_px: BoxPx | None = None,
    ) -> None:
        self._size_px, self._confidence_model, self._most = (
            (width_px, height_px),
            confidence_model,
            most,
        )
        self._motion, self._numbers = Motion(width_px, height_px), Numbers(REACH * width_px)
        self._vote_grid, self._history = (
            VoteGrid(self._motion, width_px, height_px),
            MotionHistory(self._motion),
        )
        self._slots = [self._fill_slot(selected_px)]
        self._pending: deque[_Pending] = deque()
        self._map = self._vote_grid.empty

    def choose(self, box_px: BoxPx) -> None:
        """Follow what lies in this box of the next frame as the main object."""
        x, y = (box_px[0] + box_px[2]) / 2, (box_px[1] + box_px[3]) / 2
        for slot, (x0, y0, x1, y1) in self._held():
            if x0 <= x <= x1 and y0 <= y <= y1:
                self._slots.remove(slot)
                self._slots.insert(0, slot)
                return
        self._slots = [self._fill_slot(box_px), *(slot for slot in self._slots if slot.held)][
            : self._most
        ]

    def window(self, image_bgr: ImageBgr, pts_s: float) -> BoxPx | None:
        """Where to look in the next frame: whole pixels, inside it."""
        step = self._motion.step(image_bgr)
        self._history.add(step)
        self._hide()
        looking = max(self._slots, key=lambda slot: slot.waited)
        window = None
        for slot in self._slots:
            look = slot is looking
            slot.waited, slot.looks = (0, slot.looks + 1) if look else (slot.waited + 1, slot.looks)
            whole = (
                not slot.ready or (not slot.held and slot.looks % WHOLE_LOOKS == 0)
                if len(self._slots) > 1
                else None
            )
            slot.frames += slot.held
            window = slot.tracker.window_after(self._own(slot, step), pts_s, look, whole) or window
        self._pending.append(_Pending(tuple(self._slots), looking, window))
        return window

    def update(self, found: Localization | None) -> tuple[Localization, Track, tuple[Tracked, ...]]:
        """Take the answer for the oldest frame that is awaited; see ``Tracker.update``.

        Returns:
            (the main object, with the map of what was looked at in its place; what following says
            of it, with the window that the engine saw, whomever it was for; every object).
        """
        pending, said = self._pending.popleft(), dict[int, Track]()
        window, further = pending.window_px, tuple[Detection, ...]()
        if found is not None and window is not None:
            self._map = self._vote_grid.placed(found.map_hw, window)
            found, further = self._meant(pending.looking, found, window)
        held = [slot for slot, _ in self._held()]
        for slot in pending.slots:
            _, said[id(slot)] = slot.tracker.update(found if slot is pending.looking else None)
        self._merge()
        for slot in held:
            if not slot.held:
                slot.frames = 0
                slot.tracker.forget()
        self._fill_other_slots(further)
        objects = tuple(
            _tracked(slot.tracker, said[id(slot)]) for slot, _ in self._held() if id(slot) in said
        )
        first = self._slots[0]
        track = said.get(id(first)) or Track(first.tracker.state, None, 0.0, 0, None)
        main = replace(first.tracker.found or NOTHING, map_hw=self._map, detections=())
        return main, replace(track, window_xyxy_px=window), objects

    def _fill_slot(self, selected_px: BoxPx | None = None) -> _TrackSlot:
        tracker = Tracker(
            *self._size_px,
            self._confidence_model,
            selected_px,
            self._motion,
            self._numbers,
            every_frame=True,
        )
        return _TrackSlot(tracker, given=selected_px is not None)

    def _held(self) -> list[tuple[_TrackSlot, BoxPx]]:
        """Those that follow something, and its box."""
        return [
            (slot, slot.tracker.box_px) for slot in self._slots if slot.held and slot.tracker.box_px
        ]

    def _hide(self) -> None:
        """Tell each tracker what is another's."""
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
        x0, y0, x1, y1 = self._vote_grid.cells(widened(box_px, margin))
        cells[y0:y1, x0:x1] = value

    def _own(self, slot: _TrackSlot, step: Step) -> Step:
        """The step as a tracker sees it: what goes otherwise than its object is evidence against
        it, or none at all.

        Against it at first, when one box may hold two objects, and where another's box is near:
        else, legs would be lost.
        """
        box = slot.tracker.box_px
        if step.flow is None or box is None:
            return step
        alike = self._history.alike(self._vote_grid.cells(box), slot.tracker.votes)
        others = [other for another, other in self._held() if another is not slot]
        against = slot.frames <= YOUNG_FRAMES or any(
            overlap(widened(box, NEAR), other) for other in others
        )
        share = 2 * alike - 1 if against else alike
        own = np.where(step.evidence > 0, step.evidence * share, step.evidence)
        return replace(step, rate=lambda: (own, step.moving))

    def _meant(
        self, looking: _TrackSlot, found: Localization, window_px: BoxPx
    ) -> tuple[Localization | None, tuple[Detection, ...]]:
        """(the answer as one to who looks; what else was detected, nobody's yet). An answer about
        another's object is none; one after the other, they say that there is nothing else.
        """
        if found.box_xyxy_px is None:
            return found, ()
        first = Detection(found.box_xyxy_px, found.class_index, found.class_name, found.score)
        nobodys = list[tuple[Detection, BoxPx]]()
        mine = looking.tracker.box_px if looking.held else None
        for each in found.detections or (first,):
            box = moved(each.box_xyxy_px, window_px)
            theirs = max(
                (overlap(box, other) for slot, other in self._held() if slot is not looking),
                default=0.0,
            )
            if theirs <= max(SAME_IOU, overlap(box, mine) if mine else 0.0):
                nobodys.append((each, box))
        looking.denied = 0 if nobodys else looking.denied + 1
        if not nobodys:
            return (
                None if looking.denied <= PATIENCE_FRAMES else replace(found, box_xyxy_px=None)
            ), ()
        if mine is not None:
            nobodys.sort(key=lambda pair: -overlap(pair[1], mine))
        best = nobodys[0][0]
        answer = replace(
            found,
            box_xyxy_px=best.box_xyxy_px,
            class_index=best.class_index,
            class_name=best.class_name,
        )
        return answer, () if looking.held else tuple(
            replace(each, box_xyxy_px=box) for each, box in nobodys[1:]
        )

    def _merge(self) -> None:
        """Two that have come to one box are one: the older stays."""
        for (one, a), (other, b) in combinations(self._held(), 2):
            if (
                one.held
                and other.held
                and (overlap(a, b) > SAME_IOU or float(shared(a, b)) > SAME_SHARE)
            ):
                max(one, other, key=lambda slot: slot.tracker.track_id).tracker.give_up()

    def _fill_other_slots(self, further: Sequence[Detection]) -> None:
        """Who lost its object makes room, but for the last; what was detected besides gets a slot
        each, a search the next.
        """
        kept = [
            slot for slot in self._slots if slot.held or (slot.given and slot.looks < GIVEN_LOOKS)
        ]
        rest = [slot for slot in self._slots if slot not in kept]
        boxes = [box for _, box in self._held()]
        for each in further:
            if (
                boxes
                and len(kept) < self._most
                and all(overlap(each.box_xyxy_px, box) < SAME_IOU for box in boxes)
            ):
                kept.append(self._fill_slot(each.box_xyxy_px))
                boxes.append(each.box_xyxy_px)
        if boxes and len(kept) < self._most:
            kept += [slot for slot in rest if slot.tracker.state == SEARCHING and not slot.given][
                :1
            ] or [self._fill_slot()]
        self._slots = kept or rest[:1]


def _tracked(tracker: Tracker, track: Track) -> Tracked:
    found = tracker.found or NOTHING
    return Tracked(tracker.box_px, found.class_index, found.class_name, found.score, track)
