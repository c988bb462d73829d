"""The confidence of a tracked box: a logistic model on eleven numbers, fitted to how often such
boxes were right.

"Right" is an IoU over 0.5 with the truth. The model was fitted by ``calib.research.confidence`` on
clips of training photos.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.boxes import overlap
from engines.errors import ModelError
from engines.install import restore
from engines.reading import read_json_object
from realtime.frames import BoxPx
from realtime.tracking.optical_flow import Map
from realtime.tracking.vote_grid import MOST, VoteGrid

SHIPPED = Path(__file__).parent / "trust.json"
SETTLED_FRAMES = 12
RING = 1.6
Cues = NDArray[np.float64]
CUES = (
    "inside",
    "contrast",
    "filled",
    "elsewhere",
    "agreement",
    "score",
    "steadiness",
    "size",
    "moves",
    "settled",
    "at_edge",
)
PAIRS = np.triu_indices(len(CUES))


@dataclass(frozen=True)
class ConfidenceModel:
    """Probability that a box is right, from its cues.

    Attributes:
        mean, scale: of each cue in the training set.
        weight: of each standardized cue and of each product of two.
        bias: what is left.
    """

    mean: Cues
    scale: Cues
    weight: Cues
    bias: float

    def __call__(self, cues: Cues) -> float:
        """0..1."""
        return float(
            1 / (1 + np.exp(-(expanded((cues - self.mean) / self.scale) @ self.weight + self.bias)))
        )


def expanded(standard: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cues ``[..., S]`` and the products of each two of them, held within 3 deviations."""
    held = np.clip(standard, -3, 3)
    return np.concatenate([held, held[..., PAIRS[0]] * held[..., PAIRS[1]]], axis=-1)


@lru_cache(maxsize=2)
def load_confidence_model(path: Path = SHIPPED) -> ConfidenceModel:
    """Read a model.

    Raises:
        ModelError: it is missing, damaged, or of other signs.
    """
    try:
        stored = read_json_object(path, "trust")
        if tuple(stored["signs"]) != CUES:
            raise ModelError(
                f"{path} reads other signs than this version: make it again with 'python -m"
                " calib.research.confidence'"
            )
        mean, scale, weight = (
            np.array(stored[name], np.float64) for name in ("mean", "scale", "weight")
        )
        bias = float(stored["bias"])
        if mean.shape != scale.shape or not (
            np.isfinite([*mean, *scale, *weight, bias]).all() and (scale > 0).all()
        ):
            raise ValueError("its numbers are not finite, or a scale is not positive")
        return ConfidenceModel(mean, scale, weight, bias)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error or type(error).__name__}; {restore(path)}"
        ) from error


def cues_of(
    vote_grid: VoteGrid,
    votes: Map,
    evidence: Map,
    box_px: BoxPx,
    said_px: BoxPx,
    expected_px: BoxPx | None,
    score: float,
    age: int,
) -> Cues:
    """The cues of a box, in the order of ``CUES``.

    Args:
        vote_grid: that the votes belong to.
        votes: after the answer.
        evidence: of motion, this frame's.
        box_px: the box that is judged.
        said_px: what the head said.
        expected_px: the last box, carried along; None without one.
        score: of the class.
        age: frames since the object was found.
    """
    x0, y0, x1, y1 = vote_grid.cells(box_px)
    h, w = votes.shape
    rx, ry = round((x1 - x0) * (RING - 1) / 2) + 1, round((y1 - y0) * (RING - 1) / 2) + 1
    around = slice(max(0, y0 - ry), y1 + ry), slice(max(0, x0 - rx), x1 + rx)
    mine, near = votes[y0:y1, x0:x1], votes[around]
    ring = (float(near.sum()) - float(mine.sum())) / max(near.size - mine.size, 1)
    moving = evidence[y0:y1, x0:x1]
    ring_moving = (float(evidence[around].sum()) - float(moving.sum())) / max(
        near.size - moving.size, 1
    )
    for_it, for_any = float(np.maximum(mine, 0).sum()), float(np.maximum(votes, 0).sum())
    edges = [x0 == 0, y0 == 0, x1 == w, y1 == h]
    return np.array(
        [
            float(mine.mean()) / MOST,
            (float(mine.mean()) - ring) / MOST,
            float((mine > 0).mean()),
            1 - for_it / max(for_any, 1e-6),
            overlap(box_px, said_px),
            np.sqrt(score),
            0.0 if expected_px is None else overlap(box_px, expected_px),
            np.log(mine.size / votes.size),
            float(moving.mean()) - ring_moving,
            min(age, SETTLED_FRAMES) / SETTLED_FRAMES,
            sum(edges) / 4,
        ],
        np.float64,
    )
