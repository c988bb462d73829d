"""The papers' own way to fit their head: a linear layer on the whole map by stochastic gradient descent.

Batches of 2,048, a rate of 0.1 that falls tenfold every 10,000 iterations (Ebrahimpour & Noelle, section 4). The loss is the
mean over the batch of half the squared error of the four edges; the map is scaled to a mean squared norm of 1 over the
training set, which the rate needs and the papers leave open.
"""

import numpy as np
from numpy.typing import NDArray

from calib.heads.linear import Array64

BATCH = 2048
RATE = 0.1
FALLS_EVERY = 10_000


def fit_by_sgd(values: Array64, boxes: Array64, iterations: int = 30_000, seed: int = 0) -> tuple[Array64, Array64]:
    """(weight ``[4, D]``, bias ``[4]``) after plain SGD from zero.

    Every step adds a combination of training maps to the weights, so they stay one: ``W = A^T X``. The steps are taken on
    ``A`` (``[N, 4]``) with the maps' inner products, which is the same descent and much cheaper where D exceeds N.

    Args:
        values: maps ``[N, D]``.
        boxes: ``[N, 4]``.
        iterations: of a batch each.
        seed: decides the batches.
    """
    rng = np.random.default_rng(seed)
    scale = np.sqrt((values**2).sum(axis=1).mean())
    products = ((values / scale) @ (values / scale).T).astype(np.float32)
    combination, bias = np.zeros((len(values), 4), np.float32), boxes.mean(axis=0)
    size = min(BATCH, len(values))
    for step in range(iterations):
        rate = RATE * 0.1 ** (step // FALLS_EVERY)
        rows: NDArray[np.int64] = rng.choice(len(values), size, replace=False)
        residual = (products @ combination)[rows] + bias - boxes[rows]
        combination[rows] -= (rate / size) * residual
        bias = bias - rate * residual.mean(axis=0)
    weight = (combination.T.astype(np.float64) @ values) / scale**2
    return weight, bias
