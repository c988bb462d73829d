"""Fits the classifier's last layer to a user's own classes. An image may have several of them.

One sigmoid a class, by cross-entropy. Only the classes of an image are used, and no boxes. The
layers below stay as they are. Their output is therefore computed once, and the problem is convex.
Bency et al., "Weakly Supervised Localization using Deep Feature Maps" (2016), fine-tune for the
same purpose otherwise, with a softmax and by gradient descent: ``calib.papers.adaptation``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save

from calib.data.datasets import Sample
from calib.evaluation.metrics import average_precision, mean_ap
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, append_preprocessing
from engines.errors import ModelError, SourceError
from engines.files import Kind, whole_file
from engines.graph import Graph
from engines.head import is_fitted_on, load_head, shipped_head_path
from engines.localizer import Localizer
from engines.networks.registry import NETWORKS, Classifier, with_last_linear

WEIGHTS_FILE = Kind(
    "weights", (".safetensors",), rb'.{8}\{"__metadata__":\{.*?"sightline_weights":"finetuned"'
)
STRENGTHS = (1e-4, 1e-3, 1e-2)
STEPS = 400
HELD_OUT = 5
Array64 = NDArray[np.float64]


@dataclass(frozen=True)
class Finetuned:
    """A last layer for a user's own classes.

    Attributes:
        classes: the names of the K classes.
        weight: ``[K, D]``.
        bias: ``[K]``.
        strength: the ridge penalty, chosen on every fifth image.
        average_precision: by class, on those images, of a layer that was fitted without them.
    """

    classes: tuple[str, ...]
    weight: Array64
    bias: Array64
    strength: float
    average_precision: dict[str, float]

    @property
    def mean_average_precision(self) -> float:
        """The mean of ``average_precision`` over classes."""
        return mean_ap(self.average_precision)


def finetune(samples: Sequence[Sample], classifier: Classifier, console: Console) -> Finetuned:
    """Fit the last layer to the classes of labelled images.

    Args:
        samples: the labelled images.
        classifier: the network.
        console: for progress.

    Raises:
        ModelError: the network does not end in a linear layer of ours.
        SourceError: there are not two classes, or too few images.
    """
    classes = tuple(sorted({truth.class_name for sample in samples for truth in sample.truths}))
    if len(classes) < 2 or len(samples) < 2 * HELD_OUT:
        raise SourceError(
            f"fine-tuning needs two classes and {2 * HELD_OUT} images: got {len(classes)} and"
            f" {len(samples)}"
        )
    has = [{truth.class_name for truth in sample.truths} for sample in samples]
    labels = np.array([[name in each for name in classes] for each in has], np.float64)
    inputs = last_inputs(samples, classifier, console)
    held = np.arange(len(samples)) % HELD_OUT == HELD_OUT - 1
    scores = {}
    for strength in STRENGTHS:
        weight, bias = fit_sigmoid(inputs[~held], labels[~held], strength)
        scores[strength] = image_ap(inputs[held] @ weight.T + bias, labels[held], classes)
    best = max(STRENGTHS, key=lambda strength: mean_ap(scores[strength]))
    return Finetuned(classes, *fit_sigmoid(inputs, labels, best), best, scores[best])


def last_inputs(samples: Sequence[Sample], classifier: Classifier, console: Console) -> Array64:
    """The input of the last linear layer for each image, ``[N, D]``.

    Raises:
        ModelError: the network does not end in a linear layer.
    """
    if classifier.network.classless:
        graph, forward = classifier.forward_graph()
        width = graph.shape(forward.last)[1]
        classifier = with_last_linear(classifier, np.zeros((1, width)), np.zeros(1), ("any",))
    if classifier.network.last_linear is None:
        known = [name for name, network in NETWORKS.items() if network.last_linear]
        raise ModelError(
            f"fine-tuning replaces the last linear layer of {', '.join(known)}: {classifier.name}"
            " has none"
        )
    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.shape, classifier.preprocessing)
    last = graph.producer(classifier.append(graph, x).scores)
    assert last is not None  # networks with a last linear layer end in a Gemm
    graph.output(last.input[0], "inputs")
    model = graph.model({"class_names": "[]"})
    engine = OpenVinoEngine(model, "fp32")
    localizer = Localizer(engine)
    rows = [
        engine.infer({IMAGE: localizer.prepare(s.read())[None]})["inputs"][0]
        for s in track(samples, console=console)
    ]
    return np.array(rows, np.float64)


def fit_sigmoid(inputs: Array64, labels: Array64, strength: float) -> tuple[Array64, Array64]:
    """Fit a layer with the least sigmoid cross-entropy and ridge penalty.

    What is minimized is the mean over images of the sum over classes of log(1 + e^z) - y z, plus
    strength / 2 |w|^2, with inputs that are scaled to unit variance. The gradient steps are
    accelerated (Nesterov 1983) and of size 1 / L, where the curvature of the logistic function is
    at most 1/4.

    Args:
        inputs: ``[N, D]``.
        labels: 1 where an image has a class, else 0, ``[N, K]``.
        strength: of the ridge penalty.

    Returns:
        The weight ``[K, D]`` and the bias ``[K]``.
    """
    mean, scale = inputs.mean(axis=0), np.maximum(inputs.std(axis=0), 1e-6)
    scaled = np.column_stack([(inputs - mean) / scale, np.ones(len(inputs))])
    step = 1 / (0.25 * np.linalg.norm(scaled, 2) ** 2 / len(scaled) + strength)
    penalty = np.full(scaled.shape[1], strength)
    penalty[-1] = 0
    weight = ahead = np.zeros((labels.shape[1], scaled.shape[1]))
    for count in range(STEPS):
        probability = 1 / (1 + np.exp(-np.clip(scaled @ ahead.T, -60, 60)))
        gradient = (probability - labels).T @ scaled / len(scaled) + penalty * ahead
        moved = ahead - step * gradient
        ahead = moved + count / (count + 3) * (moved - weight)
        weight = moved
    unscaled = weight[:, :-1] / scale
    return unscaled, weight[:, -1] - unscaled @ mean


def image_ap(scores: Array64, labels: Array64, classes: Sequence[str]) -> dict[str, float]:
    """The average precision of each class that some image has. Its scores rank the images.

    Args:
        scores: ``[N, K]``.
        labels: 1 where an image has a class, else 0, ``[N, K]``.
        classes: the names of the K classes.
    """
    found = {}
    for place, name in enumerate(classes):
        if labels[:, place].any():
            order = np.argsort(-scores[:, place], kind="stable")
            found[name] = average_precision(
                list(labels[order, place] > 0), int(labels[:, place].sum())
            )
    return found


def save_finetuned(found: Finetuned, classifier: Classifier, path: Path) -> Classifier:
    """Write the network's weights, with the new last layer and the names of its classes.

    Args:
        found: the new last layer.
        classifier: the network.
        path: the file to write, which ``--weights`` reads.

    Returns:
        The network with these weights.

    Raises:
        OutputError: the place cannot be written.
    """
    made = with_last_linear(classifier, found.weight, found.bias, found.classes)
    tensors = {name: np.ascontiguousarray(value) for name, value in made.weights.items()}
    metadata = {"sightline_weights": "finetuned", "class_names": json.dumps(found.classes)}
    if made.body_digest:
        metadata["body"] = made.body_digest
    usual = made.network.default_head
    if usual and is_fitted_on(load_head(shipped_head_path(usual)), made):
        metadata["head"] = usual
    with whole_file(path) as part:
        part.write_bytes(save(tensors, metadata))
    return made
