"""What tests of TensorRT share: a graph to build, and a GPU that is not there."""

import onnx
import pytest

from engines.build import build_graph
from engines.networks.registry import load_classifier
from tests.engines.gpu import SIZE, machine_with_gpu


@pytest.fixture(scope="session")
def model() -> onnx.ModelProto:
    """The compact network with random weights at ``SIZE`` px."""
    return build_graph(load_classifier("compact", "random", SIZE))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    return machine_with_gpu(monkeypatch)
