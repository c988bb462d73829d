"""A network of a user's own: registered from outside, with nothing else touched."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import Sample, Truth
from calib.heads.fit import default_features, fit_head
from engines import ModelError, open_localizer
from engines.graph import Graph
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
