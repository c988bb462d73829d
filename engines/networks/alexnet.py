"""AlexNet (Krizhevsky et al. 2012), in the two forms that weights are published for.

Caffe's (``bvlc_alexnet``): 227 px, 96 channels first, local response normalization behind the first
two convolutions, then the pool; convolutions 2, 4 and 5 in two groups. Weight names ``conv1`` ...
``conv5``, ``fc6``, ``fc7``, ``fc8``. torchvision's (Krizhevsky 2014, "One weird trick"): 224 px, 64
channels first, no normalization, no groups. Weight names ``features.0`` ... ``classifier.6``. Each
with ``.weight`` and ``.bias``; which one it is, the names and shapes say.
"""

from dataclasses import replace

import numpy as np

from engines.downloads import Download
from engines.errors import ModelError
from engines.graph import Graph
from engines.networks.network import Forward, Network, Weights
from engines.networks.preprocessing import CAFFE, Preprocessing

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
DENSE = ("fc6", "fc7", "fc8")
GROUPS = {"conv2": 2, "conv4": 2, "conv5": 2}
_TORCHVISION = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}
GRID = 6
LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}
CAFFE_SHAPES = {
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
}
TORCHVISION_SHAPES = {
    "conv1": (64, 3, 11, 11),
    "conv2": (192, 64, 5, 5),
    "conv3": (384, 192, 3, 3),
    "conv4": (256, 384, 3, 3),
    "conv5": (256, 256, 3, 3),
}
PADDING = {"conv2": 2, "conv3": 1, "conv4": 1, "conv5": 1}


def renamed(weights: Weights) -> dict[str, np.ndarray]:
    """Weights under this module's names, from either naming."""
    result = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        result[f"{_TORCHVISION.get(layer, layer)}.{kind}"] = np.asarray(value, np.float32)
    return result


def is_caffe(weights: Weights) -> bool:
    """Whether renamed weights are Caffe's: the second convolution reads half of the first one's
    channels.
    """
    first, second = weights.get("conv1.weight"), weights.get("conv2.weight")
    return (
        first is not None
        and second is not None
        and second.ndim == 4
        and 2 * second.shape[1] == len(first)
    )


def forward(graph: Graph, x_nchw: str, weights: Weights) -> Forward:
    """Append AlexNet's forward graph.

    Args:
        graph: appended to.
        x_nchw: ``[N, 3, S, S]``: BGR 0..255 less the channel means for Caffe's weights, ImageNet's
            usual normalisation for torchvision's.
        weights: float32 arrays under either naming.

    Raises:
        ModelError: a weight is missing or does not fit, or the image is so small that the last pool
            leaves another grid than the dense layers read (Caffe's weights only; torchvision
            averages to 6 x 6).
    """
    weights = renamed(weights)
    caffe, layers, x = is_caffe(weights), {}, x_nchw
    for layer in CONVOLUTIONS:
        groups = GROUPS.get(layer, 1) if caffe else 1
        weight, bias = _pair(weights, layer, graph.shape(x)[1] // groups)
        padding = PADDING.get(layer, 0 if caffe else 2)
        strides = [4, 4] if layer == "conv1" else [1, 1]
        inputs = (
            x,
            graph.constant(weight, hint=f"{layer}.weight"),
            graph.constant(bias, hint=f"{layer}.bias"),
        )
        linear = graph.add(
            "Conv",
            *inputs,
            hint=f"{layer}_linear",
            kernel_shape=list(weight.shape[2:]),
            strides=strides,
            pads=[padding] * 4,
            group=groups,
        )
        x = layers[layer] = graph.add("Relu", linear, hint=layer)
        if layer in ("conv1", "conv2") and caffe:
            x = layers[f"norm{layer[4:]}"] = graph.add("LRN", x, hint=f"norm{layer[4:]}", **LRN)
        if layer in ("conv1", "conv2", "conv5"):
            x = layers[f"pool{layer[4:]}"] = _pool(graph, x, f"pool{layer[4:]}", caffe)
    flat = graph.add("Flatten", _grid(graph, x, caffe), hint="flat")
    for layer in DENSE:
        weight, bias = _pair(weights, layer, graph.shape(flat)[1])
        inputs = (
            flat,
            graph.constant(weight, hint=f"{layer}.weight"),
            graph.constant(bias, hint=f"{layer}.bias"),
        )
        flat = graph.add("Gemm", *inputs, hint=f"{layer}_linear", transB=1)
        if layer != DENSE[-1]:
            flat = graph.add("Relu", flat, hint=layer)
    return Forward(flat, layers["conv5"], layers)


def _pool(graph: Graph, x: str, name: str, caffe: bool) -> str:
    """3 x 3 in steps of 2: windows overlap. Caffe rounds the number of windows up, torchvision
    down.
    """
    return graph.add(
        "MaxPool", x, hint=name, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=int(caffe)
    )


def _grid(graph: Graph, x: str, caffe: bool) -> str:
    """What the dense layers read, ``[N, 256, 6, 6]``: torchvision averages other sizes to it."""
    size = graph.shape(x)[2]
    if size == GRID:
        return x
    if caffe or size < 1:
        raise ModelError(
            f"AlexNet's dense layers read {GRID} x {GRID} cells, this input leaves {size}: use"
            " 227 px",
            option="size_px",
        )
    matrix = np.zeros((GRID, size), np.float32)
    for i in range(GRID):
        start, stop = i * size // GRID, -(-(i + 1) * size // GRID)
        matrix[i, start:stop] = 1 / (stop - start)
    n, channels = graph.shape(x)[:2]
    rows = graph.add(
        "MatMul",
        graph.add("Transpose", x, perm=[0, 1, 3, 2]),
        graph.constant(matrix.T),
        hint="averaged_rows",
    )
    columns = graph.add(
        "MatMul",
        graph.add("Transpose", rows, perm=[0, 1, 3, 2]),
        graph.constant(matrix.T),
        hint="averaged",
    )
    return graph.add(
        "Reshape", columns, graph.constant([n, channels, GRID, GRID], np.int64), hint="grid"
    )


def _pair(weights: Weights, layer: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of one layer that reads ``width`` channels or values, checked."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name not in weights:
            raise ModelError(
                f"these are not AlexNet weights: '{layer}' is missing; expected torchvision's or"
                " Caffe's names"
            )
    weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"].reshape(-1)
    expected = 4 if layer in CONVOLUTIONS else 2
    if weight.ndim != expected or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        shapes = f"shape {list(weight.shape)} and bias {list(bias.shape)}"
        raise ModelError(
            f"weight '{layer}.weight' has {shapes}; AlexNet's reads {width} values here"
        )
    return weight, bias


def random_weights(
    caffe: bool = True, classes: int = 1000, hidden: int = 4096, seed: int = 0
) -> dict[str, np.ndarray]:
    """Untrained weights of the published shapes (He et al. 2015 scaling), for timing and tests."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = dict(CAFFE_SHAPES if caffe else TORCHVISION_SHAPES)
    shapes |= {
        "fc6": (hidden, shapes["conv5"][0] * GRID * GRID),
        "fc7": (hidden, hidden),
        "fc8": (classes, hidden),
    }
    weights = {}
    for name, shape in shapes.items():
        scale = np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
        weights[f"{name}.weight"] = rng.standard_normal(shape, np.float32) * scale
        weights[f"{name}.bias"] = (0.01 * rng.standard_normal(shape[0])).astype(np.float32)
    return weights


def _of_weights(network: Network, weights: Weights) -> Network:
    """The record of the form that these weights are of: Caffe's, or torchvision's."""
    if is_caffe(weights):
        return network
    return replace(network, preprocessing=Preprocessing(), size_px=224)


ALEXNET = Network(
    "alexnet",
    forward,
    random_weights,
    CAFFE,
    227,
    last_layer="conv5",
    renamed=renamed,
    of_weights=_of_weights,
    # The file's name ends in the first eight digits of its sha256. It could not be fetched where
    # this was written: sha256 and size are those that many projects publish.
    download=Download(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        244_408_911,
        "alexnet-owt-7be5be79.pth",
    ),
    box_layer="conv5",  # by analogy with SqueezeNet, as is the signal
    box_signal="layercam",
    dam_layer="conv5",
    beam_layer="conv5",
    pooled_layer="pool5",
    head_layers=("pool1", "pool2", "conv4"),
    head_cam_layers=("pool1", "pool2", "conv5"),
    last_linear="fc8",
    torch_module="engines.backends.torch_networks:alexnet",
)
