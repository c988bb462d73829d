"""A graph in float64, run by ONNX's own reference implementation."""

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from engines.typed_graph import to_double


def run_in_float64(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Slow: for small inputs."""
    names = [output.name for output in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(to_double(model)).run(None, feeds), strict=True))
