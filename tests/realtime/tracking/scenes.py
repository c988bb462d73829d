"""Scenes with a textured patch that moves over a textured field, and an engine's answer that knows
where the patch is.
"""

import cv2
import numpy as np

from engines.localizer import Localization

SIZE_PX = (240, 160)


def texture(height, width, seed, mean=128.0):
    """Smooth noise: something to tell motion by."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return np.clip(mean + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def scene(frames, start=(40, 50), speed=(3, 0), side=(50, 40), pan=(0, 0), second=None):
    """(images, boxes of the patch): the patch moves by ``speed`` a frame, the field by ``pan``;
    ``second``: the place of another.
    """
    field, patch = texture(400, 600, 1), texture(side[1], side[0], 2, mean=170.0)
    other = texture(side[1], side[0], 3, mean=80.0)
    images, boxes = [], []
    for number in range(frames):
        x, y = (100 + round(each * number) for each in pan)
        image = field[y : y + SIZE_PX[1], x : x + SIZE_PX[0]].copy()
        if second is not None:
            left, top = second[0] - number, second[1]
            image[top : top + side[1], left : left + side[0]] = other
        left, top = (round(s + v * number) for s, v in zip(start, speed, strict=True))
        image[top : top + side[1], left : left + side[0]] = patch
        images.append(image)
        boxes.append((float(left), float(top), float(left + side[0]), float(top + side[1])))
    return images, boxes


def answer(box, window, score=0.6):
    """What a good engine says of a window: a map that is high on the object, and its box, both as
    the window sees them.
    """
    if window is None:
        return None
    width, height = window[2] - window[0], window[3] - window[1]
    x0, x1 = (np.clip(edge - window[0], 0, width) for edge in (box[0], box[2]))
    y0, y1 = (np.clip(edge - window[1], 0, height) for edge in (box[1], box[3]))
    map_hw = np.full((16, 16), 0.1, np.float32)
    rows, columns = (
        slice(int(16 * a), max(int(np.ceil(16 * b)), int(16 * a) + 1))
        for a, b in ((y0 / height, y1 / height), (x0 / width, x1 / width))
    )
    map_hw[rows, columns] = 1.0
    return Localization((float(x0), float(y0), float(x1), float(y1)), 3, "patch", score, map_hw)


def misled(number, window):
    """What an engine says that has no idea: anything at all."""
    if window is None:
        return None
    random = np.random.default_rng(number)
    (x0, x1), (y0, y1) = (
        np.sort(random.uniform(low, high, 2))
        for low, high in ((0, window[2] - window[0]), (0, window[3] - window[1]))
    )
    return Localization(
        (x0, y0, x1, y1), 0, "nothing", 0.1, random.random((16, 16)).astype(np.float32)
    )
