"""A small trained detector as a peer: YOLOX (Ge et al. 2021, "YOLOX: Exceeding YOLO series in
2021"), trained on COCO's 80 classes, from an ONNX file that the user has.

Sightline ships no detector and needs none. This is what its boxes and times are compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engines.backends.openvino import OpenVinoEngine
from engines.boxes import distinct
from engines.choose import open_localizer
from engines.engine import Array, Engine
from engines.errors import ModelError
from engines.files import read_file
from engines.localizer import ImageBgr
from engines.options import EngineOptions
from realtime.frames import BoxPx
from realtime.sources.demo import Demo

STRIDES_PX = (8, 16, 32)
"""Of the cells, in the order of the output's rows."""
GREY = 114
"""The colour beside a letterboxed image."""
BOX, OBJECTNESS, CLASSES = slice(0, 4), 4, slice(5, None)
"""Columns of the output: centre and size, objectness, scores of the classes."""
LEAST_SCORE = 0.01
"""Boxes with a lower score are left out, but for the best one. YOLOX measures itself so."""
MOST_BYTES = 1 << 30
PIXELS = "pixels"
NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush"""
COCO_CLASSES = tuple(name.strip() for name in NAMES.split(","))
"""The names of COCO's 80 classes, in the order of the output's columns."""
Array32 = NDArray[np.float32]


@dataclass(frozen=True)
class Box:
    """One box of the detector.

    Attributes:
        box_xyxy_px: continuous pixel edges x0, y0, x1, y1 in the image.
        class_name: one of ``COCO_CLASSES``.
        score: objectness times the score of the class.
    """

    box_xyxy_px: BoxPx
    class_name: str
    score: float


class Detector:
    """The detector, compiled as our engines are. One image a call.

    Args:
        path: of the ONNX file, with one input ``[1, 3, S, S]`` and one output ``[1, cells, 85]``.
        precision: ``fp32``, ``bf16``, or ``auto`` for the fastest that the processor computes
            natively.
        threads: processor threads; 0 for all.

    Attributes:
        name: of the file, without its ending.
        engine: takes uint8 ``[1, S, S, 3]`` in BGR, as our own do.
        size_px: S.

    Raises:
        ModelError: the file is no such detector, or cannot be read.
        EngineError: OpenVINO refuses it, or does not compute in the precision.
    """

    def __init__(self, path: Path, precision: str = "auto", threads: int = 0) -> None:
        self.name = path.stem
        self.engine = OpenVinoEngine(detector_graph(path), precision, threads)
        self.size_px = self.engine.inputs[0].shape[1]
        self._corners_px, self._strides_px = cells(self.size_px)

    def prepare(self, image_bgr: ImageBgr) -> Array:
        """The image in the upper left of a grey square, uint8 ``[1, S, S, 3]``."""
        height, width = image_bgr.shape[:2]
        scale = self._scale(width, height)
        size = max(1, int(width * scale)), max(1, int(height * scale))
        square = np.full((1, self.size_px, self.size_px, 3), GREY, np.uint8)
        square[0, : size[1], : size[0]] = cv2.resize(
            image_bgr, size, interpolation=cv2.INTER_LINEAR
        )
        return square

    def forward(self, prepared: Array) -> Array32:
        """The network's output for a prepared image, ``[cells, 85]``."""
        found = self.engine.infer({PIXELS: prepared})
        return np.asarray(next(iter(found.values()))[0], np.float32)

    def detect(
        self, image_bgr: ImageBgr, by_class: bool = False, least_score: float = LEAST_SCORE
    ) -> list[Box]:
        """The boxes of an image, best first; at least one where the image has any.

        Args:
            image_bgr: of any size.
            by_class: boxes of different classes do not suppress each other.
            least_score: see ``LEAST_SCORE``.
        """
        height, width = image_bgr.shape[:2]
        rows = self.forward(self.prepare(image_bgr))
        best = decoded(rows, self._corners_px, self._strides_px, least_score)
        boxes = best.boxes_xyxy / self._scale(width, height)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2))
        apart = best.classes[:, None] * (width + height) if by_class else 0
        return [
            Box(
                (float(boxes[i, 0]), float(boxes[i, 1]), float(boxes[i, 2]), float(boxes[i, 3])),
                COCO_CLASSES[best.classes[i]],
                float(best.scores[i]),
            )
            for i in distinct(boxes + apart, best.scores)
        ]

    def _scale(self, width_px: int, height_px: int) -> float:
        return min(self.size_px / width_px, self.size_px / height_px)


SHAPES_PX = {"16:9": (1280, 720), "4:3": (640, 480)}
"""Frames that are timed where the input takes their shape."""


def detector_calls(detector: Detector, choice: EngineOptions) -> dict[str, Callable[[], object]]:
    """What the bench times on a frame of the demo clip, by name: the detector's network alone, all
    of it from image to boxes, and ours from image to box; and our engine alone for frames of
    ``SHAPES_PX``, where their input is no square.
    """
    name = f"{detector.name} {detector.engine.precision}"
    photo = next(iter(Demo(1))).image_bgr
    prepared = detector.prepare(photo)
    localizer = open_localizer(choice, first_px=(photo.shape[1], photo.shape[0]))
    calls: dict[str, Callable[[], object]] = {
        f"{name}, forward only": lambda: detector.forward(prepared),
        f"{name}, image to boxes": lambda: detector.detect(photo),
        "Sightline, image to box": lambda: localizer.localize([photo]),
    }
    for words, size_px in SHAPES_PX.items():
        engine = open_localizer(choice, first_px=size_px).engine
        _, rows, columns, _ = engine.inputs[0].shape
        if rows != columns:
            calls[f"Sightline {engine.precision}, {rows} x {columns} for {words}"] = partial(
                engine.infer, blank_feed(engine)
            )
    return calls


def blank_feed(engine: Engine) -> dict[str, Array]:
    """Grey images and no wanted class."""
    images, wanted = engine.inputs
    return {
        images.name: np.full(images.shape, GREY, images.dtype),
        wanted.name: np.full(wanted.shape, -1, wanted.dtype),
    }


def cells(size_px: int) -> tuple[Array32, Array32]:
    """(upper left corner of each cell ``[cells, 2]``, its stride ``[cells, 1]``) in pixels."""
    corners, strides = [], []
    for stride in STRIDES_PX:
        side = size_px // stride
        rows, columns = np.mgrid[:side, :side]
        corners.append(np.stack([columns.ravel(), rows.ravel()], axis=1) * stride)
        strides.append(np.full((side * side, 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(strides).astype(np.float32)


@dataclass(frozen=True)
class Decoded:
    """Boxes in the square, in no order: ``[L, 4]``, scores ``[L]``, places of classes ``[L]``."""

    boxes_xyxy: Array32
    scores: Array32
    classes: NDArray[np.int64]


def decoded(
    rows: Array32, corners_px: Array32, strides_px: Array32, least_score: float = LEAST_SCORE
) -> Decoded:
    """The boxes of the network's output.

    Args:
        rows: ``[cells, 85]``: centre in strides from the cell's corner, logarithm of the size in
            strides, objectness, scores of 80 classes.
        corners_px: of the cells, see ``cells``.
        strides_px: of the cells.
        least_score: boxes with a lower score are left out, but for the best one.
    """
    kept = np.flatnonzero(rows[:, OBJECTNESS] >= least_score)  # no score is more than that
    if not len(kept):
        kept = np.array([int(np.argmax(rows[:, OBJECTNESS]))])
    rows, strides = rows[kept], strides_px[kept]
    classes = rows[:, CLASSES].argmax(axis=1)
    scores = rows[:, OBJECTNESS] * rows[:, CLASSES].max(axis=1)
    middles = rows[:, 0:2] * strides + corners_px[kept]
    sizes = np.exp(rows[:, 2:4]) * strides
    boxes = np.concatenate([middles - sizes / 2, middles + sizes / 2], axis=1)
    likely = scores >= min(least_score, scores.max())
    return Decoded(boxes[likely], scores[likely], classes[likely])


def detector_graph(path: Path) -> onnx.ModelProto:
    """The file's graph with an input of bytes in front, uint8 ``[1, S, S, 3]``, as ours have it.

    Raises:
        ModelError: it is no YOLOX of 80 classes, or cannot be read.
    """
    content = read_file(path, "detector", MOST_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model: its bytes cannot be parsed") from error
    graph = model.graph
    constants = {each.name for each in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    shapes = [
        tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inputs, *graph.output)
    ]
    if len(inputs) != 1 or len(shapes) != 2 or not _fits(*shapes):
        raise ModelError(
            f"{path} is no YOLOX detector of COCO's classes: it should take 1 x 3 x S x S and give"
            f" 1 x cells x {5 + len(COCO_CLASSES)}, and its inputs and outputs are"
            f" {', '.join(map(str, shapes)) or 'missing'}",
            option="detector",
        )
    name, side = inputs[0].name, shapes[0][2]
    floats, taken = f"{name}_floats", {*constants, *(n for node in graph.node for n in node.output)}
    if taken & {PIXELS, floats}:
        raise ModelError(
            f"{path} has tensors called {PIXELS} or {floats}: rename them", option="detector"
        )
    nodes = [
        helper.make_node("Cast", [PIXELS], [floats], to=TensorProto.FLOAT),
        helper.make_node("Transpose", [floats], [name], perm=[0, 3, 1, 2]),
        *graph.node,
    ]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, [1, side, side, 3]))
    return model


def _fits(image: tuple[int, ...], output: tuple[int, ...]) -> bool:
    """Whether these are the shapes of a YOLOX's input and output."""
    if len(image) != 4 or image[:2] != (1, 3) or image[2] != image[3] or image[2] % STRIDES_PX[-1]:
        return False
    count = sum((image[2] // stride) ** 2 for stride in STRIDES_PX)
    return image[2] > 0 and output == (1, count, 5 + len(COCO_CLASSES))
