"""SqueezeNet v1.0 (Iandola et al. 2016, table 1) in its Caffe form: overlapping pools that round
up, joined branches.

Weight names are ``conv1``, ``fire2.squeeze``, ``fire2.expand1``, ``fire2.expand3`` ...
``conv_final``, each with ``.weight`` and ``.bias``. The archive of Han et al. (names like
``fire2__conv1x1_1__w``) is renamed on loading.
"""

from pathlib import Path

import numpy as np

from engines.downloads import Download
from engines.errors import ModelError
from engines.files import read_file
from engines.graph import Graph
from engines.networks.network import Forward, Network, Weights
from engines.networks.preprocessing import CAFFE

LAST = "conv_final"
FIRES = tuple(f"fire{i}" for i in range(2, 10))
FIRE_SIZES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
POOLED_AFTER = ("conv1", "fire4", "fire8")
_CAFFE_NAMES = {"conv1x1_1": "squeeze", "conv1x1_2": "expand1", "conv3x3_2": "expand3"}


def renamed(weights: Weights) -> dict[str, np.ndarray]:
    """Weights under this module's names, from either naming."""
    result = {}
    for name, value in weights.items():
        parts = name.split("__")
        if len(parts) > 1:
            layer = ".".join(_CAFFE_NAMES.get(part, part) for part in parts[:-1])
            renamed_to = f"{layer}.{'weight' if parts[-1] == 'w' else 'bias'}"
        else:
            renamed_to = name
        result[renamed_to] = np.asarray(value, np.float32)
    return result


def forward(graph: Graph, x_nchw: str, weights: Weights) -> Forward:
    """Append SqueezeNet's forward graph; ``x_nchw`` is BGR 0..255 less the channel means.

    Raises:
        ModelError: a weight is missing or does not fit.
    """
    weights = renamed(weights)
    layers: dict[str, str] = {}

    def convolution(x: str, name: str, **attributes: object) -> str:
        if f"{name}.weight" not in weights or f"{name}.bias" not in weights:
            raise ModelError(f"these are not SqueezeNet weights: '{name}' is missing")
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if (
            weight.ndim != 4
            or weight.shape[1] != graph.shape(x)[1]
            or bias.shape != weight.shape[:1]
        ):
            raise ModelError(
                f"weight '{name}' has shape {list(weight.shape)}; it reads {graph.shape(x)[1]}"
                " channels"
            )
        inputs = (
            x,
            graph.constant(weight, hint=f"{name}.weight"),
            graph.constant(bias, hint=f"{name}.bias"),
        )
        linear = graph.add(
            "Conv",
            *inputs,
            hint=f"{name}_linear",
            kernel_shape=list(weight.shape[2:]),
            **attributes,
        )
        return graph.add("Relu", linear, hint=name)

    x = layers["conv1"] = convolution(x_nchw, "conv1", strides=[2, 2])
    x = layers["pool1"] = _pool(graph, x, "pool1")
    for fire in FIRES:
        squeezed = convolution(x, f"{fire}.squeeze")
        wide = [
            convolution(squeezed, f"{fire}.expand1"),
            convolution(squeezed, f"{fire}.expand3", pads=[1, 1, 1, 1]),
        ]
        x = layers[fire] = graph.add("Concat", *wide, axis=1, hint=fire)
        if fire in POOLED_AFTER:
            x = layers[f"pool{fire[4:]}"] = _pool(graph, x, f"pool{fire[4:]}")
    last = layers[LAST] = convolution(x, LAST, pads=[1, 1, 1, 1])
    scores = graph.add(
        "Flatten", graph.add("GlobalAveragePool", last, hint="average"), hint="scores_raw"
    )
    return Forward(scores, last, layers)


def _pool(graph: Graph, x: str, name: str) -> str:
    return graph.add("MaxPool", x, hint=name, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)


def shapes(classes: int = 1000) -> dict[str, tuple[int, int, int, int]]:
    """Weight shape ``[out, in, kh, kw]`` of each convolution, in network order."""
    result = {"conv1": (96, 3, 7, 7)}
    width = 96
    for fire, (squeeze, expand) in zip(FIRES, FIRE_SIZES, strict=True):
        result[f"{fire}.squeeze"] = (squeeze, width, 1, 1)
        result[f"{fire}.expand1"], result[f"{fire}.expand3"] = (
            (expand, squeeze, 1, 1),
            (expand, squeeze, 3, 3),
        )
        width = 2 * expand
    return {**result, "conv_final": (classes, width, 1, 1)}


def random_weights(classes: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Untrained weights (He et al. 2015 scaling), for timing and tests."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(classes).items():
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        weights[f"{name}.weight"] = (scale * rng.standard_normal(shape)).astype(np.float32)
        weights[f"{name}.bias"] = (0.01 * rng.standard_normal(shape[0])).astype(np.float32)
    return weights


MOST_BYTES = 1 << 24
"""The published file has 675,763."""


def decode_net(path: Path) -> dict[str, np.ndarray]:
    """Float32 weights and biases by layer name.

    Raises:
        ModelError: the file cannot be read or is not SqueezeNet's.
    """
    layers = shapes()
    try:
        data = read_file(path, "weights", MOST_BYTES)
        counts = np.frombuffer(data, "<u4", len(layers))
        offset, weights = counts.nbytes, {}
        for (name, shape), count in zip(layers.items(), counts, strict=True):
            codebook = np.frombuffer(data, "<f4", 256, offset)
            bias = np.frombuffer(data, "<f4", shape[0], offset + 1024)
            offset += 1024 + bias.nbytes
            index = np.frombuffer(data, np.uint8, count, offset)
            packed = np.frombuffer(data, np.uint8, (int(count) + 1) // 2, offset + int(count))
            offset += int(count) + packed.nbytes
            gaps = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
            flat = np.full(int(np.prod(shape)), codebook[0], np.float32)
            flat[np.cumsum(gaps.astype(np.int64) + 1) - 1] = codebook[index]
            weights[f"{name}.weight"], weights[f"{name}.bias"] = flat.reshape(shape), bias.copy()
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"cannot read {path} as SqueezeNet's compressed weights: {error}"
        ) from error
    if offset != len(data):
        raise ModelError(
            f"{path} holds {len(data)} bytes, SqueezeNet's compressed weights take {offset}"
        )
    return weights


SQUEEZENET = Network(
    "squeezenet",
    forward,
    random_weights,
    CAFFE,
    227,
    last_layer=LAST,
    renamed=renamed,
    download=Download(
        "https://raw.githubusercontent.com/songhan/SqueezeNet-Deep-Compression/"
        "fb13faa2cf121ced9999f8a9d538ec6c56084733/compressed_SqueezeNet.net",
        "e4ab6960ae8cd81505e1c2136921201507e930966c53deaf15862a395b3a3261",
        675_763,
        "compressed_SqueezeNet.net",
    ),
    # The box and DAM's settings are the best on the training split of animal_pose_voc.
    box_layer="fire5",
    box_signal="layercam",
    dam_layer="fire8",
    dam_settings={"k": 10, "percentile": 60, "dilate": 0.06},
    # Nothing but the average follows this layer; fire9 finds as much, at a dozen times the cost.
    beam_layer=LAST,
    head_layers=("pool1", "fire3", "fire5", "fire7", "fire9"),
    head_cam_layers=("fire5", "fire7", "fire9", LAST),
    torch_module="engines.backends.torch_networks:squeezenet",
)
"""Its last layer is a convolution with a ReLU behind it: there is no linear layer to fine-tune."""
