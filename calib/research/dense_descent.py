"""Trains the linear layers of a dense head further by gradient descent; the network stays as it is.

What is fitted in closed form has small squared errors. Here the layers start from there, and the
losses are nearer to what counts: the overlap of boxes (GIoU, Rezatofighi et al. 2019), above all of
those that come first, the order of an image's boxes (ListNet, Cao et al. 2007), and cross-entropy
of names. The steps are those of the closed form's own curvature, so that all directions move alike.

Run it as ``python -m calib.research.dense_descent --head START --data FOLDER --out HEAD``, on a GPU
where PyTorch sees one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from calib.data.datasets import Sample
from calib.heads.dense import figures_of, halved
from calib.heads.dense_layers import (
    CELL_PENALTY,
    CORRECTION_AGAIN_PENALTY,
    CORRECTION_PENALTY,
    FURTHER_WEIGHT,
    IOU_PENALTY,
    JITTERED,
    Layers,
)
from calib.heads.dense_names import Answer, Names, Sureness
from calib.heads.dense_scenes import MAIN, Array32, Reader, SceneTable, boxes_in_square
from calib.research.command_line import run
from calib.research.dense import BLURRED, FITTED, LEFT_OUT, training_images
from calib.research.dense_losses import (
    RECIPES,
    Batch,
    Recipe,
    are,
    curvature_rows,
    loss_of,
    name_shares,
    rows_of,
)
from engines.backends.torch_dense import TorchDenseHead
from engines.backends.torch_networks import torch_network
from engines.dense import SMALLEST, DenseHead
from engines.errors import ModelError
from engines.head import head_path, is_fitted_on, load_head
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import Classifier, load_classifier
from engines.options import Option
from engines.resizing import Resizing

MOST_OBJECTS, MOST_IGNORED = 24, 8
"""Of one image, the largest ones; further objects are to be ignored."""
SHARES = {MAIN: 0.77, "small": 0.09, "empty": 0.035, "far away": 0.04, "moving": 0.03}
"""Of a batch, by the kind of the images."""
SHARE_OF_OTHERS = 0.02
WARPED, WARPED_SHARE = (MAIN, "small", "rare", "moving"), 0.6
"""So many of the images of these kinds are zoomed, shifted and changed in colour."""
ZOOMS, ASPECT, GAIN, LIGHT = (-0.5, 0.45), 0.15, 0.15, 0.15
"""Logarithms of the zoom, and how far the others go to either side; light is added to normalised
pixels.
"""
LEAST_SHARE, SEEN_SHARE, LEAST_SIDE_PX = 0.5, 0.02, 5
"""An object stays of which more than that is in the image and which is larger; one of which less
than the second can be seen is none, and the others are to be ignored.
"""
FASTER = {"names": 8.0, "cells": 0.3}
"""The rates of these layers, in that of the others."""
MOMENTUM, WARM_UP = 0.9, 0.03
"""Of all steps, so many are slower at first."""
HOLD, HOLD_OF_NAMES = 0.3, 0.03
"""Overlaps and names have smaller curvatures here than squares: so does the pull to the start."""
SETTLED = 1e-4
"""Is added to the curvature of standardized features."""
PENALTIES = {
    "cells": CELL_PENALTY,
    "first": CORRECTION_PENALTY,
    "corrections": CORRECTION_AGAIN_PENALTY,
    "expected": IOU_PENALTY,
}
REGRESSIONS = {
    "cells": [(slice(None), "cells")],
    "first": [(slice(None), "first")],
    "boxes": [(slice(0, 4), "corrections"), (slice(4, 5), "expected")],
    "names": [(slice(None), "expected")],
}
"""Which regression's curvature each row of a layer has."""


def main(
    head: Annotated[str, Option("The head to start from: a file, or a shipped one's name.")],
    data: Annotated[Path, Option("Folder with the data sets.")],
    out: Annotated[Path, Option("The head to write (.safetensors).")],
    trial: Annotated[
        str,
        Option(
            "A head that was fitted without the photos left out (python -m calib.research.dense"
            " --leave-out): it is trained without them, too, measured on them, and gives the"
            " confidence. Without it the confidence stays."
        ),
    ] = "",
    model: Annotated[str, Option("The network.")] = "lite0",
    recipe: Annotated[str, Option(f"One of {', '.join(RECIPES)}.")] = "all_top",
    epochs: Annotated[float, Option("How often each image is drawn, on average.", min=0)] = 8.0,
    batch: Annotated[int, Option("Images in a step.", min=1)] = 128,
    curves: Annotated[int, Option("Batches that the curvature is computed of.", min=1)] = 60,
) -> None:
    """Train the layers of a dense head further, and write it."""
    if recipe not in RECIPES:
        raise ModelError(f"{recipe} is no recipe: take one of {', '.join(RECIPES)}")
    console, how = Console(), RECIPES[recipe]
    start, network = _opened(head, model)
    said = None
    if trial:
        before, _ = _opened(trial, model)
        fitted = training_images(data, FITTED)
        after = descended(before, fitted, network, how, console, epochs, batch, curves)
        left_out = training_images(data, LEFT_OUT)
        del left_out[BLURRED]
        for word, each in (("before", before), ("after", after)):
            said = confident(each, left_out, network, console)
            console.print(f"{word}: {said.card['held_out']}")
    everything = training_images(data)
    found = descended(start, everything, network, how, console, epochs, batch, curves)
    card = {**start.card, "descent": {"recipe": recipe, "epochs": epochs, "batch": batch}}
    if said and said.naming and found.naming:
        naming = replace(found.naming, shown_from=said.naming.shown_from)
        found = replace(found, trust=said.trust, shown_from=said.shown_from, naming=naming)
        card["held_out"] = said.card["held_out"]
    replace(found, card=card).save(out)
    console.print(f"{out}: {'with a new' if said else 'with the old'} confidence")


def _opened(name: str, model: str) -> tuple[DenseHead, Classifier]:
    """A head, and the network that it was fitted on.

    Raises:
        ModelError: it is another head than those that are trained here.
    """
    head = load_head(head_path(name))
    if not isinstance(head, DenseHead) or head.first_weight is None or head.naming is None:
        raise ModelError(f"{name} is no dense head with two rounds of corrections and names")
    network = load_classifier(model, None, head.size_px, GivenInput(resize=head.resize))
    if not is_fitted_on(head, network):
        raise ModelError(f"{name} was not fitted on {model}: name its network")
    return head, network


def confident(
    head: DenseHead, images: Mapping[str, Sequence[Sample]], network: Classifier, console: Console
) -> DenseHead:
    """The head with a confidence that is fitted to images that its layers were not fitted on, and
    what it reaches on them in its card.
    """
    names = Names.of([], head.naming)
    layers, reader = Layers.of(head, names), Reader.of(head)
    found = list[Answer]()
    with TemporaryDirectory(prefix="sightline-descent-") as folder:
        place, levels = Path(folder), head.levels
        table = SceneTable.of(images, names.names, network, levels, place, console)
        for scene in table.scenes(np.arange(len(table)), mirrored=False):
            if not scene.says_nothing:
                found.append(layers.answer(reader, scene))
    least_px = SMALLEST * head.stride_px
    sure = Sureness(names, None, head.certainty, head.size_px, least_px).fitted(found)
    naming, said = names.layer(layers.names, None, found)
    held_out = {**figures_of([each for each in found if each.kind == MAIN], sure), **said}
    return replace(
        head,
        trust=sure.trust,
        shown_from=sure.shown_from(found),
        naming=head.naming and replace(head.naming, shown_from=naming.shown_from),
        card={**head.card, "held_out": held_out},
    )


class Images:
    """All images as the network sees them; gives batches that are drawn by lot, and changed.

    Args:
        images: by their kind.
        head: whose components are read, and whose names are meant.
        network: it was fitted on.
        reader: of the head; the network runs where it is.
        device: of both.
        console: for progress.
        seed: of all lots.
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[Sample]],
        head: DenseHead,
        network: Classifier,
        reader: TorchDenseHead,
        device: torch.device,
        console: Console,
        seed: int = 0,
    ) -> None:
        self._reader, self._device, self._side = reader, device, head.size_px
        self._random = torch.Generator(device).manual_seed(seed)
        self._dtype = torch.float16 if device.type == "cuda" else torch.float32
        self._network = torch_network(network).to(device, self._dtype)
        preprocessing = network.preprocessing
        self._rgb = preprocessing.order == "rgb"
        self._mean, self._std = (
            torch.tensor(each, device=device).view(1, 3, 1, 1)
            for each in (preprocessing.mean, preprocessing.std)
        )
        names = {name: place for place, name in enumerate(head.naming.names if head.naming else ())}
        pairs = [(kind, sample) for kind, some in images.items() for sample in some]
        self._squares = np.zeros((len(pairs), self._side, self._side, 3), np.uint8)
        boxes = np.zeros((len(pairs), MOST_OBJECTS, 4), np.float32)
        classes = np.full((len(pairs), MOST_OBJECTS), -1)
        ignored = np.zeros((len(pairs), MOST_IGNORED, 4), np.float32)
        resizing = Resizing.of(preprocessing)
        for row, (_, sample) in enumerate(track(pairs, "reading images", console=console)):
            image = sample.read()
            self._squares[row] = resizing.prepared(image, (self._side, self._side))
            place = image.shape[1], image.shape[0], resizing, self._side
            mine, kept = boxes_in_square(sample.truths, *place)
            known = np.array([names.get(each.class_name, -1) for each in sample.truths], np.int64)
            order = np.argsort(-(mine[:, 2:] - mine[:, :2]).prod(axis=1), kind="stable")
            used, others = order[:MOST_OBJECTS], order[MOST_OBJECTS:]
            boxes[row, : len(used)], classes[row, : len(used)] = mine[used], known[kept][used]
            hidden = [boxes_in_square(sample.ignored, *place)[0], mine[others]]
            some = np.concatenate(hidden)[:MOST_IGNORED]
            ignored[row, : len(some)] = some
        self._boxes, self._classes, self._ignored = (
            torch.from_numpy(each).to(device) for each in (boxes, classes, ignored)
        )
        kinds = [kind for kind, _ in pairs]
        counts = {kind: len(some) for kind, some in images.items()}
        shares = [SHARES.get(kind, SHARE_OF_OTHERS) / counts[kind] for kind in kinds]
        self._shares = torch.tensor(shares, device=device)
        self._warped = torch.tensor([kind in WARPED for kind in kinds], device=device)
        weights = [1.0 if kind == MAIN else FURTHER_WEIGHT for kind in kinds]
        self._weights = torch.tensor(weights, device=device)

    def __len__(self) -> int:
        return len(self._squares)

    def lots(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1, drawn by lot."""
        return torch.rand(shape, device=self._device, generator=self._random)

    def lots_of(self, batch: Batch) -> Tensor:
        """Those that the losses of a batch need, see ``dense_losses.rows_of``."""
        return self.lots(len(batch.boxes), JITTERED, 5)

    @torch.no_grad()
    def draw(self, count: int) -> Batch:
        """So many images, or all where there are fewer."""
        count = min(count, len(self))
        rows = torch.multinomial(self._shares, count, generator=self._random)
        squares = torch.from_numpy(self._squares[rows.cpu().numpy()]).to(self._device)
        pixels = squares.permute(0, 3, 1, 2).float()
        x = ((pixels.flip(1) if self._rgb else pixels) - self._mean) / self._std
        warped = self._warped[rows] & (self.lots(count) < WARPED_SHARE)
        x, boxes, ignored = self._mirrored(x, self._boxes[rows], self._ignored[rows])
        x, boxes, ignored = self._changed(x, boxes, ignored, warped)
        classes = torch.where(are(boxes), self._classes[rows], -1)
        _, layers = self._network.activations(x.to(self._dtype))
        maps = self._reader.components(layers)
        return Batch(maps, boxes, classes, ignored, self._weights[rows])

    def _mirrored(self, x: Tensor, *boxes: Tensor) -> tuple[Tensor, ...]:
        """Half of the images ``[N, 3, S, S]`` and their boxes ``[N, M, 4]``, mirrored."""
        flip = self.lots(len(x)) < 0.5
        found = [torch.where(flip[:, None, None, None], x.flip(3), x)]
        for each in boxes:
            x0, y0, x1, y1 = each.unbind(dim=2)
            turned = torch.stack([self._side - x1, y0, self._side - x0, y1], dim=2)
            used = flip[:, None] & are(each)
            found.append(torch.where(used[..., None], turned, each))
        return tuple(found)

    def _changed(
        self, x: Tensor, boxes: Tensor, ignored: Tensor, warped: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the images with other colours, zoomed and shifted; objects that leave them are to
        be ignored as far as they are seen.
        """
        n, side, some = len(x), self._side, warped.float()
        inside = (x.abs().sum(dim=1, keepdim=True) > 0).float()  # the filling stays as it is
        gain, light = (
            (some * each * (2 * self.lots(n) - 1))[:, None, None, None] for each in (GAIN, LIGHT)
        )
        x = x * (1 + gain) + light * inside
        zoom = ZOOMS[0] + (ZOOMS[1] - ZOOMS[0]) * self.lots(n)
        aspect = ASPECT * (2 * self.lots(n) - 1)
        logs = torch.stack([zoom + aspect, zoom - aspect], dim=1)
        scale = (some[:, None] * logs).exp()
        offset = some[:, None] * self.lots(n, 2) * (side - side / scale)
        places = torch.zeros(n, 2, 3, device=x.device)
        places[:, 0, 0], places[:, 1, 1] = 1 / scale[:, 0], 1 / scale[:, 1]
        places[:, :, 2] = 1 / scale + 2 * offset / side - 1
        grid = functional.affine_grid(places, list(x.shape), align_corners=False)
        moved = functional.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
        x = torch.where(warped[:, None, None, None], moved, x)

        def full(each: Tensor) -> Tensor:
            return (each - offset.repeat(1, 2)[:, None]) * scale.repeat(1, 2)[:, None]

        whole = full(boxes)
        cut = whole.clamp(0, side)
        areas = [(each[..., 2:] - each[..., :2]).prod(dim=2) for each in (cut, whole)]
        share = areas[0] / areas[1].clamp_min(1e-6)
        large = ((cut[..., 2:] - cut[..., :2]) > LEAST_SIDE_PX).all(dim=2)
        stays = are(boxes) & (~warped[:, None] | ((share > LEAST_SHARE) & large))
        leaves = are(boxes) & ~stays & (share > SEEN_SHARE)
        hidden = torch.where(are(ignored)[..., None], full(ignored).clamp(0, side), 0.0)
        hidden = torch.cat([hidden, torch.where(leaves[..., None], cut, 0.0)], dim=1)
        return x, torch.where(stays[..., None], cut, 0.0), hidden


Curvatures = dict[str, tuple[Tensor, Tensor]]
"""Of each regression: the scales ``[D + 1]`` of its features, the last of which is 1, and the
inverse ``[D + 1, D + 1]`` of the sums of their squares with the penalty.
"""


@torch.no_grad()
def curvatures(
    reader: TorchDenseHead, images: Images, count: int, batches: int, penalty: float
) -> Curvatures:
    """The curvatures of the closed form, of so many batches of ``count`` images.

    Raises:
        RuntimeError: the features are not finite.
    """
    sums = dict[str, Tensor]()
    for _ in range(batches):
        batch = images.draw(count)
        for name, features, weights in curvature_rows(reader, batch, images.lots_of(batch)):
            x = functional.pad(features, (0, 1), value=1.0).flatten(0, 1)
            x = x * weights.reshape(-1, 1).sqrt()
            sums[name] = sums.get(name, x.new_zeros(())) + x.T @ x
    found: Curvatures = {}
    for name, total in sums.items():
        squares = total / total[-1, -1].clamp_min(1e-6)
        scale = squares.diagonal().sqrt() + 1e-6
        system = (squares / scale[:, None] / scale).double()
        system.diagonal()[:-1].add_(PENALTIES[name] * penalty)
        system.diagonal().add_(SETTLED)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        found[name] = scale, (inverse / scale[:, None] / scale).float()
    return found


class Descent:
    """Moves the layers of a head against the gradient of the losses.

    Each step goes along the mean of the last gradients, multiplied by the inverse curvature.

    Args:
        reader: whose layers are trained, in their place.
        recipe: says which, and how.
        curves: of its features.
    """

    def __init__(self, reader: TorchDenseHead, recipe: Recipe, curves: Curvatures) -> None:
        self._reader, self._recipe, self._curves = reader, recipe, curves
        self._weights = {
            name: torch.cat([weight, bias[:, None]], dim=1)
            for name, (weight, bias) in reader.layers.items()
            if name in recipe.trained
        }
        self._start = {name: each.clone() for name, each in self._weights.items()}
        self._mean = {name: torch.zeros_like(each) for name, each in self._weights.items()}

    def step(self, batch: Batch, lots: Tensor, left: float) -> Tensor:
        """Move all layers once; gives the loss before.

        Args:
            batch: what they are to fit better.
            lots: see ``dense_losses.rows_of``.
            left: the share of the steps that are still to come, this one included.
        """
        for name, each in self._weights.items():
            each.requires_grad_(True)
            self._reader.layers[name] = each[:, :-1], each[:, -1]
        loss = loss_of(self._reader, batch, self._recipe, lots)
        gradients = torch.autograd.grad(loss, list(self._weights.values()))
        rate = self._recipe.rate * 0.5 * (1 - math.cos(math.pi * left))
        rate *= min(1.0, (1 - left) / WARM_UP + 0.05)
        for (name, each), gradient in zip(self._weights.items(), gradients, strict=True):
            each.requires_grad_(False)
            for rows, regression in REGRESSIONS[name]:
                self._move(name, regression, rows, gradient[rows], rate)
            self._reader.layers[name] = each[:, :-1], each[:, -1]
        return loss.detach()

    def _move(self, name: str, regression: str, rows: slice, gradient: Tensor, rate: float) -> None:
        scale, inverse = self._curves[regression]
        weights, mean = self._weights[name][rows], self._mean[name][rows]
        hold = PENALTIES[regression] * self._recipe.pull * scale**2
        hold *= HOLD_OF_NAMES if name == "names" else HOLD
        hold[-1] = 0
        gradient = gradient + hold * (weights - self._start[name][rows])
        mean.mul_(MOMENTUM).add_((1 - MOMENTUM) * (gradient @ inverse))
        weights.sub_(rate * FASTER.get(name, 1.0) * mean)


def descended(
    head: DenseHead,
    images: Mapping[str, Sequence[Sample]],
    network: Classifier,
    recipe: Recipe,
    console: Console,
    epochs: float = 8.0,
    count: int = 128,
    curve_batches: int = 60,
) -> DenseHead:
    """The head with layers that were trained on images; its confidence is the one that it had.

    On a processor, the same images give the same head.

    Args:
        head: with two rounds of corrections and names.
        images: by their kind.
        network: it was fitted on.
        recipe: what is trained, and how.
        console: for progress and the loss.
        epochs: how often an image is drawn, on average.
        count: of images in a step.
        curve_batches: of so many batches the curvature is computed, and the means of the names.

    Raises:
        ModelError: the steps were too long for the layers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = TorchDenseHead(head, network.shape, device)
    drawn = Images(images, head, network, reader, device, console)
    boxes, width = curve_batches * count * head.candidates, head.box_weight.shape[1]
    if boxes < 2 * width:
        console.print(
            f"note: {boxes} boxes give the curvature of {width} features, which are too few: the"
            " steps get too long; take more batches for it"
        )
    curves = curvatures(reader, drawn, count, curve_batches, recipe.penalty)
    descent, steps = Descent(reader, recipe, curves), math.ceil(epochs * len(drawn) / count)
    for number in track(range(steps), "training", console=console):
        batch = drawn.draw(count)
        loss = descent.step(batch, drawn.lots_of(batch), 1 - number / steps)
        if number % max(1, steps // 10) == 0:
            console.print(f"step {number} of {steps}: loss {float(loss):.4f}")
            if not math.isfinite(float(loss)):
                raise ModelError(f"the loss is not finite at step {number} of {steps}")
    return _head_of(reader, drawn, count, curve_batches)


@torch.no_grad()
def _head_of(reader: TorchDenseHead, images: Images, count: int, batches: int) -> DenseHead:
    """The head that has the layers of a reader, rounded as its file has them, and the means of its
    names in so many batches of images.
    """
    head, naming = reader.head, reader.head.naming
    assert naming is not None
    arrays = {
        name: tuple(each.cpu().numpy().copy() for each in layer)
        for name, layer in reader.layers.items()
    }
    (cells, boxes, first, names) = (arrays[each] for each in ("cells", "boxes", "first", "names"))
    naming = replace(naming, weight=halved(names[0]), bias=names[1])
    if naming.means.size:
        naming = replace(naming, means=_means(reader, images, count, batches, naming.means))
    return replace(
        head,
        cell_weight=halved(cells[0]),
        cell_bias=cells[1],
        box_weight=halved(boxes[0]),
        box_bias=boxes[1],
        first_weight=halved(first[0]),
        first_bias=first[1],
        naming=naming,
    )


def _means(
    reader: TorchDenseHead, images: Images, count: int, batches: int, before: Array32
) -> Array32:
    """See ``engines.dense_names.Naming``; those of before where no box has a name."""
    sums = torch.zeros(len(before), before.shape[1] + 1, device=reader.centres.device)
    for _ in range(batches):
        batch = images.draw(count)
        rows = rows_of(reader, batch, images.lots_of(batch))
        moved = reader.moved(
            rows.again, functional.linear(rows.features, *reader.layers["boxes"])[..., :4]
        )
        best, nearest = batch.overlaps(moved)
        shares = name_shares(batch, best, nearest, len(before))
        shares = shares * (batch.is_known(moved, best) * batch.several[:, None])[..., None]
        x = functional.pad(rows.features, (0, 1), value=1.0)
        sums += shares.flatten(0, 1).T @ x.flatten(0, 1)
    found, mass = sums[:, :-1].cpu().numpy(), sums[:, -1:].cpu().numpy()
    return halved(np.where(mass > 0, found / np.maximum(mass, 1e-6), before))


if __name__ == "__main__":
    run(main)
