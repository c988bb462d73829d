"""The papers' linear mapping from a sensitivity map to a box, fitted as it was published and in
closed form, to any number of images.

Ebrahimpour & Noelle, "Fast Object Localization via Sensitivity Analysis", section 2, equation 4:
one 4 x M matrix W and four biases w for all classes, which minimize the mean over images and over
the four coordinates of (B - (W s + w))^2. Maps are read from disk in parts, and are never in memory
all at once.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.heads.linear import Array64
from calib.papers.maps import AT_ONCE, Images, Map32
from engines.files import whole_file

BATCH = 2048
RATE = 0.1
FALLS_EVERY = 10_000
ITERATIONS = 30_000
"""Section 3: batches of 2,048, a rate of 0.1 that falls by 10 every 10,000 iterations. How many
iterations there were is not said.
"""
TOO_FAR = 1e6
MOST_BY_PRODUCTS = 12_000
"""Images whose products with each other are kept (0.6 GB); of more, maps are read again and again.
"""
STRENGTHS = tuple(10.0**power for power in range(-5, 4))
FOLDS = 5
SCALES = ("as they are", "unit length", "mean 1", "peak 1")


@dataclass(frozen=True)
class Mapping4:
    """A fitted mapping: W ``[4, M]`` and w ``[4]``; boxes are in fractions of width and height."""

    weight: Array64
    bias: Array64

    def boxes(self, maps: NDArray[np.float32]) -> Array64:
        """The boxes ``[N, 4]`` of maps ``[N, M]``, with edges in order and inside the image."""
        return in_order(maps @ self.weight.T + self.bias)


def in_order(boxes: Array64) -> Array64:
    """Boxes with their edges in order, cut to the image."""
    inside = np.clip(boxes, 0, 1)
    low = np.minimum(inside[..., :2], inside[..., 2:])
    return np.concatenate([low, np.maximum(inside[..., :2], inside[..., 2:])], axis=-1)


def products(one: Images, other: Images, aggregation: str, console: Console) -> NDArray[np.float32]:
    """The inner product of each map with each other, ``[N, K]``; kept on disk beside the maps."""
    words = f"{aggregation} {one.digests} {other.digests}".encode()
    path = one.store.folder / f"products_{hashlib.sha256(words).hexdigest()[:24]}.npy"
    if path.exists():
        found: NDArray[np.float32] = np.load(path)
        return found
    result = np.zeros((len(one), len(other)), np.float32)
    same = one.digests == other.digests
    parts = [slice(at, at + 4 * AT_ONCE) for at in range(0, len(one), 4 * AT_ONCE)]
    for part in track(parts, "products of maps", console=console):
        mine = one.maps(aggregation, range(len(one))[part])
        for where, theirs in other.chunks(aggregation):
            if same and where.stop <= part.start:
                continue  # known from the other side
            result[part, where] = mine @ theirs.T
            if same:
                result[where, part] = result[part, where].T
    with whole_file(path) as place, place.open("wb") as file:
        np.save(file, result)
    return result


@dataclass(frozen=True)
class Dual:
    """Equation 4 with a penalty on W, from the products of maps alone: W = A^T S for maps S.

    Several boxes of one image are one example of their mean box, as often as there are boxes: the
    same W minimizes both.

    Args:
        products: of the training maps, ``[N, N]``.
        boxes: the mean box of each image, ``[N, 4]``.
        counts: how many boxes it has.
    """

    products: NDArray[np.float32]
    boxes: Array64
    counts: Array64

    def solve(self, strength: float, rows: NDArray[np.int64]) -> tuple[Array64, Array64]:
        """Fit to some of the images.

        Args:
            strength: of the penalty, in parts of the mean squared length of the centred maps.
            rows: of the images.

        Returns:
            A ``[len(rows), 4]`` and w ``[4]``, for maps as they are.
        """
        k = self.products[np.ix_(rows, rows)].astype(np.float64)
        share = self.counts[rows] / self.counts[rows].sum()
        to_mean = k @ share
        k -= to_mean[:, None] + to_mean[None] - share @ to_mean
        mean_box = share @ self.boxes[rows]
        penalty = strength * float(share @ np.diag(k)) / share
        # scaled, so that the system is symmetric and well posed where an image has many boxes
        root = np.sqrt(share)
        system = root[:, None] * k * root
        system[np.diag_indices(len(rows))] += penalty * share
        alpha = root[:, None] * np.linalg.solve(
            system, root[:, None] * (self.boxes[rows] - mean_box)
        )
        alpha -= share[:, None] * alpha.sum(axis=0)  # centred maps in terms of maps
        return alpha, mean_box - alpha.T @ to_mean

    def found(self, strength: float, rows: NDArray[np.int64], held: NDArray[np.int64]) -> Array64:
        """The boxes of some images by a mapping that was fitted to others."""
        alpha, bias = self.solve(strength, rows)
        return in_order(self.products[np.ix_(held, rows)] @ alpha + bias)

    def strength(self, score: Callable[[Array64, NDArray[np.int64]], float]) -> float:
        """The penalty whose held-out boxes score best, over ``FOLDS`` parts of the images.

        Args:
            score: of boxes, and of the rows of their images; the higher the better.
        """
        order = np.random.default_rng(0).permutation(len(self.boxes))
        parts = np.array_split(order, FOLDS)
        totals = dict.fromkeys(STRENGTHS, 0.0)
        for place, held in enumerate(parts):
            rows = np.concatenate(parts[:place] + parts[place + 1 :])
            for each in STRENGTHS:
                totals[each] += score(self.found(each, rows, held), held)
        return max(STRENGTHS, key=lambda each: totals[each])


def descended(
    products: NDArray[Any],
    rows: NDArray[np.int64],
    boxes: Array64,
    console: Console | None = None,
    iterations: int | None = None,
) -> tuple[Array64, Array64]:
    """Plain stochastic gradient descent on equation 4, from W = 0 and w = 0, as published.

    Args:
        products: of the training maps, ``[N, N]``.
        rows: the map of each example, ``[B]``.
        boxes: of each example, ``[B, 4]``.
        console: for progress.
        iterations: the number of steps; ``ITERATIONS`` when None.

    Returns:
        A ``[N, 4]`` with W = A^T S for maps S, and w ``[4]``; not finite where the rate is too
        large for maps of this size.
    """
    as_they_are = np.ones((1, len(products)))
    combinations, biases = descended_by(as_they_are, products, rows, boxes, console, iterations)
    return combinations[0], biases[0]


def descended_by(
    factors: Array64,
    products: NDArray[Any],
    rows: NDArray[np.int64],
    boxes: Array64,
    console: Console | None = None,
    iterations: int | None = None,
) -> tuple[Array64, Array64]:
    """``descended`` for maps in several scales at once, which share batches and products.

    One step moves W by -rate times the gradient of the mean over the batch and over the four
    coordinates of the squared error, which is half of the sum over the error times the map. All
    steps are sums of maps, so that W = A^T S; the steps are taken on A with the products of maps.

    Args:
        factors: by what each scale multiplies each map, ``[S, N]``.
        products: of the training maps, ``[N, N]``, without factors.
        rows: the map of each example, ``[B]``.
        boxes: of each example, ``[B, 4]``.
        console: for progress.
        iterations: the number of steps; ``ITERATIONS`` when None.

    Returns:
        A ``[S, N, 4]`` for maps without factors, and w ``[S, 4]``.
    """
    rng = np.random.default_rng(0)
    size, scales = min(BATCH, len(boxes)), len(factors)
    combination, bias = np.zeros((len(products), scales, 4)), np.zeros((scales, 4))
    quiet = console or Console(quiet=True)
    for step in track(range(iterations or ITERATIONS), "gradient descent", console=quiet):
        far = ~(np.abs(bias).max(axis=1) < TOO_FAR)
        bias[far], combination[:, far] = np.nan, 0
        if far.all():
            break
        batch = rng.choice(len(boxes), size, replace=False)
        seen, places = np.unique(rows[batch], return_inverse=True)
        columns = combination.reshape(len(products), -1).astype(products.dtype)
        found = (products[seen] @ columns).reshape(len(seen), scales, 4)
        by_map = factors.T[seen, :, None]
        error = (by_map * found)[places] + bias - boxes[batch, None]
        rate = RATE * 0.1 ** (step // FALLS_EVERY) * 2 / 4
        total = np.zeros_like(found, dtype=np.float64)
        np.add.at(total, places, error)
        combination[seen] -= rate / size * by_map * total
        bias = bias - rate * error.mean(axis=0)
    far = ~np.isfinite(bias).all(axis=1)
    combination[:, far] = np.nan
    return combination.transpose(1, 0, 2), bias


def streamed(
    images: Images,
    aggregation: str,
    boxes: Array64,
    counts: Array64,
    strength: float,
    console: Console,
    rounds: int = 60,
) -> Mapping4:
    """Equation 4 with the penalty of ``Dual``, for any number of images: conjugate gradients
    (Hestenes & Stiefel 1952), each round of which reads every map once.

    Args:
        images: the training images.
        aggregation: of their maps.
        boxes: the mean box of each image, ``[N, 4]``.
        counts: how many boxes it has.
        strength: of the penalty.
        console: for progress.
        rounds: at most so many.
    """
    share = counts / counts.sum()
    mean_box = share @ boxes
    width = images.maps(aggregation, [0]).shape[1]
    mean, moment, square = np.zeros(width), np.zeros((4, width)), 0.0
    for part, maps in images.chunks(aggregation):
        wide = maps.astype(np.float64)
        mean += share[part] @ wide
        square += float(share[part] @ (wide**2).sum(axis=1))
        moment += (share[part, None] * (boxes[part] - mean_box)).T @ wide
    penalty = strength * (square - float(mean @ mean))

    def curved(weight: Array64) -> Array64:
        total = penalty * weight
        for part, maps in images.chunks(aggregation):
            wide = maps - mean
            total += (share[part, None] * (wide @ weight.T)).T @ wide
        return total

    weight = np.zeros((4, len(mean)))
    rest = moment
    way, size = rest.copy(), (rest**2).sum(axis=1)
    first = size.copy()
    for _ in track(range(rounds), "fitting", console=console):
        if np.all(size <= 1e-20 * first):
            break
        bent = curved(way)
        step = size / np.maximum((way * bent).sum(axis=1), 1e-300)
        weight += step[:, None] * way
        rest -= step[:, None] * bent
        before, size = size, (rest**2).sum(axis=1)
        way = rest + (size / np.maximum(before, 1e-300))[:, None] * way
    return Mapping4(weight, mean_box - weight @ mean)


def scaled(images: Images, aggregation: str, scale: str) -> Array64:
    """By what each map is multiplied, ``[N]``, so that it is as one of ``SCALES`` says."""
    factors = []
    for _, maps in images.chunks(aggregation):
        if scale == "unit length":
            size = np.sqrt((maps.astype(np.float64) ** 2).sum(axis=1))
        elif scale == "mean 1":
            size = maps.astype(np.float64).mean(axis=1)
        elif scale == "peak 1":
            size = maps.max(axis=1).astype(np.float64)
        else:
            size = np.ones(len(maps))
        factors.append(1 / np.maximum(size, 1e-30))
    return np.concatenate(factors)


def coarse(images: Images, aggregation: str, block_px: int) -> Map32:
    """The maps averaged over blocks of pixels, ``[N, cells * cells]``; what is left over at the
    right and below is cut off.
    """
    side = images.store.classifier.size_px
    cells = side // block_px
    kept, found = cells * block_px, []
    for _, maps in images.chunks(aggregation):
        square = maps.reshape(-1, side, side)[:, :kept, :kept]
        blocks = square.reshape(-1, cells, block_px, cells, block_px)
        found.append(blocks.mean(axis=(2, 4)).reshape(len(maps), -1))
    return np.concatenate(found)
