"""What peers compute."""

import sys

import cv2
import numpy as np
import pytest

from calib.bench.turns import PEERS, USUAL_PEERS, Task, peers, recipro_cam_graph
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import install_extra
from engines.maps import MapSpec
from engines.networks.registry import load_classifier
from tests.engines.double import run_in_float64


@pytest.fixture(scope="module")
def task():
    classifier = load_classifier("compact", "random", 64)
    image = cv2.GaussianBlur(
        np.random.default_rng(3).integers(0, 256, (64, 64, 3)).astype(np.uint8), (5, 5), 0
    )
    return Task(classifier, image[None], build_graph(classifier))


@pytest.fixture(scope="module")
def ours(task):
    """The compiled graph's fp32 outputs."""
    return OpenVinoEngine(task.graph, "fp32").infer(
        {IMAGE: task.image_nhwc_bgr, WANTED_CLASS: np.array([-1])}
    )


@pytest.mark.parametrize("name", ["torch eager forward + autograd", "Captum Saliency"])
def test_gradient_peers_return_our_map(task, ours, name):
    found = PEERS[name](task)()
    assert found.shape == (1, 64, 64)
    np.testing.assert_allclose(found, ours["map"], atol=1e-4 * ours["map"].max())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, in its compiler
def test_the_compiled_peer_returns_our_map(task, ours):
    found = PEERS["torch.compile forward + autograd"](task)()
    np.testing.assert_allclose(found, ours["map"], atol=1e-4 * ours["map"].max())


def test_grad_cam_is_ours_at_the_last_activations(task):
    """A mean over channels for their sum, stretched and scaled as the library does (it adds 1e-7 to
    the largest value).
    """
    found = PEERS["pytorch-grad-cam GradCAM"](task)()
    graph = build_graph(task.classifier, MapSpec(layer="conv5_3", signal="gradcam"))
    small = OpenVinoEngine(graph, "fp32").infer(
        {IMAGE: task.image_nhwc_bgr, WANTED_CLASS: np.array([-1])}
    )["map"][0]
    expected = cv2.resize(small - small.min(), (64, 64))
    assert found.shape == (1, 64, 64)
    assert found.max() > found.min() + 0.5
    np.testing.assert_allclose(found[0] / found.max(), expected / expected.max(), atol=1e-3)


def test_torch_peers_run_squeezenet_too(task):
    squeezenet = Task(load_classifier("squeezenet", "random", 64), task.image_nhwc_bgr, task.graph)
    assert PEERS["pytorch-grad-cam GradCAM"](squeezenet)().shape == (1, 64, 64)
    saliency, gradient = (
        PEERS[name](squeezenet)() for name in ("Captum Saliency", "torch eager forward + autograd")
    )
    np.testing.assert_allclose(saliency, gradient, rtol=1e-5)
    assert gradient.max() > 0


def test_onnx_runtime_runs_our_graph_to_the_same_outputs(task, ours):
    found = PEERS["ONNX Runtime, our graph"](task)()
    for value, spec in zip(found, task.graph.graph.output, strict=True):
        np.testing.assert_allclose(
            value, ours[spec.name], rtol=1e-3, atol=1e-4 * np.abs(ours[spec.name]).max()
        )


def test_forward_peers_return_the_same_scores(task):
    by_torch, (by_onnx,) = (
        PEERS[f"{name} forward only"](task)() for name in ("torch eager", "ONNX Runtime")
    )
    np.testing.assert_allclose(by_torch, by_onnx, rtol=1e-3, atol=1e-4 * np.abs(by_onnx).max())


def test_a_peer_that_cannot_run_is_a_row_that_says_why(task, monkeypatch):
    def broken(_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setitem(PEERS, "torch.compile forward + autograd", broken)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    found, missing = peers(task, PEERS)
    assert (
        missing["torch.compile forward + autograd"]
        == "InvalidCxxCompiler: No working C++ compiler found"
    )
    assert missing["Captum Saliency"] == f"captum is not installed: {install_extra('bench')}"
    assert set(found) | set(missing) == set(PEERS)
    assert "ONNX Runtime forward only" in found
    found, missing = peers(task, USUAL_PEERS, end_s=0.0)
    assert not found
    assert set(missing) == set(USUAL_PEERS)
    assert all("no time left" in why for why in missing.values())


def test_a_network_from_a_file_has_no_torch_peers(task, tmp_path):
    from engines.graph import FLOAT, Graph

    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, 64, 64))
    graph.output(task.classifier.append(graph, x).scores, "scores")
    (tmp_path / "net.onnx").write_bytes(graph.model().SerializeToString())
    classifier = load_classifier(str(tmp_path / "net.onnx"))
    found, missing = peers(Task(classifier, task.image_nhwc_bgr, build_graph(classifier)), PEERS)
    assert set(found) == {
        "ONNX Runtime, our graph",
        "ONNX Runtime forward only",
        "Recipro-CAM after its paper, at the last maps, OpenVINO",
    }
    assert "the torch backend runs" in missing["Captum Saliency"]


def test_recipro_cam_scores_each_cell_of_the_last_maps_alone():
    classifier = load_classifier("compact", "random", 64)
    graph, forward = classifier.forward_graph()
    graph.output(forward.last, "last")
    graph.output(forward.scores, "scores")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    preprocessing = classifier.preprocessing
    given = pixels if preprocessing.order == "bgr" else pixels[..., ::-1]
    x = ((given - np.array(preprocessing.mean)) / preprocessing.std).transpose(0, 3, 1, 2)
    plain = run_in_float64(graph.model(), {"pixels": x})
    best = plain["scores"].argmax()
    weight, bias = (classifier.weights[f"classifier.{name}"] for name in ("weight", "bias"))
    pooled = plain["last"][0, 0].size / 4  # by 2 x 2, before the mean
    expected = np.einsum("c,chw->hw", weight[best], plain["last"][0]) / pooled
    found = run_in_float64(recipro_cam_graph(classifier), {IMAGE: pixels})["map"]
    np.testing.assert_allclose(found, expected + bias[best], rtol=1e-5, atol=1e-9)
