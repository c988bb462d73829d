"""Gradient rules beside central differences of ONNX's own reference implementation in float64."""

from collections.abc import Callable, Sequence

import numpy as np

from engines.graph import FLOAT, Graph
from tests.engines.differences import Build, check, op
from tests.engines.double import run_in_float64


def forward_of(build: Build, shape: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """What a graph computes of one input, in float64."""
    graph = Graph()
    graph.output(build(graph, graph.input("x", FLOAT, shape)), "out")
    model = graph.model()
    return lambda x: run_in_float64(model, {"x": x})["out"]


def check_rule(build: Build, x: np.ndarray) -> None:
    """Raise AssertionError where the graph's gradient differs from the differences."""
    check(build, forward_of(build, x.shape), x)


def check_op(kind: str, x: np.ndarray, *constants: object, **attributes: object) -> None:
    """The same for one operator on x and constants."""
    check_rule(op(kind, *constants, **attributes), x)
