"""Activations and arithmetic."""

import math

import numpy as np
import pytest

from engines.graph import Graph
from tests.engines.differences import check, distinct, op
from tests.engines.gradient.by_reference import check_op, check_rule

X = distinct(2, 3, 4, 3)
POSITIVE = np.abs(X) + 0.1
SCALE = np.array([[[0.5]], [[-2.0]], [[3.0]]], np.float32)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("HardSigmoid", {}),
        ("HardSigmoid", {"alpha": 0.6, "beta": 0.1}),
        ("HardSwish", {}),
        ("Gelu", {"approximate": "tanh"}),
        ("Softplus", {}),
        ("Softsign", {}),
        ("Mish", {}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("Elu", {"alpha": 0.7}),
        ("Selu", {}),
        ("Celu", {"alpha": 1.5}),
        ("ThresholdedRelu", {"alpha": 0.4}),
        ("Abs", {}),
        ("Exp", {}),
        ("Sin", {}),
        ("Cos", {}),
        ("Neg", {}),
        ("Reciprocal", {}),
        ("Cast", {"to": 1}),
    ],
)
def test_activations(kind, attributes):
    check_op(kind, 2 * X if kind == "HardSwish" else X, **attributes)


def test_the_error_function_and_what_is_made_of_it():
    """ONNX's reference computes it in float32."""
    erf = np.vectorize(math.erf)
    check(op("Erf"), erf, X)
    check(op("Gelu"), lambda x: x * (1 + erf(x / math.sqrt(2))) / 2, X)


@pytest.mark.parametrize("kind", ["Log", "Sqrt"])
def test_of_positive_values(kind):
    check_op(kind, POSITIVE)


def test_prelu_with_a_slope_for_each_channel():
    check_op("PRelu", X, np.abs(SCALE))


@pytest.mark.parametrize("exponent", [2.0, 0.5, 3.0, 1.7])
def test_powers(exponent):
    check_op("Pow", POSITIVE, np.float32(exponent))


def test_a_power_whose_exponent_is_computed():
    check_rule(lambda graph, x: graph.add("Pow", graph.constant(SCALE**2), x), X)


@pytest.mark.parametrize("kind", ["Mul", "Div", "Add", "Sub", "Max", "Min", "Sum"])
@pytest.mark.parametrize("narrow_first", [False, True])
def test_two_tensors_of_the_image_of_which_one_is_broadcast(kind, narrow_first):
    def build(graph: Graph, x: str) -> str:
        mean = graph.add("GlobalAveragePool", graph.add("Exp", x))
        other = graph.add("Add", mean, graph.constant(0.3))
        return graph.add(kind, *((other, x) if narrow_first else (x, other)))

    check_rule(build, X)


def test_the_mean_of_two_tensors():
    def build(graph: Graph, x: str) -> str:
        return graph.add("Mean", graph.add("GlobalAveragePool", x), x)

    check(build, lambda x: (x + x.mean(axis=(2, 3), keepdims=True)) / 2, X)


def test_a_tensor_multiplied_by_itself():
    check_rule(lambda graph, x: graph.add("Mul", x, x), X)


@pytest.mark.parametrize("index", [1, 2])
def test_where_takes_from_one_side(index):
    mask = np.random.default_rng(1).random(X.shape) > 0.4

    def build(graph: Graph, x: str) -> str:
        sides = [graph.constant(SCALE), graph.constant(SCALE)]
        sides[index - 1] = x
        return graph.add("Where", graph.constant(mask, bool), *sides)

    check_rule(build, X)


def test_a_condition_that_is_computed_has_no_gradient_of_its_own():
    def build(graph: Graph, x: str) -> str:
        zero = graph.constant(0.0)
        return graph.add("Where", graph.add("Greater", x, zero), graph.add("Mul", x, x), zero)

    check_rule(build, X)


@pytest.mark.parametrize("kind", ["Max", "Min"])
def test_of_equal_values_the_first_gets_the_gradient(kind):
    def build(graph: Graph, x: str) -> str:
        return graph.add(kind, x, graph.add("Identity", x))

    check_rule(build, X)
