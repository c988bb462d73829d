"""Boxes in windows: from the one to the other, at its edge, from frame to frame."""

from engines.boxes import overlap
from realtime.frames import BoxPx

EDGE = 0.02
"""Of a window's sides: a box that comes so near to its edge may go on beyond it, and the next window is a larger one."""
CALM, CALM_LATER, CALM_FRAMES, CALM_IOU, ANOTHER_IOU = 0.3, 0.12, 4, 0.9, 0.35
"""The calm box, carried along, goes a third of the way to a new one that is much the same (IoU), all of it to another. The
longer it was there, the less far: after N frames CALM_FRAMES / N of the way, at least CALM_LATER."""


def touches(box_px: BoxPx, window_px: BoxPx, size_px: tuple[int, int]) -> bool:
    """Whether a box reaches an edge of its window beyond which the frame goes on."""
    for low, high, first, last, size in zip(box_px[:2], box_px[2:], window_px[:2], window_px[2:], size_px, strict=True):
        near = EDGE * (last - first)
        if (first > 0 and low < first + near) or (last < size and high > last - near):
            return True
    return False


def moved(box_px: BoxPx, window_px: BoxPx) -> BoxPx:
    """A box in the frame's pixels, from one in the window's: shifted by the window's corner."""
    x, y = window_px[:2]
    return box_px[0] + x, box_px[1] + y, box_px[2] + x, box_px[3] + y


def calmed(raw_px: BoxPx, expected_px: BoxPx | None, frames: int) -> BoxPx:
    """Between where the box should be and where it was found; a box that is elsewhere altogether is taken as it is.

    Args:
        raw_px: where it was found.
        expected_px: the last one, carried along; None without one.
        frames: since the scene began.
    """
    if expected_px is None:
        return raw_px
    alike = (overlap(raw_px, expected_px) - ANOTHER_IOU) / (CALM_IOU - ANOTHER_IOU)
    least = min(CALM, max(CALM_LATER, CALM_FRAMES / max(frames, 1)))
    share = 1 - (1 - least) * min(max(alike, 0.0), 1.0)
    x0, y0, x1, y1 = (then + share * (now - then) for then, now in zip(expected_px, raw_px, strict=True))
    return x0, y0, x1, y1


def widened(box_px: BoxPx, margin: float) -> BoxPx:
    """A box with a margin, a share of its sides."""
    x, y = (margin * (high - low) for low, high in zip(box_px[:2], box_px[2:], strict=True))
    return box_px[0] - x, box_px[1] - y, box_px[2] + x, box_px[3] + y
