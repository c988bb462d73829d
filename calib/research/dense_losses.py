"""The losses that train the layers of a dense head by gradient descent, see
``calib.research.dense_descent``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from calib.heads.dense_layers import (
    CORRECTED_AGAIN_IOU,
    CORRECTED_IOU,
    JITTER,
    JITTERED,
    MIDDLE,
    OBJECT_IOU,
    SIZE_RANGES,
)
from calib.heads.dense_names import FULL_IOU, NO_IOU
from calib.heads.dense_scenes import IGNORED_IOU, MOSTLY
from engines.backends.torch_dense import TorchDenseHead, ious, picked
from engines.dense import MOST_CORRECTION, SIZES

OVERLAP_WEIGHT, SIDES_WEIGHT, ROUGH_WEIGHT = 0.15, 0.3, 0.2
"""Of one less the GIoU: of corrected boxes, and of the cells' boxes; and of the squared errors of
the logarithms of the cells' distances. The curvature is then near that of the closed form.
"""
IOU_SLOPE, OBJECT_SLOPE, OBJECT_AT = 6.0, 8.0, 0.4
"""Overlaps are learned as probabilities, whose logits are a slope times what is expected less 0.5,
or of cells less ``OBJECT_AT``.
"""
RANK_WIDTH, ORDER_WIDTH, ORDER_WEIGHT, ORDER_FROM_IOU = 0.12, 0.1, 0.4, 0.4
"""Differences of expected overlaps that count: for which box comes first, and in the order of all
boxes of an image that has one better than the last.
"""
LEAST_ERROR = 0.02
"""Is added to the error of a cell's objectness, which half of the cell's weight goes with."""
NEVER = -1e4


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        cells, names: whether these layers are trained, too; the others are always.
        top: the share of the weight of boxes that goes to those that come first.
        order: weight of the order of an image's boxes.
        pull: towards the start, in penalties of the closed form.
        penalty: of the curvature, in those as well.
        rate: of a step; 1 is Newton's for squared errors.
    """

    cells: bool = True
    names: bool = True
    top: float = 0.6
    order: float = 1.0
    pull: float = 0.3
    penalty: float = 1.0
    rate: float = 0.05

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the layers that are trained."""
        return ("boxes", "first", *["cells"] * self.cells, *["names"] * self.names)


RECIPES = {
    "all_top": Recipe(),
    "all": Recipe(top=0.0, order=0.5),
    "boxes": Recipe(cells=False, names=False, top=0.0, order=0.0),
    "all_free": Recipe(pull=0.03, penalty=0.3, rate=0.1),
}


@dataclass(frozen=True)
class Batch:
    """N images as the head reads them, each with B places for objects.

    Attributes:
        maps: the components of each level, ``[N, P, h, w]``.
        boxes: true boxes, ``[N, B, 4]``; zeros where there is none.
        classes: which of the names each has, -1 for none of them, ``[N, B]``.
        ignored: boxes of objects to be ignored, ``[N, I, 4]``.
        weights: of their boxes in the corrections, ``[N]``.
    """

    maps: list[Tensor]
    boxes: Tensor
    classes: Tensor
    ignored: Tensor
    weights: Tensor
    valid: Tensor = field(init=False)
    """Where there is an object, ``[N, B]``."""
    several: Tensor = field(init=False)
    """The root of how many objects an image has, at least 1, ``[N]``."""

    def __post_init__(self) -> None:
        valid = are(self.boxes)
        object.__setattr__(self, "valid", valid)
        object.__setattr__(self, "several", valid.sum(dim=1).clamp_min(1).float().sqrt())

    def overlaps(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The IoU of boxes ``[N, L, 4]`` with the nearest object, and which that is."""
        found = (ious(boxes, self.boxes) * self.valid[:, None]).max(dim=2)
        return found.values, found.indices

    def is_known(self, boxes: Tensor, overlaps: Tensor) -> Tensor:
        """See ``calib.heads.dense_scenes.Scene.is_known``; ``[N, L]``."""
        low = torch.maximum(boxes[:, :, None, :2], self.ignored[:, None, :, :2])
        high = torch.minimum(boxes[:, :, None, 2:], self.ignored[:, None, :, 2:])
        common = (high - low).clamp_min(0).prod(dim=3)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=2).clamp_min(1e-6)
        within = (common / area[..., None]).amax(dim=2)
        alike = ious(boxes, self.ignored).amax(dim=2)
        return ((within < MOSTLY) & (alike < IGNORED_IOU)) | (overlaps > IGNORED_IOU)


def are(boxes: Tensor) -> Tensor:
    """Which boxes have an area."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Of pairs of boxes ``[..., 4]``: the IoU less the share of the box round both that neither
    fills.
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    common = (high - low).clamp_min(0).prod(dim=-1)
    one, other = (
        (each[..., 2:] - each[..., :2]).clamp_min(0.1).prod(dim=-1) for each in (boxes, others)
    )
    union = one + other - common
    around = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(
        boxes[..., :2], others[..., :2]
    )
    hull = around.prod(dim=-1).clamp_min(0.1)
    return common / union.clamp_min(1e-3) - (hull - union) / hull


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(1e-3)


@dataclass(frozen=True)
class Rows:
    """What the layers of boxes read and learn of a batch, in the words of ``calib.heads``.

    Attributes:
        first: features of proposals and of jittered true boxes, ``[N, K + JITTERED, D]``.
        boxes, scores: these boxes and their objectness.
        features: of the K proposals after their first corrections, ``[N, K, D]``.
        again: these boxes, ``[N, K, 4]``.
    """

    first: Tensor
    boxes: Tensor
    scores: Tensor
    features: Tensor
    again: Tensor


@torch.no_grad()
def rows_of(reader: TorchDenseHead, batch: Batch, lots: Tensor) -> Rows:
    """The rows of a batch; ``lots`` has ``JITTERED`` rows of 5 numbers for each image."""
    boxes, scores = reader.proposals(reader.cells(batch.maps))
    count = batch.valid.sum(dim=1, keepdim=True)
    place = (lots[..., 0] * count).long().clamp(0, batch.boxes.shape[1] - 1)
    true = picked(batch.boxes, place)
    sizes = (true[..., 2:] - true[..., :2]).repeat(1, 1, 2)
    jittered = reader.moved(true, JITTER * (2 * lots[..., 1:] - 1) * (sizes > 0))
    both = torch.cat([boxes, jittered], dim=1)
    objectness = torch.cat([scores, scores.mean(dim=1, keepdim=True).expand(-1, JITTERED)], dim=1)
    first = reader.features(batch.maps, both, objectness)
    corrections = functional.linear(first[:, : boxes.shape[1]], *reader.layers["first"])
    again = reader.moved(boxes, corrections)
    return Rows(first, both, objectness, reader.features(batch.maps, again, scores), again)


def corrected_weights(
    reader: TorchDenseHead,
    batch: Batch,
    boxes: Tensor,
    least_iou: float,
    by: Tensor | None = None,
    top: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The objects that boxes ``[N, L, 4]`` are corrected to, and the weights ``[N, L]``, of which a
    share of ``top`` goes to those that come first by ``by``.
    """
    best, nearest = batch.overlaps(boxes)
    used = (best > least_iou) & ((boxes[..., 2:] - boxes[..., :2]) > reader.least_px).all(dim=2)
    counts = used.sum(dim=1, keepdim=True)
    weights = used * batch.weights[:, None] / counts.clamp_min(1).sqrt()
    if by is not None and top:
        rank = torch.where(used, by / RANK_WIDTH, NEVER).softmax(dim=1) * used
        weights = weights * (1 - top + top * counts * rank)
    return picked(batch.boxes, nearest), weights


def loss_of(reader: TorchDenseHead, batch: Batch, recipe: Recipe, lots: Tensor) -> Tensor:
    """The sum of all losses of a batch; ``lots`` as for ``rows_of``."""
    rows, total = rows_of(reader, batch, lots), lots.new_zeros(())
    if recipe.cells:
        cells = reader.cells(batch.maps)
        total = sides_loss(reader, batch, cells) + objectness_loss(reader, batch, cells)

    def corrections_loss(boxes: Tensor, found: Tensor, least_iou: float, by: Tensor) -> Tensor:
        true, weights = corrected_weights(reader, batch, boxes, least_iou, by, recipe.top)
        beyond = 0.5 * (found.abs() - MOST_CORRECTION).clamp_min(0).pow(2).sum(dim=2)
        away = OVERLAP_WEIGHT * (1 - giou(reader.moved(boxes, found), true))
        return _mean(away + beyond, weights)

    first = functional.linear(rows.first, *reader.layers["first"])
    total = total + corrections_loss(rows.boxes, first, CORRECTED_IOU, rows.scores)
    found = functional.linear(rows.features, *reader.layers["boxes"])
    expected, by = found[..., 4], found[..., 4].detach()
    total = total + corrections_loss(rows.again, found[..., :4], CORRECTED_AGAIN_IOU, by)
    with torch.no_grad():
        last = reader.moved(rows.again, found[..., :4])
        best, nearest = batch.overlaps(last)
        known = batch.is_known(last, best)
        weights = known * (batch.several / known.sum(dim=1).clamp_min(1))[:, None]
    logits = IOU_SLOPE * (expected - 0.5)
    entropy = functional.binary_cross_entropy_with_logits(logits, best, reduction="none")
    total = total + _mean(4 * entropy / IOU_SLOPE**2, weights)
    if recipe.order:
        wanted = torch.where(known, best / ORDER_WIDTH, NEVER).softmax(dim=1)
        said = torch.where(known, expected / ORDER_WIDTH, NEVER).log_softmax(dim=1)
        some = (best.amax(dim=1) > ORDER_FROM_IOU) * batch.several
        order = _mean(-(wanted * said).sum(dim=1), some)
        total = total + recipe.order * ORDER_WEIGHT * ORDER_WIDTH**2 * order
    if recipe.names:
        said = functional.linear(rows.features, *reader.layers["names"]).log_softmax(dim=2)
        shares = name_shares(batch, best, nearest, said.shape[2])
        mass = shares.sum(dim=2)
        total = total + _mean(-(shares * said).sum(dim=2), weights * mass)
    return total


def name_shares(batch: Batch, overlaps: Tensor, nearest: Tensor, count: int) -> Tensor:
    """See ``calib.heads.dense_names.name_targets``; ``[N, K, count]``."""
    share = ((overlaps - NO_IOU) / (FULL_IOU - NO_IOU)).clamp(0, 1)
    mine = batch.classes.gather(1, nearest)
    shares = functional.one_hot(mine.clamp_min(0), count) * (share * (mine >= 0))[..., None]
    return torch.cat([shares[..., :-1], 1 - share[..., None]], dim=2)


def sides_loss(reader: TorchDenseHead, batch: Batch, cells: Tensor) -> Tensor:
    """Of the boxes that the cell layer gives near the middles of objects, see
    ``calib.heads.dense_layers.side_rows``.
    """
    boxes, centres, stride_px = reader.cell_boxes(cells), reader.centres, reader.head.stride_px
    middles = (batch.boxes[..., :2] + batch.boxes[..., 2:]) / 2
    sizes = batch.boxes[..., 2:] - batch.boxes[..., :2]
    reach = (MIDDLE * sizes).clamp_min(0.51 * stride_px)
    away = (centres[None, :, None] - middles[:, None]).abs()
    inside = (away < reach[:, None]).all(dim=3) & batch.valid[:, None]
    areas = sizes.prod(dim=2)
    owner = torch.where(inside, areas[:, None], torch.inf).argmin(dim=2)
    mine, roots = picked(batch.boxes, owner), areas.gather(1, owner).sqrt() / reader.head.size_px
    sides = torch.cat([centres - mine[..., :2], mine[..., 2:] - centres], dim=2)
    wanted = (sides / stride_px).clamp_min(0.125).log()
    total = cells.new_zeros(())
    for place, (low, high) in enumerate(SIZE_RANGES):
        used = (inside.any(dim=2) & (roots >= low) & (roots < high)).float()
        counts = torch.zeros_like(areas).scatter_add_(1, owner, used).gather(1, owner)
        logs = cells[:, 4 * place : 4 * place + 4].transpose(1, 2)
        rough = 0.5 * ((logs - wanted) ** 2).sum(dim=2)
        errors = SIDES_WEIGHT * (1 - giou(boxes[:, place], mine)) + ROUGH_WEIGHT * rough
        total = total + _mean(errors, used / counts.clamp_min(1))
    return total


def objectness_loss(reader: TorchDenseHead, batch: Batch, cells: Tensor) -> Tensor:
    """Of the objectness of cells, see ``calib.heads.dense_layers.objectness_rows``. Half of the
    weight goes with the error.
    """
    shape = (len(cells), SIZES, -1)
    logits = OBJECT_SLOPE * (cells[:, 4 * SIZES :] - OBJECT_AT)
    with torch.no_grad():
        boxes = reader.cell_boxes(cells).flatten(1, 2)
        overlaps, _ = batch.overlaps(boxes)
        known = batch.is_known(boxes, overlaps).reshape(shape).all(dim=1)
        overlaps = overlaps.reshape(shape)
        near = overlaps.amax(dim=1) > OBJECT_IOU
        hard = (logits.sigmoid() - overlaps).abs().amax(dim=1) + LEAST_ERROR

        def weighted(some: Tensor) -> Tensor:
            sums = (hard * some).sum(dim=1, keepdim=True).clamp_min(1e-3)
            counts = some.sum(dim=1, keepdim=True).clamp_min(1)
            shares: Tensor = 0.5 * some * (hard / sums + 1 / counts)
            return shares

        weights = weighted(near) * batch.several[:, None] + weighted(~near & known)
    entropy = functional.binary_cross_entropy_with_logits(logits, overlaps, reduction="none")
    return _mean(4 * entropy.mean(dim=1) / OBJECT_SLOPE**2, weights)


def curvature_rows(
    reader: TorchDenseHead, batch: Batch, lots: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The features ``[N, L, D]`` of each regression of the closed form and their weights
    ``[N, L]``, by its name: those of a batch; ``lots`` as for ``rows_of``.
    """
    rows = rows_of(reader, batch, lots)
    _, weights = corrected_weights(reader, batch, rows.boxes, CORRECTED_IOU)
    yield "first", rows.first, weights
    _, weights = corrected_weights(reader, batch, rows.again, CORRECTED_AGAIN_IOU)
    yield "corrections", rows.features, weights
    count = rows.again.shape[1]
    yield "expected", rows.features, (batch.several[:, None] / count).expand(-1, count)
    boxes = reader.cell_boxes(reader.cells(batch.maps)).flatten(1, 2)
    overlaps = batch.overlaps(boxes)[0].reshape(len(boxes), SIZES, -1)
    near = overlaps.amax(dim=1) > OBJECT_IOU
    weights = near / near.sum(dim=1, keepdim=True).clamp_min(1) * batch.several[:, None]
    weights = weights + ~near / (~near).sum(dim=1, keepdim=True).clamp_min(1)
    yield "cells", reader.cell_features(batch.maps), weights
