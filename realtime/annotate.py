"""Draws boxes, labels and the heat map on a frame, and smooths drawn boxes. Sizes follow the
frame's size.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, TypeVar, get_args, get_type_hints

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.boxes import iou
from engines.errors import InputError
from engines.localizer import Detection, ImageBgr, Localization
from engines.options import OUTPUT, Option
from engines.text import displayable
from realtime.frames import NO_IMAGE, BoxPx, Frame, Tracked

Boxed = TypeVar("Boxed", Localization, Tracked)

LIGHT_HZ, HEAVY_HZ = 4.0, 0.15
"""Cut-off frequencies of a box at rest for the least and the greatest strength."""
BETA = 6.0
"""Hz that a box which crosses the frame in a second gains: fast boxes are followed, not dragged
behind.
"""
DERIVATIVE_HZ = 1.0  # the paper's own
STALE_S = 1.0
ANOTHER_OBJECT_IOU = 0.1


class OneEuro:
    """Low-pass filter whose cut-off rises with speed: steady at rest, prompt in motion (algorithm 1
    of the paper).

    Args:
        min_cutoff_hz: at rest; lower is steadier.
        beta: Hz gained per unit of speed; higher lags less.
    """

    def __init__(self, min_cutoff_hz: float, beta: float) -> None:
        self.min_cutoff_hz, self._beta = min_cutoff_hz, beta
        self._last_s = 0.0
        self._value = np.empty(0)
        self._speed = np.empty(0)

    def __call__(self, value: NDArray[np.float64], now_s: float) -> NDArray[np.float64]:
        """The filtered value; ``now_s`` must be later than the last."""
        if not self._value.size:
            self._last_s = now_s
            self._value = value
            self._speed = np.zeros_like(value)
            return value
        passed_s, self._last_s = now_s - self._last_s, now_s
        kept = _passed(DERIVATIVE_HZ, passed_s)
        self._speed = self._speed + kept * ((value - self._value) / passed_s - self._speed)
        share = _passed(self.min_cutoff_hz + self._beta * np.abs(self._speed), passed_s)
        self._value = self._value + share * (value - self._value)
        return self._value


class BoxSmoother:
    """Smooths the boxes of one source over time. It begins anew after a pause, a change of size, or
    a jump to another object.
    """

    def __init__(self) -> None:
        self._filter = OneEuro(0.0, BETA)
        self._size = (0, 0)
        self._last_s = -math.inf
        self._last: tuple[float, ...] = ()

    def smoothed(
        self, found: Boxed, pts_s: float, width_px: int, height_px: int, strength: float
    ) -> Boxed:
        """A copy with the box to draw.

        Args:
            found: what was found; left as it is.
            pts_s: when, in the source's time.
            width_px: of the frame.
            height_px: of the frame.
            strength: 0 (off) to 1.
        """
        box = found.box_xyxy_px
        if strength <= 0 or box is None:
            self._last = ()
            return found
        passed_s = pts_s - self._last_s
        another = (
            not self._last
            or (width_px, height_px) != self._size
            or iou(box, self._last) < ANOTHER_OBJECT_IOU
        )
        if another or not 0 < passed_s <= STALE_S:
            self._filter = OneEuro(0.0, BETA)
        self._filter.min_cutoff_hz = LIGHT_HZ * (HEAVY_HZ / LIGHT_HZ) ** min(1.0, strength)
        scale = np.array(
            [width_px, height_px, width_px, height_px], np.float64
        )  # speeds in frames a second, at any size
        x0, y0, x1, y1 = (
            float(edge) for edge in self._filter(np.asarray(box) / scale, pts_s) * scale
        )
        self._size = (width_px, height_px)
        self._last_s = pts_s
        self._last = (x0, y0, x1, y1)
        return replace(found, box_xyxy_px=(x0, y0, x1, y1))


def _passed(cutoff_hz: float | NDArray[np.float64], passed_s: float) -> NDArray[np.float64]:
    """How far the output goes towards the input (equation 6): a low pass with this cut-off, after
    this time.
    """
    turn = 2 * math.pi * np.asarray(cutoff_hz) * passed_s
    return np.asarray(turn / (turn + 1))


PREDICTED_BGR = (60, 60, 255)
TRUTH_BGR = (90, 220, 90)
TEXT_BGR = (255, 255, 255)
SHADE_BGR = (24, 24, 24)
OBJECTS_BGR = (
    PREDICTED_BGR,
    (230, 140, 30),
    (30, 180, 240),
    (190, 60, 190),
    (140, 170, 20),
    (20, 100, 230),
    (200, 90, 90),
    (90, 60, 140),
)
"""Of objects that are followed beside each other, by number; the next begin anew."""
INSET_SHARE = 0.26  # of the frame's height
SMALLEST_WITH_INSET_PX = 32
LARGE_PX = 128 * 128
FONT = cv2.FONT_HERSHEY_DUPLEX
COLOURS_BGR = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)
"""``[256, 1, 3]``: OpenCV would work this table out anew for every frame."""


@dataclass(frozen=True)
class Look:
    """How results are drawn; it may change from frame to frame. Session, page, ``stream`` and
    ``Result.draw`` take its fields from here.

    Attributes:
        box: draw outlines and labels.
        heat_map: ``inset`` in the lower right corner, ``over`` the whole frame, or ``off``.
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
        return draw(frame.image_bgr, calm, frame.truth_xyxy_px, status, heat.picture, look, objects)

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
) -> ImageBgr:
    """A copy of the frame with everything drawn on it.

    Args:
        image_bgr: the frame.
        found: its box (red), class and score, and map; further detections in a thinner line.
        truth_xyxy_px: the true box (green), where it is known.
        status: a line for the lower left corner, such as the latency.
        heat: the heat map as ``heat_picture`` makes it, if that was made before.
        look: what to draw, and how.
        objects: that are followed beside each other, drawn in place of what was found: each in its
            own colour, with number and confidence.
    """
    height, width = image_bgr.shape[:2]
    heat = heat_picture(found, height, width, look) if heat is None else heat
    if look.heat_map == "over" and heat.size:
        canvas = np.asarray(
            cv2.addWeighted(image_bgr, 1 - look.alpha, heat, look.alpha, 0), np.uint8
        )
    else:
        canvas = image_bgr.copy()
    unit = max(1, round(min(height, width) / 240))
    if look.heat_map == "inset" and heat.size:
        plate_w, plate_h = _plate_px(status, unit) if status else (0, 0)
        meets = plate_w > width - heat.shape[1] - 6 * unit
        _draw_inset(
            canvas,
            heat,
            unit,
            plate_h if meets and plate_h + heat.shape[0] + 6 * unit < height else 0,
        )
    if truth_xyxy_px is not None:
        _rectangle(canvas, truth_xyxy_px, TRUTH_BGR, unit)
    if look.box and objects:
        _draw_objects(canvas, objects, unit)
    elif look.box:
        for other in found.detections[1:]:
            _rectangle(canvas, other.box_xyxy_px, PREDICTED_BGR, unit)
            _text(
                canvas,
                label(other),
                other.box_xyxy_px[:2],
                unit,
                PREDICTED_BGR,
            )
        corner = (0.0, 0.0)
        if found.box_xyxy_px is not None:
            _rectangle(canvas, found.box_xyxy_px, PREDICTED_BGR, 2 * unit)
            corner = found.box_xyxy_px[:2]
        _text(canvas, label(found), corner, unit, PREDICTED_BGR)
    if status:
        _text(canvas, status, (0.0, float(height)), unit, SHADE_BGR)
    return canvas


def _draw_objects(canvas: ImageBgr, objects: Sequence[Tracked], unit: int) -> None:
    """Draw the first object, which is the main one, last and in a thicker line."""
    for place, each in reversed(list(enumerate(objects))):
        colour = OBJECTS_BGR[(each.track.track_id - 1) % len(OBJECTS_BGR)]
        if each.box_xyxy_px is not None:
            _rectangle(canvas, each.box_xyxy_px, colour, unit if place else 2 * unit)
            text = (
                f"{each.track.track_id} {_class_words(each.class_name, each.score)}, box"
                f" {100 * each.track.confidence:.0f} %"
            )
            _text(canvas, text, each.box_xyxy_px[:2], unit, colour)


def label(found: Localization | Detection) -> str:
    """What is written at the box: the class, its score, and how sure the box is; or that nothing is
    sure enough.
    """
    if found.confidence is None:
        return _class_words(found.class_name, found.score)
    if found.box_xyxy_px is None:
        return "no object"
    words = _class_words(found.class_name, found.score)
    return f"{words}, box {100 * found.confidence:.0f} %"


def _class_words(name: str, score: float) -> str:
    """A class and its score; a network that scores none has no number to show."""
    return f"{name} {score:.2f}" if score else name


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


def _draw_inset(canvas: ImageBgr, inset: ImageBgr, unit: int, lift_px: int) -> None:
    """In the lower right corner, so much higher where a line of text needs the room."""
    height, width = inset.shape[:2]
    margin = 3 * unit
    y, x = canvas.shape[0] - height - margin - lift_px, canvas.shape[1] - width - margin
    canvas[y : y + height, x : x + width] = inset
    cv2.rectangle(canvas, (x - 1, y - 1), (x + width, y + height), TEXT_BGR, unit)


def _rectangle(
    canvas: ImageBgr, box_xyxy_px: BoxPx, colour: tuple[int, int, int], thickness: int
) -> None:
    """An outline drawn inside the box, so that a box at the frame's edge stays visible."""
    height, width = canvas.shape[:2]
    half = thickness // 2
    x0, y0 = round(box_xyxy_px[0]) + half, round(box_xyxy_px[1]) + half
    x1, y1 = round(box_xyxy_px[2]) - 1 - half, round(box_xyxy_px[3]) - 1 - half
    first, second = (min(x0, width - 1), min(y0, height - 1)), (max(x1, 0), max(y1, 0))
    cv2.rectangle(canvas, first, second, colour, thickness)


def _text(
    canvas: ImageBgr, text: str, corner: tuple[float, float], unit: int, back: tuple[int, int, int]
) -> None:
    """White on a plate above the given corner, moved into the frame where it would leave it."""
    text = displayable(text)
    scale, thickness, pad = _letters(unit)
    (_, height), _ = cv2.getTextSize(text, FONT, scale, thickness)
    plate_w, plate_h = _plate_px(text, unit)
    x = int(np.clip(corner[0], 0, max(0, canvas.shape[1] - plate_w)))
    y = int(np.clip(corner[1] - plate_h, 0, max(0, canvas.shape[0] - plate_h)))
    cv2.rectangle(canvas, (x, y), (x + plate_w, y + plate_h), back, cv2.FILLED)
    cv2.putText(
        canvas,
        text,
        (x + pad, y + height + pad // 2),
        FONT,
        scale,
        TEXT_BGR,
        thickness,
        cv2.LINE_AA,
    )


def _letters(unit: int) -> tuple[float, int, int]:
    """(scale, thickness, space around): on a large picture as legible, but not as loud."""
    letters = min(unit, 2) * (max(unit, 2) / 2) ** 0.75
    return 0.42 * letters, max(1, round(0.8 * letters)), 2 * unit


def _plate_px(text: str, unit: int) -> tuple[int, int]:
    """(width, height) of the plate that a text is on."""
    scale, thickness, pad = _letters(unit)
    (width, height), base = cv2.getTextSize(displayable(text), FONT, scale, thickness)
    return width + 2 * pad, height + base + pad
