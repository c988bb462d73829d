"""Reductions, softmax and normalizations."""

import numpy as np
import pytest

from tests.engines.differences import distinct
from tests.engines.gradient.by_reference import check_op
from tests.processors import NORMALIZES

RNG = np.random.default_rng(7)
X = distinct(2, 4, 3, 5)


def scale(count):
    return RNG.uniform(0.5, 2, count).astype(np.float32)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[1], [2, 3], [-1, 0]])
@pytest.mark.parametrize(
    "kind",
    [
        "ReduceSum",
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSumExp",
        "ReduceProd",
    ],
)
def test_reductions(kind, axes, keepdims):
    check_op(kind, X, np.array(axes), keepdims=keepdims)


def test_a_reduction_over_everything():
    check_op("ReduceSum", X, keepdims=0)


def test_the_global_maximum():
    check_op("GlobalMaxPool", X)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax(kind, axis):
    check_op(kind, X, axis=axis)


@NORMALIZES
@pytest.mark.parametrize("axis", [-1, 2, 1])
def test_layer_normalization(axis):
    shape = X.shape[axis:]
    values = (RNG.uniform(0.5, 2, shape).astype(np.float32) for _ in range(2))
    check_op("LayerNormalization", X, *values, axis=axis, epsilon=1e-3)


@NORMALIZES
def test_instance_normalization():
    check_op("InstanceNormalization", X, scale(4), scale(4), epsilon=1e-3)


def test_the_euclidean_length():
    check_op("LpNormalization", X, axis=1, p=2)
