"""Slices, parts, padding, repetition and resizing."""

import numpy as np
import pytest

from engines.graph import Graph
from tests.engines.differences import check, distinct, op
from tests.engines.gradient.by_reference import check_op, check_rule

X = distinct(2, 4, 6, 5)


@pytest.mark.parametrize(
    ("indices", "axis"),
    [
        (np.array(0), 1),
        (np.array(-1), 2),
        (np.array([1, 2, 3]), 2),
        (np.array([3, 1, 0]), 1),
        (np.array([5, 4, 3, 2, 1, 0]), 2),
        (np.array([0, 0, 2]), 3),
        (np.array([[0, 1], [1, 3]]), 1),
        (np.array([1]), 0),
    ],
)
def test_gather(indices, axis):
    check_op("Gather", X, indices, axis=axis)


@pytest.mark.parametrize(
    "given",
    [
        ([1], [3], [2]),
        ([0, 1], [4, -1], [2, 3]),
        ([-1], [-99], [2], [-1]),
        ([1], [99], [2], [2]),
        ([4, 0], [0, 5], [2, 3], [-2, 3]),
        ([0, 1], [2, 3]),
    ],
)
def test_slice(given):
    check_op("Slice", X, *(np.array(values) for values in given))


@pytest.mark.parametrize("kept", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_split_of_which_some_parts_are_used(kept):
    def build(graph: Graph, x: str) -> str:
        import onnx

        names = [graph.fresh(f"part{i}") for i in range(3)]
        sizes = graph.constant([1, 2, 1], np.int64)
        graph.append(onnx.helper.make_node("Split", [x, sizes], names, axis=1))
        return graph.add("Concat", *(graph.add("Exp", names[i]) for i in kept), axis=1)

    check_rule(build, X)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [[0, 0, 1, 2, 0, 0, 2, 0], [0, 0, 0, 1, 0, 0, 0, 1]])
def test_pad(mode, pads):
    check_op("Pad", X, np.array(pads), mode=mode)


def test_pad_that_cuts_off():
    def forward(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))[:, :, 1:, :-2]

    check(op("Pad", np.array([0, 0, -1, 1, 0, 0, 0, -2])), forward, X)


def test_pad_of_named_axes():
    def build(graph: Graph, x: str) -> str:
        pads, axes = graph.constant([1, 2], np.int64), graph.constant([-1], np.int64)
        return graph.add("Pad", x, pads, "", axes)

    check_rule(build, X)


def test_expand_and_tile():
    check_op("Expand", distinct(2, 1, 3), np.array([2, 2, 4, 3]))
    check_op("Tile", X, np.array([1, 3, 2, 1]))


@pytest.mark.parametrize(
    ("sizes", "attributes"),
    [
        (
            (12, 10),
            {
                "mode": "nearest",
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            },
        ),
        ((9, 7), {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
        ((3, 5), {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
        ((7, 8), {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}),
    ],
)
def test_resize_to_sizes(sizes, attributes):
    def build(graph: Graph, x: str) -> str:
        wanted = graph.constant([*X.shape[:2], *sizes], np.int64)
        return graph.add("Resize", x, "", "", wanted, **attributes)

    check_rule(build, X)


def test_resize_by_scales():
    def build(graph: Graph, x: str) -> str:
        scales = graph.constant([1, 1, 2, 2])
        return graph.add("Resize", x, "", scales, mode="nearest", nearest_mode="floor")

    check_rule(build, X)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode):
    check_op("DepthToSpace", distinct(1, 8, 2, 3), blocksize=2, mode=mode)


def test_space_to_depth():
    check_op("SpaceToDepth", distinct(1, 2, 4, 6), blocksize=2)


@pytest.mark.parametrize("upper", [0, 1])
def test_a_triangle(upper):
    check_op("Trilu", distinct(2, 4, 4), upper=upper)
