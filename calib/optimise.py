"""The training loop of the compact VGG16: batches, losses, schedule, checkpoints.

Every batch is a function of (seed, stage, step) alone, so a run that was stopped goes on exactly as it would have.
"""

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from engines.backends.torch_networks import Vgg16
from engines.files import whole_file

Images = NDArray[np.uint8]
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHASES = {"classify": 0, "distil": 1}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a stage, written on the card of the weights."""

    stage: str
    side_px: int
    steps: int
    batch_labelled: int
    batch_distilled: int
    peak_rate: float
    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    temperature: float = 2.0
    distil_weight: float = 1.0
    smallest_crop: float = 0.35
    seed: int = 0


@dataclass(frozen=True)
class Labelled:
    """Square BGR images ``[N, S, S, 3]``; ``labels`` are positions among ``class_indices`` (of ImageNet-1k)."""

    images: Images
    labels: NDArray[np.int64]
    class_indices: NDArray[np.int64]


@dataclass(frozen=True)
class Soft:
    """Square BGR crops ``[M, S, S, 3]`` with the teacher's 1,000 scores each, float16."""

    crops: Images
    scores: NDArray[np.float16]


Batch = tuple[Images, NDArray[np.int64], NDArray[np.float16] | None]


def random_crop(image: Images, side_px: int, smallest: float, rng: np.random.Generator) -> Images:
    """A random crop resized to a square and mirrored half the time: at least ``smallest`` of the area, aspect 3/4 to 4/3."""
    height, width = image.shape[:2]
    area = rng.uniform(smallest, 1.0) * height * width
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_w = min(width, round(math.sqrt(area * aspect)))
    crop_h = min(height, round(math.sqrt(area / aspect)))
    x0, y0 = int(rng.integers(0, width - crop_w + 1)), int(rng.integers(0, height - crop_h + 1))
    square = resized(image[y0 : y0 + crop_h, x0 : x0 + crop_w], side_px)
    return square[:, ::-1] if rng.random() < 0.5 else square


def resized(image: Images, side_px: int) -> Images:
    """Squashed to a square, averaging where it shrinks, as the localizer does."""
    shrinks = min(image.shape[:2]) > side_px
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side_px, side_px), interpolation=method), np.uint8)


def batches(recipe: Recipe, labelled: Labelled, soft: Soft | None, start: int) -> Iterator[Batch]:
    """Batches from step ``start`` on: images (labelled first, then distilled), labels, teacher scores."""
    per_epoch = len(labelled.images) // recipe.batch_labelled
    for step in range(start, recipe.steps):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((recipe.seed, PHASES[recipe.stage], epoch)).permutation(len(labelled.images))
        rng = np.random.default_rng((recipe.seed, PHASES[recipe.stage], 1 << 20, step))
        chosen = order[place * recipe.batch_labelled : (place + 1) * recipe.batch_labelled]
        images = [random_crop(labelled.images[i], recipe.side_px, recipe.smallest_crop, rng) for i in chosen]
        scores = None
        if soft is not None and recipe.batch_distilled:
            drawn = rng.integers(0, len(soft.crops), recipe.batch_distilled)
            images += [soft.crops[i][:, ::-1] if rng.random() < 0.5 else soft.crops[i] for i in drawn]
            scores = soft.scores[drawn]
        yield np.stack(images), labelled.labels[chosen], scores


def prefetched(items: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """The same items, made in a thread ahead of time (OpenCV releases the interpreter lock)."""
    ready: queue.Queue[Batch | None] = queue.Queue(depth)

    def produce() -> None:
        for item in items:
            ready.put(item)
        ready.put(None)

    threading.Thread(target=produce, daemon=True).start()
    while (item := ready.get()) is not None:
        yield item


def normalised(images_nhwc_bgr: Images) -> Tensor:
    """uint8 BGR ``[N, H, W, 3]`` to the network's float32 RGB input ``[N, 3, H, W]``, channels last in memory."""
    x = torch.from_numpy(images_nhwc_bgr).permute(0, 3, 1, 2).flip(1).float().div_(255)
    x = (x - torch.tensor(MEAN_RGB).view(1, 3, 1, 1)) / torch.tensor(STD_RGB).view(1, 3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def loss_of(
    scores: Tensor, labels: Tensor, teacher: Tensor | None, class_indices: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the labelled classes only, and the teacher's KL divergence over all 1,000 (0 without one)."""
    known = scores[: len(labels)].index_select(1, class_indices)
    hard = functional.cross_entropy(known, labels, label_smoothing=recipe.label_smoothing)
    if teacher is None:
        return hard, torch.zeros(())
    heat = recipe.temperature
    student_log = functional.log_softmax(scores[len(labels) :] / heat, dim=1)
    soft = functional.kl_div(student_log, functional.softmax(teacher / heat, dim=1), reduction="batchmean") * heat**2
    return hard, soft


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up over the first 5 % of the steps, then a half cosine to zero."""
    warm = max(1, recipe.steps // 20)
    if step < warm:
        return recipe.peak_rate * (step + 1) / warm
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def top1(network: nn.Module, labelled: Labelled, side_px: int, batch: int = 250) -> float:
    """Share of images whose best score among the labelled classes is right, at ``side_px`` pixels."""
    network.eval()
    indices = torch.from_numpy(labelled.class_indices)
    right = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(labelled.images), batch):
            images = np.stack([resized(image, side_px) for image in labelled.images[i : i + batch]])
            best = network(normalised(images)).index_select(1, indices).argmax(1).numpy()
            right += int((best == labelled.labels[i : i + batch]).sum())
    network.train()
    return right / len(labelled.images)


def optimise(network: Vgg16, recipe: Recipe, labelled: Labelled, soft: Soft | None, checkpoint: Path, console: Console) -> None:
    """Train in place, with a progress bar. Saves ``checkpoint`` every 200 steps and goes on from it where it exists."""
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    start = _resume(checkpoint, network, optimizer)
    class_indices = torch.from_numpy(labelled.class_indices)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"), TimeRemainingColumn())  # fmt: skip  # noqa: E501
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(recipe.stage, total=recipe.steps, completed=start, losses="")
        for step, (images, labels, teacher) in enumerate(prefetched(batches(recipe, labelled, soft, start)), start=start):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, recipe)
            with torch.autocast("cpu", torch.bfloat16):
                scores = network(normalised(images))
            soft_scores = None if teacher is None else torch.from_numpy(teacher).float()
            hard, softened = loss_of(scores.float(), torch.from_numpy(labels), soft_scores, class_indices, recipe)
            optimizer.zero_grad(set_to_none=True)
            (hard + recipe.distil_weight * softened).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update(task, advance=1, losses=f"labels {hard.detach():.2f}, teacher {softened.detach():.2f}")
            if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
                state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                with whole_file(checkpoint) as part:
                    torch.save(state, part)


def _resume(checkpoint: Path, network: Vgg16, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from: 0, or the checkpoint's, whose state is loaded."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
