"""The cues of a tracked box, and the shipped confidence model that reads them.

The model is fitted by ``calib.research.confidence`` on clips of training photos.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from engines.boxes import overlap
from engines.confidence import ConfidenceModel, confidence_model_of
from engines.errors import ModelError, restore
from engines.files import read_json_object
from realtime.frames import BoxPx
from realtime.tracking.optical_flow import Map
from realtime.tracking.vote_grid import MOST, VoteGrid

SHIPPED = Path(__file__).parent / "confidence.json"
SETTLED_FRAMES = 12
RING = 1.6
"""The ring around a box ends where a box this many times as large would."""
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
"""The cues of a tracked box, see ``cues_of``."""
CuesToConfidence = Callable[[Sequence[float]], float]
"""Gives the probability that a box is right from its cues. Usually it is a ``ConfidenceModel``."""


@lru_cache(maxsize=2)
def load_confidence_model(path: Path = SHIPPED) -> ConfidenceModel:
    """Read the confidence model of tracked boxes.

    Raises:
        ModelError: the file is missing or damaged, or its model needs other cues.
    """
    try:
        model = confidence_model_of(read_json_object(path, "confidence model"), CUES)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error or type(error).__name__}; {restore(path)}"
        ) from error
    if model is None:
        raise ModelError(
            f"{path} needs other cues than this version has: make it again with 'python -m"
            " calib.research.confidence'"
        )
    return model


def cues_of(
    vote_grid: VoteGrid,
    votes: Map,
    evidence: Map,
    box_px: BoxPx,
    said_px: BoxPx,
    expected_px: BoxPx | None,
    score: float,
    age: int,
) -> list[float]:
    """The cues of a tracked box, in the order of ``CUES``.

    Args:
        vote_grid: the grid that the votes belong to.
        votes: the votes after the answer of this frame, ``[h, w]``.
        evidence: the evidence of motion in this frame, ``[h, w]``.
        box_px: the box whose cues are computed.
        said_px: the box that the head found.
        expected_px: the last box, propagated to this frame; None where there is none.
        score: the score of the class.
        age: frames since the object was found.
    """
    x0, y0, x1, y1 = vote_grid.cells(box_px)
    h, w = votes.shape
    rx = round((x1 - x0) * (RING - 1) / 2) + 1
    ry = round((y1 - y0) * (RING - 1) / 2) + 1
    around = slice(max(0, y0 - ry), y1 + ry), slice(max(0, x0 - rx), x1 + rx)
    mine = votes[y0:y1, x0:x1]
    near = votes[around]
    ring_size = max(near.size - mine.size, 1)
    ring = (float(near.sum()) - float(mine.sum())) / ring_size
    moving = evidence[y0:y1, x0:x1]
    ring_moving = (float(evidence[around].sum()) - float(moving.sum())) / ring_size
    votes_for_box = float(np.maximum(mine, 0).sum())
    votes_in_all = float(np.maximum(votes, 0).sum())
    edges = [x0 == 0, y0 == 0, x1 == w, y1 == h]
    return [
        float(mine.mean()) / MOST,
        (float(mine.mean()) - ring) / MOST,
        float((mine > 0).mean()),
        1 - votes_for_box / max(votes_in_all, 1e-6),
        overlap(box_px, said_px),
        math.sqrt(max(score, 0.0)),
        0.0 if expected_px is None else overlap(box_px, expected_px),
        math.log(mine.size / votes.size),
        float(moving.mean()) - ring_moving,
        min(age, SETTLED_FRAMES) / SETTLED_FRAMES,
        sum(edges) / 4,
    ]
