"""The dense head in PyTorch, written apart from ``engines.dense``: maps are sampled bilinearly by
PyTorch, boxes are compared by their IoU itself, and features are in the order of a head's file.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engines.confidence import FURTHEST
from engines.dense import (
    ALIKE,
    AROUND,
    LOG_LIMITS,
    MOST_CORRECTION,
    SAMPLES,
    SAMPLES_OF_CLASS,
    SIZES,
    SMALLEST,
    SUPPRESSED,
    DenseHead,
)
from engines.dense_names import CUES
from engines.networks.network import Shape
from engines.resizing import cell_window


class TorchDenseHead:
    """Reads the candidates of ``engines.dense.append_candidates``.

    All steps from the components to the corrected boxes can be differentiated, but for the choice
    of the proposals.

    Args:
        head: see below.
        shape: of the network's input, rows and columns in pixels.
        device: where the layers are.

    Attributes:
        head: what is read.
        layers: weight ``[T, D]`` and bias ``[T]`` of ``cells``, ``boxes``, and where the head has
            such, of ``first`` and ``names``. Whoever trains them puts others in their place.
        least_px: no side of a box counts as shorter.
        centres: of the cells, x and y in pixels, ``[cells, 2]``.
    """

    def __init__(self, head: DenseHead, shape: Shape, device: torch.device) -> None:
        self.head, self._device = head, device
        self._rows, self._columns = shape
        self._cells = self._rows // head.stride_px, self._columns // head.stride_px
        self._limits = self._tensor([self._columns, self._rows] * 2)
        middles = [
            (torch.arange(count, device=device) + 0.5) * head.stride_px for count in self._cells
        ]
        y, x = torch.meshgrid(*middles, indexing="ij")
        self.centres = torch.stack([x, y], dim=-1).reshape(-1, 2)
        self.least_px = SMALLEST * head.stride_px
        self._better = torch.ones(head.compared, head.compared, device=device).triu(1)
        self._bases = [tuple(map(self._tensor, (each.mean, each.basis))) for each in head.levels]
        self.layers = {
            name: (self._tensor(weight), self._tensor(bias))
            for name, weight, bias in (
                ("cells", head.cell_weight, head.cell_bias),
                ("boxes", head.box_weight, head.box_bias),
                *(
                    []
                    if head.first_weight is None
                    else [("first", head.first_weight, head.first_bias)]
                ),
                *([("names", head.naming.weight, head.naming.bias)] if head.naming else []),
            )
        }

        self._trust = (
            tuple(map(self._tensor, (trust.mean, trust.scale, trust.weight, trust.bias)))
            if (trust := head.trust)
            else None
        )
        self._pairs = torch.triu_indices(len(CUES), len(CUES), device=device)

    def _tensor(self, values: object) -> Tensor:
        return torch.as_tensor(np.array(values, np.float32), device=self._device)

    def __call__(
        self,
        layers: Mapping[str, Tensor],
        last_nchw: Tensor,
        scores: Tensor,
        linear: tuple[Tensor, Tensor] | None,
        wanted: Tensor,
    ) -> Tensor:
        """The candidates, float32 ``[N, candidates, 7]``, or 9 with names.

        Args:
            layers: what each wrote.
            last_nchw: the last maps.
            scores: of the image, ``[N, classes]``.
            linear: weight ``[classes, C]`` and bias of the layer that gives them of the mean of the
                last maps; None where none does.
            wanted: class that is looked for, ``[N]``; negative for any.
        """
        maps = self.components(layers)
        boxes, objectness = self.proposals(self.cells(maps))
        if "first" in self.layers:
            features = self.features(maps, boxes, objectness)
            boxes = self.moved(boxes, functional.linear(features, *self.layers["first"]))
        features = self.features(maps, boxes, objectness)
        found = functional.linear(features, *self.layers["boxes"])
        moved = self.moved(boxes, found[..., :4])
        expected = found[..., 4]
        names, evidence = list[Tensor](), torch.zeros_like(expected)
        if self.head.naming is not None:
            logits = functional.linear(features, *self.layers["names"])
            most, place = logits[..., :-1].max(dim=2)
            probability = logits.softmax(dim=2).gather(2, place[..., None])[..., 0]
            names, evidence = [place.float(), probability], most - logits[..., -1]
        confidence = self._confidence(moved, expected, objectness, evidence)
        classes = self._classes(boxes, last_nchw.float(), scores, linear, wanted)
        columns = torch.stack([confidence, *classes, *names], dim=2)
        return torch.cat([moved / self._limits, columns], dim=2)

    def components(self, layers: Mapping[str, Tensor]) -> list[Tensor]:
        """The components ``[N, P, h, w]`` of each level; of what each layer wrote."""
        found = []
        for level, (mean, basis) in zip(self.head.levels, self._bases, strict=True):
            x = layers[level.layer].float()
            if level.root:
                x = x.relu().sqrt()
            found.append(torch.einsum("nchw,cp->nphw", x - mean[:, None, None], basis))
        return found

    def cells(self, maps: Sequence[Tensor]) -> Tensor:
        """The cell layer, ``[N, 5 * SIZES, cells]``."""
        return self._read_cells(maps, *self.layers["cells"])

    def cell_features(self, maps: Sequence[Tensor]) -> Tensor:
        """What the cell layer reads, ``[N, cells, D1]``."""
        width = self.layers["cells"][0].shape[1]
        each = torch.eye(width, device=self._device)
        return self._read_cells(maps, each, each.new_zeros(width)).transpose(1, 2)

    def _read_cells(self, maps: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        """A linear layer at every cell, ``[N, T, cells]``."""
        total, start = bias[:, None, None], 0
        for level, x in zip(self.head.levels, maps, strict=True):
            part = weight[:, start : start + level.cell_width]
            start += level.cell_width
            kernel = part.reshape(len(weight), -1, level.kernel, level.kernel)
            windows = [
                cell_window(have, cells, level.kernel)
                for have, cells in zip(x.shape[2:], self._cells, strict=True)
            ]
            stride, padding = zip(*windows, strict=True)
            read = functional.conv2d(x, kernel, stride=stride, padding=padding)
            if read.shape[2:] != self._cells:
                read = functional.interpolate(read, self._cells, mode="bilinear")
            total = total + read
        return total.flatten(2)

    def cell_boxes(self, cells: Tensor) -> Tensor:
        """The boxes ``[N, SIZES, cells, 4]`` of what the cell layer gives."""
        logs = cells[:, : 4 * SIZES].clamp(*LOG_LIMITS)
        logs = logs.reshape(len(cells), SIZES, 4, -1)
        sides = logs.exp().transpose(2, 3) * self.head.stride_px
        edges = [self.centres - sides[..., :2], self.centres + sides[..., 2:]]
        return self._inside(torch.cat(edges, dim=3))

    def proposals(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The best boxes ``[N, K, 4]`` and their objectness ``[N, K]``, of what the cell layer
        gives.
        """
        boxes = self.cell_boxes(cells).flatten(1, 2)
        scores = cells[:, 4 * SIZES :].flatten(1)
        scores, places = scores.topk(min(self.head.compared, scores.shape[1]), dim=1)
        boxes = picked(boxes, places)
        better = self._better[: len(scores[0]), : len(scores[0])]
        near = (ious(boxes, boxes) > self.head.same) & (better > 0)
        ranked = scores - SUPPRESSED * near.any(dim=1).float()
        places = ranked.topk(self.head.candidates, dim=1).indices
        return picked(boxes, places), scores.gather(1, places)

    def features(self, maps: Sequence[Tensor], boxes: Tensor, objectness: Tensor) -> Tensor:
        """What the box layer reads, ``[N, K, D2]``."""
        parts = [objectness[..., None]]
        for level, x in zip(self.head.levels, maps, strict=True):
            pooled = self._pooled(x[:, : level.box_channels], boxes, level.box_bins)
            parts.append(pooled.permute(0, 2, 3, 1, 4).flatten(2))
        share = self._sizes(boxes) / max(self._rows, self._columns)
        logs = share.log()
        parts += [logs, logs**2, logs.prod(dim=2, keepdim=True), share]
        if self.head.whole:
            parts.append(self._mean_in(maps[-1], boxes))
        return torch.cat(parts, dim=2)

    def _mean_in(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The mean of maps ``[N, C, h, w]`` in each box, ``[N, K, C]``."""
        return self._pooled(x, boxes, 1, 1.0, SAMPLES_OF_CLASS)[..., 0, 0].transpose(1, 2)

    def _pooled(
        self, x: Tensor, boxes: Tensor, bins: int, around: float = AROUND, samples: int = SAMPLES
    ) -> Tensor:
        """Maps ``[N, C, h, w]`` in and around boxes, ``[N, C, K, bins, bins]``: rows, then columns
        of bins, each the mean of ``samples`` squared.
        """
        count = bins * samples
        offsets = ((torch.arange(count, device=x.device) + 0.5) / count - 0.5) * around
        middle, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, self._sizes(boxes)
        places = middle[..., None] + sizes[..., None] * offsets  # [N, K, 2, count]
        places = 2 * places / self._limits[:2, None] - 1
        across = places[:, :, 0, None, :].expand(-1, -1, count, -1)
        down = places[:, :, 1, :, None].expand(-1, -1, -1, count)
        grid = torch.stack([across, down], dim=-1).flatten(1, 2)
        found = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        found = found.reshape(*x.shape[:2], boxes.shape[1], bins, samples, bins, samples)
        return found.mean(dim=(4, 6))

    def _sizes(self, boxes: Tensor) -> Tensor:
        return (boxes[..., 2:] - boxes[..., :2]).clamp_min(self.least_px)

    def _inside(self, boxes: Tensor) -> Tensor:
        return torch.minimum(boxes.clamp_min(0), self._limits)

    def moved(self, boxes: Tensor, corrections: Tensor) -> Tensor:
        """Boxes ``[N, K, 4]`` with their edges moved by shares of their sides ``[N, K, 4]``."""
        sizes = self._sizes(boxes).repeat(1, 1, 2)
        return self._inside(boxes + corrections.clamp(-MOST_CORRECTION, MOST_CORRECTION) * sizes)

    def _confidence(
        self, boxes: Tensor, expected: Tensor, objectness: Tensor, evidence: Tensor
    ) -> Tensor:
        """The probability that each of the corrected boxes is right, ``[N, K]``."""
        if self._trust is None:
            slope, offset = self.head.certainty
            return torch.sigmoid(slope * expected + offset)
        logs = (self._sizes(boxes) / max(self._rows, self._columns)).log()
        cues = (
            expected,
            objectness,
            logs.sum(dim=2),
            (logs[..., 0] - logs[..., 1]).abs(),
            evidence,
            expected.amax(dim=1, keepdim=True).expand_as(expected),
            (ious(boxes, boxes) > ALIKE).sum(dim=2).float(),
        )
        mean, scale, weight, bias = self._trust
        held = ((torch.stack(cues, dim=2) - mean) / scale).clamp(-FURTHEST, FURTHEST)
        first, second = self._pairs
        terms = torch.cat([held, held[..., first] * held[..., second]], dim=2)
        return torch.sigmoid(terms[..., : len(weight)] @ weight + bias)

    def _classes(
        self,
        boxes: Tensor,
        last: Tensor,
        scores: Tensor,
        linear: tuple[Tensor, Tensor] | None,
        wanted: Tensor,
    ) -> list[Tensor]:
        """The class of each box and its probability, each ``[N, K]``."""
        if linear is None:
            of_boxes = scores[:, None].expand(-1, boxes.shape[1], -1)
        else:
            of_boxes = functional.linear(self._mean_in(last, boxes), *linear)
        best = of_boxes.argmax(dim=2)
        chosen = torch.where(wanted[:, None] < 0, best, wanted[:, None])
        probability = of_boxes.softmax(dim=2).gather(2, chosen[..., None])[..., 0]
        return [chosen.float(), probability]


def picked(boxes: Tensor, places: Tensor) -> Tensor:
    """Of boxes ``[N, L, 4]`` those at places ``[N, K]``."""
    return boxes.gather(1, places[..., None].expand(-1, -1, 4))


def ious(boxes: Tensor, others: Tensor) -> Tensor:
    """The IoU of all pairs of boxes ``[N, L, 4]`` and ``[N, M, 4]``: ``[N, L, M]``."""
    low = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    common = (high - low).clamp_min(0).prod(dim=3)
    area, of_others = ((each[..., 2:] - each[..., :2]).prod(dim=2) for each in (boxes, others))
    return common / (area[:, :, None] + of_others[:, None] - common).clamp_min(1e-9)
