"""Two layers of adaptation behind a network, trained for classes of one's own as it was published.

Bency et al., "Weakly Supervised Localization using Deep Feature Maps" (ECCV 2016), sections 3.2 and
4.1; ``finetune --as-published`` runs it, and ``calib.heads.finetune`` is the product's way. The
layers Fa and Fb stand in place of the last: Ma = relu(Wa M7 + Ba), Mb = softmax(Wb Ma + Bb). They
are trained by stochastic gradient descent on equation 1, where an image may have several classes.
Where only the convolutions are at hand, Fa reads their pooled maps. The layers below stay as they
are, so what they give is computed once. The paper trains them, too, more slowly.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save

from calib.data.datasets import Sample
from calib.evaluation.metrics import mean_ap
from calib.heads.finetune import image_ap
from calib.papers.pooled import BEFORE_LAST, PooledStore, Reader
from engines.confidence import softmax
from engines.errors import ModelError, SourceError
from engines.files import whole_file
from engines.localizer import ImageBgr
from engines.networks.registry import NETWORKS, Classifier, with_weights
from engines.networks.vgg import ADAPTATION

STEP_DEVIATIONS = (0.005, 0.01)
"""Of the first weights of Fa and Fb; the paper does not say them."""
NOISE = 10.0
"""Deviation of the white noise, in steps of 0..255; the paper does not say it."""
LARGEST_TURN_DEG = 30.0
HELD_OUT = 10
"""Every tenth image is set aside for choosing (section 4.3)."""
LEAST = 1e-7
Array32 = NDArray[np.float32]
Array64 = NDArray[np.float64]
Draw = Callable[[np.random.Generator], NDArray[np.int64]]


@dataclass(frozen=True)
class Schedule:
    """Of the training, with the values of section 4.1.

    Attributes:
        hidden: units of Fa. The paper refers to Oquab et al. 2014, who have 2,048.
        batches: how many.
        batch: samples in each.
        rate: of learning, at first.
        drop_every: after so many batches the rate is a tenth of what it was.
        momentum, decay: of the gradient and of weights. The paper does not say them; they are
            Caffe's usual ones.
        copies: at most so many samples are made of one image, the turned and noisy ones included.
    """

    hidden: int = 2048
    batches: int = 400_000
    batch: int = 50
    rate: float = 0.001
    drop_every: int = 20_000
    momentum: float = 0.9
    decay: float = 0.0005
    copies: int = 8

    def rate_at(self, number: int) -> float:
        """The learning rate of a batch; the first is 0."""
        return float(self.rate * 0.1 ** (number // self.drop_every))


PUBLISHED = Schedule()


def schedule_of(hidden: int, batches: int, copies: int) -> Schedule:
    """The published schedule with so many units, batches and copies. The learning rate falls every
    20,000 batches, or where there are fewer than three times as many, at each third of them.
    """
    drop_every = min(PUBLISHED.drop_every, max(1, batches // 3))
    return replace(PUBLISHED, hidden=hidden, batches=batches, drop_every=drop_every, copies=copies)


@dataclass(frozen=True)
class Layers:
    """Fa and Fb.

    Attributes:
        fa, fa_bias: ``[H, D]`` and ``[H]``.
        fb, fb_bias: ``[K, H]`` and ``[K]``.
    """

    fa: Array32
    fa_bias: Array32
    fb: Array32
    fb_bias: Array32

    def scores(self, inputs: NDArray[np.float32]) -> Array32:
        """Before the softmax: ``[N, D]`` to ``[N, K]``."""
        hidden = np.maximum(inputs @ self.fa.T + self.fa_bias, 0)
        return np.asarray(hidden @ self.fb.T + self.fb_bias, np.float32)

    def probabilities(self, inputs: NDArray[np.float32]) -> Array32:
        """``[N, D]`` to ``[N, K]``."""
        return softmax(self.scores(inputs))


@dataclass(frozen=True)
class Adapted:
    """Layers of adaptation for a user's own classes.

    Attributes:
        layers: the layers.
        classes: the names of the K classes.
        average_precision: by class, on every tenth image, which was not trained on.
        samples: how many were trained on, copies included.
    """

    layers: Layers
    classes: tuple[str, ...]
    average_precision: dict[str, float]
    samples: int

    @property
    def mean_average_precision(self) -> float:
        """The mean of ``average_precision`` over classes."""
        return mean_ap(self.average_precision)


def adapt(
    samples: Sequence[Sample], schedule: Schedule, store: PooledStore, console: Console
) -> Adapted:
    """Train layers of adaptation on nine images of ten.

    Raises:
        SourceError: there are not two classes, or too few images.
    """
    classes = tuple(sorted({truth.class_name for sample in samples for truth in sample.truths}))
    if len(classes) < 2 or len(samples) < 2 * HELD_OUT:
        raise SourceError(
            f"fine-tuning needs two classes and {2 * HELD_OUT} images: got {len(classes)} and"
            f" {len(samples)}"
        )
    labels, held = labels_of(samples, classes), held_out(len(samples))
    training, kept = (
        np.flatnonzero(~held),
        [s for s, is_out in zip(samples, held, strict=True) if is_out],
    )
    copies = copies_of(labels[training], schedule.copies)
    rows, readers = training.tolist(), [samples[row].read for row in training.tolist()]
    for row, count in zip(training.tolist(), copies.tolist(), strict=True):
        rows += [row] * (count - 1)
        readers += [partial(changed, samples[row].read, row, number) for number in range(1, count)]
    layers = trained(_rows(store, readers, console), labels[rows], schedule, console)
    scores = layers.scores(_rows(store, [sample.read for sample in kept], console))
    found = image_ap(scores.astype(np.float64), labels[held], classes)
    return Adapted(layers, classes, found, len(rows))


def _rows(store: PooledStore, readers: Sequence[Reader], console: Console) -> Array32:
    maps = store.maps_of(readers, "the training images", console)
    return maps.reshape(len(maps), -1).astype(np.float32)


def store_of(classifier: Classifier, precision: str) -> PooledStore:
    """What Fa reads: the input of the network's last layer, or the pooled maps where there are only
    convolutions.

    Raises:
        ModelError: the network takes no layers of adaptation.
    """
    if classifier.network.pooled_layer is None or not classifier.network.class_layers:
        raise ModelError(
            f"layers of adaptation stand behind vgg16, not {classifier.name}",
            option=("as_published", "model"),
        )
    only = classifier.network.classless
    return PooledStore.of(
        classifier, classifier.network.pooled_layer if only else BEFORE_LAST, precision
    )


def labels_of(samples: Sequence[Sample], classes: Sequence[str]) -> Array64:
    """1 where an image has a class, else 0: ``[N, K]``."""
    has = [{truth.class_name for truth in sample.truths} for sample in samples]
    return np.array([[name in each for name in classes] for each in has], np.float64)


def held_out(count: int) -> NDArray[np.bool_]:
    """Which of the images are set aside for choosing."""
    return np.asarray(np.arange(count) % HELD_OUT == HELD_OUT - 1)


def copies_of(labels: Array64, most: int) -> NDArray[np.int64]:
    """How many samples each image gives, itself included, so that all classes have about as many
    (section 4.1): as many times as its rarest class is rarer than the most frequent one, at most
    ``most``.
    """
    counts = np.maximum(labels.sum(axis=0), 1)
    rarest = np.where(labels > 0, counts, np.inf).min(axis=1)
    times = np.where(np.isfinite(rarest), counts.max() / rarest, 1)
    return np.clip(np.rint(times), 1, most).astype(np.int64)


def changed(read: Reader, image_number: int, copy_number: int) -> ImageBgr:
    """An image, turned by up to 30 degrees either way, with white Gaussian noise (section 4.1)."""
    rng = np.random.default_rng([image_number, copy_number])
    image = read()
    height, width = image.shape[:2]
    angle = rng.uniform(-LARGEST_TURN_DEG, LARGEST_TURN_DEG)
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    turned = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    noisy = turned + rng.normal(0, NOISE, turned.shape)
    return np.asarray(np.clip(np.rint(noisy), 0, 255), np.uint8)


def cross_entropy(
    scores: NDArray[np.floating], labels: NDArray[np.floating]
) -> tuple[float, NDArray[np.floating]]:
    """Equation 1, averaged over images, and its gradient by the scores before the softmax.

    J = -1/K sum_k [p_k log q_k + (1 - p_k) log(1 - q_k)], with q the softmax and p 1 for each class
    that the image has.

    Args:
        scores: ``[N, K]``.
        labels: p, ``[N, K]``.
    """
    q = np.clip(softmax(scores), LEAST, 1 - LEAST)
    each = labels * np.log(q) + (1 - labels) * np.log1p(-q)
    by_q = -(labels / q - (1 - labels) / (1 - q)) / scores.size
    gradient = q * (by_q - (by_q * q).sum(axis=1, keepdims=True))
    return float(-each.mean()), gradient


def trained(
    inputs: NDArray[np.float32], labels: Array64, schedule: Schedule, console: Console
) -> Layers:
    """Fa and Fb after stochastic gradient descent (section 4.1).

    Args:
        inputs: ``[N, D]``.
        labels: ``[N, K]``.
        schedule: batches, learning rates and the rest.
        console: for progress.
    """
    rng = np.random.default_rng(0)
    shapes = ((schedule.hidden, inputs.shape[1]), (labels.shape[1], schedule.hidden))
    weights = [
        (rng.standard_normal(shape, np.float32) * np.float32(deviation))
        for shape, deviation in zip(shapes, STEP_DEVIATIONS, strict=True)
    ]
    fa, fb = weights
    values = [fa, np.zeros(len(fa), np.float32), fb, np.zeros(len(fb), np.float32)]
    moved = [np.zeros_like(value) for value in values]
    targets = labels.astype(np.float32)
    order = np.zeros(0, np.int64)
    for number in track(range(schedule.batches), "training", console=console):
        if len(order) < schedule.batch:
            order = np.concatenate([order, rng.permutation(len(inputs))])
        rows, order = order[: schedule.batch], order[schedule.batch :]
        gradients = _gradients(values, inputs[rows], targets[rows])
        rate = schedule.rate_at(number)
        for value, before, gradient in zip(values, moved, gradients, strict=True):
            decay = schedule.decay if value.ndim == 2 else 0.0
            step = np.float32(rate) * (gradient + np.float32(decay) * value)
            np.subtract(np.float32(schedule.momentum) * before, step, out=before)
            np.add(value, before, out=value)
    return Layers(values[0], values[1], values[2], values[3])


def _gradients(values: Sequence[Array32], x: Array32, labels: Array32) -> list[Array32]:
    """Of equation 1 by Fa, its bias, Fb and its bias."""
    fa, fa_bias, fb, fb_bias = values
    hidden = np.maximum(x @ fa.T + fa_bias, 0)
    _, by_score = cross_entropy(hidden @ fb.T + fb_bias, labels)
    by_score = by_score.astype(np.float32)
    by_hidden = (by_score @ fb) * (hidden > 0)
    return [by_hidden.T @ x, by_hidden.sum(axis=0), by_score.T @ hidden, by_score.sum(axis=0)]


def with_adaptation(classifier: Classifier, found: Adapted) -> Classifier:
    """The network with these layers in place of its last, or behind its convolutions."""
    layers = found.layers
    named = {
        f"{ADAPTATION[0]}.weight": layers.fa,
        f"{ADAPTATION[0]}.bias": layers.fa_bias,
        f"{ADAPTATION[1]}.weight": layers.fb,
        f"{ADAPTATION[1]}.bias": layers.fb_bias,
    }
    known = NETWORKS.get(classifier.name, classifier.network)
    return with_weights(classifier, known, {**classifier.weights, **named}, found.classes)


def save_adapted(found: Adapted, classifier: Classifier, path: Path) -> Classifier:
    """Write the network's weights with these layers, and the names of the classes.

    Raises:
        OutputError: the place cannot be written.
    """
    made = with_adaptation(classifier, found)
    tensors = {name: np.ascontiguousarray(value) for name, value in made.weights.items()}
    metadata = {
        "sightline_weights": "finetuned",
        "class_names": json.dumps(found.classes),
        "body": made.body_digest,
    }
    with whole_file(path) as part:
        part.write_bytes(save(tensors, metadata))
    return made
