"""A network, a method and a backend of a user's own: registered from outside, with nothing else
touched.
"""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import Sample, Truth
from calib.heads.fit import default_features, fit_head
from engines import EngineError, ModelError, open_localizer
from engines.backends.openvino import OpenVinoEngine
from engines.backends.registry import BACKENDS, Backend, EngineRequest, register_backend
from engines.graph import Graph
from engines.maps import METHODS, SIGNALS, Method, register_method
from engines.networks.network import Forward, Network, Weights
from engines.networks.registry import NETWORKS, load_classifier, register_network

SIDE, CHANNELS, CLASSES = 32, 8, 3


def forward(graph: Graph, x_nchw: str, weights: Weights) -> Forward:
    """Two convolutions, the global average, and one linear layer."""
    x, layers = x_nchw, {}
    for layer in ("conv1", "conv2"):
        constants = [graph.constant(weights[f"{layer}.{kind}"]) for kind in ("weight", "bias")]
        linear = graph.add("Conv", x, *constants, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        x = layers[layer] = graph.add("Relu", linear, hint=layer)
    pooled = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    last = [graph.constant(weights[f"linear.{kind}"]) for kind in ("weight", "bias")]
    return Forward(graph.add("Gemm", pooled, *last, transB=1), x, layers)


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "conv1": (CHANNELS, 3, 3, 3),
        "conv2": (CHANNELS, CHANNELS, 3, 3),
        "linear": (CLASSES, CHANNELS),
    }
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32) / 4
        weights[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return weights


TOY = Network(
    "toy",
    forward,
    random_weights,
    size_px=SIDE,
    box_layer="conv2",
    dam_layer="conv2",
    beam_layer="conv2",
    head_layers=("conv1", "conv2"),
)


@pytest.fixture
def toy():
    """The toy network, known to Sightline for the length of a test."""
    register_network(TOY)
    yield TOY
    del NETWORKS["toy"]


def squares(count: int) -> list[Sample]:
    """Pictures of a square of noise on gray, with its box."""
    rng = np.random.default_rng(4)
    samples = []
    for number in range(count):
        image = np.full((64, 64, 3), 30, np.uint8)
        x, y, width, height = (int(v) for v in rng.integers((4, 4, 16, 16), (24, 24, 32, 32)))
        image[y : y + height, x : x + width] = rng.integers(0, 256, (height, width, 3))
        truth = Truth("square", (x, y, x + width, y + height))
        samples.append(Sample(f"{number}.png", lambda image=image: image, (truth,)))
    return samples


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("method", ["sensitivity", "gestalt", "heuristic", "dam", "beam"])
def test_every_method_opens_a_registered_network(method):
    with open_localizer("toy", weights="random", method=method) as localizer:
        found = localizer.localize([squares(1)[0].read()])[0]
    assert found.box_xyxy_px is not None
    assert found.class_name in ("class 0", "class 1", "class 2")


@pytest.mark.usefixtures("toy")
def test_a_head_is_fitted_on_a_registered_network_and_read(tmp_path):
    classifier = load_classifier("toy", "random")
    spec, features = default_features(classifier, "sensitivity")
    assert {feature.layer for feature in features} == {"pixels", "conv1", "conv2"}
    fitted = fit_head(squares(40), classifier, spec, features, Console(quiet=True), "squares")
    fitted.head.save(tmp_path / "toy.safetensors")
    head = str(tmp_path / "toy.safetensors")
    with open_localizer("toy", weights="random", head=head) as localizer:
        assert localizer.box_reader == "fitted head"
        found = localizer.localize([squares(1)[0].read()])[0]
    assert found.box_xyxy_px is not None
    assert found.confidence is not None


@pytest.mark.usefixtures("toy")
def test_weights_of_a_registered_network_must_be_named():
    with pytest.raises(ModelError, match="no weights of toy are shipped or published"):
        open_localizer("toy")


@pytest.mark.usefixtures("toy")
def test_two_networks_cannot_have_one_name():
    with pytest.raises(ModelError, match="cannot be called 'vgg16'"):
        register_network(replace(TOY, name="vgg16"))


def total_activation(graph: Graph, x_nchw: str, gradient_nchw: str, layer: str) -> str:
    """A toy signal: the activations, summed over channels."""
    return graph.add("ReduceSum", x_nchw, graph.constant([1], np.int64), keepdims=0)


@pytest.fixture
def toy_method():
    """A toy method with a signal of its own."""
    register_method(Method("total", "a toy", signal="total"), total_activation)
    yield "total"
    del METHODS["total"], SIGNALS["total"]


@pytest.mark.parametrize("model", ["toy", "compact"])
def test_a_registered_method_is_reached_by_its_name(toy, toy_method, model):
    weights = "random" if model == "toy" else None
    with open_localizer(model, weights=weights, method=toy_method) as localizer:
        assert localizer.box_reader.startswith("heuristic: total at conv")
        found = localizer.localize([squares(1)[0].read()])[0]
    assert found.box_xyxy_px is not None
    assert found.map_hw.any()


def test_a_registered_method_reads_no_fitted_head(toy, toy_method):
    with pytest.raises(ModelError, match="method total reads boxes without a fitted head"):
        default_features(load_classifier("toy", "random"), toy_method)
    with pytest.raises(ModelError, match="there is a method 'beam'"):
        register_method(Method("beam", "again"))
    with pytest.raises(ModelError, match="nothing computes the signal 'shadow'"):
        register_method(Method("shadow", "a toy", signal="shadow"))


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_the_cams_are_methods_at_the_last_feature_maps(method):
    with open_localizer(method=method) as localizer:
        assert localizer.box_reader.startswith(f"heuristic: {method} at conv5_3")
    with open_localizer(method=method, layer="conv4_3", head="none") as localizer:
        assert localizer.description["spec"]["signal"] == method
        assert localizer.description["spec"]["layer"] == "conv4_3"


def test_a_registered_backend_is_reached_by_its_name(toy):
    asked = []

    def open_engine(request):
        asked.append(request)
        return OpenVinoEngine(request.graph(None), "fp32")

    register_backend(Backend("mine", "My library", open_engine, ("fp32",)))
    try:
        with open_localizer("toy", weights="random", backend="mine") as localizer:
            assert localizer.localize([squares(1)[0].read()])[0].box_xyxy_px is not None
        with pytest.raises(EngineError, match="there is a backend 'mine'"):
            register_backend(Backend("mine", "My library", open_engine, ("fp32",)))
    finally:
        del BACKENDS["mine"]
    assert asked[0].classifier.name == "toy"


def test_a_backend_says_how_many_images_a_call_pays_for():
    with open_localizer("compact", backend="openvino", head="none", batch=0) as localizer:
        assert localizer.batch == BACKENDS["openvino"].images
    request = EngineRequest(None, None, None, 0, "auto", 0, 1, lambda: None, False)
    assert Backend("one", "One", lambda asked: asked.batch, ("fp32",)).opened(request) == 1
