"""The training loop of the compact VGG16: batches, losses, schedule, checkpoints.

Every batch is a function of (seed, stage, step) alone, so a run that was stopped goes on exactly as it would have.
"""

import json
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from engines.base import ModelError
from engines.files import whole_file

Images = NDArray[np.uint8]
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHASES = {"classify": 0, "distil": 1, "settle": 2}
UNKNOWN = -1
SAVED_EVERY = 200
ATTENTIVE_LAYERS = ("conv4_3", "conv5_3")
"""The student's layers whose attention maps follow the teacher's, at strides 8 and 16."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a stage, written on the card of the weights.

    ``batch`` is how many images of each set of examples make a batch. Where ``scores_of_labelled`` is off, labelled images
    learn their label and the teacher's attention, but not its scores: it is often wrong about them.
    """

    stage: str
    side_px: int
    steps: int
    batch: tuple[int, ...]
    peak_rate: float
    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    temperature: float = 2.0
    scores_of_labelled: bool = True
    attention_weight: float = 4.0
    smallest_crop: float = 0.35
    seed: int = 0


@dataclass(frozen=True)
class Lessons:
    """What a teacher says of N images.

    Attributes:
        scores: its class scores before any softmax, float16 ``[N, 1000]``.
        attention: its attention map for each of ``ATTENTIVE_LAYERS``, float16 ``[N, s, s]`` of that layer's side.
    """

    scores: NDArray[np.float16]
    attention: tuple[NDArray[np.float16], ...]

    def of(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> "Lessons":
        """The lessons of some images, their maps mirrored where the image is."""
        maps = [each[rows] for each in self.attention]
        flipped = tuple(np.where(mirrored[:, None, None], each[:, :, ::-1], each) for each in maps)
        return Lessons(self.scores[rows], flipped)


@dataclass(frozen=True)
class Examples:
    """Square BGR images ``[N, S, S, 3]`` with labels (of ImageNet-1k, or ``UNKNOWN``) and, to distil, a teacher's lessons."""

    images: Images
    labels: NDArray[np.int64]
    lessons: Lessons | None = None


Batch = tuple[Images, NDArray[np.int64], Lessons | None]


def random_crop(image: Images, side_px: int, smallest: float, rng: np.random.Generator) -> Images:
    """A random crop resized to a square: at least ``smallest`` of the area, aspect 3/4 to 4/3."""
    height, width = image.shape[:2]
    area = rng.uniform(smallest, 1.0) * height * width
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_w = min(width, round(math.sqrt(area * aspect)))
    crop_h = min(height, round(math.sqrt(area / aspect)))
    x0, y0 = int(rng.integers(0, width - crop_w + 1)), int(rng.integers(0, height - crop_h + 1))
    return resized(image[y0 : y0 + crop_h, x0 : x0 + crop_w], side_px)


def resized(image: Images, side_px: int) -> Images:
    """Squashed to a square, averaging where it shrinks, as the localizer does."""
    shrinks = min(image.shape[:2]) > side_px
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side_px, side_px), interpolation=method), np.uint8)


def recoloured(image: Images, rng: np.random.Generator) -> Images:
    """Random brightness, contrast and tint, as cameras differ in."""
    gains = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3)
    table = np.clip(128 + (np.arange(256)[:, None] - 128) * gains + rng.uniform(-25, 25), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(np.ascontiguousarray(image), table[None]), np.uint8)


def batches(recipe: Recipe, sets: Sequence[Examples], start: int) -> Iterator[Batch]:
    """Batches from step ``start`` on, set after set: images, labels, lessons.

    Every image of a set comes once per epoch. Taught images keep the crop that the teacher saw; others are cropped anew.
    """
    for step in range(start, recipe.steps):
        rng = np.random.default_rng((recipe.seed, PHASES[recipe.stage], 1 << 20, step))
        images, labels, lessons = [], [], []
        for place, (examples, count) in enumerate(zip(sets, recipe.batch, strict=True)):
            rows = _rows(recipe, place, len(examples.images), count, step)
            mirrored = rng.random(count) < 0.5
            for row, mirror in zip(rows, mirrored, strict=True):
                image = examples.images[row]
                if examples.lessons is None:
                    image = random_crop(image, recipe.side_px, recipe.smallest_crop, rng)
                else:
                    image = recoloured(resized(image, recipe.side_px), rng)
                images.append(image[:, ::-1] if mirror else image)
            labels.append(examples.labels[rows])
            if examples.lessons is not None:
                lessons.append(examples.lessons.of(rows, mirrored))
        yield np.stack(images), np.concatenate(labels), joined(lessons) if lessons else None


def _rows(recipe: Recipe, place: int, size: int, count: int, step: int) -> NDArray[np.int64]:
    """Which images of a set are due at a step: a new order every epoch."""
    epoch, turn = divmod(step, max(1, size // count))
    order = np.random.default_rng((recipe.seed, PHASES[recipe.stage], place, epoch)).permutation(size)
    return order[turn * count : (turn + 1) * count]


def joined(lessons: Sequence[Lessons]) -> Lessons:
    """Several sets' lessons as one."""
    maps = zip(*(each.attention for each in lessons), strict=True)
    return Lessons(np.concatenate([each.scores for each in lessons]), tuple(np.concatenate(m) for m in maps))


def prefetched(items: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """The same items, made in a thread ahead of time (OpenCV releases the interpreter lock)."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)

    def produce() -> None:
        try:
            for item in items:
                ready.put(item)
            ready.put(None)
        except BaseException as error:  # raised again where the items are awaited
            ready.put(error)

    threading.Thread(target=produce, daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def normalised(images_nhwc_bgr: Images) -> Tensor:
    """uint8 BGR ``[N, H, W, 3]`` to the network's float32 RGB input ``[N, 3, H, W]``, channels last in memory."""
    x = torch.from_numpy(images_nhwc_bgr).permute(0, 3, 1, 2).flip(1).float().div_(255)
    x = (x - torch.tensor(MEAN_RGB).view(1, 3, 1, 1)) / torch.tensor(STD_RGB).view(1, 3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def losses_of(network: Vgg16, batch: Batch, classes: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, teacher, attention): cross-entropy over the labelled ``classes`` alone, the teacher's KL divergence over all
    1,000 (Hinton et al. 2015, equation 1), and how far the attention maps point from the teacher's, as 1 - cosine
    (Zagoruyko & Komodakis 2017, equation 2, up to a factor). 0 without a teacher.
    """
    images, labels_array, lessons = batch
    with torch.autocast("cpu", torch.bfloat16):
        scores, layers = network.activations(normalised(images))
    scores, labels = scores.float(), torch.from_numpy(labels_array)
    known = labels != UNKNOWN
    positions = torch.searchsorted(classes, labels[known])
    hard = functional.cross_entropy(scores[known][:, classes], positions, label_smoothing=recipe.label_smoothing)
    if lessons is None:
        return hard, torch.zeros(()), torch.zeros(())
    listens = torch.ones_like(known) if recipe.scores_of_labelled else ~known
    taught, heat = torch.from_numpy(lessons.scores).float()[listens], recipe.temperature
    student_log = functional.log_softmax(scores[listens] / heat, dim=1)
    soft = functional.kl_div(student_log, functional.softmax(taught / heat, dim=1), reduction="batchmean") * heat**2
    looks = torch.zeros(())
    for name, wanted in zip(ATTENTIVE_LAYERS, lessons.attention, strict=True):
        attention = layers[name].float().square().mean(dim=1).flatten(1)
        looks = looks + 1 - functional.cosine_similarity(attention, torch.from_numpy(wanted).float().flatten(1)).mean()
    return hard, soft, looks


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up over the first 5 % of the steps, then a half cosine to zero."""
    warm = max(1, recipe.steps // 20)
    if step < warm:
        return recipe.peak_rate * (step + 1) / warm
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def top1(network: nn.Module, labelled: Examples, side_px: int, batch: int = 250) -> float:
    """Share of images whose best score among the labelled classes is right, at ``side_px`` pixels."""
    network.eval()
    classes = np.unique(labelled.labels)
    right = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(labelled.images), batch):
            images = np.stack([resized(image, side_px) for image in labelled.images[i : i + batch]])
            best = network(normalised(images))[:, torch.from_numpy(classes)].argmax(1).numpy()
            right += int((classes[best] == labelled.labels[i : i + batch]).sum())
    network.train()
    return right / len(labelled.images)


def optimise(network: Vgg16, recipe: Recipe, sets: Sequence[Examples], checkpoint: Path, console: Console) -> None:
    """Train in place, with a progress bar. Saves ``checkpoint`` now and then, and goes on from it."""
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    start = _resume(checkpoint, recipe, network, optimizer)
    known = np.unique(np.concatenate([examples.labels for examples in sets]))
    classes = torch.from_numpy(known[known != UNKNOWN])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"), TimeRemainingColumn())  # fmt: skip  # noqa: E501
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(recipe.stage, total=recipe.steps, completed=start, losses="")
        for step, batch in enumerate(prefetched(batches(recipe, sets, start)), start=start):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, recipe)
            hard, soft, looks = losses_of(network, batch, classes, recipe)
            optimizer.zero_grad(set_to_none=True)
            (hard + soft + recipe.attention_weight * looks).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            said = f"labels {hard.detach():.2f}, teacher {soft.detach():.2f}, attention {looks.detach():.3f}"
            bar.update(task, advance=1, losses=said)
            if (step + 1) % SAVED_EVERY == 0 or step + 1 == recipe.steps:
                state = {
                    "network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                    "recipe": json.dumps(asdict(recipe)),
                }  # fmt: skip
                with whole_file(checkpoint) as part:
                    torch.save(state, part)


def _resume(checkpoint: Path, recipe: Recipe, network: Vgg16, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from: 0, or the checkpoint's, whose state is loaded.

    Raises:
        ModelError: the checkpoint is of another recipe, which the card would hide.
    """
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["recipe"] != json.dumps(asdict(recipe)):
        raise ModelError(f"checkpoint {checkpoint} was trained by another recipe: move it away, or train in another --out")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
