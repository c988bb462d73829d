"""The linear head and the training-free box in PyTorch, written apart from ``engines.head``:
quantiles by interpolation, boxes by the rows and columns that hold a kept pixel.

All of it is computed where the maps are, and waits for nothing, so that a CUDA graph can hold it.
"""

import numpy as np
import torch
from torch import Tensor

from engines.head import Head, Heuristic
from engines.maps import Feature, Source, area_matrix


class TorchHead:
    """Reads one box of each image with a linear layer on features of its maps.

    Args:
        head: what is read.
        device: where the maps are.
    """

    def __init__(self, head: Head, device: torch.device) -> None:
        self._features = head.features
        self._weight = torch.tensor(head.weight, device=device)
        self._bias = torch.tensor(head.bias, device=device)
        self._routes = torch.tensor(head.routes, device=device)
        self._levels = {
            each.size: torch.from_numpy((np.arange(each.size) + 0.5) / each.size).to(device)
            for each in head.features
            if each.kind == "quantiles"
        }
        self._areas: dict[tuple[int, int], Tensor] = {}

    def __call__(self, maps_nhw: dict[Source, Tensor], class_index: Tensor) -> Tensor:
        """The boxes, float32 ``[N, 4]``, corners in order and inside 0..1.

        Args:
            maps_nhw: by signal and layer, ``[N, h, w]``.
            class_index: int64 ``[N]``; decides between layers where the head has several.
        """
        parts = [self._read(maps_nhw[each.signal, each.layer], each) for each in self._features]
        kinds = torch.zeros_like(class_index)
        if len(self._routes):
            kinds = self._routes[class_index]
        box = torch.einsum("nd,nkd->nk", torch.cat(parts, 1), self._weight[kinds])
        box = (box + self._bias[kinds]).clamp(0, 1)
        low = torch.minimum(box[:, :2], box[:, 2:])
        high = torch.maximum(box[:, :2], box[:, 2:])
        return torch.cat([low, high], 1)

    def _read(self, map_nhw: Tensor, feature: Feature) -> Tensor:
        """The head's inputs from one map, ``[N, D]``."""
        scaled = map_nhw**feature.power
        if feature.kind == "raw":
            return scaled.flatten(1)
        scaled = scaled / scaled.mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        if feature.kind == "grid":
            rows, columns = (self._area(n, feature.size, scaled.device) for n in scaled.shape[1:])
            return torch.einsum("ih,nhw,jw->nij", rows, scaled, columns).flatten(1)
        marginals = (scaled.double().sum(dim=axis) for axis in (1, 2))
        levels = self._levels[feature.size]
        return torch.cat([_quantiles(each, levels) for each in marginals], 1).float()

    def _area(self, length: int, cells: int, device: torch.device) -> Tensor:
        """See ``engines.maps.area_matrix``; copied to the device once."""
        if (length, cells) not in self._areas:
            matrix = torch.from_numpy(area_matrix(length, cells))
            self._areas[length, cells] = matrix.to(device)
        return self._areas[length, cells]


def _quantiles(mass: Tensor, levels: Tensor) -> Tensor:
    """Where the running sum of each row ``[N, L]`` passes the levels, as fractions of the row.

    A level is a share of the row's sum. Rows that are zero give 1.
    """
    n, length = mass.shape
    total = mass.sum(dim=1, keepdim=True)
    before = torch.zeros_like(total)
    edges = torch.cat([before, mass.cumsum(dim=1)], 1) / total.clamp_min(1e-300)
    wanted = levels.expand(n, -1).contiguous()
    after = torch.searchsorted(edges, wanted).clamp(1, length)
    low = edges.gather(1, after - 1)
    high = edges.gather(1, after)
    positions = (after - 1 + (wanted - low) / (high - low).clamp_min(1e-300)) / length
    return torch.where(total > 0, positions, torch.ones_like(positions))


class TorchHeuristic:
    """The training-free box: the largest share of a blurred map, and the box around it.

    Args:
        heuristic: blur and share.
    """

    def __init__(self, heuristic: Heuristic) -> None:
        self._heuristic = heuristic
        self._blurs: dict[int, Tensor] = {}

    def __call__(self, maps_nhw: Tensor) -> Tensor:
        """The boxes, float32 ``[N, 4]``, of maps ``[N, h, w]``."""
        n, height, width = maps_nhw.shape
        blurred = maps_nhw.double()
        if self._heuristic.sigma:
            rows, columns = (self._blur(side, maps_nhw.device) for side in (height, width))
            blurred = torch.einsum("ih,nhw,jw->nij", rows, blurred, columns)
        flat = blurred.reshape(n, -1)
        count = max(1, round(self._heuristic.share * flat.shape[1]))
        least = flat.topk(count, dim=1).values[:, -1]
        kept = blurred >= least[:, None, None]
        edges = [_first_and_last(kept.any(dim=axis)) for axis in (1, 2)]
        (left, right), (top, bottom) = edges
        return torch.stack([left / width, top / height, right / width, bottom / height], 1).float()

    def _blur(self, length: int, device: torch.device) -> Tensor:
        """The Gaussian's weights along a side, whose rows add up to 1; made once."""
        if length not in self._blurs:
            places = np.arange(length)
            distance = np.subtract.outer(places, places) / (self._heuristic.sigma * length)
            weights = np.exp(-(distance**2) / 2)
            weights /= weights.sum(1, keepdims=True)
            self._blurs[length] = torch.from_numpy(weights).to(device)
        return self._blurs[length]


def _first_and_last(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of truths ``[N, L]``: the place of the first, and the place behind the last."""
    places = torch.arange(kept.shape[1], device=kept.device, dtype=torch.float64)
    first = torch.where(kept, places, torch.inf).amin(dim=1)
    behind = torch.where(kept, places + 1, -torch.inf).amax(dim=1)
    return first, behind
