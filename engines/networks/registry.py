"""The known networks: the names that ``--model`` and ``--weights`` take, and how each becomes a
forward graph.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from engines.errors import ModelError
from engines.graph import FLOAT, Graph
from engines.networks import alexnet, squeezenet, vgg
from engines.networks.network import CAFFE, Forward, Preprocessing, Weights
from engines.networks.onnx_file import forward_of_file
from engines.networks.weights import ASSETS, load_class_names, load_weights


@dataclass(frozen=True)
class Classifier:
    """A classifier that can be put into a graph.

    Attributes:
        name: ``compact``, ``vgg16``, ``alexnet``, ``squeezenet`` or the ONNX file's name.
        append: (graph, normalised input tensor) to the forward graph's landmarks.
        preprocessing: what the network's input is.
        size_px: side of the input it is used at unless told otherwise.
        digest: sha256 of architecture, preprocessing and weights: what heads are tied to.
        weights: float32 arrays by name; empty where the network came as an ONNX file.
        class_names: of its classes, where the weights say them (``finetune`` writes such); else see
            ``class_names``.
    """

    name: str
    append: Callable[[Graph, str], Forward]
    preprocessing: Preprocessing
    size_px: int
    digest: str
    weights: Weights = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) of the 1,000 ImageNet-1k classes in their usual order."""
    lines = (ASSETS / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, name) for wnid, name in (line.split("\t") for line in lines))


def load_classifier(
    model: str = "compact", weights: str | None = None, size_px: int | None = None
) -> Classifier:
    """The classifier that ``--model``, ``--weights`` and ``--size`` name.

    Args:
        model: ``compact``, ``vgg16``, ``alexnet``, ``squeezenet``, or the path of an ``.onnx``
            classifier.
        weights: a file, a name to download, or ``random``; the shipped ones (compact only) when
            None.
        size_px: input side; the network's usual one when None.

    Raises:
        ModelError: unknown model, or weights that are missing or do not fit.
    """
    if model.endswith(".onnx"):
        append, own_size_px, digest = forward_of_file(Path(model))
        side = size_px or own_size_px or 224
        return Classifier(Path(model).name, append, Preprocessing(), side, digest)
    if model not in ARCHITECTURES:
        raise ModelError(
            f"unknown model '{model}': use {', '.join(ARCHITECTURES)} or the path of an .onnx"
            " classifier"
        )
    build, random, preprocessing, usual_px = ARCHITECTURES[model]
    values: Weights = random() if weights == "random" else load_weights(model, weights)
    if model == "squeezenet":
        values = squeezenet.renamed(values)
    if model == "alexnet":
        values = alexnet.renamed(values)
        preprocessing, usual_px = (
            (CAFFE, 227) if alexnet.is_caffe(values) else (Preprocessing(), 224)
        )
    digest = _digest(model, preprocessing, values)
    names = load_class_names(weights) if weights else ()
    return Classifier(
        model,
        lambda graph, x: build(graph, x, values),
        preprocessing,
        size_px or usual_px,
        digest,
        values,
        names,
    )


ARCHITECTURES: dict[
    str,
    tuple[
        Callable[[Graph, str, Weights], Forward],
        Callable[[], dict[str, np.ndarray]],
        Preprocessing,
        int,
    ],
] = {
    "compact": (
        vgg.forward,
        partial(vgg.random_weights, vgg.COMPACT_CHANNELS, hidden=0),
        Preprocessing(),
        128,
    ),
    "vgg16": (vgg.forward, vgg.random_weights, Preprocessing(), 224),
    "alexnet": (alexnet.forward, alexnet.random_weights, CAFFE, 227),
    "squeezenet": (squeezenet.forward, squeezenet.random_weights, CAFFE, 227),
}
"""name: (forward graph, random weights, preprocessing, usual input side in pixels); AlexNet's two
forms differ in the latter
"""


def _digest(name: str, preprocessing: Preprocessing, values: Weights) -> str:
    digest = hashlib.sha256(json.dumps([name, asdict(preprocessing)]).encode())
    for key in sorted(values):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(values[key]).data)
    return digest.hexdigest()


def class_names(count: int) -> tuple[str, ...]:
    """ImageNet-1k names for 1,000 classes, else ``class 0`` ..."""
    if count == 1000:
        return tuple(name for _, name in imagenet_classes())
    return tuple(f"class {i}" for i in range(count))


def class_count(classifier: Classifier) -> int:
    """How many classes the network scores."""
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, classifier.size_px, classifier.size_px))
    return graph.shape(classifier.append(graph, x).scores)[1]
