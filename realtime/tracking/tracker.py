"""Tracks one object: where to look next, what the answer means, how confident it is. It reads no
clock and no file.
"""

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engines.localizer import ImageBgr, Localization
from realtime.frames import NO_MAP, BoxPx, Track
from realtime.tracking.confidence import CuesToConfidence, cues_of
from realtime.tracking.geometry import Numbers, calmed, moved, touches
from realtime.tracking.optical_flow import Map, Motion, Step
from realtime.tracking.vote_grid import UNSEEN, VoteGrid

SEARCHING, FOLLOWING, WIDENED, LOST = "searching", "following", "widened", "lost"
HELD = (FOLLOWING, WIDENED)
SCALE = {SEARCHING: 1.6, FOLLOWING: 1.6, WIDENED: 2.0, LOST: 2.0}
"""The window is the box, so much larger a side."""
LEAST_WINDOW_PX = 32
LEAD_FRAMES = 4
LOOK_AROUND = {SEARCHING: 8, FOLLOWING: 8, WIDENED: 8, LOST: 2}
"""The whole frame is looked at in the first few frames, and then in one of so many, so that no
better object is missed.
"""
SURE, UNSURE, HOPELESS = 0.5, 0.4, 0.15
MOST_PROPAGATED, PROPAGATE_UNSURE_FRAMES = 1, 12
"""The engine need not look at every frame: after one that it saw, so many are carried along with
the motion. While nothing is sure, that begins after so many frames. It costs what is shown in the
docs; two or three at a time save little more."""
PATIENCE_FRAMES = 6
"""So many boxes in a row that are hopeless, and the object is lost."""


@dataclass
class _Pending:
    """A frame whose answer is awaited, or, without a window, its turn; ``votes`` of before it,
    where they are known already; ``chosen`` by the user on it; ``rated``: what moves has a vote.
    """

    step: Step
    window_px: BoxPx | None
    whole: bool
    pts_s: float
    begun: int
    votes: Map | None
    chosen: bool
    rated: bool


NOTHING = Localization(None, 0, "", 0.0, NO_MAP)


class Tracker:
    """Follows one object through the frames of one source, all of one size.

    ``window`` is called for each frame in turn, ``update`` with each answer, in the same order;
    several frames may be under way. The windows of those behind are then chosen by what was known
    when they set out, carried along with the motion.

    Args:
        width_px, height_px: of the frames.
        confidence_model: says how sure a box is.
        selected_px: the box to follow from the first frame on; None for what is found.
        motion: computes the steps; its own if None.
        numbers: of the source's objects; its own if None.
        every_frame: look at each frame; else at every other one, where nothing speaks against it.

    Attributes:
        state: see ``Track``.
        track_id: likewise.
        confidence: likewise.
        found: the last answer, see ``update``; None before the first.
        hidden: cells of the grid that are others' objects, ``[h, w]``: there is nothing for this
            one; None where it is alone.
    """

    def __init__(
        self,
        width_px: int,
        height_px: int,
        confidence_model: CuesToConfidence,
        selected_px: BoxPx | None = None,
        motion: Motion | None = None,
        numbers: Numbers | None = None,
        every_frame: bool = False,
    ) -> None:
        self.state, self.track_id = SEARCHING, 0
        self._size_px, self._confidence_model, self._selected_px = (
            (width_px, height_px),
            confidence_model,
            selected_px,
        )
        self._motion = motion or Motion(width_px, height_px)
        self._vote_grid, self._numbers = (
            VoteGrid(self._motion, width_px, height_px),
            numbers or Numbers(),
        )
        self._settled = self._ahead = self._vote_grid.empty
        self._pending: deque[_Pending] = deque()
        self._begun, self._hopeless, self._number, self._last_sure_s = 0, 0, 0, -math.inf
        self._calm: BoxPx | None = None
        self._raw: BoxPx | None = None
        self.found: Localization | None = None
        self.hidden: NDArray[np.bool_] | None = None
        self.confidence, self._propagated_frames, self._another = 0.0, 0, False
        self._cut_off = False
        self._most_propagated = 0 if every_frame else MOST_PROPAGATED

    def choose(self, box_px: BoxPx) -> None:
        """Follow what lies in this box of the next frame, from there on."""
        self._selected_px = box_px

    def window(self, image_bgr: ImageBgr, pts_s: float) -> BoxPx | None:
        """Where to look in the next frame: whole pixels, inside it; None where its object need not
        be looked at.
        """
        return self.window_after(self._motion.step(image_bgr), pts_s)

    def window_after(
        self, step: Step, pts_s: float, look: bool | None = None, whole: bool | None = None
    ) -> BoxPx | None:
        """``window``, for who has computed the step to the next frame already.

        Args:
            step: to the next frame.
            pts_s: when that is.
            look: whether its object is to be looked at; None for what it thinks itself.
            whole: whether at the whole frame; likewise.
        """
        known = not self._pending
        self._begun = 0 if step.cut or step.blank else self._begun + 1
        selected, chosen = self._selected_px, self._selected_px is not None and not step.blank
        looks = (chosen or not self._may_propagate(step)) if look is None else look
        now = _Pending(
            step, None, False, pts_s, self._begun, None, chosen, rated=looks or look is not None
        )
        if selected is not None and chosen:
            self._ahead, known, self._begun = (
                self._vote_grid.marked(selected),
                True,
                LEAD_FRAMES + 1,
            )
            self._selected_px, now.begun = None, self._begun
        else:
            self._ahead = self._next(self._ahead, now)
        self._ahead = self._apart(self._ahead)
        now.votes = self._ahead if known else None
        self._pending.append(now)
        self._propagated_frames = 0 if looks else self._propagated_frames + 1
        if not looks:
            return None
        box = self._vote_grid.box(self._ahead, None if chosen else self._near)
        now.whole = box is None or (self._due if whole is None else whole)
        now.window_px = self._around(
            (0.0, 0.0, *self._size_px) if box is None or now.whole else box
        )
        return now.window_px

    @property
    def _due(self) -> bool:
        """Whether it is time to look at the whole frame; of a lost object's frames half are looked
        at so, however many are.
        """
        looks = 1 + self._most_propagated if self.state == LOST else 1
        return self._begun <= LEAD_FRAMES or self._begun % (looks * LOOK_AROUND[self.state]) == 0

    def _may_propagate(self, step: Step) -> bool:
        """Whether the last box may be carried along to the next frame, and the engine spared."""
        settled = self.state == FOLLOWING or self._begun > PROPAGATE_UNSURE_FRAMES
        known = self._calm is not None and step.flow is not None
        return (
            settled and known and not self._due and self._propagated_frames < self._most_propagated
        )

    def update(self, found: Localization | None) -> tuple[Localization, Track]:
        """Take the answer for the oldest frame that is awaited.

        Args:
            found: as read in the window: box in the window's pixels, map over the window; None
                where there was no window.

        Returns:
            (the same in the frame's pixels, with the followed box and the map in its place; what
            following adds).
        """
        now = self._pending.popleft()
        if now.chosen:
            self._calm, self.state, self.track_id, self._another = None, SEARCHING, 0, True
        votes = self._next(self._settled, now) if now.votes is None else now.votes
        if now.window_px is None or found is None:
            return self._propagate(now, votes)
        if now.step.blank or found.box_xyxy_px is None:
            self._settled, confidence, self._raw = votes, 0.0, None
        else:
            said = moved(found.box_xyxy_px, now.window_px)
            self._cut_off = touches(said, now.window_px, self._size_px)
            expected = self._expected(now.step)
            voted = self._vote_grid.voted(
                votes, found.map_hw, said, now.window_px, now.whole, now.step.moving
            )
            self._settled = self._apart(voted)
            self._raw = self._vote_grid.box(self._settled, self._near) or said
            self._calm = calmed(self._raw, expected, now.begun)
            cues = cues_of(
                self._vote_grid,
                self._settled,
                now.step.evidence,
                self._box,
                said,
                expected,
                found.score,
                now.begun,
            )
            confidence = self._confidence_model(cues)
        self._settle(now, confidence)
        self.confidence = confidence
        self._look_ahead()
        track = Track(self.state, now.window_px, confidence, self.track_id, self._raw)
        map_hw = self._vote_grid.placed(found.map_hw, now.window_px)
        detections = tuple(
            replace(one, box_xyxy_px=moved(one.box_xyxy_px, now.window_px))
            for one in found.detections
        )
        self.found = replace(found, box_xyxy_px=self.box_px, map_hw=map_hw, detections=detections)
        return self.found, track

    def _propagate(self, now: _Pending, votes: Map) -> tuple[Localization, Track]:
        """A frame without an answer: the last one's, carried along."""
        expected = self._expected(now.step)
        if expected and self._calm and self._raw:
            self._raw = moved(
                self._raw, (expected[0] - self._calm[0], expected[1] - self._calm[1], 0.0, 0.0)
            )
        self._calm = expected or self._calm
        self._settled = votes
        if now.step.flow is None:
            self.confidence = 0.0
            self._settle(now, 0.0)
        elif self.state in HELD:
            self._last_sure_s = now.pts_s
        self._look_ahead()
        self.found = replace(self.found or NOTHING, box_xyxy_px=self.box_px)
        return self.found, Track(self.state, None, self.confidence, self.track_id, self._raw)

    def _apart(self, votes: Map) -> Map:
        """Without those for others' objects."""
        return (
            votes
            if self.hidden is None
            else np.where(self.hidden, np.minimum(votes, np.float32(UNSEEN)), votes)
        )

    def _look_ahead(self) -> None:
        self._ahead = self._settled
        for later in self._pending:
            self._ahead = self._next(self._ahead, later) if later.votes is None else later.votes

    def _next(self, votes: Map, pending: _Pending) -> Map:
        """The votes as they are in a frame that is awaited, before its answer."""
        return self._vote_grid.propagated(votes, pending.step, self._near, pending.rated)

    @property
    def box_px(self) -> BoxPx | None:
        """Where the object is, or was last; None before the first answer."""
        return None if self._calm is None else self._box

    @property
    def votes(self) -> Map:
        """As they are in the newest frame, ``[h, w]``."""
        return self._ahead

    @property
    def _box(self) -> BoxPx:
        """The calm box, inside the frame."""
        assert self._calm is not None
        width, height = self._size_px
        x0, y0, x1, y1 = self._calm
        return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)

    @property
    def _near(self) -> BoxPx | None:
        """Where the object was last, unless it was lost."""
        return self._box if self._calm is not None and self.state != LOST else None

    def _around(self, box_px: BoxPx) -> BoxPx:
        """The window around a box, shifted into the frame."""
        edges: list[tuple[int, int]] = []
        for low, high, size in zip(box_px[:2], box_px[2:], self._size_px, strict=True):
            scale = SCALE[WIDENED if self._cut_off else self.state]
            length = min(max((high - low) * scale, LEAST_WINDOW_PX), size)
            start = min(max((low + high - length) / 2, 0), size - length)
            edges.append((round(start), round(start + length)))
        (x0, x1), (y0, y1) = edges
        return float(x0), float(y0), float(x1), float(y1)

    def _expected(self, step: Step) -> BoxPx | None:
        """The calm box of the last frame, carried along."""
        if self._calm is None or step.flow is None:
            return None
        x, y = self._vote_grid.shift_px(self._settled, step, self._box)
        x0, y0, x1, y1 = self._calm
        return x0 + x, y0 + y, x1 + x, y1 + y

    def _settle(self, now: _Pending, confidence: float) -> None:
        """What state that makes."""
        active = self.state in HELD
        self._hopeless = self._hopeless + 1 if confidence < HOPELESS else 0
        if now.step.blank or (active and (now.step.cut or self._hopeless >= PATIENCE_FRAMES)):
            self.give_up()
        elif confidence >= SURE and (active or now.begun > LEAD_FRAMES):
            if not active:
                self._number = (
                    self._numbers.new()
                    if self._another
                    else self._numbers.found(self._box, now.pts_s)
                )
                self._another = False
            self.state = FOLLOWING
        elif active and confidence < UNSURE:
            self.state = WIDENED
        if self.state in HELD:
            self._last_sure_s = now.pts_s
        self.track_id = self._number if self.state in HELD else 0

    def forget(self) -> None:
        """Begin anew elsewhere: where the object was says nothing of where it is."""
        self.give_up()
        self._calm = None

    def give_up(self) -> None:
        """Follow nothing any more. What is found before long may be the same object."""
        if self.state in HELD:
            self._numbers.lose(self._number, self._box, self._last_sure_s)
        self.state, self.track_id = LOST if self._number else SEARCHING, 0
