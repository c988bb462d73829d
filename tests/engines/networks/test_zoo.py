"""Networks of timm, with random weights, exported by both exporters: their maps, classes and
gradients are their own modules'. ``python -m calib.research.networks`` makes a page of the same.

Batch normalizations get the mean square of what comes, and parameters that begin near zero are made
large enough to matter (``settle``, ``awaken``): else maps would be zero for reasons of the
initialisation.
"""

import importlib.util

import numpy as np
import pytest

from calib.research.networks import (
    ZOO,
    autograd,
    export,
    gradient_graph,
    runs,
    settle,
    try_network,
)
from engines.networks.packages import EXPORTERS, build, exported
from engines.networks.preprocessing import Preprocessing
from engines.networks.registry import load_classifier
from engines.resizing import resized
from tests.engines.double import run_in_float64

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("timm", "torchvision")),
        reason="timm and torchvision are not installed",
    ),
]
SMOOTH = (
    "timm:convnextv2_atto#64",
    "timm:mobilenetv3_small_100#64",
    "timm:vit_tiny_patch16_224#64",
)


@pytest.fixture(scope="module")
def normalised(photos):
    usual = Preprocessing()
    chosen = np.stack([resized(photo, 224)[..., ::-1] for photo in photos[:2]])
    values = (chosen - np.array(usual.mean)) / np.array(usual.std)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("network", ZOO)
def test_it_runs_as_its_own_module(network, exporter, normalised, tmp_path):
    trial = try_network(network, exporter, tmp_path, normalised)
    assert runs(trial), trial


@pytest.mark.parametrize("network", SMOOTH)
def test_the_gradient_is_autograds_in_float64(network, normalised, tmp_path):
    name, _, side = network.partition("#")
    photo = normalised[:1, :, : int(side), : int(side)].copy()
    built = build(name, "random", int(side))
    settle(built, photo)
    path = tmp_path / "network.onnx"
    export(built, "TorchScript", path)
    graph, _ = gradient_graph(load_classifier(str(path)))
    best, scores, gradient = autograd(built.module.double(), photo.astype(np.float64))
    feeds = {"pixels": photo.astype(np.float64), "wanted": np.array([best])}
    found = run_in_float64(graph.model(), feeds)
    np.testing.assert_allclose(found["scores_out"], scores, atol=1e-6 * np.abs(scores).max())
    np.testing.assert_allclose(found["gradient_0"], gradient, atol=1e-6 * np.abs(gradient).max())


def test_the_users_way_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    assert exported("timm:resnet18", "random", 64) == exported("timm:resnet18", "random", 64)
    assert load_classifier("timm:resnet18", "random", 64).class_names[0] == "tench"
