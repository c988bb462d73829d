"""Makes films and clips with known boxes from photos, because there are few real sequences with a
box in each frame.

In films a camera moves over a whole photo. In clips objects of some photos move over another photo.
Clips are harder than real sequences: objects are small and cut out as ellipses, and backgrounds
show objects of their own that stand still.
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
CAMERA_PX = (0.0, 2.0, 5.0)
"""The largest motions of the camera from frame to frame."""
CROWD_FRAMES = 60
CROWD_AREAS = (0.02, 0.15)
"""The range of an object's area, as a share of the frame, evenly on a logarithmic scale."""
CROWD_PX = (3.0, 5.0, 8.0)
SMALLEST_PX = 60
NOISE = 2.0
JPEG_QUALITY = 80


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


def _walk(most: float, random: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """A smooth random walk around 0, ``[frames]``, whose largest step is ``most``."""
    steps = np.convolve(np.cumsum(random.normal(size=frames + 60)), np.ones(15) / 15, "same")[
        30 : 30 + frames
    ]
    return np.asarray(
        (steps - steps.mean()) / max(float(np.abs(np.diff(steps)).max()), 1e-6) * most
    )


def _scene(
    photo: ImageBgr, most_px: float, random: np.random.Generator, frames: int
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
    frames: int,
    begins: tuple[float, float],
    areas: tuple[float, float],
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


@dataclass(frozen=True)
class Film:
    """A film with its boxes.

    Attributes:
        name: those of one kind begin alike.
        frames: uint8 BGR images of one size.
        boxes: the box of each object that is in view in each frame, by the object's number.
    """

    name: str
    frames: tuple[ImageBgr, ...]
    boxes: tuple[dict[int, BoxPx], ...]


FILMS = ("nears", "recedes", "sways", "blurs", "hidden", "breaks", "several", "rushes")
"""The kinds of films: the object grows or shrinks to a third of its side; the camera sways; it
sways and shakes so that half of the frames are blurred; something passes before the object; another
scene without any object comes between; there are two objects or three; the camera sways and comes
nearer and goes away, all three times as fast.
"""
FILM_FRAMES = 36
FILM_ZOOM = 2.5
FILM_AREA = 0.3
"""The largest share of the frame that an object has before the camera comes nearer."""
FILM_PX = (2.0, 5.0, 9.0)
"""The largest motions of the camera from frame to frame."""
HIDDEN = 0.6
"""An object is not in view where more than this share of its box is hidden."""


def films(
    photos: Sequence[Sample], empty: Sequence[ImageBgr], kind: str, count: int, seed: int = 0
) -> Iterator[Film]:
    """Make films of one kind: a camera that moves over whole photos.

    Args:
        photos: those with one box, and for ``several`` those with two or three.
        empty: images without an object.
        kind: one of ``FILMS``.
        count: the number of films.
        seed: decides everything that is random.
    """
    random = np.random.default_rng([seed, FILMS.index(kind)])
    wanted = (2, 3) if kind == "several" else (1,)
    fit = [
        each
        for each in photos
        if len(each.truths) in wanted and not each.others and not each.ignored
    ]
    made = 0
    while made < count:
        sample = fit[int(random.integers(len(fit)))]
        image = sample.read()
        true = np.array([truth.box_xyxy_px for truth in sample.truths])
        covers = max(SIZE_PX[0] / image.shape[1], SIZE_PX[1] / image.shape[0])
        sides = covers * (true[:, 2:] - true[:, :2])
        largest = float(sides.prod(axis=1).max()) / (SIZE_PX[0] * SIZE_PX[1])
        if sides.min() < SMALLEST_PX / 2 or largest > FILM_AREA:
            continue
        most_px = FILM_PX[made % len(FILM_PX)]
        frames, boxes = _filmed_photo(image, true, kind, most_px, random)
        if kind == "hidden":
            _hide(frames, boxes, fit[int(random.integers(len(fit)))].read())
        if kind == "breaks":
            nothing = cv2.resize(empty[int(random.integers(len(empty)))], SIZE_PX)
            for n in range(FILM_FRAMES // 3, 2 * FILM_FRAMES // 3):
                frames[n], boxes[n] = np.asarray(nothing, np.uint8), {}
        shown = tuple(_filmed(frame, random) for frame in frames)
        yield Film(f"{kind} {made}", shown, tuple(boxes))
        made += 1


def _filmed_photo(
    image: ImageBgr,
    true: NDArray[np.float64],
    kind: str,
    most_px: float,
    random: np.random.Generator,
) -> tuple[list[ImageBgr], list[dict[int, BoxPx]]]:
    """The frames of a photo before a camera that keeps what is in its boxes ``[N, 4]`` in view, and
    the boxes of each frame.
    """
    size = np.array(SIZE_PX, np.float64)
    photo = np.array(image.shape[1::-1], np.float64)
    around = np.concatenate([true[:, :2].min(axis=0), true[:, 2:].max(axis=0)])
    middle, extent = (around[:2] + around[2:]) / 2, around[2:] - around[:2]
    widest = float((size / photo).max())
    closest = max(float((0.95 * size / extent).min()), widest)
    closest = min(closest, widest * FILM_ZOOM)
    steps = np.linspace(0, 1, FILM_FRAMES)
    if kind not in ("nears", "recedes"):
        steps = np.full(FILM_FRAMES, random.uniform(0, 1)) + _walk(0.02, random, FILM_FRAMES)
    if kind == "recedes":
        steps = steps[::-1]
    if kind == "rushes":
        steps = np.abs(np.linspace(-1.5, 1.5, FILM_FRAMES) % 2 - 1)
        most_px *= 3
    scales = widest * (closest / widest) ** np.clip(steps, 0, 1)
    walks = [np.clip(_walk(px, random, FILM_FRAMES), -70, 70) for px in (most_px, most_px / 2)]
    frames, boxes = list[ImageBgr](), list[dict[int, BoxPx]]()
    for n, scale in enumerate(scales):
        shake = random.normal(0, 2.0 if kind == "blurs" else 0.5, 2)
        corner = size / 2 - scale * middle + [walks[0][n], walks[1][n]] + shake
        corner = np.clip(corner, np.minimum(size - scale * photo, 0), 0)
        place = np.array([[scale, 0, corner[0]], [0, scale, corner[1]]])
        frame = cv2.warpAffine(
            image, place, SIZE_PX, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        if kind == "blurs" and n % 6 < 3:
            frame = cv2.blur(frame, (3 + 2 * int(random.integers(6)), 1 + 2 * (n % 2)))
        frames.append(np.asarray(frame, np.uint8))
        there = dict[int, BoxPx]()
        for number, edges in enumerate(true.reshape(-1, 2, 2)):
            low, high = np.clip(scale * edges + corner, 0, size)
            if np.prod(high - low) > HIDDEN / 2 * np.prod(scale * (edges[1] - edges[0])):
                there[number] = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        boxes.append(there)
    return frames, boxes


def _hide(frames: list[ImageBgr], boxes: list[dict[int, BoxPx]], photo: ImageBgr) -> None:
    """Let a part of another photo pass before what is filmed, from left to right."""
    width, height = SIZE_PX
    wide = width // 3
    strip = np.asarray(cv2.resize(photo[:, : photo.shape[1] // 3], (wide, height)), np.uint8)
    first, last = FILM_FRAMES // 4, 3 * FILM_FRAMES // 4
    for n in range(first, last):
        left = round((n - first) / (last - first) * (width + wide)) - wide
        x0, x1 = max(left, 0), min(left + wide, width)
        frames[n][:, x0:x1] = strip[:, x0 - left : x1 - left]
        boxes[n] = {
            number: box
            for number, box in boxes[n].items()
            if max(0.0, min(box[2], x1) - max(box[0], x0)) < HIDDEN * (box[2] - box[0])
        }
