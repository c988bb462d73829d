"""An engine without a network, for tests of everything around engines: the box follows the
brightest part of the image.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engines.build import IMAGE, WANTED_CLASS
from engines.engine import Array, Engine, TensorSpec


class MockEngine(Engine):
    """See ``engines.engine.Engine``.

    The map is the mean over channels; the box is the bounding box of pixels at or over half the
    maximum; the class is the wanted one or 0; the score is the mean brightness. It works in a
    thread of its own, one call after the other.

    Attributes:
        calls: counts what it was asked.
    """

    backend: str = "mock"
    precision: str = "fp32"
    device: str = "no device"

    def __init__(
        self,
        size_px: int = 32,
        batch: int = 1,
        slots: int = 1,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(slots)
        rows, columns = shape or (size_px, size_px)
        self.inputs: tuple[TensorSpec, ...] = (
            TensorSpec(IMAGE, np.dtype(np.uint8), (batch, rows, columns, 3)),
            TensorSpec(WANTED_CLASS, np.dtype(np.int64), (batch,)),
        )
        self.outputs: tuple[TensorSpec, ...] = (
            TensorSpec("class_index", np.dtype(np.int64), (batch,)),
            TensorSpec("score", np.dtype(np.float32), (batch,)),
            TensorSpec("map", np.dtype(np.float32), (batch, rows, columns)),
            TensorSpec("box_xyxy", np.dtype(np.float32), (batch, 4)),
        )
        self.metadata: Mapping[str, str] = {"class_names": '["thing", "other"]'}
        self.calls = 0
        self._answers: dict[int, Future[dict[str, Array]]] = {}
        self._worker = ThreadPoolExecutor(1)

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        self.calls += 1
        self._answers[place] = self._worker.submit(self.run, feeds)

    def _finish(self, place: int) -> dict[str, Array]:
        return self._answers.pop(place).result()

    def _free(self) -> None:
        self._worker.shutdown()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The work of one call, in the engine's thread; tests make it slow or let it fail."""
        maps = feeds[IMAGE].astype(np.float32).mean(axis=3)
        return {
            "class_index": np.maximum(feeds[WANTED_CLASS], 0),
            "score": (maps.mean(axis=(1, 2)) / 255).astype(np.float32),
            "map": maps,
            "box_xyxy": np.stack([_bright_box(image) for image in maps]),
        }


def _bright_box(image: Array) -> Array:
    rows, columns = np.nonzero(image >= image.max() / 2)
    height, width = image.shape
    edges = [
        columns.min() / width,
        rows.min() / height,
        (columns.max() + 1) / width,
        (rows.max() + 1) / height,
    ]
    return np.array(edges, np.float32)
