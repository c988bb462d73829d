"""Scenes with a textured patch that moves over a textured field, and an engine's answer that knows
where the patch is.
"""

import cv2
import numpy as np

from engines.localizer import Detection, Localization

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


def answer(box, confidence=0.9):
    """What a good engine of one box says: a map that is high on the object, and its box; nothing
    where it is not in the frame.
    """
    (found,) = detections([box], [confidence]).detections or (None,)
    map_hw = np.full((16, 16), 0.1, np.float32)
    if found is None:
        return Localization(None, 3, "patch", 0.1, map_hw)
    return Localization(found.box_xyxy_px, 3, "patch", 0.6, map_hw, (), confidence)


def detections(boxes, confidences):
    """Several boxes, as far as the frame shows them; the surest first."""
    found = []
    for box, confidence in zip(boxes, confidences, strict=True):
        edges = [float(np.clip(edge, 0, SIZE_PX[place % 2])) for place, edge in enumerate(box)]
        if edges[0] < edges[2] and edges[1] < edges[3]:
            found.append(Detection(tuple(edges), 3, "patch", 0.6, confidence))
    found.sort(key=lambda each: -each.confidence)
    map_hw = np.full((16, 16), 0.1, np.float32)
    if not found:
        return Localization(None, 3, "patch", 0.1, map_hw)
    return Localization(
        found[0].box_xyxy_px, 3, "patch", 0.6, map_hw, tuple(found), found[0].confidence
    )
