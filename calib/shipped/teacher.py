"""A teacher's opinion of images: what the compact network is distilled from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.shipped.optimise import UNKNOWN, Examples, Images, Lessons, random_crop, resized
from engines.backends.openvino import OpenVinoEngine
from engines.classifiers import Classifier
from engines.features import area_matrix
from engines.graph import Graph
from engines.preprocess import IMAGE, append_preprocessing

BATCH = 16
ATTENTIVE_LAYERS = ("fire8", "fire9")
"""SqueezeNet's layers that teach the student's ``calib.shipped.optimise.ATTENTIVE_LAYERS``, in that order."""


def teaching_engine(classifier: Classifier, batch: int = BATCH) -> OpenVinoEngine:
    """No backward pass: uint8 BGR images to float32 ``scores`` before any softmax, and an attention map per layer.

    Attention is the mean square over channels (Zagoruyko & Komodakis 2017, section 3.1, F with p = 2), ``[N, h, w]``.
    """
    graph = Graph()
    _, x = append_preprocessing(graph, batch, classifier.size_px, classifier.preprocessing)
    forward = classifier.append(graph, x)
    graph.output(forward.scores, "scores")
    for layer in ATTENTIVE_LAYERS:
        square = graph.add("Mul", forward.layers[layer], forward.layers[layer], hint=f"{layer}_square")
        graph.output(graph.add("ReduceMean", square, graph.constant([1], np.int64), keepdims=0), f"attention_{layer}")
    return OpenVinoEngine(graph.model())


def taught_crops(
    photos: Sequence[Images],
    teacher: Classifier,
    per_photo: int,
    side_px: int,
    attention_sides: Sequence[int],
    console: Console,
    labels: NDArray[np.int64] | None = None,
    smallest: float = 0.15,
    seed: int = 0,
) -> Examples:
    """Random crops of every photo with the teacher's lessons; the first crop of each is the whole photo.

    Args:
        photos: BGR images of any size.
        teacher: sees each crop at its own input size.
        per_photo: crops of each photo.
        side_px: at which crops are kept.
        attention_sides: of the student's maps, to which the teacher's are averaged.
        console: for progress.
        labels: of each photo, where they are known.
        smallest: smallest area of a crop, as a share of the photo.
        seed: decides the crops.
    """
    engine = teaching_engine(teacher)
    jobs = [(index, number) for index in range(len(photos)) for number in range(per_photo)]
    crops = np.empty((len(jobs), side_px, side_px, 3), np.uint8)
    scores = np.empty((len(jobs), engine.outputs[0].shape[1]), np.float16)
    attention = [np.empty((len(jobs), side, side), np.float16) for side in attention_sides]
    feed = np.zeros(engine.inputs[0].shape, np.uint8)
    for start in track(range(0, len(jobs), BATCH), description="teacher", console=console):
        chunk = jobs[start : start + BATCH]
        for place, (index, number) in enumerate(chunk):
            rng = np.random.default_rng((seed, index, number))
            if number:
                feed[place] = random_crop(photos[index], teacher.size_px, smallest, rng)
                crops[start + place] = resized(feed[place], side_px)
            else:  # the student's copy from the photo itself: a detour over the teacher's size would blur small images
                feed[place] = resized(photos[index], teacher.size_px)
                crops[start + place] = resized(photos[index], side_px)
        said, rows = engine.infer({IMAGE: feed}), slice(start, start + len(chunk))
        scores[rows] = said["scores"][: len(chunk)]
        for kept, layer in zip(attention, ATTENTIVE_LAYERS, strict=True):
            kept[rows] = _averaged(said[f"attention_{layer}"], kept.shape[1])[: len(chunk)]
    known = np.repeat(np.full(len(photos), UNKNOWN) if labels is None else labels, per_photo)
    return Examples(crops, known.astype(np.int64), Lessons(scores, tuple(attention)))


def _averaged(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps ``[N, h, w]`` averaged to ``[N, side, side]`` and scaled to a largest value of 1."""
    small = area_matrix(maps.shape[1], side) @ maps @ area_matrix(maps.shape[2], side).T
    return np.asarray(small / np.maximum(small.max(axis=(1, 2), keepdims=True), 1e-12))
