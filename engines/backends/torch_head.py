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

    What is alike is computed together: a GPU takes as long for one small map as for twenty.

    Args:
        head: what is read.
        device: where the maps are.
    """

    def __init__(self, head: Head, device: torch.device) -> None:
        self._features = head.features
        self._weight = torch.tensor(head.weight, device=device)
        self._bias = torch.tensor(head.bias, device=device)
        self._routes = torch.tensor(head.routes, device=device)
        self._powers: dict[Source, Tensor] = {}
        self._places: dict[Feature, int] = {}  # of its power among those of its map
        for source in dict.fromkeys((each.signal, each.layer) for each in head.features):
            same = [each for each in head.features if (each.signal, each.layer) == source]
            powers = list(dict.fromkeys(each.power for each in same))
            self._powers[source] = torch.tensor(powers, device=device).view(-1, 1, 1, 1)
            self._places |= {each: powers.index(each.power) for each in same}
        self._levels = {
            each.size: torch.from_numpy((np.arange(each.size) + 0.5) / each.size).to(device)
            for each in head.features
            if each.kind == "quantiles"
        }
        self._quantiles_of = dict.fromkeys(
            (each.signal, each.layer) for each in head.features if each.kind == "quantiles"
        )
        self._areas: dict[tuple[int, int], Tensor] = {}

    def __call__(self, maps_nhw: dict[Source, Tensor], class_index: Tensor) -> Tensor:
        """The boxes, float32 ``[N, 4]``, corners in order and inside 0..1.

        Args:
            maps_nhw: by signal and layer, ``[N, h, w]``.
            class_index: int64 ``[N]``; decides between layers where the head has several.
        """
        kinds = torch.zeros_like(class_index)
        if len(self._routes):
            kinds = self._routes[class_index]
        box = torch.einsum("nd,nkd->nk", self._read(maps_nhw), self._weight[kinds])
        box = (box + self._bias[kinds]).clamp(0, 1)
        low = torch.minimum(box[:, :2], box[:, 2:])
        high = torch.maximum(box[:, :2], box[:, 2:])
        return torch.cat([low, high], 1)

    def _read(self, maps_nhw: dict[Source, Tensor]) -> Tensor:
        """The head's inputs, ``[N, D]``."""
        raised = {source: maps_nhw[source] ** powers for source, powers in self._powers.items()}
        shares = {
            source: values / values.mean(dim=(2, 3), keepdim=True).clamp_min(1e-30)
            for source, values in raised.items()
        }
        marginals = {
            (source, axis): shares[source].double().sum(dim=axis)
            for source in self._quantiles_of
            for axis in (2, 3)
        }
        read = {
            (size, length): _quantiles(marginals, size, length, self._levels[size])
            for size in self._levels
            for length in {values.shape[2] for values in marginals.values()}
        }
        parts = []
        for each in self._features:
            source, place = (each.signal, each.layer), self._places[each]
            if each.kind == "raw":
                parts.append(raised[source][place].flatten(1))
            elif each.kind == "grid":
                parts.append(self._grid(shares[source][place], each.size))
            else:
                for axis in (2, 3):
                    length = marginals[source, axis].shape[2]
                    parts.append(read[each.size, length][source, axis][place])
        return torch.cat(parts, 1)

    def _grid(self, share_nhw: Tensor, size: int) -> Tensor:
        rows, columns = (self._area(n, size, share_nhw.device) for n in share_nhw.shape[1:])
        return torch.einsum("ih,nhw,jw->nij", rows, share_nhw, columns).flatten(1)

    def _area(self, length: int, cells: int, device: torch.device) -> Tensor:
        """See ``engines.maps.area_matrix``; copied to the device once."""
        if (length, cells) not in self._areas:
            matrix = torch.from_numpy(area_matrix(length, cells))
            self._areas[length, cells] = matrix.to(device)
        return self._areas[length, cells]


Marginals = dict[tuple[Source, int], Tensor]


def _quantiles(marginals: Marginals, size: int, length: int, levels: Tensor) -> Marginals:
    """Where the running sums of marginals ``[P, N, length]`` pass the levels, ``[P, N, size]``.

    A level is a share of the sum, and a place a fraction of the length. Zeros give 1.
    """
    alike = {key: values for key, values in marginals.items() if values.shape[2] == length}
    mass = torch.cat([values.flatten(0, 1) for values in alike.values()])
    total = mass.sum(dim=1, keepdim=True)
    edges = torch.cat([torch.zeros_like(total), mass.cumsum(dim=1)], 1)
    edges = edges / total.clamp_min(1e-300)
    wanted = levels.expand(len(mass), -1).contiguous()
    after = torch.searchsorted(edges, wanted).clamp(1, length)
    low = edges.gather(1, after - 1)
    high = edges.gather(1, after)
    places = (after - 1 + (wanted - low) / (high - low).clamp_min(1e-300)) / length
    places = torch.where(total > 0, places, torch.ones_like(places)).float()
    counts = [values.shape[0] * values.shape[1] for values in alike.values()]
    split = zip(alike.items(), places.split_with_sizes(counts), strict=True)
    return {key: part.reshape(*values.shape[:2], size) for (key, values), part in split}


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
