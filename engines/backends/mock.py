"""An engine without a network, for tests of everything around engines: the box follows the brightest part of the image."""

from collections.abc import Mapping

import numpy as np

from engines.base import Array, TensorSpec, check_feeds
from engines.build import WANTED_CLASS
from engines.preprocess import IMAGE


class MockEngine:
    """See ``engines.base.Engine``.

    The map is the mean over channels; the box is the bounding box of pixels at or over half the maximum; the class is the
    wanted one or 0; the score is the mean brightness. ``calls`` counts what it was asked.
    """

    backend: str = "mock"
    precision: str = "fp32"
    device: str = "no device"

    def __init__(self, size_px: int = 32, batch: int = 1) -> None:
        self.inputs: tuple[TensorSpec, ...] = (
            TensorSpec(IMAGE, np.dtype(np.uint8), (batch, size_px, size_px, 3)),
            TensorSpec(WANTED_CLASS, np.dtype(np.int64), (batch,)),
        )
        self.outputs: tuple[TensorSpec, ...] = (
            TensorSpec("class_index", np.dtype(np.int64), (batch,)),
            TensorSpec("score", np.dtype(np.float32), (batch,)),
            TensorSpec("map", np.dtype(np.float32), (batch, size_px, size_px)),
            TensorSpec("box_xyxy", np.dtype(np.float32), (batch, 4)),
        )
        self.metadata: Mapping[str, str] = {"class_names": '["thing", "other"]'}
        self.calls = 0

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``engines.base.Engine.infer``."""
        check_feeds(self.inputs, feeds)
        self.calls += 1
        maps = feeds[IMAGE].astype(np.float32).mean(axis=3)
        return {
            "class_index": np.maximum(feeds[WANTED_CLASS], 0),
            "score": (maps.mean(axis=(1, 2)) / 255).astype(np.float32),
            "map": maps,
            "box_xyxy": np.stack([_bright_box(image) for image in maps]),
        }

    def close(self) -> None:
        """Nothing to free."""


def _bright_box(image: Array) -> Array:
    rows, columns = np.nonzero(image >= image.max() / 2)
    height, width = image.shape
    edges = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
    return np.array(edges, np.float32)
