"""From the camera's bytes to the network's input, inside the graph: uint8 BGR HWC to normalised float32 NCHW."""

import numpy as np

from engines.graph import FLOAT, UINT8, Graph
from engines.networks import Preprocessing

IMAGE = "image_nhwc_bgr"


def append_preprocessing(graph: Graph, batch: int, size_px: int, preprocessing: Preprocessing) -> tuple[str, str]:
    """Declare the image input and append its normalisation.

    Args:
        graph: appended to.
        batch: images per call.
        size_px: side of the square image.
        preprocessing: channel order, mean and standard deviation.

    Returns:
        (pixels, normalised): float32 ``[N, 3, S, S]`` in 0..255 and the network's channel order, which gradients "to the
        pixels" are taken by, and the network's input.
    """
    image = graph.input(IMAGE, UINT8, (batch, size_px, size_px, 3))
    pixels = graph.add("Transpose", graph.add("Cast", image, to=FLOAT), perm=[0, 3, 1, 2], hint="pixels")
    if preprocessing.order == "rgb":
        pixels = graph.add("Gather", pixels, graph.constant([2, 1, 0], np.int64), axis=1, hint="pixels_rgb")
    x = graph.add("Sub", pixels, _per_channel(graph, preprocessing.mean), hint="centred")
    if any(value != 1 for value in preprocessing.std):
        x = graph.add("Mul", x, _per_channel(graph, [1 / value for value in preprocessing.std]), hint="normalised")
    return pixels, x


def _per_channel(graph: Graph, values: tuple[float, ...] | list[float]) -> str:
    return graph.constant(np.reshape(values, (1, 3, 1, 1)))
