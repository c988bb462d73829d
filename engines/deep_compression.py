"""SqueezeNet's published weights in Deep Compression's form (Han et al. 2016): codebook, 4-bit gaps, little endian.

The file holds 26 uint32 counts of stored entries, one per convolution in network order; then for each convolution 256
float32 (the codebook), out-channels float32 (the bias), one uint8 codebook index per stored entry, and half as many bytes
of 4-bit gaps, low nibble first. Entry k lies at the cumulative sum of (gap + 1), less 1; every other weight takes codebook
entry 0.
"""

from pathlib import Path

import numpy as np

from engines.base import ModelError
from engines.reading import read_file
from engines.squeezenet import shapes

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
        raise ModelError(f"cannot read {path} as SqueezeNet's compressed weights: {error}") from error
    if offset != len(data):
        raise ModelError(f"{path} holds {len(data)} bytes, SqueezeNet's compressed weights take {offset}")
    return weights
