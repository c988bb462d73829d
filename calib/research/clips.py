"""Makes clips with known boxes from photos: the object of one photo moves over another photo, and
the camera moves too.

There are few real sequences with a box in each frame, and what is fitted on them cannot be measured
on them. Clips are harder than real sequences: objects are cut out as ellipses, and backgrounds show
objects of their own that stand still.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from calib.data.datasets import Sample
from engines.localizer import ImageBgr
from realtime.frames import BoxPx

SIZE_PX = (480, 270)
FRAMES = 32
AREAS = (0.015, 0.35)
"""The range of the object's area, as a share of the frame, evenly on a logarithmic scale."""
CAMERA_PX = (0.0, 2.0, 5.0)
"""The largest motions of the camera from frame to frame."""
OBJECT_PX = (0.0, 1.0, 3.0, 8.0)
"""The largest motions of the object from frame to frame."""
STILL_CAMERA_PX = (0.0, 0.0, 1.0)
NO_OBJECT = 0.15
"""The share of the clips without an object."""
CROWD_FRAMES = 60
"""Clips with several objects are longer than others."""
CROWD_AREAS = (0.02, 0.15)
"""Their objects are smaller, so that there is room for all."""
CROWD_PX = (3.0, 5.0, 8.0)
SMALLEST_PX = 60
NOISE = 2.0
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Clip:
    """A clip with at most one object.

    Attributes:
        frames: uint8 BGR images of one size.
        boxes: the box of the object in each frame; None where there is no object.
    """

    frames: tuple[ImageBgr, ...]
    boxes: tuple[BoxPx | None, ...]


def clips(
    objects: Sequence[Sample], backgrounds: Sequence[ImageBgr], count: int, seed: int = 0
) -> Iterator[Clip]:
    """Make clips in which an object moves over a background.

    Args:
        objects: photos with one box each.
        backgrounds: photos.
        count: the number of clips.
        seed: decides everything that is random.
    """
    random = np.random.default_rng(seed)
    for number in range(count):
        background = backgrounds[int(random.integers(len(backgrounds)))]
        scene = _scene(background, CAMERA_PX[number % len(CAMERA_PX)], random)
        if random.random() < NO_OBJECT:
            yield Clip(tuple(_filmed(frame, random) for frame in scene), (None,) * FRAMES)
            continue
        cut = _cut_out(objects, random)
        speed = OBJECT_PX[(number // len(CAMERA_PX)) % len(OBJECT_PX)]
        pasted = [
            _pasted(frame, cut, placed)
            for frame, placed in zip(scene, _places(cut, speed, random), strict=True)
        ]
        yield Clip(
            tuple(_filmed(frame, random) for frame, _ in pasted), tuple(box for _, box in pasted)
        )


def stills(objects: Sequence[Sample], count: int, seed: int = 0) -> Iterator[Clip]:
    """Make clips of whole photos, with a camera that stands still or sways. Nothing moves by
    itself.

    Args:
        objects: photos with one box each.
        count: the number of clips.
        seed: decides everything that is random.
    """
    random = np.random.default_rng(seed)
    for number in range(count):
        sample = objects[int(random.integers(len(objects)))]
        photo = sample.read()
        x0, y0, x1, y1 = sample.truths[0].box_xyxy_px
        most_px = STILL_CAMERA_PX[number % len(STILL_CAMERA_PX)]
        xs = np.clip(_walk(most_px, random), -12, 12)
        ys = np.clip(_walk(most_px, random), -12, 12)
        frames = []
        boxes = []
        for x, y in zip(xs, ys, strict=True):
            place = np.array([[1.0, 0, x], [0, 1.0, y]])
            moved = cv2.warpAffine(
                photo,
                place,
                photo.shape[1::-1],
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REFLECT,
            )
            frames.append(_filmed(np.asarray(moved, np.uint8), random))
            boxes.append((x0 + float(x), y0 + float(y), x1 + float(x), y1 + float(y)))
        yield Clip(tuple(frames), tuple(boxes))


@dataclass(frozen=True)
class Crowd:
    """A clip with several objects.

    Attributes:
        frames: uint8 BGR images of one size.
        boxes: ``boxes[frame][object]``, also of objects that are hidden by others.
    """

    frames: tuple[ImageBgr, ...]
    boxes: tuple[tuple[BoxPx, ...], ...]


def crowds(
    objects: Sequence[Sample],
    backgrounds: Sequence[ImageBgr],
    count: int,
    seed: int = 0,
    several: int = 2,
) -> Iterator[Crowd]:
    """Make clips in which several objects move, each on its own path. They may hide each other.

    Args:
        objects: photos with one box each.
        backgrounds: photos.
        count: the number of clips.
        seed: decides everything that is random.
        several: the number of objects in each clip.
    """
    random = np.random.default_rng(seed)
    for number in range(count):
        background = backgrounds[int(random.integers(len(backgrounds)))]
        scene = _scene(background, CAMERA_PX[number % len(CAMERA_PX)], random, CROWD_FRAMES)
        boxes: list[list[BoxPx]] = [[] for _ in scene]
        for place in random.permutation(several):
            cut = _cut_out(objects, random)
            speed = CROWD_PX[int(random.integers(len(CROWD_PX)))]
            begins = (0.15 + 0.7 * (place + 0.25) / several, 0.15 + 0.7 * (place + 0.75) / several)
            for n, placed in enumerate(
                _places(cut, speed, random, CROWD_FRAMES, begins, CROWD_AREAS)
            ):
                scene[n], box = _pasted(scene[n], cut, placed)
                boxes[n].append(box)
        yield Crowd(
            tuple(_filmed(frame, random) for frame in scene), tuple(tuple(each) for each in boxes)
        )


def _walk(most: float, random: np.random.Generator, frames: int = FRAMES) -> NDArray[np.float64]:
    """A smooth random walk around 0, ``[frames]``, whose largest step is ``most``."""
    steps = np.convolve(np.cumsum(random.normal(size=frames + 60)), np.ones(15) / 15, "same")[
        30 : 30 + frames
    ]
    return np.asarray(
        (steps - steps.mean()) / max(float(np.abs(np.diff(steps)).max()), 1e-6) * most
    )


def _scene(
    photo: ImageBgr, most_px: float, random: np.random.Generator, frames: int = FRAMES
) -> list[ImageBgr]:
    """The frames of a photo before a camera that pans and zooms."""
    width, height = SIZE_PX
    tall, wide = photo.shape[:2]
    xs = np.clip(_walk(most_px, random, frames), -60, 60)
    ys = np.clip(_walk(most_px * 0.4, random, frames), -40, 40)
    scales = (
        1.35
        * max(width / wide, height / tall)
        * np.exp(_walk(0.004 if most_px else 0.0, random, frames))
    )
    made = []
    for x, y, scale in zip(xs, ys, scales, strict=True):
        place = np.array(
            [
                [scale, 0, (width - wide * scale) / 2 + x],
                [0, scale, (height - tall * scale) / 2 + y],
            ]
        )
        frame = cv2.warpAffine(
            photo, place, SIZE_PX, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        made.append(np.asarray(frame, np.uint8))
    return made


@dataclass(frozen=True)
class _Cut:
    """An object that is cut out of its photo.

    Attributes:
        image_bgr: ``[h, w, 3]``.
        mask: how opaque each pixel is, 0..1, ``[h, w]``.
    """

    image_bgr: ImageBgr
    mask: NDArray[np.float32]


def _cut_out(objects: Sequence[Sample], random: np.random.Generator) -> _Cut:
    """The object of a random photo, as an ellipse."""
    while True:
        sample = objects[int(random.integers(len(objects)))]
        x0, y0, x1, y1 = (max(0, round(edge)) for edge in sample.truths[0].box_xyxy_px)
        image = sample.read()[y0:y1, x0:x1]
        if min(image.shape[:2]) >= SMALLEST_PX:
            break
    mask = np.zeros(image.shape[:2], np.float32)
    middle = tuple(n // 2 for n in image.shape[1::-1])
    half = tuple(int(n * 0.49) for n in image.shape[1::-1])
    cv2.ellipse(mask, middle, half, 0, 0, 360, 1.0, -1)
    return _Cut(image, np.asarray(cv2.GaussianBlur(mask, (5, 5), 0), np.float32))


def _places(
    cut: _Cut,
    most_px: float,
    random: np.random.Generator,
    frames: int = FRAMES,
    begins: tuple[float, float] = (0.3, 0.7),
    areas: tuple[float, float] = AREAS,
) -> list[NDArray[np.float64]]:
    """An affine map for each frame, from the object's pixels to the frame's. Two thirds of the
    object stay in view.

    Args:
        cut: the object.
        most_px: its largest motion from frame to frame.
        random: draws the path.
        frames: their number.
        begins: the range of the middle of the path, as shares of the frame's width.
        areas: the range of the object's area, as a share of the frame.
    """
    width, height = SIZE_PX
    tall, wide = cut.mask.shape
    area = np.exp(random.uniform(*np.log(areas))) * width * height
    scales = np.exp(_walk(0.01, random, frames)) * min(
        np.sqrt(area / (wide * tall)), 0.95 * height / tall, 0.9 * width / wide
    )
    middle = random.uniform((begins[0], 0.3), (begins[1], 0.7))
    xs, ys = middle[:, None] * [[width], [height]] + [
        _walk(most_px, random, frames),
        _walk(most_px / 2, random, frames),
    ]
    places = []
    for x, y, scale in zip(xs, ys, scales, strict=True):
        half_w, half_h = wide * scale / 2, tall * scale / 2
        left = np.clip(x, 0.7 * half_w, width - 0.7 * half_w) - half_w
        top = np.clip(y, 0.7 * half_h, height - 0.7 * half_h) - half_h
        places.append(np.array([[scale, 0, left], [0, scale, top]]))
    return places


def _pasted(frame: ImageBgr, cut: _Cut, place: NDArray[np.float64]) -> tuple[ImageBgr, BoxPx]:
    """A frame with an object at a place, and the box of the object."""
    flags = cv2.INTER_AREA if place[0, 0] < 1 else cv2.INTER_LINEAR
    image, mask = (
        cv2.warpAffine(each, place, SIZE_PX, flags=flags) for each in (cut.image_bgr, cut.mask)
    )
    rows, columns = np.flatnonzero(mask.max(axis=1) > 0.5), np.flatnonzero(mask.max(axis=0) > 0.5)
    mixed = np.rint(frame * (1 - mask[..., None]) + image * mask[..., None]).astype(np.uint8)
    return mixed, (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _filmed(frame: ImageBgr, random: np.random.Generator) -> ImageBgr:
    """A frame with a sensor's noise, compressed as JPEG."""
    noisy = np.clip(frame + random.normal(0, NOISE, frame.shape), 0, 255).astype(np.uint8)
    encoded = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
