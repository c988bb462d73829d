"""A teacher's opinion of random crops: what the compact network is distilled from."""

from collections.abc import Sequence

import numpy as np
from rich.progress import track

from calib.optimise import Images, Soft, random_crop, resized
from engines.backends.openvino import OpenVinoEngine
from engines.classifiers import Classifier
from engines.graph import Graph
from engines.preprocess import IMAGE, append_preprocessing

BATCH = 16


def scoring_engine(classifier: Classifier, batch: int = BATCH) -> OpenVinoEngine:
    """The classifier alone, no backward pass: uint8 BGR images to float32 scores before any softmax."""
    graph = Graph()
    _, x = append_preprocessing(graph, batch, classifier.size_px, classifier.preprocessing)
    graph.output(classifier.append(graph, x).scores, "scores")
    return OpenVinoEngine(graph.model())


def scored_crops(
    photos: Sequence[Images], teacher: Classifier, per_photo: int, side_px: int, smallest: float = 0.15, seed: int = 0
) -> Soft:
    """Random crops of every photo with the teacher's scores; the first crop of each is the whole photo.

    Args:
        photos: BGR images of any size.
        teacher: sees each crop at its own input size.
        per_photo: crops of each photo.
        side_px: the student's input side, at which crops are kept.
        smallest: smallest area of a crop, as a share of the photo.
        seed: decides the crops.
    """
    engine = scoring_engine(teacher)
    jobs = [(index, number) for index in range(len(photos)) for number in range(per_photo)]
    crops = np.empty((len(jobs), side_px, side_px, 3), np.uint8)
    scores = np.empty((len(jobs), engine.outputs[0].shape[1]), np.float16)
    feed = np.zeros(engine.inputs[0].shape, np.uint8)
    for start in track(range(0, len(jobs), BATCH), description="teacher"):
        chunk = jobs[start : start + BATCH]
        for place, (index, number) in enumerate(chunk):
            rng = np.random.default_rng((seed, index, number))
            if number:
                large: Images = random_crop(photos[index], teacher.size_px, smallest, rng)
            else:
                large = resized(photos[index], teacher.size_px)
            feed[place] = large
            crops[start + place] = resized(large, side_px)
        scores[start : start + len(chunk)] = engine.infer({IMAGE: feed})["scores"][: len(chunk)]
    return Soft(crops, scores)
