"""Transposed convolutions, products of two tensors, einsum."""

import numpy as np
import pytest
import torch

from engines.errors import ModelError
from engines.graph import Graph
from tests.engines.differences import check, distinct, op
from tests.engines.gradient.by_reference import check_op, check_rule

RNG = np.random.default_rng(4)


def weight(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("channels", "kernel", "attributes"),
    [
        (3, (3, 2, 2, 2), {"strides": [2, 2]}),
        (3, (3, 2, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        (4, (4, 1, 3, 2), {"group": 2, "pads": [1, 0, 1, 0]}),
    ],
)
def test_transposed_convolutions(channels, kernel, attributes):
    """Beside PyTorch in float64: ONNX's reference takes no groups."""
    kernels = weight(*kernel)
    pads = attributes.get("pads", [0, 0, 0, 0])
    given = {
        "stride": attributes.get("strides", 1),
        "padding": pads[:2],
        "output_padding": attributes.get("output_padding", 0),
        "groups": attributes.get("group", 1),
    }

    def forward(x: np.ndarray) -> np.ndarray:
        found = torch.nn.functional.conv_transpose2d(
            torch.from_numpy(x), torch.from_numpy(kernels).double(), **given
        )
        return found.numpy()

    check(op("ConvTranspose", kernels, **attributes), forward, distinct(1, channels, 4, 5))


def test_a_product_of_two_tensors_of_the_image():
    def build(graph: Graph, x: str) -> str:
        turned = graph.add("Transpose", graph.add("Exp", x), perm=[0, 1, 3, 2])
        return graph.add("MatMul", x, turned)

    check_rule(build, distinct(1, 2, 3, 4))


def test_a_product_whose_stack_is_broadcast():
    def build(graph: Graph, x: str) -> str:
        first = graph.add("ReduceMean", x, graph.constant([1], np.int64), keepdims=1)
        return graph.add("MatMul", first, x)

    check_rule(build, distinct(2, 3, 4, 4))


def test_a_constant_times_the_image():
    factor = weight(5, 3)
    check_rule(lambda graph, x: graph.add("MatMul", graph.constant(factor), x), distinct(2, 3, 4))


def test_a_product_with_a_vector_is_refused_in_words():
    with pytest.raises(ModelError, match="products with a vector"):
        check_op("MatMul", distinct(2, 3), weight(3))


def test_the_bias_of_a_gemm_may_be_of_the_image():
    factor = weight(3, 3)

    def build(graph: Graph, x: str) -> str:
        return graph.add("Gemm", x, graph.constant(factor), x, beta=0.5, alpha=2.0)

    check_rule(build, distinct(2, 3))


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bhqd,bhkd->bhqk", (1, 2, 3, 4)),
        ("bchw,cd->bdhw", (1, 2, 3, 4)),
        ("bchw,bchw->bc", (1, 2, 3, 4)),
    ],
)
def test_einsum_of_two(equation, shape):
    factor = weight(2, 5)

    def build(graph: Graph, x: str) -> str:
        other = graph.constant(factor) if ",cd" in equation else graph.add("Exp", x)
        return graph.add("Einsum", x, other, equation=equation)

    check_rule(build, distinct(*shape))


def test_einsum_that_sums_an_axis_away():
    check_op("Einsum", distinct(2, 3, 4), equation="abc->ac")


def test_einsum_with_an_ellipsis_is_refused_in_words():
    with pytest.raises(ModelError, match="is not supported"):
        check_op("Einsum", distinct(2, 3), weight(3, 4), equation="...i,ij->...j")


@pytest.mark.parametrize(
    ("kind", "kernel", "attributes"),
    [
        ("Conv", (4, 3, 3), {"pads": [1, 1]}),
        ("Conv", (3, 1, 3), {"group": 3, "strides": [2], "pads": [0, 1], "dilations": [2]}),
        ("AveragePool", None, {"kernel_shape": [4], "strides": [4]}),
        ("MaxPool", None, {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}),
    ],
)
def test_windows_along_rows(kind, kernel, attributes):
    """As ECA-ResNet's gates and NextViT's reduced keys have them."""
    constants = () if kernel is None else (weight(*kernel),)
    check_op(kind, distinct(2, 3, 12), *constants, **attributes)
