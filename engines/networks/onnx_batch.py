"""Any number of images a call of a network that was exported for one, or for another number.

Exporters write sizes as numbers: a network of one image cuts tokens into ``[1, 197, 3, 64]``, and
joins a class token ``[1, 1, C]`` to them. For several images, a tensor holds the values of one
image after those of another along one axis, and such numbers are made larger at that axis. Where
that axis is, is followed from node to node. What would mix images is refused.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from engines.errors import ModelError
from engines.graph import Graph, attributes_of

AXES: Mapping[str, int | None] = {
    "Concat": None,
    "Gather": 0,
    "GatherElements": 0,
    "Split": 0,
    "Softmax": -1,
    "LogSoftmax": -1,
    "LayerNormalization": -1,
    "LpNormalization": -1,
    "ArgMax": 0,
    "ArgMin": 0,
    "TopK": -1,
}
"""The axis along which each of these operators reads several values, where the node names none."""
Shape = tuple[int, ...]


class Images:
    """Another number of images than a file's, while its nodes are replayed.

    Args:
        graph: that the nodes are appended to.
        image: the tensor ``[N, ...]`` that holds the images.
        shapes: of each tensor in the file, for as many images as it is for.
        usual: how many that are.
    """

    def __init__(
        self, graph: Graph, image: str, shapes: Mapping[str, Shape], usual: int = 1
    ) -> None:
        self._graph, self._shapes, self._usual = graph, shapes, usual
        self.count = graph.shape(image)[0]
        self._axes: dict[str, int] = {image: 0}

    def prepare(self, node: onnx.NodeProto, original: onnx.NodeProto) -> None:
        """Change the numbers of a node that are of the usual number of images.

        Args:
            node: as it is to be appended; changed in place.
            original: as the file has it.

        Raises:
            ModelError: the node would mix images.
        """
        known = [self._axes[name] for name in node.input if name in self._axes]
        if not known:
            return
        axis, rank = known[0], len(self._graph.shape(node.input[0]))
        stated = attributes_of(node).get("axis", AXES.get(node.op_type))
        if node.op_type in AXES and stated is not None and stated % rank == axis:
            raise self._mixed(original)
        if node.op_type == "Reshape" and node.input[0] in self._axes:
            target = self._reshaped(node.input[0], original, axis)
            node.input[1] = self._graph.constant(target, np.int64)
        if node.op_type == "Concat":
            for place, name in enumerate(node.input):
                one = name if name in self._axes else self._of_one(name, axis)
                shape = self._graph.shape(one)
                if one not in self._axes and shape[axis] == 1:
                    wanted = [*shape[:axis], self.count, *shape[axis + 1 :]]
                    size = self._graph.constant(wanted, np.int64)
                    node.input[place] = self._graph.add("Expand", one, size, hint="each_image")

    def _of_one(self, name: str, axis: int) -> str:
        """A constant that is the same for the usual number of images, for one."""
        value = self._graph.constants.get(name)
        if value is None or not 1 < value.shape[axis] == self._usual:
            return name
        first = value.take([0], axis)
        return self._graph.constant(first, value.dtype) if (value == first).all() else name

    def _reshaped(self, tensor: str, node: onnx.NodeProto, axis: int) -> list[int]:
        """The new shape of all images. What lies before the images' axis stays before it.

        Raises:
            ModelError: it does not.
        """
        after, lead = self._shapes[node.output[0]], math.prod(self._graph.shape(tensor)[:axis])
        for place in range(len(after)):
            many = self.count * after[place]
            if math.prod(after[:place]) == lead and many % self._usual == 0:
                return [*after[:place], many // self._usual, *after[place + 1 :]]
        raise self._mixed(node)

    def follow(self, node: onnx.NodeProto, original: onnx.NodeProto) -> None:
        """Note where the images are in what an appended node writes.

        Raises:
            ModelError: it is nowhere, or not known.
        """
        if not any(name in self._axes for name in node.input):
            return
        for name, theirs in zip(node.output, original.output, strict=True):
            if name and name not in self._graph.constants:
                self.add(name, self._axis(self._graph.shape(name), self._shapes[theirs], original))

    def add(self, tensor: str, axis: int) -> None:
        """Note where the images are in a tensor that is no node's of the file."""
        self._axes[tensor] = axis

    def _axis(self, shape: Shape, single: Sequence[int], node: onnx.NodeProto) -> int:
        larger = [
            i for i, pair in enumerate(zip(shape, single, strict=False)) if len(set(pair)) > 1
        ]
        if len(shape) != len(single) or len(larger) != 1:
            raise self._mixed(node)
        if shape[larger[0]] * self._usual != self.count * single[larger[0]]:
            raise self._mixed(node)
        return larger[0]

    def _mixed(self, node: onnx.NodeProto) -> ModelError:
        usual = "one image" if self._usual == 1 else f"{self._usual} images"
        return ModelError(
            f"the network takes {usual} a call: node '{node.name or node.output[0]}'"
            f" ({node.op_type}) would mix several; export it with a dynamic batch"
        )
