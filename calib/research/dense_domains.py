"""Further images that a dense head is fitted to, made of the training photos: squares as ImageNet's
photos are squeezed to, photos far away in a wide frame, and frames in which nothing is.

All is drawn from the photo's name, so that two runs make the same images.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from calib.data.datasets import Sample
from calib.data.labels import Truth
from engines.localizer import ImageBgr
from realtime.frames import BoxPx

SQUARE_PX = 227
"""Side of a squeezed photo."""
FRAMES_PX = ((320, 180), (320, 240), (240, 320))
"""(width, height) of the frames that photos are put into."""
SHRUNK = (0.5, 0.25)
"""A photo that is put into a frame has so much of the frame's width or height."""
LEAST_EMPTY_PX = 96
"""The shorter side of a crop in which nothing is."""
TRIES = 60
KINDS_OF_NOTHING = 5
DRAWN_FRAMES = 400
DARK, BLUR_PX = 0.25, 6.0
MOVED_SHARE = (0.02, 0.08)
"""A moving object is blurred along so much of the photo's width or height."""
SOFT_SHARES = (0.35, 1.0)
"""Such a photo is first shrunk to so much, as frames of videos are soft."""


def _random(sample: Sample, salt: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{salt}{sample.name}".encode()))


def squeezed(sample: Sample) -> Sample:
    """A window round the object of a photo with one object, squeezed to a square."""

    def window() -> tuple[ImageBgr, BoxPx]:
        image = sample.read()
        height, width = image.shape[:2]
        rng = _random(sample, "squeezed")
        x0, y0, x1, y1 = sample.truths[0].box_xyxy_px
        room = rng.uniform(0, 1, 4) * rng.choice([0.0, 0.4, 0.8, 1.0])
        left, top = int(x0 * (1 - room[0])), int(y0 * (1 - room[1]))
        right = max(left + 8, round(x1 + room[2] * (width - x1)))
        bottom = max(top + 8, round(y1 + room[3] * (height - y1)))
        return image[top:bottom, left:right], (left, top, right, bottom)

    def read() -> ImageBgr:
        part = window()[0]
        return np.asarray(cv2.resize(part, (SQUARE_PX, SQUARE_PX), interpolation=cv2.INTER_AREA))

    left, top, right, bottom = window()[1]
    scale = np.array([SQUARE_PX / (right - left), SQUARE_PX / (bottom - top)] * 2)

    def seen(each: Truth) -> Truth:
        box = (np.array(each.box_xyxy_px) - [left, top, left, top]) * scale
        return replace(each, box_xyxy_px=tuple(np.clip(box, 0, SQUARE_PX).tolist()))

    return Sample(
        f"{sample.name}, squeezed",
        read,
        (seen(sample.truths[0]),),
        ignored=tuple(seen(each) for each in sample.ignored),
        sequence=sample.group,
    )


def far_away(sample: Sample, background: Sample) -> Sample:
    """A photo, shrunk to a half or a quarter, in a frame of one colour or of blurred background."""
    rng = _random(sample, "far")
    width, height = FRAMES_PX[rng.integers(len(FRAMES_PX))]
    share = SHRUNK[rng.integers(len(SHRUNK))]
    place, plain = rng.uniform(0, 1, 2), bool(rng.integers(2))
    colour = rng.integers(0, 256, 3)
    image = sample.read()
    scale = share * min(width / image.shape[1], height / image.shape[0])
    inner = tuple(max(8, round(length * scale)) for length in (image.shape[1], image.shape[0]))
    x, y = int(place[0] * (width - inner[0])), int(place[1] * (height - inner[1]))

    def read() -> ImageBgr:
        frame = np.empty((height, width, 3), np.uint8)
        frame[:] = colour
        if not plain:
            wide = cv2.resize(background.read(), (width, height), interpolation=cv2.INTER_AREA)
            frame = np.asarray(cv2.GaussianBlur(wide, (0, 0), 2 * BLUR_PX), np.uint8)
        small = cv2.resize(sample.read(), inner, interpolation=cv2.INTER_AREA)
        frame[y : y + inner[1], x : x + inner[0]] = small
        return frame

    ratio = np.array([inner[0] / image.shape[1], inner[1] / image.shape[0]] * 2)

    def seen(some: Sequence[Truth]) -> tuple[Truth, ...]:
        boxes = [np.array(each.box_xyxy_px) * ratio + [x, y, x, y] for each in some]
        pairs = zip(some, boxes, strict=True)
        return tuple(Truth(each.class_name, tuple(box.tolist())) for each, box in pairs)

    return Sample(
        f"{sample.name}, far away",
        read,
        seen(sample.truths),
        ignored=seen(sample.ignored),
        sequence=sample.group,
    )


def moving(sample: Sample) -> Sample:
    """A photo that is blurred in one direction and soft, as a frame of a video is."""
    rng = _random(sample, "moving")
    soft, angle = rng.uniform(*SOFT_SHARES), rng.uniform(0, np.pi)
    share, brightness = rng.uniform(*MOVED_SHARE), rng.uniform(0.5, 1.1)

    def read() -> ImageBgr:
        image = sample.read()
        height, width = image.shape[:2]
        small = cv2.resize(image, None, fx=soft, fy=soft, interpolation=cv2.INTER_AREA)
        length = max(3, round(share * soft * max(height, width))) | 1
        middle = np.array([length // 2] * 2)
        along = np.array([np.cos(angle), np.sin(angle)]) * (length // 2)
        ends = [np.rint(middle + sign * along).astype(int).tolist() for sign in (-1, 1)]
        kernel = np.asarray(cv2.line(np.zeros((length, length)), ends[0], ends[1], (1.0,)))
        blurred = cv2.filter2D(small, -1, brightness * kernel / kernel.sum())
        return np.asarray(cv2.resize(blurred, (width, height)), np.uint8)

    return Sample(
        f"{sample.name}, moving", read, sample.truths, sample.group, ignored=sample.ignored
    )


def empty(sample: Sample) -> Sample | None:
    """A part of a photo that no labelled object touches: as it is, dark, or blurred; None where
    there is none.
    """
    rng = _random(sample, "empty")
    image = sample.read()
    height, width = image.shape[:2]
    known = (*sample.truths, *sample.ignored)
    true = np.array([each.box_xyxy_px for each in known]).reshape(-1, 4)
    best: tuple[int, int, int, int] | None = None
    for _ in range(TRIES):
        size = rng.integers(LEAST_EMPTY_PX // 2, (width + 1, height + 1))
        if min(size) < LEAST_EMPTY_PX or max(size) > 3 * min(size):
            continue
        x, y = (int(rng.integers(0, room + 1)) for room in (width - size[0], height - size[1]))
        x1, y1 = x + int(size[0]), y + int(size[1])
        apart = (true[:, 0] >= x1) | (true[:, 2] <= x) | (true[:, 1] >= y1) | (true[:, 3] <= y)
        if apart.all() and (
            best is None or size.prod() > (best[2] - best[0]) * (best[3] - best[1])
        ):
            best = (x, y, x1, y1)
    if best is None:
        return None
    x, y, x1, y1 = best
    kind = int(rng.integers(4))

    def read() -> ImageBgr:
        part = sample.read()[y:y1, x:x1]
        if kind == 1:
            return np.asarray(part * DARK, np.uint8)
        if kind == 2:
            return np.asarray(cv2.GaussianBlur(part, (0, 0), BLUR_PX), np.uint8)
        return np.ascontiguousarray(part)

    return Sample(f"{sample.name}, empty", read, (), sequence=sample.group)


def drawn_nothing(number: int) -> Sample:
    """A frame in which nothing is: one colour, a slope, noise, stripes, or coarse blots."""

    def read() -> ImageBgr:
        rng = np.random.default_rng(number)
        width, height = FRAMES_PX[rng.integers(len(FRAMES_PX))]
        one, other = rng.integers(0, 256, (2, 3)).astype(np.float32)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        along = x * rng.uniform(-1, 1) / width + y * rng.uniform(-1, 1) / height
        kind = number % KINDS_OF_NOTHING
        if kind == 0:
            share = np.zeros_like(x)
        elif kind == 1:
            share = along
        elif kind == 2:
            share = rng.normal(0.5, 0.3, x.shape)
        elif kind == 3:
            share = 0.5 + 0.5 * np.sin(along * rng.uniform(10, 200))
        else:
            cells = rng.uniform(0, 1, tuple(rng.integers(3, 20, 2)))
            share = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
        frame = one + share[..., None] * (other - one) + rng.normal(0, rng.uniform(0, 6), 1)
        frame = frame + rng.normal(0, rng.uniform(0, 5), frame.shape)
        return np.asarray(np.clip(frame, 0, 255), np.uint8)

    return Sample(f"drawn {number}", read, ())


def further(
    samples: Sequence[Sample], complete: Sequence[Sample], each: int, first_drawn: int = 0
) -> dict[str, list[Sample]]:
    """About so many images of each kind, made of some of the photos, by the name of the kind.

    Args:
        samples: photos.
        complete: those in which all objects are labelled, not the animals alone. Of each that has
            room an empty part is taken.
        each: how many of the other kinds.
        first_drawn: the number of the first drawn frame; others give other frames.
    """
    order = np.random.default_rng(1).permutation(len(samples))
    photos = [samples[place] for place in order]
    single = [photo for photo in photos if photo.single][:each]
    backgrounds = photos[::-1]
    chosen = np.random.default_rng(2).permutation(len(complete))
    nothing = (empty(complete[place]) for place in chosen)
    crops = [crop for crop in nothing if crop is not None]
    return {
        "squeezed": [squeezed(photo) for photo in single],
        "far away": [far_away(*pair) for pair in zip(photos[:each], backgrounds, strict=False)],
        "moving": [moving(photo) for photo in photos[each : 2 * each]],
        "empty": crops,
        "drawn": [drawn_nothing(first_drawn + number) for number in range(DRAWN_FRAMES)],
    }
