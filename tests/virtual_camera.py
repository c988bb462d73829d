"""Frames whose true box is known, of any number: a virtual camera moves over a wall with a photo of
a cat.

Photo: "Chelsea" by Stefan van der Walt, CC0, as distributed with scikit-image.
"""

import math

import cv2
import numpy as np

from engines.localizer import ImageBgr
from realtime.doctor import PHOTO

CAT_XYXY_PX = (
    0.0,
    0.0,
    402.0,
    300.0,
)  # the cat in the photo, by hand: the right ear ends at 402 of 451 px
FRAME_W_PX, FRAME_H_PX = 854, 480
WALL_W_PX, WALL_H_PX = 1600, 1200
BLUR_PX = 14.0


class DemoCamera:
    """Shoots frame ``index`` of a clip of ``frames`` frames; the same index always gives the same
    frame.
    """

    def __init__(self, frames: int) -> None:
        self._frames = frames
        photo = np.asarray(cv2.imread(str(PHOTO), cv2.IMREAD_COLOR_BGR), np.uint8)
        height, width = photo.shape[:2]
        self._wall = _wall()
        self._left, self._top = (WALL_W_PX - width) // 2, (WALL_H_PX - height) // 2
        area = self._wall[self._top : self._top + height, self._left : self._left + width]
        edge = _soft_edge(height, width)[:, :, None]
        area[:] = (edge * photo + (1 - edge) * area).astype(np.uint8)

    def shoot(self, index: int) -> tuple[ImageBgr, tuple[float, float, float, float]]:
        """(frame, true box of the cat in pixels, clipped to the frame)."""
        phase = 2 * math.pi * index / max(1, self._frames)
        zoom = 1.15 + 0.45 * math.sin(2 * phase - 1.0)
        centre_x = WALL_W_PX / 2 + 170 / zoom * math.sin(3 * phase)
        centre_y = WALL_H_PX / 2 + 75 / zoom * math.sin(2 * phase + 0.7)
        shift_x, shift_y = FRAME_W_PX / 2 - zoom * centre_x, FRAME_H_PX / 2 - zoom * centre_y
        view = np.array([[zoom, 0, shift_x], [0, zoom, shift_y]])
        frame = cv2.warpAffine(
            self._wall,
            view,
            (FRAME_W_PX, FRAME_H_PX),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        x0, y0, x1, y1 = CAT_XYXY_PX
        left, right = (zoom * (self._left + x) + shift_x for x in (x0, x1))
        top, bottom = (zoom * (self._top + y) + shift_y for y in (y0, y1))
        box = (
            max(0.0, left),
            max(0.0, top),
            min(float(FRAME_W_PX), right),
            min(float(FRAME_H_PX), bottom),
        )
        return np.asarray(frame, np.uint8), box


def _wall() -> ImageBgr:
    """A plastered wall: warm grey, lit from the left, with a little grain; always the same."""
    rng = np.random.default_rng(7)
    coarse = (
        cv2.GaussianBlur(rng.standard_normal((WALL_H_PX, WALL_W_PX)).astype(np.float32), (0, 0), 3)
        * 18
    )
    light = np.linspace(18, -22, WALL_W_PX, dtype=np.float32)[None, :]
    grain = rng.standard_normal((WALL_H_PX, WALL_W_PX)).astype(np.float32) * 2
    shade = (coarse + light + grain)[:, :, None]
    return np.clip(np.array([142.0, 152.0, 160.0], np.float32) + shade, 0, 255).astype(np.uint8)


def _soft_edge(height: int, width: int) -> np.ndarray:
    """1 inside, falling to 0 over the last pixels, so that the photo has no hard frame."""
    inside = np.zeros((height, width), np.float32)
    margin = round(BLUR_PX)
    inside[margin // 2 : -margin // 2, margin // 2 : -margin // 2] = 1
    return cv2.GaussianBlur(inside, (0, 0), BLUR_PX / 3)
