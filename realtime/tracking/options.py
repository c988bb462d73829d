"""The options of tracking, and the trackers of a run, one for each source."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from engines.confidence import USUAL_LIMITS, Limits
from engines.errors import InputError
from engines.head import NO_HEAD
from engines.localizer import SMALLEST_PX, Localization, Localizer, box_name_of
from engines.maps import method_of
from engines.options import LOOK_AT, EngineOptions, Option
from realtime.frames import BoxPx, Frame, FrameRecord, Tracked, View
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.tracker import Tracker

State = dict[str, Any]
"""Of a tracker, see ``Tracker.json``."""
POINT_SHARE = 0.3
"""The first box around a selected point, as a share of the frame's width and height."""


@dataclass(frozen=True)
class FollowOptions:
    """The options of tracking: whether and what to track.

    ``follow`` is None where nothing is said: see ``for_source``.

    ``min_score`` is a least confidence: for tracked boxes that of the tracker, for others that of
    the head. None is the limit of the head. ``objects`` comes from the options of the engine, see
    ``beside``. ``photos_too`` says whether photos beside films are followed, too.
    """

    follow: Annotated[
        bool | None,
        Option(
            "Follow objects from frame to frame, or take each frame alone. Else videos and cameras"
            " are followed, and photos are not.",
            LOOK_AT,
        ),
    ] = None
    min_score: Annotated[
        float | None,
        Option(
            "No box that is less likely to be right: 0.8 is right 8 times in 10, 0 shows all. Else"
            " the head's own limit.",
            LOOK_AT,
            min=0,
            max=1,
        ),
    ] = None
    select: Annotated[
        str | None,
        Option("With --follow: what, on the first frame: X0,Y0,X1,Y1, X,Y, or a class.", LOOK_AT),
    ] = None
    objects: int = 1
    photos_too: bool = True
    place: tuple[float, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.follow is False and self.select:
            raise InputError(
                "select is about the object that is followed: follow one",
                option=("select", "follow"),
            )
        parts = [part.strip() for part in (self.select or "").split(",")]
        if len(parts) < 2:
            return
        try:
            place = tuple(float(part) for part in parts)
        except ValueError:
            return  # a class: some have commas in their names
        if len(place) not in (2, 4) or (
            len(place) == 4 and not (place[0] < place[2] and place[1] < place[3])
        ):
            raise InputError(
                f"'{self.select}' cannot be selected: give a box X0,Y0,X1,Y1, a point X,Y, or a"
                " class",
                option="select",
            )
        object.__setattr__(self, "place", place)

    @property
    def class_name(self) -> str | None:
        """The class that is selected; None where it is a place, or nothing."""
        return None if self.place else self.select

    def beside(self, choice: EngineOptions) -> "tuple[FollowOptions, EngineOptions]":
        """Complete the options of tracking and those of the engine by each other.

        The options of tracking get the number of objects. Those of the engine get the selected
        class, and without tracking the least confidence. Methods that find one box are asked for
        one: the trackers then find the other objects.

        Raises:
            InputError: there would be no box to track.
        """
        without = choice.head == NO_HEAD and not method_of(choice.method).search
        if self.follow is False or (self.follow is None and without):
            plain = replace(self, follow=False, select=None) if without else self
            return plain, replace(choice, least_confidence=self.min_score)
        if self.follow is None:
            wanted_class = self.class_name or choice.wanted_class
            wanted = replace(choice, wanted_class=wanted_class, least_confidence=self.min_score)
            return replace(self, objects=choice.objects), wanted
        if without:
            raise InputError(
                "follow needs boxes, and head none gives none: leave one of them out",
                option=("follow", "head"),
            )
        wanted = replace(
            choice,
            wanted_class=self.class_name or choice.wanted_class,
            least_confidence=0.0,
        )
        if not method_of(choice.method).search:
            wanted = replace(wanted, objects=1)
        return replace(self, objects=choice.objects), wanted

    def for_source(self, photos: bool) -> "FollowOptions":
        """The options for a source, which follow or not: photos are not followed unless that is
        asked for, and all else is unless that is forbidden.

        Raises:
            InputError: something is selected in photos.
        """
        return (
            self if self.follow is not None else replace(self, follow=not photos, photos_too=False)
        )

    def box_in(self, width_px: int, height_px: int) -> BoxPx | None:
        """The selected place as a box in a frame of that size; None where no place is selected.

        Raises:
            InputError: the place lies outside the frame.
        """
        if not self.place:
            return None
        x0, y0, x1, y1 = self.place * (2 if len(self.place) == 2 else 1)
        if x0 >= width_px or y0 >= height_px or x1 <= 0 or y1 <= 0:
            raise InputError(
                f"the selected place {self.select} lies outside the frame of"
                f" {width_px}x{height_px} pixels",
                option="select",
            )
        if len(self.place) == 2:
            return box_around((x0, y0), width_px, height_px)
        return max(0.0, x0), max(0.0, y0), min(float(width_px), x1), min(float(height_px), y1)


def box_around(point_px: tuple[float, float], width_px: int, height_px: int) -> BoxPx:
    """The box, inside the frame, that is taken for the object at a point."""
    x, y = point_px
    half_w = POINT_SHARE * width_px / 2
    half_h = POINT_SHARE * height_px / 2
    return (
        max(0.0, x - half_w),
        max(0.0, y - half_h),
        min(float(width_px), x + half_w),
        min(float(height_px), y + half_h),
    )


class Following:
    """The trackers of a run, one for each source. The engine's half of the frame loop uses it.

    Args:
        options: what to track.
        limits: of the head; None for the usual ones.
        states: of a source in segments: the state behind each segment that another run did, by the
            segment's number. It gets those of this run.
        photos: names of sources that are not followed.

    Attributes:
        min_score: see ``FollowOptions``. It may be changed from any thread.
        limits, states: as above.

    Raises:
        ModelError: the shipped confidence model is damaged.
    """

    def __init__(
        self,
        options: FollowOptions,
        limits: Limits | None = None,
        states: dict[int, State] | None = None,
        photos: Collection[str] = (),
    ) -> None:
        self.min_score = options.min_score
        self.limits = limits or USUAL_LIMITS
        self.states = {} if states is None else states
        self._photos = photos
        self._options = options
        self._confidence_model = load_confidence_model()
        self._trackers: dict[str, tuple[tuple[int, ...], Tracker]] = {}
        self._points: dict[str, tuple[float, float]] = {}
        self._seen_segment = -1
        self._segment = -1
        self._tracker: Tracker | None = None

    def select(self, source: str, point: tuple[float, float]) -> None:
        """Track what is at a point of a source's next frame. Any thread may call this.

        Args:
            source: its name.
            point: x and y in fractions of the frame's width and height.
        """
        self._points[source] = point

    def view(self, frame: Frame) -> View:
        """A frame and the tracker that gets the engine's answer: none for photos.

        Raises:
            InputError: the selected place lies outside the frame.
        """
        image = frame.image_bgr
        refused = image.ndim != 3 or min(image.shape[:2]) < SMALLEST_PX  # by the localizer
        if refused or frame.source in self._photos:
            return View(image)
        height, width = image.shape[:2]
        tracker = self._tracker_of(frame)
        if point := self._points.pop(frame.source, None):
            tracker.choose(box_around((point[0] * width, point[1] * height), width, height))
        tracker.see(image, frame.pts_s)
        return View(image, tracker)

    def _tracker_of(self, frame: Frame) -> Tracker:
        """The tracker of a frame's source. Where a segment begins whose predecessor another run
        did, it goes on from the state behind that.
        """
        shape, tracker = self._trackers.get(frame.source, ((), None))
        before, self._seen_segment = self._seen_segment, frame.segment
        new = tracker is None
        if tracker is not None and frame.segment != before:
            new = frame.segment != before + 1
        if tracker is None or new or shape != frame.image_bgr.shape:
            height, width = frame.image_bgr.shape[:2]
            state = self.states.get(frame.segment - 1) if new else None
            begins = tracker is None and state is None
            tracker = Tracker(
                width,
                height,
                self._confidence_model,
                self._options.objects,
                self._options.box_in(width, height) if begins else None,
                self._options.class_name is not None,
                self.limits,
            )
            if state is not None:
                tracker.restore(state)
            self._trackers[frame.source] = frame.image_bgr.shape, tracker
        return tracker

    def passes(self, frame: Frame, tracker: Tracker | None) -> None:
        """Take note of a frame, in order, before its answer: of a segment that is over, the state
        is kept.
        """
        if frame.segment != self._segment:
            self.end()
            if frame.segment != self._segment + 1:
                self._tracker = None
        self._segment = frame.segment
        self._tracker = tracker or self._tracker

    def end(self) -> None:
        """Keep the state behind the last frame."""
        if self._tracker is not None:
            self.states[self._segment] = self._tracker.json()
        elif self._segment - 1 in self.states:
            self.states[self._segment] = self.states[self._segment - 1]

    def update(
        self, record: FrameRecord, tracker: Tracker | None, found: Localization
    ) -> Localization:
        """The answer for a frame, with the tracked box if its confidence is high enough.

        What else tracking knows goes into ``record.track``, and into ``record.objects`` where
        several objects are tracked.

        Args:
            record: of the frame; it is changed.
            tracker: of the ``View`` that the engine saw; None for photos.
            found: the engine's answer.
        """
        least = self.limits.shown_from if self.min_score is None else self.min_score
        if tracker is None:
            return found.sure(least)
        result, record.track = tracker.update(found)
        if self._options.objects > 1:
            record.objects = tuple(self._named(each, least) for each in tracker.objects)
        sure = record.track.confidence
        box_name = result.box_name or box_name_of(result.class_name, result.score)
        unsure = sure < self.limits.sure_from
        return replace(result, confidence=sure, box_name=box_name, unsure=unsure).sure(least)

    def _named(self, found: Tracked, least: float) -> Tracked:
        """One of several objects, without its box where that is not sure enough."""
        sure = found.track.confidence
        box = found.box_xyxy_px if sure >= least else None
        box_name = found.box_name or box_name_of(found.class_name, found.score)
        unsure = sure < self.limits.sure_from
        return replace(found, box_xyxy_px=box, box_name=box_name, unsure=unsure)


WHOLE_FRAMES = FollowOptions(follow=False)


def shown_from(options: FollowOptions, localizer: Localizer) -> float | None:
    """From which confidence on boxes are shown; None where nothing tells how sure they are."""
    if not options.follow:
        return localizer.least_confidence if localizer.limits else None
    limits = localizer.limits or USUAL_LIMITS
    return limits.shown_from if options.min_score is None else options.min_score


def opened(
    options: FollowOptions,
    localizer: Localizer,
    states: dict[int, State] | None = None,
    photos: Collection[str] = (),
) -> Following | None:
    """The trackers for the frame loop, see ``Following``; None without tracking."""
    if not options.follow:
        return None
    return Following(options, localizer.limits, states, () if options.photos_too else photos)
