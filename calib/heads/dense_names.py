"""Fits what a dense head says of its boxes: their names, and how sure they are, on images that its
layers were not fitted on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.confidence import RatedBoxes, fit_confidence_model
from calib.heads.linear import Array64
from engines.boxes import distinct, iou
from engines.confidence import ConfidenceModel, softmax
from engines.dense import ALIKE
from engines.dense_names import CUES, Naming

NO_IOU, FULL_IOU = 0.25, 0.55
"""A box with less of an IoU is background, one with more is its object's; between them it is in
part.
"""
RIGHT_NAMES, FINER_FROM = 0.95, 0.5
"""Names are shown from the least probability on from which so many of them are right. On an object
that has none of the names each is wrong.
"""
EMPTY_SHOWN, MOST_LOST = 0.05, 0.04
"""See ``Sureness.shown_from``."""
ENOUGH = 0.5
TRUST_PENALTY = 100.0
NEVER = -1e3
"""The logit of a name that no box has."""
NEWTON_STEPS, MOST_STEP = 50, 5.0
FEWEST_EMPTY = 50
BOXES = 10
"""The best distinct boxes of an image, whose names are looked at."""
RATED_BOXES = 3
"""The confidence is fitted to the first of these. Of further ones most are wrong: a model that is
fitted to them, too, tells less well where nothing is.
"""


@dataclass(frozen=True)
class Answer:
    """The candidates of an image by layers that were not fitted on it.

    Attributes:
        boxes: corrected, in the network's square, ``[K, 4]``.
        expected: their IoU, ``[K]``.
        objectness: ``[K]``.
        scores: of the C names and the background, ``[K, C + 1]``.
        true: boxes of the objects, ``[B, 4]``.
        classes: which of the names each has, -1 for none of them, ``[B]``.
        kind: of image.
    """

    boxes: Array64
    expected: Array64
    objectness: Array64
    scores: Array64
    true: Array64
    classes: NDArray[np.int64]
    kind: str = ""
    overlaps: Array64 = field(init=False)
    """The IoU of each box with the nearest object, ``[K]``."""
    wanted: NDArray[np.int64] = field(init=False)
    """Which of the names that object has, -1 where it has none of them, ``[K]``."""

    def __post_init__(self) -> None:
        wanted = np.full(len(self.boxes), -1)
        if len(self.true):
            wanted = self.classes[iou(self.boxes[:, None], self.true[None]).argmax(axis=1)]
        object.__setattr__(self, "overlaps", best_iou(self.boxes, self.true))
        object.__setattr__(self, "wanted", wanted)

    def best(self) -> NDArray[np.int64]:
        """The places of the best distinct boxes."""
        return distinct(self.boxes, self.expected)[:BOXES]


def best_iou(boxes: Array64, true: Array64) -> Array64:
    """The IoU of each box with the nearest true one; 0 where there is none."""
    if not len(true):
        return np.zeros(len(boxes))
    return np.asarray(iou(boxes[:, None], true[None]).max(axis=1))


def name_targets(
    boxes: Array64, true: Array64, classes: NDArray[np.int64], count: int
) -> NDArray[np.float32]:
    """What a linear layer should say of boxes: for each of the names and the background the share
    that it is, ``[K, count + 1]``. An object without a name is neither.
    """
    targets = np.zeros((len(boxes), count + 1), np.float32)
    if not len(true):
        targets[:, -1] = 1
        return targets
    overlaps = iou(boxes[:, None], true[None])
    nearest = overlaps.argmax(axis=1)
    share = np.clip((overlaps.max(axis=1) - NO_IOU) / (FULL_IOU - NO_IOU), 0, 1)
    mine = classes[nearest]
    named = np.flatnonzero(mine >= 0)
    targets[named, mine[named]] = share[named]
    targets[:, -1] = 1 - share
    return targets


@dataclass(frozen=True)
class Names:
    """The names of boxes while they are fitted: some are learned, the others a fitted head has.

    Attributes:
        names: of C classes.
        learned: which of the C + 1 scores are, bool ``[C + 1]``; the last is the background's.
        factor, offsets: logits are the learned scores times the factor plus the offsets
            ``[C + 1]``, and the others as they are.
    """

    names: tuple[str, ...]
    learned: NDArray[np.bool_]
    factor: float = 1.0
    offsets: Array64 = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, names: Sequence[str], fitted: Naming | None) -> "Names":
        """Those of a fitted layer, and of those classes which it does not know."""
        if fitted is None:
            return cls(tuple(names), np.ones(len(names) + 1, np.bool_))
        more = tuple(name for name in names if name not in fitted.names)
        known = np.zeros(len(fitted.names), np.bool_)
        learned = np.concatenate([known, np.ones(len(more), np.bool_), [False]])
        return cls((*fitted.names, *more), learned)

    @property
    def before(self) -> "Names":
        """The same for a head that has not learned the new ones: no box is called so."""
        if self.learned.all():
            return self
        return replace(self, offsets=np.where(self.learned, NEVER, 0.0))

    def logits(self, scores: Array64) -> Array64:
        """Of scores ``[..., C + 1]``."""
        if not len(self.offsets):
            return scores
        return np.where(self.learned, self.factor * scores, scores) + self.offsets

    def probabilities(self, scores: Array64) -> Array64:
        """Of scores ``[..., C + 1]``."""
        return softmax(self.logits(scores))

    def sharpened(self, answers: Sequence[Answer]) -> "Names":
        """The same with the factor and the offsets that make them probabilities.

        That is a multinomial logistic regression of one factor for all learned scores, by Newton's
        method. The offsets are held near 0: a rare class needs many boxes to be moved.
        """
        if not self.learned.any() or not answers:
            return self
        scores = np.concatenate([each.scores for each in answers])
        overlaps = np.concatenate([each.overlaps for each in answers])
        wanted = np.concatenate([each.wanted for each in answers])
        of_object = (overlaps > CORLOC_IOU) & (wanted >= 0)
        sure = of_object | (overlaps < NO_IOU)
        hot = np.eye(len(self.learned))[np.where(of_object, wanted, -1)[sure]]
        scores = scores[sure]
        x, places = np.where(self.learned, scores, 0.0), np.flatnonzero(self.learned)
        hold = np.array([1e-3, *[1.0] * len(places)])
        values = np.array([5.0, *[0.0] * len(places)])
        found = self
        for _ in range(NEWTON_STEPS):
            offsets = np.zeros(len(self.learned))
            offsets[places] = values[1:]
            found = replace(self, factor=float(values[0]), offsets=offsets)
            p = found.probabilities(scores)
            wrong, mean = p - hot, (p * x).sum(axis=1)
            slope = np.concatenate([[(wrong * x).sum()], wrong.sum(axis=0)[places]])
            cross = (p * (x - mean[:, None])).sum(axis=0)[places]
            both = (np.diag(p.sum(axis=0)) - p.T @ p)[np.ix_(places, places)]
            square = np.array([[(p * x**2).sum() - (mean**2).sum()]])
            curvature = np.block([[square, cross[None]], [cross[:, None], both]]) + np.diag(hold)
            step = np.linalg.solve(curvature, slope + hold * values)
            values = values - step * min(1.0, MOST_STEP / np.abs(step).max())
            if np.abs(step).max() < 1e-6:
                break
        return found

    def evidence(self, scores: Array64) -> Array64:
        """How far the best name's logit is above the background's, ``[K]``."""
        logits = self.logits(scores)
        return np.asarray(logits[:, :-1].max(axis=1) - logits[:, -1])

    def layer(
        self, weights: Array64, fitted: Naming | None, answers: Sequence[Answer]
    ) -> tuple[Naming, dict[str, float]]:
        """The layer of a head, and how often its names are right.

        Args:
            weights: of the scores by layers of all images, ``[D + 1, C + 1]``, the bias last.
            fitted: what it started from.
            answers: by layers that were not fitted on those images.
        """
        logits = np.where(self.learned, self.factor * weights, weights).astype(np.float32)
        bias = logits[-1] + (self.offsets if len(self.offsets) else 0.0)
        kept = [each.best() for each in answers]
        kept = [
            some[each.overlaps[some] > CORLOC_IOU] for each, some in zip(answers, kept, strict=True)
        ]
        scores, wanted = (
            np.concatenate([part[some] for part, some in zip(parts, kept, strict=True)])
            for parts in ([e.scores for e in answers], [e.wanted for e in answers])
        )
        shares = self.probabilities(scores)[:, :-1]
        best, probability = shares.argmax(axis=1), shares.max(axis=1)
        right = best == wanted
        least = fitted.shown_from if fitted else least_right(probability, right, RIGHT_NAMES)
        right, shown = right[wanted >= 0], probability[wanted >= 0] >= least
        figures = {
            "named": round(float(shown.mean()) if len(shown) else 0.0, 4),
            "names_right": round(float(right[shown].mean()) if shown.any() else 0.0, 4),
        }
        naming = Naming(self.names, logits[:-1].T.copy(), bias.astype(np.float32), least)
        if fitted:
            naming = replace(naming, finer=fitted.finer, finer_from=fitted.finer_from)
        return naming, figures


def least_right(probability: Array64, right: NDArray[np.bool_], share: float) -> float:
    """The least probability from which on at least that share is right, of all that are as probable
    or more; 1 where there is none, and at most ``ENOUGH`` where it is so of all.
    """
    order = np.argsort(-probability, kind="stable")
    rights = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(rights >= share)
    if not len(enough):
        return 1.0
    least = float(probability[order[enough[-1]]])
    return min(least, ENOUGH) if enough[-1] == len(order) - 1 else least


@dataclass(frozen=True)
class Sureness:
    """How sure boxes are, as the graph computes it.

    Attributes:
        names: give the evidence.
        trust: of ``engines.dense_names.CUES``; None in heads from before there was one.
        certainty: see ``DenseHead.certainty``.
        side_px, least_px: of the square, and the shortest that a side counts as.
    """

    names: Names
    trust: ConfidenceModel | None
    certainty: tuple[float, float]
    side_px: int
    least_px: float

    def __call__(self, answer: Answer) -> Array64:
        """The confidences of an image's boxes, ``[K]``."""
        if self.trust is None:
            slope, offset = self.certainty
            return np.asarray(1 / (1 + np.exp(-(slope * answer.expected + offset))))
        return np.array([self.trust(row) for row in self.cues(answer).tolist()])

    def cues(self, answer: Answer) -> Array64:
        """What the confidence is read of, ``[K, 7]``, see ``engines.dense_names.append_cues``."""
        sizes = np.maximum(answer.boxes[:, 2:] - answer.boxes[:, :2], self.least_px)
        logs = np.log(sizes / self.side_px)
        alike = (iou(answer.boxes[:, None], answer.boxes[None]) > ALIKE).sum(axis=1)
        columns = (
            answer.expected,
            answer.objectness,
            logs.sum(axis=1),
            np.abs(logs[:, 0] - logs[:, 1]),
            self.names.evidence(answer.scores),
            np.full(len(sizes), answer.expected.max()),
            alike,
        )
        return np.stack(columns, axis=1).astype(np.float64)

    def fitted(self, answers: Sequence[Answer]) -> "Sureness":
        """The same with a trust that is fitted to the first distinct boxes of each image."""
        cues, right = list[Array64](), list[NDArray[np.bool_]]()
        for each in answers:
            kept = each.best()[:RATED_BOXES]
            cues.append(self.cues(each)[kept])
            right.append(each.overlaps[kept] > CORLOC_IOU)
        hits = np.concatenate(right).astype(np.float64)
        rated = RatedBoxes(np.concatenate(cues), hits, np.ones(len(hits)))
        trust = fit_confidence_model(rated, CUES, TRUST_PENALTY, pairs=True)
        return replace(self, trust=trust)

    def shown_from(self, answers: Sequence[Answer]) -> float | None:
        """The confidence from which on boxes should be shown: at most ``EMPTY_SHOWN`` of the images
        without objects then have a box, unless the kinds of images would on average lose the right
        first box of more than ``MOST_LOST`` of theirs. None where too few images are without
        objects.
        """
        empty, right = list[float](), dict[str, list[float]]()
        for each in answers:
            confidences = self(each)
            best = int(confidences.argmax())
            if not len(each.true):
                empty.append(float(confidences[best]))
                continue
            hit = each.overlaps[best] > CORLOC_IOU
            right.setdefault(each.kind, []).append(confidences[best] if hit else 1.0)
        if len(empty) < FEWEST_EMPTY:
            return None
        limits, weights = (
            np.concatenate(parts)
            for parts in (
                [*right.values()],
                [np.full(len(each), 1 / len(each) / len(right)) for each in right.values()],
            )
        )
        order = np.argsort(limits)
        lost = np.cumsum(weights[order])
        kept = limits[order[min(int((lost <= MOST_LOST).sum()), len(order) - 1)]]
        least = min(float(np.quantile(empty, 1 - EMPTY_SHOWN)), float(kept))
        return math.ceil(1000 * least) / 1000


def with_finer(naming: Naming, finer: Mapping[str, Sequence[int]], classes: int) -> Naming:
    """The layer that knows which classes of the network are kinds of its names.

    Args:
        naming: the layer.
        finer: classes of the network by name.
        classes: how many the network has.
    """
    kinds = np.full(classes, -1, np.int64)
    for name, some in finer.items():
        kinds[list(some)] = naming.names.index(name)
    return replace(naming, finer=kinds, finer_from=FINER_FROM)
