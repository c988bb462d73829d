"""The walks of DAM in float64, one value at a time, on a small VGG16."""

import numpy as np

from engines.networks import vgg
from tests import oracles

BLOCKS = (2, 2, 3, 3, 3)


def slow_forward(classifier, image):
    """Every step of the network, one output value at a time: (kind, input, output, weight) in
    order.
    """
    mean, std = (
        np.array(np.float32(v), np.float64)
        for v in (classifier.preprocessing.mean, classifier.preprocessing.std)
    )
    x = ((image[0, :, :, ::-1] - mean) * np.float32(1 / std).astype(np.float64)).transpose(2, 0, 1)[
        None
    ]
    steps = []
    weights = {name: value.astype(np.float64) for name, value in classifier.weights.items()}
    for count, names in zip(BLOCKS, vgg.convolution_names(), strict=True):
        assert count == len(names)
        for _, prefix in names:
            weight = weights[f"{prefix}.weight"]
            y = (
                oracles.conv(x, weight, pads=(1, 1, 1, 1))
                + weights[f"{prefix}.bias"][:, None, None]
            )
            steps.append(("conv", x, y, weight))
            steps.append(("relu", y, np.maximum(y, 0), None))
            x = np.maximum(y, 0)
        y = oracles.pool(x, "max", (2, 2), (2, 2))
        steps.append(("pool", x, y, None))
        x = y
    scores = x.mean(axis=(2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    return steps, scores[0], weights["classifier.weight"]


def slow_backward(steps, cotangent, guided):
    """The gradient walked back step by step, by each one's definition."""
    for kind, x, y, weight in reversed(steps):
        if kind == "relu":
            passes = (x > 0) & (cotangent > 0) if guided else x > 0
            cotangent = np.where(passes, cotangent, 0)
            continue
        gradient = (
            np.zeros((1, x.shape[1], x.shape[2] + 2, x.shape[3] + 2))
            if kind == "conv"
            else np.zeros(x.shape)
        )
        for _, c, i, j in np.ndindex(y.shape):
            if kind == "conv":
                gradient[0, :, i : i + 3, j : j + 3] += cotangent[0, c, i, j] * weight[c]
            else:
                window = x[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                down, right = np.unravel_index(np.argmax(window), (2, 2))
                gradient[0, c, 2 * i + down, 2 * j + right] += cotangent[0, c, i, j]
        cotangent = gradient[:, :, 1:-1, 1:-1] if kind == "conv" else gradient
    return cotangent


def layer_end(layer):
    """How many steps lead to the layer's ReLU."""
    done = 0
    for block, names in enumerate(vgg.convolution_names()):
        for name, _ in names:
            done += 2
            if name == layer:
                return done + block  # a pool behind each block before
    raise AssertionError(layer)
