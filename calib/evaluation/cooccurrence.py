"""Which classes are seen together, and what that says of a doubtful detection.

Bency et al., "Weakly Supervised Localization using Deep Feature Maps" (2016): a detection's score is raised by those of the
other classes in its image, as far as these come with it in a labelled set: s_i + alpha * sum over j of p(b_i | b_j) s_j.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from calib.data.datasets import Sample
from calib.evaluation.detection import Predicted

ALPHA = 0.1

Given = Mapping[str, Mapping[str, float]]
"""p(i | j) as ``given[j][i]``."""


def conditional_probabilities(samples: Sequence[Sample]) -> Given:
    """p(i | j): of the images with class j, the share that has class i too; never of a class with itself."""
    seen = [{truth.class_name for truth in sample.truths} for sample in samples]
    names = sorted(set().union(*seen)) if seen else []
    counts = {j: sum(j in image for image in seen) for j in names}
    return {j: {i: sum(i in image and j in image for image in seen) / counts[j] for i in names if i != j} for j in names}


def rescored(predicted: Sequence[Predicted], given: Given, alpha: float = ALPHA) -> list[Predicted]:
    """The same detections, each with alpha * sum p(b_i | b_j) s_j added, over the other classes' best scores in its image."""
    best: dict[str, dict[str, float]] = {}
    for each in predicted:
        scores = best.setdefault(each.image, {})
        scores[each.class_name] = max(each.score, scores.get(each.class_name, 0.0))

    def support(each: Predicted) -> float:
        others = ((name, score) for name, score in best[each.image].items() if name != each.class_name)
        return sum(given.get(name, {}).get(each.class_name, 0.0) * score for name, score in others)

    return [replace(each, score=each.score + alpha * support(each)) for each in predicted]
