"""AlexNet in its two published forms: against PyTorch autograd on an independent module."""

import numpy as np
import pytest
import torch

from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_networks import torch_network
from engines.backends.torch_reference import TorchEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import ModelError
from engines.graph import FLOAT, Graph
from engines.maps import MapSpec
from engines.networks import alexnet
from engines.networks.preprocessing import Preprocessing
from engines.networks.registry import Classifier, load_classifier
from tests.engines.double import run_in_float64


def small(caffe: bool, size_px: int | None = None) -> Classifier:
    """The published convolutions with narrow dense layers, for speed."""
    weights = alexnet.random_weights(caffe, classes=20, hidden=32, seed=1)
    network = alexnet.ALEXNET.of_weights(alexnet.ALEXNET, weights)
    return Classifier(network, size_px or network.size_px, "d", weights)


def image_of(side):
    return np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("caffe", [True, False])
@pytest.mark.parametrize(
    "spec",
    [MapSpec(), MapSpec(objective="gestalt"), MapSpec(layer="pool2"), MapSpec(layer="conv1")],
    ids=str,
)
def test_map_class_and_score_are_autograds(caffe, spec):
    """Normalization, groups, overlapping pools and the stride of 4 are all on the way."""
    classifier = small(caffe)
    feeds = {IMAGE: image_of(classifier.size_px), WANTED_CLASS: np.array([-1])}
    found = OpenVinoEngine(build_graph(classifier, spec), "fp32").infer(feeds)
    expected = TorchEngine(classifier, spec).infer(feeds)
    assert found["class_index"] == expected["class_index"]
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4)
    assert expected["map"].max() > 0
    assert np.linalg.norm(found["map"] - expected["map"]) < 1e-3 * np.linalg.norm(expected["map"])


def test_in_float64_the_gradient_is_autograds():
    """The formula itself, torchvision's form: ONNX's reference implementation, which computes it,
    cannot be trusted with LRN.

    The rule of LRN alone is held against float64 in ``test_gradient.py``, and Caffe's form against
    autograd above.
    """
    classifier = small(False)
    image = image_of(224)
    found = run_in_float64(build_graph(classifier), {IMAGE: image, WANTED_CLASS: np.array([-1])})[
        "map"
    ]
    pixels = (
        torch.from_numpy(image[..., ::-1].copy())
        .permute(0, 3, 1, 2)
        .double()
        .contiguous()
        .requires_grad_(True)
    )
    usual = Preprocessing()
    mean, std = (
        torch.tensor(np.float32(v), dtype=torch.float64).view(1, 3, 1, 1)
        for v in (usual.mean, usual.std)
    )
    torch_network(classifier).double()((pixels - mean) / std).max().backward()
    expected = pixels.grad.abs().amax(1).numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_weights_say_which_form_it_is_under_either_naming(tmp_path):
    """Sizes and preprocessing follow; torchvision's names are understood."""
    ours = alexnet.random_weights(False, classes=5, hidden=8)
    theirs = {name: number for number, name in alexnet._TORCHVISION.items()}
    renamed = {
        f"{theirs[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in ours.items()
    }
    np.savez(tmp_path / "torchvision.npz", **renamed)
    np.savez(tmp_path / "caffe.npz", **alexnet.random_weights(True, classes=5, hidden=8))
    torchvision = load_classifier("alexnet", str(tmp_path / "torchvision.npz"))
    caffe = load_classifier("alexnet", str(tmp_path / "caffe.npz"))
    assert (torchvision.size_px, torchvision.preprocessing.order) == (224, "rgb")
    assert (caffe.size_px, caffe.preprocessing.order) == (227, "bgr")
    assert set(torchvision.weights) == set(caffe.weights)
    graph = Graph()
    forward = caffe.append(graph, graph.input("x", FLOAT, (1, 3, 227, 227)))
    shapes = {name: graph.shape(tensor)[1:] for name, tensor in forward.layers.items()}
    assert shapes["conv1"] == (96, 55, 55)
    assert shapes["norm2"] == (256, 27, 27)
    assert shapes["conv5"] == (256, 13, 13)
    assert shapes["pool5"] == (256, 6, 6)


def test_torchvisions_form_averages_other_sizes_to_six_cells():
    classifier = small(False, 320)
    feeds = {IMAGE: image_of(320), WANTED_CLASS: np.array([-1])}
    found, expected = (
        OpenVinoEngine(build_graph(classifier), "fp32").infer(feeds),
        TorchEngine(classifier).infer(feeds),
    )
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4)
    assert np.linalg.norm(found["map"] - expected["map"]) < 1e-3 * np.linalg.norm(expected["map"])


def test_what_does_not_fit_says_so():
    with pytest.raises(ModelError, match="use 227 px"):
        build_graph(small(True, 320))
    weights = alexnet.random_weights(True, classes=5, hidden=8)
    del weights["fc7.bias"]
    graph = Graph()
    with pytest.raises(ModelError, match="'fc7' is missing"):
        alexnet.forward(graph, graph.input("x", FLOAT, (1, 3, 227, 227)), weights)
