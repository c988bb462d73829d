"""The landmarks of a forward graph and the preprocessing that every network must state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Preprocessing:
    """How pixels 0..255 become the network's input: ``(pixel - mean) / std`` per channel, in
    ``order``.
    """

    order: str = "rgb"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)


CAFFE = Preprocessing("bgr", (104.0, 117.0, 123.0), (1.0, 1.0, 1.0))
"""The preprocessing of Caffe's networks: BGR less the channel means, not scaled."""


@dataclass(frozen=True)
class Forward:
    """The forward graph's landmarks, by tensor name.

    Attributes:
        scores: class scores before any softmax, ``[N, classes]``.
        last: activations of the last convolution (after its ReLU), ``[N, C, h, w]``.
        layers: inner activations that a map can be taken at, from the image to the scores.
    """

    scores: str
    last: str
    layers: Mapping[str, str] = field(default_factory=dict)
