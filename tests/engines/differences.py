"""The checker of gradient rules: a graph of one operator beside central differences of its
definition.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from engines.backends.openvino import OpenVinoEngine
from engines.gradient import attach_gradient
from engines.graph import FLOAT, Graph
from tests import oracles

TOLERANCE = 2e-5  # float32 arithmetic on a few hundred terms

Build = Callable[[Graph, str], str]
Forward = Callable[[np.ndarray], np.ndarray]


def distinct(*shape: int) -> np.ndarray:
    """Values that are all different and none near 0, so that no kink lies within a
    finite-difference step.
    """
    count = int(np.prod(shape))
    values = (np.random.default_rng(5).permutation(count) - count / 2 + 0.25) / count * 4
    return values.reshape(shape).astype(np.float32).astype(np.float64)


def graph_gradient(
    build: Build, x: np.ndarray, cotangent: np.ndarray, relu_rule: str = "plain"
) -> np.ndarray:
    graph = Graph()
    source = graph.input("x", FLOAT, x.shape)
    y = build(graph, source)
    assert graph.shape(y) == cotangent.shape
    gradients = attach_gradient(graph, {y: graph.constant(cotangent)}, [source], relu_rule)
    graph.output(gradients[source], "dx")
    return OpenVinoEngine(graph.model(), "fp32").infer({"x": x.astype(np.float32)})["dx"]


def check(build: Build, forward: Forward, x: np.ndarray) -> None:
    """Raise AssertionError where graph and oracle differ by more than float32 rounding, relative to
    the largest value.
    """
    cotangent = (
        np.random.default_rng(9)
        .standard_normal(forward(x).shape)
        .astype(np.float32)
        .astype(np.float64)
    )
    expected = oracles.numeric_gradient(forward, x, cotangent)
    found = graph_gradient(build, x, cotangent)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def op(kind: str, *constants: Any, **attributes: Any) -> Build:
    """A graph of one node on x and constants."""
    return lambda graph, x: graph.add(
        kind, x, *(graph.constant(c, np.asarray(c).dtype) for c in constants), **attributes
    )
