"""VGG16, configuration D (Simonyan & Zisserman 2015, table 1), at any number of channels per block.

Weights carry torchvision's names (``features.0.weight`` ... ``classifier.6.bias``). A network that
ends in one linear layer over the global average, as the compact one does, has ``classifier.weight``
and ``classifier.bias`` instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from engines.downloads import Download
from engines.errors import ModelError
from engines.graph import Graph
from engines.networks.network import Forward, Network, Weights

CONVOLUTIONS_PER_BLOCK = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)
COMPACT_CHANNELS = (16, 32, 64, 128, 256)
GRID = 7
LAST = "conv5_3"
_TIMM = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}


def renamed(weights: Weights) -> dict[str, np.ndarray]:
    """Weights under torchvision's names, from torchvision's naming or timm's.

    timm keeps the fully connected layers as convolutions; the order of values is the same.
    """
    result = {}
    for name, value in weights.items():
        prefix, _, kind = name.rpartition(".")
        if prefix in _TIMM:
            flat = value.reshape(len(value), -1) if value.ndim == 4 else value
            result[f"{_TIMM[prefix]}.{kind}"] = flat
        else:
            result[name] = value
    return result


def convolution_names() -> list[list[tuple[str, str]]]:
    """Per block, (layer name, weight prefix) of each convolution: ``("conv1_1", "features.0")``
    ...
    """
    blocks, index = [], 0
    for block, repeats in enumerate(CONVOLUTIONS_PER_BLOCK, start=1):
        blocks.append(
            [(f"conv{block}_{i + 1}", f"features.{index + 2 * i}") for i in range(repeats)]
        )
        index += 2 * repeats + 1
    return blocks


def forward(graph: Graph, x_nchw: str, weights: Weights) -> Forward:
    """Append VGG16's forward graph.

    Args:
        graph: appended to.
        x_nchw: normalised image, ``[N, 3, S, S]`` with S a multiple of 32.
        weights: float32 arrays by torchvision name.

    Raises:
        ModelError: a weight is missing or has the wrong shape, or the size does not divide by 32.
    """
    size = graph.shape(x_nchw)[2]
    if size % 32 or size < 32:
        raise ModelError(f"VGG16 halves the image five times: size {size} is not a multiple of 32")
    layers: dict[str, str] = {}
    x, width = x_nchw, 3
    for block, names in enumerate(convolution_names(), start=1):
        for layer, prefix in names:
            weight, bias = _pair(weights, prefix, (None, width, 3, 3))
            inputs = (
                x,
                graph.constant(weight, hint=f"{prefix}.weight"),
                graph.constant(bias, hint=f"{prefix}.bias"),
            )
            conv = graph.add(
                "Conv", *inputs, hint=f"{layer}_linear", kernel_shape=[3, 3], pads=[1, 1, 1, 1]
            )
            x = layers[layer] = graph.add("Relu", conv, hint=layer)
            width = weight.shape[0]
        x = layers[f"pool{block}"] = graph.add(
            "MaxPool", x, hint=f"pool{block}", kernel_shape=[2, 2], strides=[2, 2]
        )
    if "classifier.weight" in weights:
        scores = _linear(graph, _pooled(graph, x), weights, "classifier", width)
    else:
        scores = _fully_connected(graph, x, weights)
    return Forward(scores, layers[LAST], layers)


def _pooled(graph: Graph, x: str) -> str:
    return graph.add("Flatten", graph.add("GlobalAveragePool", x, hint="average"), hint="pooled")


def _fully_connected(graph: Graph, x: str, weights: Weights) -> str:
    """The three fully connected layers; torchvision's adaptive average pool to 7x7 is folded into
    the first.
    """
    _, channels, height, width = graph.shape(x)
    first, bias = _pair(weights, "classifier.0", (None, channels * GRID * GRID))
    if (height, width) != (GRID, GRID):
        grid = first.reshape(-1, channels, GRID, GRID)
        pools = _adaptive_matrix(height), _adaptive_matrix(width)
        first = np.einsum("ocij,ih,jw->ochw", grid, *pools, optimize=True).reshape(len(first), -1)
    folded = {"first.weight": first, "first.bias": bias}
    x = graph.add("Flatten", x, hint="flat")
    x = graph.add("Relu", _linear(graph, x, folded, "first", first.shape[1]), hint="fc6")
    x = graph.add("Relu", _linear(graph, x, weights, "classifier.3", graph.shape(x)[1]), hint="fc7")
    return _linear(graph, x, weights, "classifier.6", graph.shape(x)[1])


def _linear(graph: Graph, x: str, weights: Weights, prefix: str, width: int) -> str:
    weight, bias = _pair(weights, prefix, (None, width))
    inputs = (
        x,
        graph.constant(weight, hint=f"{prefix}.weight"),
        graph.constant(bias, hint=f"{prefix}.bias"),
    )
    return graph.add("Gemm", *inputs, hint=f"{prefix}_linear", transB=1)


def _adaptive_matrix(size: int) -> np.ndarray:
    """Torch's AdaptiveAvgPool to 7 cells as a matrix ``[7, size]``: cell i averages floor(i*n/7) ..
    ceil((i+1)*n/7).
    """
    matrix = np.zeros((GRID, size), np.float32)
    for i in range(GRID):
        start, stop = i * size // GRID, -(-(i + 1) * size // GRID)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def _pair(
    weights: Weights, prefix: str, shape: Sequence[int | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of one layer, checked; ``None`` in ``shape`` is free."""
    for name in (f"{prefix}.weight", f"{prefix}.bias"):
        if name not in weights:
            raise ModelError(
                f"these are not VGG16 weights: '{name}' is missing; expected torchvision's names"
            )
    weight, bias = weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]
    fits = len(weight.shape) == len(shape) and all(
        e in (None, g) for e, g in zip(shape, weight.shape, strict=True)
    )
    if not fits or bias.shape != weight.shape[:1]:
        expected = ["any" if n is None else n for n in shape]
        raise ModelError(
            f"weight '{prefix}.weight' has shape {list(weight.shape)} and bias {list(bias.shape)};"
            f" VGG16 needs {expected}"
        )
    return weight, bias


def random_weights(
    channels: Sequence[int] = CHANNELS, classes: int = 1000, hidden: int = 4096, seed: int = 0
) -> dict[str, np.ndarray]:
    """Untrained weights of the published shape (He et al. 2015 scaling), for timing and tests.

    ``hidden`` 0 gives the compact form: global average and one linear layer.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def draw(prefix: str, *shape: int) -> None:
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        weights[f"{prefix}.weight"] = rng.standard_normal(shape, np.float32)
        weights[f"{prefix}.weight"] *= (
            scale  # in place: a hundred million numbers are not copied as float64
        )
        weights[f"{prefix}.bias"] = (0.01 * rng.standard_normal(shape[0], np.float32)).astype(
            np.float32
        )

    width = 3
    for block, names in zip(channels, convolution_names(), strict=True):
        for _, prefix in names:
            draw(prefix, block, width, 3, 3)
            width = block
    if hidden:
        draw("classifier.0", hidden, width * GRID * GRID)
        draw("classifier.3", hidden, hidden)
        draw("classifier.6", classes, hidden)
    else:
        draw("classifier", classes, width)
    return weights


VGG16 = Network(
    "vgg16",
    forward,
    random_weights,
    last_layer=LAST,
    renamed=renamed,
    # The file's name ends in the first eight digits of its sha256. It could not be fetched where
    # this was written: sha256 and size are those that many projects publish.
    download=Download(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        "vgg16-397923af.pth",
    ),
    box_layer="conv4_3",  # by analogy with SqueezeNet, as is the signal
    box_signal="layercam",
    dam_layer="conv5_1",  # the paper's: the 11th convolution
    beam_layer=LAST,
    head_layers=("conv2_2", "conv3_3", "conv4_3", LAST),
    head_cam_layers=("conv3_3", "conv4_3", LAST),
    last_linear="classifier.6",
    torch_module="engines.backends.torch_networks:vgg16",
)
COMPACT = replace(
    VGG16,
    name="compact",
    random_weights=partial(random_weights, COMPACT_CHANNELS, hidden=0),
    size_px=128,
    download=None,
    shipped="compact.safetensors",
    box_layer=None,
    box_signal="gradient",
    dam_layer=LAST,  # the best on the training split of animal_pose_voc
    last_linear="classifier",
)
"""The network that Sightline ships: VGG16 with a quarter of the channels, and one linear layer."""
