"""Train the compact VGG16 that Sightline ships.

Two stages, one network of 1,000 ImageNet-1k scores:

1. ``classify``: cross-entropy on Tiny ImageNet at its native 64 px, over the 200 classes that it has.
2. ``distil``: the same, enlarged to the shipped input size, together with the soft scores of a teacher (SqueezeNet) on
   random crops of real photos (Hinton et al. 2015, equation 1), which is where localization learns photo statistics.

Every batch is a function of (seed, stage, step) alone, so a run that was stopped goes on exactly as it would have.
"""

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engines.backends.torch_networks import Vgg16

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


CLASSIFY = Recipe("classify", side_px=64, steps=5600, batch_labelled=128, batch_distilled=0, peak_rate=0.1)
DISTIL = Recipe("distil", side_px=128, steps=3600, batch_labelled=48, batch_distilled=64, peak_rate=0.04)


@dataclass(frozen=True)
class Labelled:
    """Square BGR images ``[N, S, S, 3]`` with a class each, as positions among ``class_indices`` (ImageNet-1k indices)."""

    images: Images
    labels: NDArray[np.int64]
    class_indices: NDArray[np.int64]


@dataclass(frozen=True)
class Soft:
    """Square BGR crops ``[M, S, S, 3]`` with the teacher's 1,000 scores each, float16."""

    crops: Images
    scores: NDArray[np.float16]


def random_crop(image: Images, side_px: int, smallest: float, rng: np.random.Generator) -> Images:
    """A random crop of at least ``smallest`` of the area, aspect 3/4 to 4/3, resized to a square, mirrored half the time."""
    height, width = image.shape[:2]
    area = rng.uniform(smallest, 1.0) * height * width
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_w = min(width, round(math.sqrt(area * aspect)))
    crop_h = min(height, round(math.sqrt(area / aspect)))
    x0, y0 = int(rng.integers(0, width - crop_w + 1)), int(rng.integers(0, height - crop_h + 1))
    crop = image[y0 : y0 + crop_h, x0 : x0 + crop_w]
    shrinks = crop_w * crop_h > side_px * side_px
    crop = cv2.resize(crop, (side_px, side_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def batches(
    recipe: Recipe, labelled: Labelled, soft: Soft | None, start: int
) -> Iterator[tuple[Images, NDArray[np.int64], NDArray[np.float16] | None]]:
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


def prefetched(items: Iterator[tuple], depth: int = 4) -> Iterator[tuple]:
    """The same items, made in a thread ahead of time (OpenCV releases the interpreter lock)."""
    ready: queue.Queue = queue.Queue(depth)

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
            images = np.stack(
                [cv2.resize(image, (side_px, side_px)) for image in labelled.images[i : i + batch]]
            )
            best = network(normalised(images)).index_select(1, indices).argmax(1).numpy()
            right += int((best == labelled.labels[i : i + batch]).sum())
    network.train()
    return right / len(labelled.images)


def train(
    network: Vgg16, recipe: Recipe, labelled: Labelled, validation: Labelled, soft: Soft | None, checkpoint: Path
) -> None:
    """Train in place. Saves ``checkpoint`` every 200 steps and goes on from it where it exists."""
    network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    class_indices = torch.from_numpy(labelled.class_indices)
    sums, since = np.zeros(2), time.perf_counter()
    for step, (images, labels, teacher) in enumerate(
        prefetched(batches(recipe, labelled, soft, start)), start=start
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(normalised(images))
        hard, softened = loss_of(
            scores.float(), torch.from_numpy(labels),
            None if teacher is None else torch.from_numpy(teacher).float(), class_indices, recipe,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        (hard + recipe.distil_weight * softened).backward()
        optimizer.step()
        sums += (float(hard.detach()), float(softened.detach()))
        if (step + 1) % 100 == 0:
            pace = 100 * len(images) / (time.perf_counter() - since)
            print(f"{recipe.stage} {step + 1}/{recipe.steps} hard {sums[0] / 100:.3f} soft {sums[1] / 100:.3f} {pace:.0f} images/s", flush=True)
            sums, since = np.zeros(2), time.perf_counter()
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
        if (step + 1) % 1000 == 0 or step + 1 == recipe.steps:
            print(f"{recipe.stage} {step + 1}: top-1 {top1(network, validation, recipe.side_px):.4f}", flush=True)
