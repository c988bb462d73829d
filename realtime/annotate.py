"""Draws boxes, labels and the heat map on a frame. Sizes follow the frame's size."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from typing import Annotated, Any, get_args, get_type_hints

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import InputError
from engines.localizer import Detection, ImageBgr, Localization
from engines.options import OUTPUT, Option
from engines.text import displayable
from realtime.frames import NO_IMAGE, BoxPx, Frame, Tracked
from realtime.smoothing import BoxSmoother

PREDICTED_BGR = (30, 75, 225)
TRUTH_BGR = (130, 190, 20)
LIGHT_BGR = (255, 255, 255)
SHADE_BGR = (8, 8, 8)
OBJECTS_BGR = (
    PREDICTED_BGR,
    (235, 180, 85),
    (65, 225, 240),
    (170, 120, 205),
    (115, 160, 0),
    (0, 160, 230),
    (180, 115, 0),
    (160, 160, 160),
)
"""Of objects that are followed beside each other, by number; the next begin anew. People who see
fewer colours tell them apart, too (after Okabe & Ito 2008, "Color Universal Design").
"""
NOTHING = "nothing sure in view"
INSET_SHARE = 0.26  # of the frame's height
SMALLEST_WITH_INSET_PX = 32
LARGE_PX = 128 * 128
FONT = cv2.FONT_HERSHEY_DUPLEX
INSET_SIZES = (1.0, 0.75, 0.5)
"""Shares of the inset's usual size: it is smaller where it would cover an object. The smallest one
has room in a corner of a box that fills the frame.
"""
HARDLY = 0.1
"""The inset stays while it reaches at most so far into an object, see ``_reach``."""
NOWHERE = -1
"""The place of an inset that is not drawn."""
DASH = 3
"""The length of a dash, in thicknesses of the line."""
MOST_ROWS = 6
"""A label is put at most so many rows below another one in the same box."""
INSIDE = 0.5
"""How bad it is that a label covers a box, of what it is to cover another label."""
COLOURS_BGR = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)
"""``[256, 1, 3]``: OpenCV would work this table out anew for every frame."""


@dataclass(frozen=True)
class Look:
    """How results are drawn; it may change from frame to frame. Session, page, ``stream`` and
    ``Result.draw`` take its fields from here.

    Attributes:
        box: draw outlines and labels.
        heat_map: ``inset`` in a corner, the lower right one unless an object is there, smaller or
            left out where there is no room; ``over`` the whole frame, or ``off``.
        alpha: opacity of ``over``: 0 shows the frame only, 1 the map only.
        smoothing: how much the drawn box is smoothed over time, from 0 (not at all) to 1.

    Raises:
        InputError: a value is out of its range.
    """

    box: bool = True
    heat_map: Annotated[
        str, Option("inset: in the corner; over: on the whole picture; off.", OUTPUT)
    ] = field(default="inset", metadata={"among": ("inset", "over", "off")})
    alpha: Annotated[float, Option("Opacity of --heat-map over.", OUTPUT, min=0, max=1)] = 0.5
    smoothing: Annotated[
        float,
        Option(
            "Calm the drawn box: 0 (not at all) to 1. The log keeps the raw box.",
            OUTPUT,
            ("smooth",),
            min=0,
            max=1,
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        for name, switch in switches().items():
            value = getattr(self, name)
            if switch.among and value not in switch.among:
                among = ", ".join(switch.among)
                raise InputError(f"the {name.replace('_', ' ')} is one of {among}, not '{value}'")
            if switch.most is not None and not switch.least <= value <= switch.most:
                raise InputError(
                    f"{name} goes from {switch.least:g} to {switch.most:g}, not {value}"
                )


@dataclass(frozen=True)
class Switch:
    """What a field of ``Look`` may be: one of some words, a number of a range, or else true or
    false.
    """

    among: tuple[str, ...] = ()
    least: float = 0.0
    most: float | None = None


@cache
def switches() -> dict[str, Switch]:
    """The fields of ``Look`` by name."""
    hints = get_type_hints(Look, include_extras=True)
    found = {}
    for each in fields(Look):
        option = next(iter(get_args(hints[each.name])[1:]), Option(""))
        found[each.name] = Switch(each.metadata.get("among", ()), option.min or 0.0, option.max)
    return found


PLAIN = Look()


class Annotator:
    """Draws the frames of any number of sources; knows of each what the next picture needs of the
    last.
    """

    def __init__(self) -> None:
        self._smoothers: defaultdict[str, BoxSmoother] = defaultdict(BoxSmoother)
        self._of_objects: dict[str, dict[int, BoxSmoother]] = {}
        self._heat: dict[str, _Heat] = {}
        self._places: dict[str, tuple[int, int]] = {}

    def paint(
        self,
        frame: Frame,
        found: Localization,
        status: str,
        look: Look = PLAIN,
        heat_map_every: int = 1,
        objects: Sequence[Tracked] = (),
    ) -> ImageBgr:
        """A copy of the frame with everything drawn on it; ``found`` is left as it is.

        Args:
            frame: with its image.
            found: what was found in it.
            status: a line for the lower left corner.
            look: what to draw, and how.
            heat_map_every: draw a new heat map in one of so many frames, and the last one in the
                others.
            objects: that are followed beside each other, see ``draw``.
        """
        height, width = frame.image_bgr.shape[:2]
        calm = self._smoothers[frame.source].smoothed(
            found, frame.pts_s, width, height, look.smoothing
        )
        objects = self._calm(frame, objects, look.smoothing) if objects else ()
        heat = self._heat.get(frame.source)
        if (
            heat is None
            or heat.age + 1 >= heat_map_every
            or heat.made_for != (height, width, look.heat_map)
        ):
            picture = heat_picture(found, height, width, look)
            heat = self._heat[frame.source] = _Heat(picture, (height, width, look.heat_map))
        else:
            heat.age += 1
        place = self._place(frame, calm, objects, heat.picture, status) if look.box else None
        return draw(
            frame.image_bgr, calm, frame.truth_xyxy_px, status, heat.picture, look, objects, place
        )

    def _place(
        self,
        frame: Frame,
        found: Localization,
        objects: Sequence[Tracked],
        inset: ImageBgr,
        status: str,
    ) -> int:
        """The inset's place: it stays while it covers hardly anything. Each segment begins anew, so
        that its pictures depend on it alone.
        """
        segment, place = self._places.get(frame.source, (frame.segment, 0))
        now = place if segment == frame.segment else 0
        if inset.size:
            height, width = frame.image_bgr.shape[:2]
            places = inset_places(inset, (width, height), status)
            outlines = outlines_of(found, objects)
            boxes = [*(each.box_xyxy_px for each in outlines), *_boxes(frame.truth_xyxy_px)]
            now = free_place(places, boxes, now)
        self._places[frame.source] = frame.segment, now
        return now

    def _calm(self, frame: Frame, objects: Sequence[Tracked], smoothing: float) -> list[Tracked]:
        """Smooth each object's box with a smoother of its own, as long as it is tracked."""
        height, width = frame.image_bgr.shape[:2]
        last, pairs = (
            self._of_objects.get(frame.source, {}),
            [(each.track.track_id, each) for each in objects],
        )
        smoothers = self._of_objects[frame.source] = {
            number: last.get(number) or BoxSmoother() for number, _ in pairs
        }
        return [
            smoothers[number].smoothed(each, frame.pts_s, width, height, smoothing)
            for number, each in pairs
        ]


@dataclass
class _Heat:
    """A heat map that was drawn, what for, and how many frames ago."""

    picture: ImageBgr
    made_for: tuple[int, int, str]
    age: int = 0


def draw(
    image_bgr: ImageBgr,
    found: Localization,
    truth_xyxy_px: BoxPx | None = None,
    status: str = "",
    heat: ImageBgr | None = None,
    look: Look = PLAIN,
    objects: Sequence[Tracked] = (),
    place: int | None = None,
) -> ImageBgr:
    """A copy of the frame with everything drawn on it.

    Args:
        image_bgr: the frame.
        found: its box, label and confidence, and map; further detections in a thinner line. Unsure
            boxes are dashed. Where no box is sure enough to be shown, words say so.
        truth_xyxy_px: the true box, where it is known.
        status: a line for the lower left corner, such as the latency.
        heat: the heat map as ``heat_picture`` makes it, if that was made before.
        look: what to draw, and how.
        objects: that are followed beside each other, drawn in place of what was found: each in its
            own colour, with its number.
        place: of the inset, its number in ``inset_places`` or ``NOWHERE``; None for the best one.
    """
    height, width = image_bgr.shape[:2]
    heat = heat_picture(found, height, width, look) if heat is None else heat
    if look.heat_map == "over" and heat.size:
        canvas = np.asarray(
            cv2.addWeighted(image_bgr, 1 - look.alpha, heat, look.alpha, 0), np.uint8
        )
    else:
        canvas = image_bgr.copy()
    unit = unit_px(width, height)
    outlines = outlines_of(found, objects, unit) if look.box else []
    boxes = [*(each.box_xyxy_px for each in outlines), *_boxes(truth_xyxy_px)]
    taken = [plate_at(status, (0.0, float(height)), unit, (width, height))] if status else []
    if look.heat_map == "inset" and heat.size:
        places = inset_places(heat, (width, height), status)
        if place is None:
            place = free_place(places, boxes, 0)
        if place != NOWHERE:
            _draw_inset(canvas, heat, unit, places[place])
            taken.append(places[place])
    if truth_xyxy_px is not None:
        _rectangle(canvas, truth_xyxy_px, TRUTH_BGR, unit)
    for each in outlines:
        _rectangle(canvas, each.box_xyxy_px, each.colour, each.thickness, each.dashed)
    for each in reversed(outlines):  # the main one first: its label has the choice of places
        taken.append(_labelled(canvas, each, taken, boxes, unit))
    if look.box and not outlines:
        text = NOTHING if found.nothing_sure else label(found)
        corners = [(0.0, 0.0), (float(width), 0.0)]
        plates = [plate_at(text, each, unit, (width, height)) for each in corners]
        covered = [sum(_common(plate, each) for each in taken) for plate in plates]
        _text(canvas, text, corners[covered.index(min(covered))], unit, SHADE_BGR)
    if status:
        _text(canvas, status, (0.0, float(height)), unit, SHADE_BGR)
    return canvas


@dataclass(frozen=True)
class Outline:
    """A box as it is drawn, with its label."""

    box_xyxy_px: BoxPx
    text: str
    colour: tuple[int, int, int]
    thickness: int
    dashed: bool


def outlines_of(found: Localization, objects: Sequence[Tracked], unit: int = 1) -> list[Outline]:
    """What is drawn of an answer, or of the objects that are followed; the main box comes last."""
    outlines: list[Outline] = []
    if objects:
        for each in objects:
            if each.box_xyxy_px is not None:
                number = each.track.track_id
                colour = OBJECTS_BGR[(number - 1) % len(OBJECTS_BGR)]
                outlines.append(
                    Outline(each.box_xyxy_px, f"{number} {label(each)}", colour, unit, each.unsure)
                )
    elif found.box_xyxy_px is not None:
        shown: list[Localization | Detection] = [found, *found.detections[1:]]
        for one in shown:
            assert one.box_xyxy_px is not None
            outlines.append(Outline(one.box_xyxy_px, label(one), PREDICTED_BGR, unit, one.unsure))
    if outlines:
        outlines[0] = replace(outlines[0], thickness=2 * unit)
    return outlines[::-1]


def label(found: Localization | Detection | Tracked) -> str:
    """What is written at a box: what it is called, and how sure the box is. Where nothing tells how
    sure it is: the class and its score.
    """
    if found.confidence is None:
        name = found.class_name
        return f"{name}, score {found.score:.2f}" if found.score else name
    words = f"{found.label} {100 * found.confidence:.0f} %"
    return f"{words}, unsure" if found.unsure else words


def heat_picture(found: Localization, height_px: int, width_px: int, look: Look) -> ImageBgr:
    """The heat map as ``draw`` shows it in a frame of that size: small, as large as the frame, or
    empty.
    """
    if look.heat_map == "inset" and min(height_px, width_px) >= SMALLEST_WITH_INSET_PX:
        size_px = max(1, round(width_px * INSET_SHARE)), max(1, round(height_px * INSET_SHARE))
        return heat_map(found.map_hw, *size_px)
    return heat_map(found.map_hw, width_px, height_px) if look.heat_map == "over" else NO_IMAGE


def heat_map(map_hw: NDArray[np.float32], width_px: int, height_px: int) -> ImageBgr:
    """The map as colours, smoothed over a fiftieth of its side and scaled to its 99.5th percentile,
    at a given size.

    A sensitivity map is spiky: without smoothing, single pixels hide where its mass lies.
    """
    smooth = cv2.GaussianBlur(map_hw.astype(np.float32), (0, 0), max(map_hw.shape) / 50)
    step = max(
        1, min(map_hw.shape) // 64
    )  # neighbours are smoothed alike: 64 x 64 samples tell the percentile
    samples = smooth[::step, ::step].ravel()
    place = round(0.995 * (samples.size - 1))
    top = max(float(np.partition(samples, place)[place]), 1e-30)
    gray = cv2.convertScaleAbs(smooth, alpha=255 / top)
    if (
        width_px * height_px > LARGE_PX
    ):  # colours are mixed in place of values: a third of the time, and no eye tells
        colours = cv2.applyColorMap(gray, COLOURS_BGR)
        return np.asarray(
            cv2.resize(colours, (width_px, height_px), interpolation=cv2.INTER_LINEAR), np.uint8
        )
    resized = cv2.resize(gray, (width_px, height_px), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.applyColorMap(resized, COLOURS_BGR), np.uint8)


def clock(seconds: float) -> str:
    """1:02:03.45, hours only where there are some."""
    hundredths = round(abs(seconds) * 100)
    minutes, rest = divmod(hundredths // 100, 60)
    hours, minutes = divmod(minutes, 60)
    long = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{'-' if seconds < 0 and hundredths else ''}{long}:{rest:02}.{hundredths % 100:02}"


def jpeg_of(image_bgr: NDArray[Any], quality: int) -> bytes:
    """An image as a JPEG file of that quality, 0 to 100."""
    return cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


Places = Sequence[BoxPx]


def unit_px(width_px: int, height_px: int) -> int:
    """The width of a thin line in a frame of that size; all that is drawn goes by it."""
    return max(1, round(min(height_px, width_px) / 240))


def inset_places(heat: ImageBgr, frame_px: tuple[int, int], status: str) -> list[BoxPx]:
    """Where the inset may be, the usual place first: lower right, upper right, lower left, upper
    left; higher where the line of status needs the room. Then the same in smaller sizes.
    """
    unit = unit_px(*frame_px)
    margin = 3 * unit
    plate = plate_at(status, (0.0, float(frame_px[1])), unit, frame_px) if status else None
    places = list[BoxPx]()
    for size in INSET_SIZES:
        height, width = (max(1, round(side * size)) for side in heat.shape[:2])
        left, right = margin, frame_px[0] - width - margin
        top, bottom = margin, frame_px[1] - height - margin
        for x, y in ((right, bottom), (right, top), (left, bottom), (left, top)):
            low = y
            if plate and _common((x - margin, y, x + width + margin, y + height + margin), plate):
                lifted = int(plate[1]) - height - margin
                low = lifted if lifted >= margin else y
            places.append((x, low, x + width, low + height))
    return places


def free_place(places: Places, boxes: Places, now: int) -> int:
    """The number of the place where the inset covers no object: the largest, and of these one that
    covers no corner of a box either; ``NOWHERE`` if there is none.

    Args:
        places: see ``inset_places``.
        boxes: of the objects.
        now: where it is. It stays there while it covers hardly anything and has no room to grow.
    """
    corners = len(places) // len(INSET_SIZES)

    def reach(number: int) -> float:
        return max((_reach(places[number], box) for box in boxes), default=0.0)

    def covers(number: int) -> bool:
        return any(_common(places[number], box) for box in boxes)

    if now != NOWHERE and reach(now) <= HARDLY:
        larger = range(now // corners * corners)
        return next((each for each in larger if not covers(each)), now)
    free = [number for number in range(len(places)) if reach(number) == 0]
    return min(free, key=lambda each: (each // corners, covers(each)), default=NOWHERE)


def _reach(place: BoxPx, box: BoxPx) -> float:
    """How far a place reaches into the ellipse in a box, which is about where its object is: from 0
    (not at all) to 1 (to its middle).
    """
    shares = []
    for axis in (0, 1):
        middle, half = (box[axis] + box[axis + 2]) / 2, max(1.0, box[axis + 2] - box[axis]) / 2
        nearest = min(max(middle, place[axis]), place[axis + 2])
        shares.append((nearest - middle) / half)
    return max(0.0, 1 - math.hypot(*shares))


def _boxes(box: BoxPx | None) -> Places:
    return [] if box is None else [box]


def _common(one: BoxPx, other: BoxPx) -> float:
    """The area that two boxes have in common."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _draw_inset(canvas: ImageBgr, inset: ImageBgr, unit: int, place: BoxPx) -> None:
    width, height = round(place[2] - place[0]), round(place[3] - place[1])
    if inset.shape[:2] != (height, width):
        inset = np.asarray(
            cv2.resize(inset, (width, height), interpolation=cv2.INTER_AREA), np.uint8
        )
    x, y = max(0, round(place[0])), max(0, round(place[1]))
    canvas[y : y + height, x : x + width] = inset[: canvas.shape[0] - y, : canvas.shape[1] - x]
    cv2.rectangle(canvas, (x - 1, y - 1), (x + width, y + height), LIGHT_BGR, unit)


def _rectangle(
    canvas: ImageBgr,
    box_xyxy_px: BoxPx,
    colour: tuple[int, int, int],
    thickness: int,
    dashed: bool = False,
) -> None:
    """An outline drawn inside the box, so that a box at the frame's edge stays visible; a dark line
    around it shows it on any ground.
    """
    height, width = canvas.shape[:2]
    half = thickness // 2
    x0, y0 = round(box_xyxy_px[0]) + half, round(box_xyxy_px[1]) + half
    x1, y1 = round(box_xyxy_px[2]) - 1 - half, round(box_xyxy_px[3]) - 1 - half
    first, second = (min(x0, width - 1), min(y0, height - 1)), (max(x1, 0), max(y1, 0))
    for shade, line in ((SHADE_BGR, thickness + 2), (colour, thickness)):
        if dashed:
            for start, end in _dashes(first, second, DASH * max(2, thickness)):
                cv2.line(canvas, start, end, shade, line)
        else:
            cv2.rectangle(canvas, first, second, shade, line)


def _dashes(
    first: tuple[int, int], second: tuple[int, int], length: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The ends of the dashes of a rectangle: each side begins and ends with one."""
    for axis in (0, 1):
        low, high = sorted((first[axis], second[axis]))
        count = max(1, round((high - low) / length / 2))
        step = (high - low) / max(1, 2 * count - 1) if count > 1 else (high - low)
        for place in range(count):
            start, end = round(low + 2 * place * step), round(low + (2 * place + 1) * step)
            for other in (first[1 - axis], second[1 - axis]):
                pair = ((start, other), (end, other))
                yield pair if axis == 0 else (pair[0][::-1], pair[1][::-1])


def _labelled(canvas: ImageBgr, outline: Outline, taken: Places, boxes: Places, unit: int) -> BoxPx:
    """Write an outline's label above it, or where that is taken, or another object is, below it,
    beside it or inside; the place.
    """
    frame_px = canvas.shape[1], canvas.shape[0]
    x0, y0, x1, y1 = outline.box_xyxy_px
    width, height = _plate_px(outline.text, unit)
    inside = ((x0, y0 + row * height) for row in range(1, 1 + MOST_ROWS))
    beside = (x1, y0 + height), (x0 - width, y0 + height)
    corners = [(x0, y0), (x1 - width, y0), (x0, y1 + height), *beside, *inside]
    places = [plate_at(outline.text, corner, unit, frame_px) for corner in corners]

    def cost(place: int) -> float:
        covered = sum(_common(places[place], each) for each in taken)
        return covered + INSIDE * sum(_common(places[place], each) for each in boxes)

    best = min(range(len(places)), key=cost)
    _text(canvas, outline.text, corners[best], unit, outline.colour)
    return places[best]


def plate_at(text: str, corner: tuple[float, float], unit: int, frame_px: tuple[int, int]) -> BoxPx:
    """The plate of a text that stands on a corner, moved into the frame where it would leave it."""
    width, height = _plate_px(text, unit)
    x = int(np.clip(corner[0], 0, max(0, frame_px[0] - width)))
    y = int(np.clip(corner[1] - height, 0, max(0, frame_px[1] - height)))
    return x, y, x + width, y + height


def _text(
    canvas: ImageBgr, text: str, corner: tuple[float, float], unit: int, back: tuple[int, int, int]
) -> None:
    """Light or dark on a plate, whichever is read better; see ``plate_at``."""
    text = displayable(text)
    scale, thickness, pad = _letters(unit)
    (_, height), _ = cv2.getTextSize(text, FONT, scale, thickness)
    x0, y0, x1, y1 = (int(edge) for edge in plate_at(text, corner, unit, canvas.shape[1::-1]))
    cv2.rectangle(canvas, (x0, y0), (x1, y1), back, cv2.FILLED)
    cv2.putText(
        canvas,
        text,
        (x0 + pad, y0 + height + pad // 2),
        FONT,
        scale,
        ink_on(back),
        thickness,
        cv2.LINE_AA,
    )


def ink_on(back_bgr: tuple[int, int, int]) -> tuple[int, int, int]:
    """Light or dark, whichever has more contrast on a ground (WCAG 2.2, "contrast ratio")."""
    ground, light, dark = (luminance(each) + 0.05 for each in (back_bgr, LIGHT_BGR, SHADE_BGR))
    return LIGHT_BGR if light / ground >= ground / dark else SHADE_BGR


@cache
def luminance(bgr: tuple[int, int, int]) -> float:
    """The relative luminance of a colour, 0 to 1 (WCAG 2.2)."""
    shares = [value / 255 for value in bgr]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]


def _letters(unit: int) -> tuple[float, int, int]:
    """(scale, thickness, space around): on a large picture as legible, but not as loud."""
    letters = min(unit, 2) * (max(unit, 2) / 2) ** 0.75
    return 0.42 * letters, max(1, round(0.8 * letters)), 2 * unit


@lru_cache(maxsize=256)
def _plate_px(text: str, unit: int) -> tuple[int, int]:
    """(width, height) of the plate that a text is on."""
    scale, thickness, pad = _letters(unit)
    (width, height), base = cv2.getTextSize(displayable(text), FONT, scale, thickness)
    return width + 2 * pad, height + base + pad
