"""How pixels become a network's input, and what a user or a file says of it.

All numbers are of pixels 0..255. Means and deviations are written in two ways: of pixels 0..1, as
timm and torchvision do, or of pixels 0..255, as Keras and Caffe do. ``numbers_of`` tells them
apart.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import InputError

Rgb = tuple[float, float, float]
ORDERS = ("rgb", "bgr")
SQUASH, CROP, LETTERBOX = "squash", "crop", "letterbox"
RESIZES = (SQUASH, CROP, LETTERBOX)
USUAL_CROP = 0.875
"""Of an image's shorter side, what networks are mostly trained and tested on: 224 of 256 pixels."""
LARGEST_NUMBER = 1e6


@dataclass(frozen=True)
class Preprocessing:
    """How pixels 0..255 become the network's input: ``(pixel - mean) / std`` per channel, in
    ``order``.

    Attributes:
        order: of the channels, ``rgb`` or ``bgr``; mean and std are in that order, too.
        mean, std: of pixels 0..255.
        resize: what is done with an image that is no square, see ``engines.resizing``.
        crop_share: of the shorter side, what ``crop`` keeps.
    """

    order: str = "rgb"
    mean: Rgb = (123.675, 116.28, 103.53)
    std: Rgb = (58.395, 57.12, 57.375)
    resize: str = SQUASH
    crop_share: float = 1.0

    def stored(self) -> dict[str, Any]:
        """All that decides the network's input, for digests and files. What is as it always was, is
        left out: digests of before stay as they are.
        """
        found: dict[str, Any] = {"order": self.order, "mean": self.mean, "std": self.std}
        if self.resize != SQUASH:
            found["resize"] = self.resize
        if self.resize == CROP:
            found["crop_share"] = self.crop_share
        return found

    @classmethod
    def of_stored(cls, found: object) -> "Preprocessing | None":
        """What ``stored`` gave, out of a file; None where it is something else."""
        if not isinstance(found, Mapping):
            return None
        try:
            mean, std = (_rgb(np.array(found[name], np.float64)) for name in ("mean", "std"))
            resize, share = str(found.get("resize", SQUASH)), float(found.get("crop_share", 1.0))
            return cls(str(found["order"]), mean, std, resize, share)
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def words(self) -> str:
        """All of it in words."""
        return f"{self.order.upper()}, {self.formula}, {self.resize_words}"

    @property
    def mean_bgr(self) -> tuple[int, int, int]:
        """The pixel that is nothing to the network."""
        mean = self.mean[::-1] if self.order == "rgb" else self.mean
        blue, green, red = (round(min(max(value, 0.0), 255.0)) for value in mean)
        return blue, green, red

    @property
    def formula(self) -> str:
        """What is done to a pixel of 0..255, such as ``(pixel - 127.5) / 127.5``."""
        if not any(self.mean):
            return "pixel as it is" if set(self.std) == {1.0} else f"pixel / {_in_words(self.std)}"
        centred = f"pixel - {_in_words(self.mean)}"
        return centred if set(self.std) == {1.0} else f"({centred}) / {_in_words(self.std)}"

    @property
    def resize_words(self) -> str:
        """What is done with an image that is no square."""
        if self.resize == CROP:
            return f"the middle square of {self.crop_share:g} of the shorter side"
        if self.resize == LETTERBOX:
            return "letterboxed: the whole image, filled up to a square with the mean"
        return "squashed to a square"

    def describe(self, size_px: int, origins: Mapping[str, str] | None = None) -> str:
        """The input in one line.

        Args:
            size_px: side of the square.
            origins: where each of ``side``, ``layout``, ``order``, ``numbers`` and ``resize`` comes
                from, and under ``layout is`` what it is.
        """
        known = dict(origins or {})
        parts = {
            "side": f"{size_px} px",
            "layout": known.get("layout is", ""),
            "order": self.order.upper(),
            "numbers": self.formula,
            "resize": self.resize_words,
        }
        return ", ".join(
            f"{what} ({known[name]})" if name in known else what
            for name, what in parts.items()
            if what
        )


IMAGENET = Preprocessing()
"""RGB by ImageNet's mean and deviation, as most networks are trained."""
CAFFE = Preprocessing("bgr", (104.0, 117.0, 123.0), (1.0, 1.0, 1.0))
"""The preprocessing of Caffe's networks: BGR less the channel means, not scaled."""
IDENTITY = Preprocessing("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""The network takes the pixels as they are, 0..255."""
UNIT = Preprocessing("rgb", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
"""The network takes pixels of 0..1."""


def _in_words(values: Rgb) -> str:
    shown = [f"{value:.6g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else f"({', '.join(shown)})"


@dataclass(frozen=True)
class GivenInput:
    """What a user says of a classifier's input and output; None where nothing.

    Attributes:
        mean, std: as typed, per channel in the network's order.
        scale: what pixels 0..255 are divided by before mean and std; None: see ``numbers_of``.
        order: see ``Preprocessing``.
        resize: see ``Preprocessing``.
        output: the output with the class scores, of several.
        labels: file of the classes' names.
    """

    mean: Rgb | None = None
    std: Rgb | None = None
    scale: float | None = None
    order: str | None = None
    resize: str | None = None
    output: str | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        for value, known, name in ((self.order, ORDERS, "order"), (self.resize, RESIZES, "resize")):
            if value is not None and value not in known:
                raise InputError(f"{name} '{value}' is none of {', '.join(known)}", option=name)

    @property
    def has_numbers(self) -> bool:
        """Whether anything is said of the values."""
        return (self.mean, self.std, self.scale) != (None, None, None)


def numbers_of(mean: Rgb | None, std: Rgb | None, scale: float | None = None) -> tuple[Rgb, Rgb]:
    """Mean and deviation of pixels 0..255.

    The network's input is ``(pixel / scale - mean) / std``. Without a scale, mean and std of at
    most 1 are of pixels 0..1, and larger ones of pixels 0..255. What is left out changes nothing.

    Raises:
        InputError: a deviation or the scale is 0, a number is none, or mean and std are of
            different pixels.
    """
    scales = None if scale is None else (scale,)
    for name, values in (("mean", mean), ("std", std), ("scale", scales)):
        if values is not None and not all(abs(value) <= LARGEST_NUMBER for value in values):
            raise InputError(f"{name} {values}: finite numbers are needed", option=name)
    if std is not None and min(std) <= 0:
        raise InputError(f"a deviation must be more than 0, not {min(std):g}", option="std")
    if scale is not None and scale <= 0:
        raise InputError(f"a scale must be more than 0, not {scale:g}", option="scale")
    if scale is None:
        scale = _scale_of(mean, std)
    elif scale < 1:
        scale = 1 / scale
    centre = np.array(mean or (0.0, 0.0, 0.0)) * scale
    width = np.array(std or (1.0, 1.0, 1.0)) * scale
    return _rgb(centre), _rgb(width)


def _scale_of(mean: Rgb | None, std: Rgb | None) -> float:
    small_mean = mean is None or max(map(abs, mean)) <= 1
    small_std = std is None or max(std) <= 1
    if mean and any(mean) and std and set(std) != {1.0} and small_mean != small_std:
        raise InputError(
            f"mean {_in_words(mean)} and std {_in_words(std)} are not of the same pixels, 0..1 or"
            " 0..255: say by what pixels are divided first (scale 255 or 1)",
            option=("mean", "std", "scale"),
        )
    return 255.0 if small_mean and small_std else 1.0


def _rgb(values: np.ndarray) -> Rgb:
    """Rounded, so that 0.485 of 0..1 is 123.675."""
    red, green, blue = (round(float(value), 6) for value in values)
    return red, green, blue


def parsed_channels(text: str) -> Rgb:
    """Three numbers, or one for all channels, with commas or spaces between them.

    Raises:
        InputError: it is something else.
    """
    parts = [part for part in re.split(r"[\s,;]+", text.strip("()[] \t")) if part]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise InputError(f"'{text}': give one number, or three with commas: 0.485,0.456,0.406")
    return values[0], values[1], values[2]


def parsed_scale(text: str) -> float:
    """A number, or ``1/255``.

    Raises:
        InputError: it is something else.
    """
    above, slash, below = text.partition("/")
    try:
        scale = float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"'{text}': give a number over 0 such as 255, or 1/255")
    return scale


def parsed_order(text: str) -> str:
    """``rgb`` or ``bgr``.

    Raises:
        InputError: it is something else.
    """
    return _one_of(text, ORDERS)


def parsed_resize(text: str) -> str:
    """``squash``, ``crop`` or ``letterbox``.

    Raises:
        InputError: it is something else.
    """
    return _one_of(text, RESIZES)


def _one_of(text: str, known: tuple[str, ...]) -> str:
    if text.lower() not in known:
        raise InputError(f"'{text}' is not known: give {', '.join(known[:-1])} or {known[-1]}")
    return text.lower()
