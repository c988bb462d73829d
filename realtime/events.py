"""Events: when something appeared, what it was, how sure, and until when. They are found in the
rows of a log, of a live run and of a file alike.
"""

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2

from engines.localizer import ImageBgr
from engines.text import displayable
from realtime.annotate import jpeg_of
from realtime.frames import BoxPx

Row = dict[str, Any]
PictureOf = Callable[[BoxPx], str]
"""Gives the part of the present frame at a box, as a JPEG in base64."""
Change = tuple[Literal["began", "ended"], "Event"]
BETTER = 1.05
"""So many times as good must another frame be before it counts as the best one."""


@dataclass(frozen=True)
class EventRules:
    """What counts as an event.

    Attributes:
        least_confidence: of a box that is shown; None takes all that are shown.
        begins_after_s: so long it is in view before it counts; what is gone sooner does not.
        ends_after_s: it ends when it was not in view for so long.
        photos: frames are photos, which do not follow one another: one event for each name.
    """

    least_confidence: float | None = None
    begins_after_s: float = 0.5
    ends_after_s: float = 2.0
    photos: bool = False


USUAL, PHOTOS = EventRules(), EventRules(photos=True)
THUMBNAIL_PX, SMALLEST_THUMBNAIL_PX = 160, 48
AROUND = 1.3
"""So many times the longer side of a box is the side of its thumbnail."""


def rules_for(photos: bool) -> EventRules:
    """What counts where nobody asks for anything else, in photos or in video."""
    return PHOTOS if photos else USUAL


@dataclass
class Event:
    """Something that is in view for a while.

    Attributes:
        number: of the event in its run, from 1; 0 before it counts.
        source: its name.
        key: the number of the tracked object, or its name where nothing is tracked.
        begin_s, end_s: when it was in view first and last, in seconds of the source.
        frames: in how many frames it was in view.
        confidence: the highest; None where nothing tells.
        best_frame, best_s: the frame that shows it best, sure and large, and its time.
        box_xyxy_px: the box there, in pixels of the frame.
        picture: the part of the frame there, as a JPEG in base64; empty where none was taken.
    """

    source: str
    key: int | str
    begin_s: float
    end_s: float
    number: int = 0
    frames: int = 0
    confidence: float | None = None
    best_frame: int = 0
    best_s: float = 0.0
    box_xyxy_px: BoxPx = (0.0, 0.0, 0.0, 0.0)
    picture: str = field(default="", repr=False)
    _names: Counter[str] = field(default_factory=Counter, repr=False)
    _goodness: float = field(default=0.0, repr=False)
    _last_row: int = field(default=0, repr=False)

    @property
    def name(self) -> str:
        """What it was called most often."""
        return self._names.most_common(1)[0][0]

    @property
    def seconds(self) -> float:
        """For how long it was in view, from the first frame to the last."""
        return self.end_s - self.begin_s

    def add(self, row: Row, part: Row, place: int, picture_of: PictureOf | None) -> None:
        """Count a frame in which it is in view.

        Args:
            row: of the frame.
            part: of the row, about this object.
            place: the number of the row among those of the source.
            picture_of: see there; None takes no picture.
        """
        sure = part.get("confidence")
        box = part["x0"], part["y0"], part["x1"], part["y1"]
        area_px = (box[2] - box[0]) * (box[3] - box[1])
        goodness = (1.0 if sure is None else sure) * area_px**0.25
        if sure is not None:
            self.confidence = max(sure, self.confidence or 0.0)
        if self.frames == 0 or goodness > BETTER * self._goodness:
            self._goodness = goodness
            self.best_frame, self.best_s, self.box_xyxy_px = row["frame"], row["pts_s"], box
            if picture_of is not None:
                self.picture = picture_of(box)
        self.frames += 1
        self.end_s, self._last_row = row["pts_s"], place
        self._names[name_in(part)] += 1

    def row(self) -> dict[str, Any]:
        """The event as one line of a file of events, without its picture."""
        tracked = isinstance(self.key, int)
        return {
            "source": displayable(self.source),
            "event": self.number,
            "name": self.name,
            "track_id": self.key if tracked else None,
            "begin_s": round(self.begin_s, 3),
            "end_s": round(self.end_s, 3),
            "frames": self.frames,
            "confidence": None if self.confidence is None else round(self.confidence, 4),
            "best_frame": self.best_frame,
            "best_s": round(self.best_s, 3),
            "box": [round(edge, 1) for edge in self.box_xyxy_px],
        }


def name_in(part: Row) -> str:
    """The name of an object in a row, without the finer class that may stand behind it."""
    name: str = part.get("label") or part["class_name"]
    return name.partition(" (")[0]


def shown_in(row: Row) -> Iterator[Row]:
    """The objects of a row whose boxes are shown: the row itself, or parts of it."""
    if row["outcome"] != "shown":
        return
    several = row.get("objects")
    if several is None:
        several = [row] if "track_id" in row else row.get("detections") or [row]
    yield from (each for each in several if each["x0"] is not None)


class EventFinder:
    """Finds the events of one source in its rows.

    Args:
        rules: what counts.
    """

    def __init__(self, rules: EventRules = USUAL) -> None:
        self._rules = rules
        self._open: dict[int | str, Event] = {}
        self._rows = 0
        self._found = 0

    def add(self, row: Row, picture_of: PictureOf | None = None) -> list[Change]:
        """Look at the next row.

        Returns:
            The events that begin to count and that end with it.
        """
        changes: list[Change] = []
        self._rows += 1
        seen: set[int | str] = set()
        for part in shown_in(row):
            sure = part.get("confidence")
            least = self._rules.least_confidence
            if least is not None and sure is not None and sure < least:
                continue
            key = part.get("track_id") or name_in(part)
            if key in seen:
                continue  # several of one name, which nothing tells apart
            seen.add(key)
            changes += self._seen(key, row, part, picture_of)
        if not self._rules.photos:
            changes += self._ended(row["pts_s"])
        return changes

    @property
    def in_view(self) -> list[Event]:
        """All events that are under way, those that do not count yet, too."""
        return list(self._open.values())

    def end(self) -> list[Change]:
        """End all events that are under way."""
        left = [event for event in self._open.values() if event.number]
        self._open.clear()
        return [("ended", event) for event in left]

    def _seen(
        self, key: int | str, row: Row, part: Row, picture_of: PictureOf | None
    ) -> list[Change]:
        event = self._open.get(key)
        if event is None:
            event = Event(row["source"], key, row["pts_s"], row["pts_s"])
            self._open[key] = event
        event.add(row, part, self._rows, picture_of)
        if event.number or not (self._rules.photos or event.seconds >= self._rules.begins_after_s):
            return []
        self._found += 1
        event.number = self._found
        return [("began", event)]

    def _ended(self, now_s: float) -> list[Change]:
        """The events that have not been in view for long. Two rows without it are needed, too:
        where only every hundredth frame is looked at, the next one is far away.
        """
        gone = [
            event
            for event in self._open.values()
            if now_s - event.end_s > self._rules.ends_after_s and self._rows - event._last_row >= 2
        ]
        for event in gone:
            del self._open[event.key]
        return [("ended", event) for event in gone if event.number]


def surest(events: Sequence[Event], most: int) -> list[Event]:
    """So many of the events: the surest, and of equals those that were in view longest. Their order
    stays.
    """
    kept = sorted(events, key=lambda each: (-(each.confidence or 0.0), -each.frames))[:most]
    return [event for event in events if any(event is each for each in kept)]


def summed_up(rows: Sequence[Row], photos: bool = False) -> str:
    """Events, as ``Event.row`` gives them, in one line: ``car 3 times, person once``; in photos
    ``cat in 6, dog in 3``.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["name"]] += row["frames"] if photos else 1
    words = {name: f"in {count}" if photos else times(count) for name, count in counts.items()}
    return ", ".join(f"{name} {words[name]}" for name, _ in counts.most_common())


def times(count: int) -> str:
    """A number of times in words."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def thumbnail(image_bgr: ImageBgr, box_px: BoxPx) -> str:
    """The part of a frame around a box, ``THUMBNAIL_PX`` high, as a JPEG in base64."""
    height, width = image_bgr.shape[:2]
    x0, y0, x1, y1 = box_px
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    half = max(AROUND * max(x1 - x0, y1 - y0) / 2, SMALLEST_THUMBNAIL_PX / 2)
    rows = slice(max(0, int(y - half)), max(1, min(height, int(y + half))))
    columns = slice(max(0, int(x - half)), max(1, min(width, int(x + half))))
    part = image_bgr[rows, columns]
    scale = min(1.0, THUMBNAIL_PX / max(part.shape[:2]))
    size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
    small = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
    return base64.b64encode(jpeg_of(small, 85)).decode()
