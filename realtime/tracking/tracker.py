"""Tracks one object: where to look next, what the answer means, how confident it is. It reads no
clock and no file.
"""

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engines.boxes import overlap, shifted
from engines.localizer import ImageBgr, Localization
from realtime.frames import NO_MAP, BoxPx, Track, Tracked
from realtime.tracking.confidence import CuesToConfidence, cues_of
from realtime.tracking.optical_flow import Map, Motion, MotionStep
from realtime.tracking.vote_grid import UNSEEN, VoteGrid

SEARCHING = "searching"
FOLLOWING = "following"
WIDENED = "widened"
LOST = "lost"
HELD = (FOLLOWING, WIDENED)
"""The states in which an object is tracked."""
SCALE = {SEARCHING: 1.6, FOLLOWING: 1.6, WIDENED: 2.0, LOST: 2.0}
"""The window is so many times as wide and as high as the box."""
LEAST_WINDOW_PX = 32
LEAD_FRAMES = 4
"""The whole frame is looked at in so many frames of a new scene."""
LOOK_AROUND = {SEARCHING: 8, FOLLOWING: 8, WIDENED: 8, LOST: 2}
"""After that, the whole frame is looked at once in so many frames, to find a better object."""
SURE = 0.5
"""The confidence from which on an object is tracked."""
UNSURE = 0.4
"""The confidence below which the window is widened."""
HOPELESS = 0.15
"""The confidence below which an object may be lost, see ``PATIENCE_FRAMES``."""
PATIENCE_FRAMES = 6
"""After so many boxes in a row below ``HOPELESS``, the object is lost."""
MOST_PROPAGATED = 1
"""After a frame that the engine saw, the box is propagated to at most so many frames instead of
asking the engine. docs/following.md shows what that costs. Two or three in a row save little more.
"""
PROPAGATE_UNSURE_FRAMES = 12
"""While nothing is tracked, boxes are propagated only after so many frames of a scene."""
EDGE = 0.02
"""A box that comes so near to an edge of its window may go on beyond it: a share of the window's
side. The next window is then a larger one.
"""
SMOOTH_SHARE = 0.3
"""The smoothed box goes this share of the way to a new box that is much the same."""
SMOOTH_SHARE_LATER = 0.12
"""The least such share. It falls as ``SMOOTH_FRAMES / N`` after N frames of a scene."""
SMOOTH_FRAMES = 4
SAME_IOU = 0.9
"""A new box with this IoU or more is much the same."""
ANOTHER_IOU = 0.35
"""A new box with this IoU or less is another one, and is taken as it is."""
SHORT_LOSS_S = 2.0
"""An object that is found again within this time keeps its track id."""
NOTHING = Localization(None, 0, "", 0.0, NO_MAP)
"""The answer of a tracker before the engine's first one."""


@dataclass
class _PendingFrame:
    """A frame that ``Tracker.window_after`` has seen, and ``Tracker.update`` not yet.

    Attributes:
        step: the motion from the frame before it.
        window_px: what the engine sees of it; None for nothing.
        whole: whether that is the whole frame.
        pts_s: its time.
        scene_frames: frames since the scene began.
        votes: the votes in this frame before its answer; None where they depend on answers that are
            awaited.
        selected: whether the user has selected an object in it.
        rated: see ``VoteGrid.propagated``.
    """

    step: MotionStep
    window_px: BoxPx | None
    whole: bool
    pts_s: float
    scene_frames: int
    votes: Map | None
    selected: bool
    rated: bool


class Tracker:
    """Tracks one object through the frames of one source, all of one size.

    ``window`` is called for each frame in turn, and ``update`` with each answer in the same order.
    Answers of several frames may be awaited at once. The windows of the later ones are then chosen
    from what is known, propagated along the optical flow.

    Args:
        width_px, height_px: size of the frames.
        confidence_model: gives the confidence of a box.
        selected_px: the box to track from the first frame on; None to track what is found.
        motion: computes the steps; None for a new one.
        track_ids: gives the track ids of the source; None for new ones.
        every_frame: whether the engine sees each frame; else it sees every other one, as long as
            that does no harm.

    Attributes:
        state: see ``Track``.
        track_id: see ``Track``.
        confidence: see ``Track``.
        found: the last answer, as ``update`` returned it; None before the first.
        objects: None, because there is only one; see ``MultiTracker``.
        hidden: cells of the grid that belong to other objects, bool ``[h, w]``. They get no votes
            for this object. None where there is no other object.
    """

    objects: tuple[Tracked, ...] | None = None

    def __init__(
        self,
        width_px: int,
        height_px: int,
        confidence_model: CuesToConfidence,
        selected_px: BoxPx | None = None,
        motion: Motion | None = None,
        track_ids: "TrackIds | None" = None,
        every_frame: bool = False,
    ) -> None:
        self.state = SEARCHING
        self.track_id = 0
        self.confidence = 0.0
        self.found: Localization | None = None
        self.hidden: NDArray[np.bool_] | None = None
        self._size_px = (width_px, height_px)
        self._confidence_model = confidence_model
        self._selected_px = selected_px
        self._motion = motion or Motion(width_px, height_px)
        self._vote_grid = VoteGrid(self._motion, width_px, height_px)
        self._track_ids = track_ids or TrackIds()
        self._most_propagated = 0 if every_frame else MOST_PROPAGATED
        self._votes = self._vote_grid.empty  # after the last answer
        self._votes_ahead = self._vote_grid.empty  # in the newest frame
        self._pending: deque[_PendingFrame] = deque()
        self._smooth: BoxPx | None = None
        self._raw: BoxPx | None = None
        self._scene_frames = 0
        self._propagated_frames = 0
        self._hopeless_frames = 0
        self._last_id = 0
        self._last_held_s = -math.inf
        self._is_another = False  # the user has selected an object that has no track id yet
        self._cut_off = False

    def choose(self, box_px: BoxPx) -> None:
        """Track what lies in this box of the next frame, from there on."""
        self._selected_px = box_px

    def window(self, image_bgr: ImageBgr, pts_s: float) -> BoxPx | None:
        """Choose what the engine sees of the next frame.

        Returns:
            The window in whole pixels inside the frame; None where the engine need not see it.
        """
        return self.window_after(self._motion.step(image_bgr), pts_s)

    def window_after(
        self, step: MotionStep, pts_s: float, look: bool | None = None, whole: bool | None = None
    ) -> BoxPx | None:
        """As ``window``, for a caller that has computed the step already.

        Args:
            step: the motion to the next frame.
            pts_s: the time of the next frame.
            look: whether the engine sees the frame; None to let the tracker decide.
            whole: whether it sees the whole frame; None to let the tracker decide.
        """
        none_pending = not self._pending
        self._scene_frames = 0 if step.cut or step.blank else self._scene_frames + 1
        selected_px = None if step.blank else self._selected_px
        is_selected = selected_px is not None
        looks = (is_selected or not self._may_propagate(step)) if look is None else look
        if is_selected:
            self._selected_px = None
            self._scene_frames = LEAD_FRAMES + 1
        frame = _PendingFrame(
            step=step,
            window_px=None,
            whole=False,
            pts_s=pts_s,
            scene_frames=self._scene_frames,
            votes=None,
            selected=is_selected,
            rated=looks or look is not None,
        )
        if selected_px is not None:
            ahead = self._vote_grid.marked(selected_px)
        else:
            ahead = self._next(self._votes_ahead, frame)
        self._votes_ahead = self._without_hidden(ahead)
        if is_selected or none_pending:
            frame.votes = self._votes_ahead
        self._pending.append(frame)
        self._propagated_frames = 0 if looks else self._propagated_frames + 1
        if not looks:
            return None
        box = self._vote_grid.box(self._votes_ahead, None if is_selected else self._near)
        frame.whole = box is None or (self._whole_frame_is_due if whole is None else whole)
        frame.window_px = self._around(
            (0.0, 0.0, *self._size_px) if box is None or frame.whole else box
        )
        return frame.window_px

    @property
    def _whole_frame_is_due(self) -> bool:
        """Whether it is time to look at the whole frame.

        For a lost object this is every other frame that the engine sees, however many those are.
        """
        frames_per_look = 1 + self._most_propagated if self.state == LOST else 1
        around = frames_per_look * LOOK_AROUND[self.state]
        return self._scene_frames <= LEAD_FRAMES or self._scene_frames % around == 0

    def _may_propagate(self, step: MotionStep) -> bool:
        """Whether the last box may be propagated to the next frame, which the engine then does not
        see.
        """
        settled = self.state == FOLLOWING or self._scene_frames > PROPAGATE_UNSURE_FRAMES
        known = self._smooth is not None and step.flow is not None
        few = self._propagated_frames < self._most_propagated
        return settled and known and not self._whole_frame_is_due and few

    def update(self, found: Localization | None) -> tuple[Localization, Track]:
        """Take the answer for the oldest frame that is awaited.

        Args:
            found: the answer for the window: its box in the window's pixels, its map over the
                window; None where there was no window.

        Returns:
            The answer in the frame's pixels, with the smoothed box and with the map at the window's
            place, and what tracking adds to it.
        """
        frame = self._pending.popleft()
        if frame.selected:
            self._smooth = None
            self.state = SEARCHING
            self.track_id = 0
            self._is_another = True
        votes = self._next(self._votes, frame) if frame.votes is None else frame.votes
        if frame.window_px is None or found is None:
            return self._propagate(frame, votes)
        if frame.step.blank or found.box_xyxy_px is None:
            self._votes = votes
            self._raw = None
            confidence = 0.0
        else:
            said_px = shifted(found.box_xyxy_px, *frame.window_px[:2])
            confidence = self._take(frame, votes, found, said_px, frame.window_px)
        self._settle(frame, confidence)
        self.confidence = confidence
        self._look_ahead()
        track = Track(self.state, frame.window_px, confidence, self.track_id, self._raw)
        map_hw = self._vote_grid.placed(found.map_hw, frame.window_px)
        detections = tuple(
            replace(each, box_xyxy_px=shifted(each.box_xyxy_px, *frame.window_px[:2]))
            for each in found.detections
        )
        self.found = replace(found, box_xyxy_px=self.box_px, map_hw=map_hw, detections=detections)
        return self.found, track

    def _take(
        self,
        frame: _PendingFrame,
        votes: Map,
        found: Localization,
        said_px: BoxPx,
        window_px: BoxPx,
    ) -> float:
        """Add the votes of an answer, and find the object's box.

        Args:
            frame: that the answer is for.
            votes: in the frame, before the answer.
            found: the answer.
            said_px: its box, in the frame.
            window_px: what the engine saw of the frame.

        Returns:
            The confidence of the object's box.
        """
        self._cut_off = touches(said_px, window_px, self._size_px)
        expected_px = self._expected(frame.step)
        voted = self._vote_grid.voted(
            votes, found.map_hw, said_px, window_px, frame.whole, frame.step.moving
        )
        self._votes = self._without_hidden(voted)
        self._raw = self._vote_grid.box(self._votes, self._near) or said_px
        self._smooth = smoothed(self._raw, expected_px, frame.scene_frames)
        cues = cues_of(
            self._vote_grid,
            self._votes,
            frame.step.evidence,
            self._inside(self._smooth),
            said_px,
            expected_px,
            found.score,
            frame.scene_frames,
        )
        return self._confidence_model(cues)

    def _propagate(self, frame: _PendingFrame, votes: Map) -> tuple[Localization, Track]:
        """Propagate the last answer to a frame that the engine has not seen, see ``update``."""
        expected_px = self._expected(frame.step)
        if expected_px and self._smooth and self._raw:
            x_px = expected_px[0] - self._smooth[0]
            y_px = expected_px[1] - self._smooth[1]
            self._raw = shifted(self._raw, x_px, y_px)
        self._smooth = expected_px or self._smooth
        self._votes = votes
        if frame.step.flow is None:
            self.confidence = 0.0
            self._settle(frame, 0.0)
        elif self.state in HELD:
            self._last_held_s = frame.pts_s
        self._look_ahead()
        self.found = replace(self.found or NOTHING, box_xyxy_px=self.box_px)
        return self.found, Track(self.state, None, self.confidence, self.track_id, self._raw)

    def _without_hidden(self, votes: Map) -> Map:
        """The votes, without those for other objects."""
        if self.hidden is None:
            return votes
        return np.where(self.hidden, np.minimum(votes, np.float32(UNSEEN)), votes)

    def _look_ahead(self) -> None:
        """Compute the votes in the newest frame from those after the last answer."""
        self._votes_ahead = self._votes
        for frame in self._pending:
            if frame.votes is None:
                self._votes_ahead = self._next(self._votes_ahead, frame)
            else:
                self._votes_ahead = frame.votes

    def _next(self, votes: Map, frame: _PendingFrame) -> Map:
        """The votes in a frame before its answer, from those in the frame before it."""
        return self._vote_grid.propagated(votes, frame.step, self._near, frame.rated)

    @property
    def box_px(self) -> BoxPx | None:
        """The smoothed box of the object, or its last one; None before the first answer."""
        return None if self._smooth is None else self._inside(self._smooth)

    @property
    def votes(self) -> Map:
        """The votes in the newest frame, ``[h, w]``."""
        return self._votes_ahead

    def _inside(self, box_px: BoxPx) -> BoxPx:
        """The part of a box that is inside the frame."""
        width, height = self._size_px
        x0, y0, x1, y1 = box_px
        return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)

    @property
    def _near(self) -> BoxPx | None:
        """Where the object was last; None where it is lost."""
        return None if self.state == LOST else self.box_px

    def _around(self, box_px: BoxPx) -> BoxPx:
        """The window around a box: larger than the box, and moved into the frame."""
        scale = SCALE[WIDENED if self._cut_off else self.state]
        edges: list[tuple[int, int]] = []
        for low, high, size in zip(box_px[:2], box_px[2:], self._size_px, strict=True):
            length = min(max((high - low) * scale, LEAST_WINDOW_PX), size)
            start = min(max((low + high - length) / 2, 0), size - length)
            edges.append((round(start), round(start + length)))
        (x0, x1), (y0, y1) = edges
        return float(x0), float(y0), float(x1), float(y1)

    def _expected(self, step: MotionStep) -> BoxPx | None:
        """The last smoothed box, propagated along a step; None where that is not possible."""
        if self._smooth is None or step.flow is None:
            return None
        x_px, y_px = self._vote_grid.shift_px(self._votes, step, self._inside(self._smooth))
        return shifted(self._smooth, x_px, y_px)

    def _settle(self, frame: _PendingFrame, confidence: float) -> None:
        """Decide the state after a frame, and the track id."""
        held = self.state in HELD
        self._hopeless_frames = self._hopeless_frames + 1 if confidence < HOPELESS else 0
        ends = frame.step.cut or self._hopeless_frames >= PATIENCE_FRAMES
        if frame.step.blank or (held and ends):
            self.give_up()
        elif confidence >= SURE and (held or frame.scene_frames > LEAD_FRAMES):
            if not held:
                self._last_id = self._new_id(frame.pts_s)
            self.state = FOLLOWING
        elif held and confidence < UNSURE:
            self.state = WIDENED
        if self.state in HELD:
            self._last_held_s = frame.pts_s
        self.track_id = self._last_id if self.state in HELD else 0

    def _new_id(self, pts_s: float) -> int:
        """The track id of an object that is tracked from now on."""
        is_another = self._is_another
        self._is_another = False
        if is_another or self.box_px is None:
            return self._track_ids.new()
        return self._track_ids.found(self.box_px, pts_s)

    def forget(self) -> None:
        """Begin anew elsewhere: the place of the object so far does not count."""
        self.give_up()
        self._smooth = None

    def give_up(self) -> None:
        """Track nothing. What is found soon afterwards may be the same object."""
        if self.state in HELD and self.box_px is not None:
            self._track_ids.lose(self._last_id, self.box_px, self._last_held_s)
        self.state = LOST if self._last_id else SEARCHING
        self.track_id = 0


def touches(box_px: BoxPx, window_px: BoxPx, size_px: tuple[int, int]) -> bool:
    """Whether a box reaches an edge of its window that is no edge of the frame.

    Args:
        box_px: the box in the frame.
        window_px: the window in the frame.
        size_px: width and height of the frame.
    """
    for low, high, first, last, size in zip(
        box_px[:2], box_px[2:], window_px[:2], window_px[2:], size_px, strict=True
    ):
        near = EDGE * (last - first)
        if (first > 0 and low < first + near) or (last < size and high > last - near):
            return True
    return False


def smoothed(raw_px: BoxPx, expected_px: BoxPx | None, scene_frames: int) -> BoxPx:
    """A box between where it should be and where it was found.

    A box that was found somewhere else altogether is taken as it is.

    Args:
        raw_px: the box that was found.
        expected_px: the last box, propagated to this frame; None without one.
        scene_frames: frames since the scene began.
    """
    if expected_px is None:
        return raw_px
    alike = (overlap(raw_px, expected_px) - ANOTHER_IOU) / (SAME_IOU - ANOTHER_IOU)
    least = min(SMOOTH_SHARE, max(SMOOTH_SHARE_LATER, SMOOTH_FRAMES / max(scene_frames, 1)))
    share = 1 - (1 - least) * min(max(alike, 0.0), 1.0)
    x0, y0, x1, y1 = (
        then + share * (now - then) for then, now in zip(expected_px, raw_px, strict=True)
    )
    return x0, y0, x1, y1


class TrackIds:
    """The track ids of one source's objects, from 1 on.

    Args:
        reach_px: what is found farther than this from where an object was lost is another object.
    """

    def __init__(self, reach_px: float = math.inf) -> None:
        self._last_id = 0
        self._reach_px = reach_px
        self._lost: dict[int, tuple[BoxPx, float]] = {}

    def lose(self, track_id: int, box_px: BoxPx, pts_s: float) -> None:
        """Remember where and when an object was last tracked."""
        self._lost[track_id] = box_px, pts_s

    def found(self, box_px: BoxPx, pts_s: float) -> int:
        """The track id of an object that is tracked from now on.

        It is that of the nearest object that was lost shortly before, or else a new one.
        """
        self._lost = {
            track_id: (box, then)
            for track_id, (box, then) in self._lost.items()
            if pts_s - then <= SHORT_LOSS_S
        }
        away_px = {track_id: _distance_px(box, box_px) for track_id, (box, _) in self._lost.items()}
        nearest = min(away_px, key=away_px.__getitem__, default=0)
        if nearest and away_px[nearest] <= self._reach_px:
            del self._lost[nearest]
            return nearest
        return self.new()

    def new(self) -> int:
        """A track id that no object has had."""
        self._last_id += 1
        return self._last_id


def _distance_px(a_px: BoxPx, b_px: BoxPx) -> float:
    """The distance between the centres of two boxes."""
    return math.dist(*(((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in (a_px, b_px)))
