"""The base of all searches: an engine that is made of several engines. It also turns maps into
regions.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

from engines.engine import Array, Engine, TensorSpec, Ticket
from engines.errors import EngineError
from engines.networks.network import Forward
from engines.networks.registry import Classifier

Mask = NDArray[np.bool_]
Boxes = NDArray[np.float64]


def bright_mask(map_hw: NDArray[np.float32], percentile: float) -> Mask:
    """Pixels at or over the ``percentile`` of the positive ones, ``[h, w]``; all False where none
    is positive.

    Of the positive ones, because a neuron sees only a part of the image: where its map is 0 for
    most pixels, so may be the percentile of all of them.
    """
    positive = map_hw[map_hw > 0]
    if not positive.size:
        return np.zeros(map_hw.shape, np.bool_)
    return np.asarray(map_hw >= np.percentile(positive, percentile))


def opened(mask: Mask, erode_px: int, dilate_px: int) -> Mask:
    """Erosion by a square of ``erode_px`` a side removes specks, dilation by one of ``dilate_px``
    joins what is near.

    Pixels outside the image neither erode nor dilate. A mask of which erosion leaves nothing is not
    eroded.
    """
    values = mask.astype(np.uint8)
    eroded = cv2.erode(values, np.ones((erode_px, erode_px), np.uint8))
    kept = eroded if eroded.any() else values
    return np.asarray(cv2.dilate(kept, np.ones((dilate_px, dilate_px), np.uint8)) > 0)


def box_of(mask: Mask) -> Boxes:
    """Bounding box of a mask as fractions of width and height, ``[4]``; the whole image where the
    mask is empty.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.array([0.0, 0.0, 1.0, 1.0])
    edges = [
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + 1) / width,
        (rows[-1] + 1) / height,
    ]
    return np.array(edges, np.float64)


def blobs(mask: Mask) -> list[Mask]:
    """The 8-connected parts of a mask, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    order = sorted(range(1, count), key=lambda label: -int(stats[label, cv2.CC_STAT_AREA]))
    return [np.asarray(labels == label) for label in order]


Compile = Callable[[onnx.ModelProto], Engine]
NOBODY = -1
DETECTION_WIDTH = 6


@dataclass(frozen=True)
class Found:
    """One object: its box in fractions of width and height, its class, its score."""

    box_xyxy: tuple[float, ...]
    class_index: int
    score: float


class CompoundEngine(Engine):
    """See ``engines.engine.Engine``; one image a call.

    Outputs: as of ``engines.build.build_graph``, and ``detections`` float32 ``[1, objects, 6]``:
        x0, y0, x1, y1 in 0..1, class
    and score of each object, best first; class -1 where there are fewer.

    Args:
        first: takes the image and the wanted class.
        others: asked by ``search``.
        map_shape: of the map that ``search`` gives, (h, w).
        objects: how many detections at most.

    Attributes:
        calls: how many engine calls were made since the engine was opened.
    """

    def __init__(
        self,
        first: Engine,
        others: Sequence[Engine],
        map_shape: tuple[int, int],
        objects: int,
        metadata: Mapping[str, str],
    ) -> None:
        super().__init__(first.slots)
        self.backend = first.backend
        self.precision = first.precision
        self.device = first.device
        self.losses = first.losses
        self.inputs = first.inputs
        self.metadata = metadata
        self.outputs = (
            TensorSpec("class_index", np.dtype(np.int64), (1,)),
            TensorSpec("score", np.dtype(np.float32), (1,)),
            TensorSpec("map", np.dtype(np.float32), (1, *map_shape)),
            TensorSpec("box_xyxy", np.dtype(np.float32), (1, 4)),
            TensorSpec("detections", np.dtype(np.float32), (1, objects, DETECTION_WIDTH)),
        )
        self.calls = 0
        self._first = first
        self._others = tuple(others)
        self._objects = objects
        self._asked: dict[int, tuple[Ticket, Mapping[str, Array]]] = {}

    @abstractmethod
    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """Find the objects of one image.

        Args:
            outputs: of the first graph.
            feeds: what it was given.

        Returns:
            (the objects, best first, at least one; the map ``[h, w]``).
        """

    def first_feeds(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """What the first graph gets of the feeds: all of them, as they are."""
        return feeds

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        """Starts the first graph."""
        self.calls += 1
        self._asked[place] = (self._first.submit(self.first_feeds(feeds)), feeds)

    def _finish(self, place: int) -> dict[str, Array]:
        """The search itself is done here."""
        ticket, feeds = self._asked.pop(place)
        outputs = self._first.collect(ticket)
        found, map_hw = self.search(outputs, feeds)
        rows = np.full((1, self._objects, DETECTION_WIDTH), 0, np.float32)
        rows[:, :, 4] = NOBODY
        for row, each in enumerate(found[: self._objects]):
            rows[0, row] = [*each.box_xyxy, each.class_index, each.score]
        return {
            "class_index": outputs["class_index"],
            "score": outputs["score"],
            "map": map_hw[None].astype(np.float32),
            "box_xyxy": np.array([found[0].box_xyxy], np.float32),
            "detections": rows,
        }

    def ask(self, engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one of the others, counted."""
        self.calls += 1
        return engine.infer(feeds)

    def _free(self) -> None:
        for engine in (self._first, *self._others):
            engine.close()


def known_layer(
    classifier: Classifier, forward: Forward, usual: str | None, wanted: str | None
) -> str:
    """The layer that is asked for, or the usual one of the network.

    Raises:
        EngineError: the network has no such layer, or none is known for it.
    """
    layer = wanted or usual
    if layer in forward.layers:
        return str(layer)
    reason = f"has no layer '{layer}'" if layer else "has no usual layer for this method: name one"
    raise EngineError(
        f"{classifier.name} {reason}; it has {', '.join(forward.layers)}", option="layer"
    )
