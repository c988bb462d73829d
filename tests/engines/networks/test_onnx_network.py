"""Stages of exported networks: where they are, and that maps there are autograd's."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.errors import ModelError
from engines.gradient import attach_gradient
from engines.maps import MapSpec
from engines.networks.registry import load_classifier
from engines.objectives import class_score_cotangent
from tests.engines.double import run_in_float64
from tests.processors import NORMALIZES

SIDE = 32


class Residual(nn.Module):
    """A residual network with squeeze-and-excite, as MobileNetV3 and EfficientNet have it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU())
        self.first, self.first_gate = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.down, self.second = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        inner = torch.relu(self.first(x))
        gate = torch.sigmoid(self.first_gate(inner.mean((2, 3), keepdim=True)))
        self.first_map = x + inner * gate
        x = self.down(self.first_map)
        self.map = torch.relu(x + self.second(nn.functional.hardswish(x))) ** 2
        return self.fc(self.map.mean((2, 3)))


class ChannelsLast(nn.Module):
    """Blocks of linear layers over the last axis, as Swin's and ConvNeXt's."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)
        self.merge, self.fc = nn.Linear(48, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        self.first_map = x
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = self.merge(torch.cat(parts, dim=-1))
        self.map = x * torch.sigmoid(x)
        return self.fc(self.map.mean((1, 2)))


class Transformer(nn.Module):
    """A vision transformer, read off a class token."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token, self.place = (
            nn.Parameter(torch.randn(1, 1, 16)),
            nn.Parameter(torch.randn(1, 17, 16)),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            self.tokens = x
            q, k, v = qkv(norm(x)).reshape(1, 17, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            attention = (q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1)
            x = x + out((attention @ v).transpose(1, 2).reshape(1, 17, 16))
        return self.fc(x[:, 0])


class GlobalResponse(nn.Module):
    """Large depthwise windows, a response normalized over the whole map and a learned scale of the
    block, as ConvNeXt V1 and V2 have them.
    """

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.deep = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.weight, self.scale = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(8, 1, 1))
        self.down_norm, self.down = nn.GroupNorm(1, 8), nn.Conv2d(8, 12, 2, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.patches(x)
        inner = nn.functional.gelu(self.wide(self.norm(self.deep(x).permute(0, 2, 3, 1))))
        length = inner.norm(p=2, dim=(1, 2), keepdim=True)
        inner = inner + self.weight * inner * length / (length.mean(-1, keepdim=True) + 1e-6)
        x = x + self.scale * self.narrow(inner).permute(0, 3, 1, 2)
        self.first_map = self.down_norm(x)
        self.map = self.down(self.first_map)
        return self.fc(nn.functional.layer_norm(self.map.mean((2, 3)), (12,)))


class Padded(nn.Module):
    """TensorFlow's padding before depthwise convolutions, and gates of hard sigmoids, as
    MobileNetV3 and EfficientNet of TensorFlow have them.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.deep, self.point = nn.Conv2d(8, 8, 5, 2, groups=8), nn.Conv2d(8, 12, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem_norm(self.stem(nn.functional.pad(x, (0, 1, 0, 1))))
        self.first_map = nn.functional.hardswish(x)
        x = self.point(self.deep(nn.functional.pad(self.first_map, (1, 2, 1, 2))))
        gate = self.excite(nn.functional.relu6(self.squeeze(x.mean((2, 3), keepdim=True))))
        self.map = x * nn.functional.hardsigmoid(gate)
        return self.fc(self.map.mean((2, 3)))


class Standardized(nn.Module):
    """Convolutions whose weights are standardised when it runs, as the NFNets'."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.gain, self.fc = nn.Parameter(torch.full((12, 1, 1, 1), 0.4)), nn.Linear(12, 5)

    def forward(self, x):
        self.first_map = nn.functional.silu(self.stem(x))
        flat = self.conv.weight.reshape(1, 12, -1)
        gain = self.gain.view(-1) * 0.2
        weight = nn.functional.batch_norm(flat, None, None, weight=gain, training=True, eps=1e-6)
        weight = weight.reshape_as(self.conv.weight)
        self.map = nn.functional.conv2d(self.first_map, weight, self.conv.bias, 2, 1)
        return self.fc(nn.functional.gelu(self.map).mean((2, 3)))


KINDS = (Residual, ChannelsLast, Transformer, GlobalResponse, Padded, Standardized)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    found = {}
    for kind in KINDS:
        torch.manual_seed(3)
        module = kind().eval()
        path = folder / f"{kind.__name__}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, torch.zeros(1, 3, SIDE, SIDE), path, dynamo=False, opset_version=17
            )
        found[kind.__name__] = module, str(path)
    return found


PIXELS = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE))


def gradient_by_graph(path, layer, class_index=2):
    """Of a class score by the layer's map, in float64; and the scores."""
    graph, forward = load_classifier(path).forward_graph()
    wanted = graph.constant([class_index], np.int64)
    tensor = forward.layers[layer]
    cotangents = class_score_cotangent(graph, forward.scores, wanted)
    graph.output(attach_gradient(graph, cotangents, [tensor])[tensor], "found")
    graph.output(forward.scores, "scores_out")
    outputs = run_in_float64(graph.model(), {"pixels": PIXELS})
    return outputs["found"], outputs["scores_out"]


def gradient_by_torch(module, kept, class_index=2):
    module = module.double()
    scores = module(torch.from_numpy(PIXELS))
    tensor = getattr(module, kept)
    gradient = torch.autograd.grad(scores[0, class_index], tensor)[0]
    return gradient.numpy(), scores.detach().numpy()


def sides(path):
    classifier = load_classifier(path)
    graph, forward = classifier.forward_graph()
    return [graph.shape(forward.layers[name])[1:] for name in classifier.network.head_layers]


def test_stages_are_the_last_maps_that_nothing_goes_past(exported):
    assert sides(exported["Residual"][1]) == [(8, 16, 16), (12, 8, 8)]
    assert sides(exported["ChannelsLast"][1]) == [(12, 8, 8), (16, 4, 4)]
    assert set(sides(exported["Transformer"][1])) == {(16, 4, 4)}


@pytest.mark.parametrize(
    ("name", "stage", "kept", "turned"),
    [
        ("Residual", 0, "first_map", lambda g: g),
        ("Residual", -1, "map", lambda g: g),
        ("ChannelsLast", 0, "first_map", lambda g: g.transpose(0, 3, 1, 2)),
        ("ChannelsLast", -1, "map", lambda g: g.transpose(0, 3, 1, 2)),
        (
            "Transformer",
            -1,
            "tokens",
            lambda g: g[:, 1:].transpose(0, 2, 1).reshape(1, 16, 4, 4),
        ),
        ("GlobalResponse", 0, "first_map", lambda g: g),
        ("GlobalResponse", -1, "map", lambda g: g),
        ("Padded", 0, "first_map", lambda g: g),
        ("Padded", -1, "map", lambda g: g),
        ("Standardized", 0, "first_map", lambda g: g),
    ],
)
def test_the_gradient_at_a_stage_is_autograds(exported, name, stage, kept, turned):
    module, path = exported[name]
    found, scores = gradient_by_graph(path, load_classifier(path).network.head_layers[stage])
    expected, their_scores = gradient_by_torch(module, kept)
    module.float()
    np.testing.assert_allclose(scores, their_scores, rtol=1e-6)
    np.testing.assert_allclose(found, turned(expected), atol=1e-6 * np.abs(expected).max())
    assert np.abs(found).max() > 0


@NORMALIZES
@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS])
def test_every_signal_at_every_stage_is_computed(exported, name):
    classifier = load_classifier(exported[name][1])
    image = np.random.default_rng(1).integers(0, 255, (1, SIDE, SIDE, 3), np.uint8)
    for layer in ("pixels", *classifier.network.head_layers):
        for signal in (
            ("gradient",) if layer == "pixels" else ("gradient", "activation", "layercam")
        ):
            spec = MapSpec("class", layer=layer, signal=signal)
            engine = OpenVinoEngine(build_graph(classifier, spec), "fp32")
            found = engine.infer({"image_nhwc_bgr": image, "wanted_class": np.array([-1])})
            assert np.isfinite(found["map"]).all()
            assert found["map"].max() > 0 or signal == "layercam"
            engine.close()


def test_the_class_is_onnx_runtimes(exported):
    for _, path in exported.values():
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        theirs = session.run(None, {session.get_inputs()[0].name: PIXELS.astype(np.float32)})[0]
        _, scores = gradient_by_graph(path, load_classifier(path).network.last_layer)
        np.testing.assert_allclose(scores, theirs, atol=1e-4)


def test_a_padded_map_is_no_stage_of_its_own(tmp_path):
    """TensorFlow's SAME pads unevenly, by a node that goes into the convolution behind it."""
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(8, 12, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    path = tmp_path / "same.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), torch.zeros(1, 3, SIDE, SIDE), path, dynamo=False)
    assert sides(str(path)) == [(8, SIDE // 2, SIDE // 2), (12, SIDE // 4, SIDE // 4)]
    for layer in load_classifier(str(path)).network.head_layers:
        found, _ = gradient_by_graph(str(path), layer)
        assert np.abs(found).max() > 0


def test_a_network_without_a_map_is_refused_in_words(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4), nn.ReLU(), nn.Linear(4, 5))
    path = tmp_path / "flat.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, torch.zeros(1, 3, SIDE, SIDE), path, dynamo=False)
    with pytest.raises(ModelError, match="the network has no map"):
        load_classifier(str(path))
