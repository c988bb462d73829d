"""Trains the compact VGG16 that Sightline ships:
``python -m calib.research.train --data DATA --out DIR``.
"""

import csv
import json
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn import functional

from calib.data.datasets import load_dataset
from calib.research.command_line import run
from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_networks import Vgg16
from engines.build import IMAGE, append_preprocessing
from engines.errors import ModelError, SourceError
from engines.files import whole_file
from engines.graph import Graph
from engines.maps import area_matrix
from engines.networks.registry import Classifier, imagenet_classes, load_classifier
from engines.options import Option
from engines.resizing import resized
from engines.text import Terminal
from realtime.sources.images import archive_members, decode_image
from realtime.sources.spec import open_source

Images = NDArray[np.uint8]
MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)
PHASES = {"classify": 0, "distil": 1, "settle": 2}
UNKNOWN = -1
SAVED_EVERY = 200
ATTENTIVE_LAYERS = ("conv4_3", "conv5_3")
"""The student's layers whose attention maps follow the teacher's, at strides 8 and 16."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a stage. The card of the weights has it.

    ``batch`` is the number of images of each set of examples in a batch. Where
    ``scores_of_labelled`` is off, the student learns the labels of labelled images and the
    teacher's attention, but not the teacher's scores, which are often wrong.
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
    """The outputs of a teacher for N images, which the student learns.

    Attributes:
        scores: the class scores before any softmax, float16 ``[N, 1000]``.
        attention: an attention map for each of ``ATTENTIVE_LAYERS``, float16 ``[N, s, s]``, where s
            is the side of that layer.
    """

    scores: NDArray[np.float16]
    attention: tuple[NDArray[np.float16], ...]

    def of(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> "Lessons":
        """The lessons of some images. The maps of mirrored images are mirrored."""
        maps = [each[rows] for each in self.attention]
        flipped = tuple(np.where(mirrored[:, None, None], each[:, :, ::-1], each) for each in maps)
        return Lessons(self.scores[rows], flipped)


@dataclass(frozen=True)
class Examples:
    """Images to learn from.

    Attributes:
        images: square BGR images ``[N, S, S, 3]``.
        labels: classes of ImageNet-1k, or ``UNKNOWN``, ``[N]``.
        lessons: of a teacher; None where the labels alone are learned.
    """

    images: Images
    labels: NDArray[np.int64]
    lessons: Lessons | None = None


Batch = tuple[Images, NDArray[np.int64], Lessons | None]


def random_crop(image: Images, side_px: int, smallest: float, rng: np.random.Generator) -> Images:
    """A random crop, resized to a square. Its aspect is 3/4 to 4/3, and its area at least
    ``smallest`` of the image's.
    """
    height, width = image.shape[:2]
    area = rng.uniform(smallest, 1.0) * height * width
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_w = min(width, round(math.sqrt(area * aspect)))
    crop_h = min(height, round(math.sqrt(area / aspect)))
    x0, y0 = int(rng.integers(0, width - crop_w + 1)), int(rng.integers(0, height - crop_h + 1))
    return resized(image[y0 : y0 + crop_h, x0 : x0 + crop_w], side_px)


def recoloured(image: Images, rng: np.random.Generator) -> Images:
    """The image with random brightness, contrast and tint, in which cameras differ."""
    gains = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3)
    table = np.clip(
        128 + (np.arange(256)[:, None] - 128) * gains + rng.uniform(-25, 25), 0, 255
    ).astype(np.uint8)
    return np.asarray(cv2.LUT(np.ascontiguousarray(image), table[None]), np.uint8)


def batches(recipe: Recipe, sets: Sequence[Examples], start: int) -> Iterator[Batch]:
    """The batches from step ``start`` on, each with images of all sets, one set after the other.

    Every image of a set comes once per epoch. Images with lessons keep the crop that the teacher
    saw. Others are cropped at random.
    """
    for step in range(start, recipe.steps):
        rng = np.random.default_rng((recipe.seed, PHASES[recipe.stage], 1 << 20, step))
        images = []
        labels = []
        lessons = []
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
    """The images of a set for a step. Their order is new in every epoch."""
    epoch, turn = divmod(step, max(1, size // count))
    order = np.random.default_rng((recipe.seed, PHASES[recipe.stage], place, epoch)).permutation(
        size
    )
    return order[turn * count : (turn + 1) * count]


def joined(lessons: Sequence[Lessons]) -> Lessons:
    """The lessons of several sets as one."""
    maps = zip(*(each.attention for each in lessons), strict=True)
    return Lessons(
        np.concatenate([each.scores for each in lessons]), tuple(np.concatenate(m) for m in maps)
    )


def prefetched(items: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """The same items, which a thread makes ahead of time. OpenCV releases the interpreter lock."""
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
    """The network's float32 RGB input ``[N, 3, H, W]``, with channels last in memory, of uint8 BGR
    images ``[N, H, W, 3]``.
    """
    x = torch.from_numpy(images_nhwc_bgr).permute(0, 3, 1, 2).flip(1).float().div_(255)
    x = (x - torch.tensor(MEAN_RGB).view(1, 3, 1, 1)) / torch.tensor(STD_RGB).view(1, 3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def losses_of(
    network: Vgg16, batch: Batch, classes: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses of a batch. The last two are 0 without a teacher.

    Returns:
        The cross-entropy of the labels, over the labelled ``classes`` alone; the KL divergence from
        the teacher over all 1,000 classes (Hinton et al. 2015, equation 1); and the difference of
        the attention maps from the teacher's, as 1 - cosine (Zagoruyko & Komodakis 2017, equation
        2, up to a factor).
    """
    images, labels_array, lessons = batch
    with torch.autocast("cpu", torch.bfloat16):
        scores, layers = network.activations(normalised(images))
    scores, labels = scores.float(), torch.from_numpy(labels_array)
    known = labels != UNKNOWN
    positions = torch.searchsorted(classes, labels[known])
    hard = functional.cross_entropy(
        scores[known][:, classes], positions, label_smoothing=recipe.label_smoothing
    )
    if lessons is None:
        return hard, torch.zeros(()), torch.zeros(())
    listens = torch.ones_like(known) if recipe.scores_of_labelled else ~known
    taught, heat = torch.from_numpy(lessons.scores).float()[listens], recipe.temperature
    student_log = functional.log_softmax(scores[listens] / heat, dim=1)
    teacher = functional.softmax(taught / heat, dim=1)
    soft = functional.kl_div(student_log, teacher, reduction="batchmean") * heat**2
    looks = torch.zeros(())
    for name, wanted in zip(ATTENTIVE_LAYERS, lessons.attention, strict=True):
        attention = layers[name].float().square().mean(dim=1).flatten(1)
        wanted_flat = torch.from_numpy(wanted).float().flatten(1)
        looks = looks + 1 - functional.cosine_similarity(attention, wanted_flat).mean()
    return hard, soft, looks


def rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate: a rise in the first 5 % of the steps, then a half cosine to 0."""
    warm = max(1, recipe.steps // 20)
    if step < warm:
        return recipe.peak_rate * (step + 1) / warm
    angle = math.pi * (step - warm) / max(1, recipe.steps - warm)
    return recipe.peak_rate * 0.5 * (1 + math.cos(angle))


def top1(network: nn.Module, labelled: Examples, side_px: int, batch: int = 250) -> float:
    """The share of images whose highest score, of the labelled classes, is that of their label."""
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


def optimise(
    network: Vgg16, recipe: Recipe, sets: Sequence[Examples], checkpoint: Path, console: Console
) -> None:
    """Train a network in place, with a progress bar.

    The state is saved in ``checkpoint`` from time to time, and training goes on from there.
    """
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    start = _resume(checkpoint, recipe, network, optimizer)
    known = np.unique(np.concatenate([examples.labels for examples in sets]))
    classes = torch.from_numpy(known[known != UNKNOWN])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(recipe.stage, total=recipe.steps, completed=start, losses="")
        for step, batch in enumerate(prefetched(batches(recipe, sets, start)), start=start):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, recipe)
            hard, soft, looks = losses_of(network, batch, classes, recipe)
            optimizer.zero_grad(set_to_none=True)
            (hard + soft + recipe.attention_weight * looks).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            said = (
                f"labels {hard.detach():.2f}, teacher {soft.detach():.2f}, attention"
                f" {looks.detach():.3f}"
            )
            bar.update(task, advance=1, losses=said)
            if (step + 1) % SAVED_EVERY == 0 or step + 1 == recipe.steps:
                state = {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "recipe": json.dumps(asdict(recipe)),
                }
                with whole_file(checkpoint) as part:
                    torch.save(state, part)


def _resume(
    checkpoint: Path, recipe: Recipe, network: Vgg16, optimizer: torch.optim.Optimizer
) -> int:
    """Load the state of a checkpoint if there is one.

    Returns:
        The step to go on from.

    Raises:
        ModelError: the checkpoint is of another recipe than the card would say.
    """
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["recipe"] != json.dumps(asdict(recipe)):
        raise ModelError(
            f"checkpoint {checkpoint} was trained by another recipe: move it away, or train in"
            " another folder"
        )
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


BATCH = 16
TEACHER_LAYERS = ("fire8", "fire9")
"""The layers of SqueezeNet that teach the student's ``ATTENTIVE_LAYERS``, in that order."""


def teaching_engine(classifier: Classifier, batch: int = BATCH) -> OpenVinoEngine:
    """An engine without a backward pass, from uint8 BGR images to a teacher's outputs.

    They are ``scores`` before any softmax, float32, and an attention map ``[N, h, w]`` of each
    layer: the mean square over channels (Zagoruyko & Komodakis 2017, section 3.1, F with p = 2).
    """
    graph = Graph()
    _, x = append_preprocessing(graph, batch, classifier.shape, classifier.preprocessing)
    forward = classifier.append(graph, x)
    graph.output(forward.scores, "scores")
    for layer in TEACHER_LAYERS:
        square = graph.add(
            "Mul", forward.layers[layer], forward.layers[layer], hint=f"{layer}_square"
        )
        graph.output(
            graph.add("ReduceMean", square, graph.constant([1], np.int64), keepdims=0),
            f"attention_{layer}",
        )
    return OpenVinoEngine(graph.model())


def taught_crops(
    photos: Sequence[Images],
    teacher: Classifier,
    per_photo: int,
    side_px: int,
    attention_sides: Sequence[int],
    console: Console,
    labels: NDArray[np.int64] | None = None,
    smallest: float = 0.15,
    seed: int = 0,
) -> Examples:
    """Random crops of photos, with the teacher's lessons. The first of each is the whole photo.

    Args:
        photos: BGR images of any size.
        teacher: sees each crop at its own input size.
        per_photo: the number of crops of each photo.
        side_px: the size at which crops are kept.
        attention_sides: the sides of the student's maps, to which the teacher's are averaged.
        console: for progress.
        labels: of each photo; None where they are not known.
        smallest: the smallest area of a crop, as a share of the photo.
        seed: decides the crops.
    """
    engine = teaching_engine(teacher)
    jobs = [(index, number) for index in range(len(photos)) for number in range(per_photo)]
    crops = np.empty((len(jobs), side_px, side_px, 3), np.uint8)
    scores = np.empty((len(jobs), engine.outputs[0].shape[1]), np.float16)
    attention = [np.empty((len(jobs), side, side), np.float16) for side in attention_sides]
    feed = np.zeros(engine.inputs[0].shape, np.uint8)
    for start in track(range(0, len(jobs), BATCH), description="teacher", console=console):
        chunk = jobs[start : start + BATCH]
        for place, (index, number) in enumerate(chunk):
            rng = np.random.default_rng((seed, index, number))
            if number:
                feed[place] = random_crop(photos[index], teacher.size_px, smallest, rng)
                crops[start + place] = resized(feed[place], side_px)
            # the student's copy is made of the photo itself: resizing it to the teacher's size
            # first would blur small images
            else:
                feed[place] = resized(photos[index], teacher.size_px)
                crops[start + place] = resized(photos[index], side_px)
        said, rows = engine.infer({IMAGE: feed}), slice(start, start + len(chunk))
        scores[rows] = said["scores"][: len(chunk)]
        for kept, layer in zip(attention, TEACHER_LAYERS, strict=True):
            kept[rows] = _averaged(said[f"attention_{layer}"], kept.shape[1])[: len(chunk)]
    known = np.repeat(np.full(len(photos), UNKNOWN) if labels is None else labels, per_photo)
    return Examples(crops, known.astype(np.int64), Lessons(scores, tuple(attention)))


def _averaged(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps ``[N, h, w]``, averaged to ``[N, side, side]`` and scaled to a largest value of 1."""
    small = area_matrix(maps.shape[1], side) @ maps @ area_matrix(maps.shape[2], side).T
    return np.asarray(small / np.maximum(small.max(axis=(1, 2), keepdims=True), 1e-12))


CLASSIFY = Recipe("classify", side_px=64, steps=5600, batch=(128,), peak_rate=0.1)
DISTIL = Recipe("distil", side_px=128, steps=2600, batch=(48, 64), peak_rate=0.04)
SETTLE = replace(
    DISTIL, stage="settle", steps=1000, batch=(64, 48), peak_rate=0.03, scores_of_labelled=False
)
CROPS_PER_PHOTO = 16
PHOTOS = ("animal_pose_voc/train.zip", "imagenet_sample/images_256.zip", "coco128/train2017.tar")
CLIPS = ("davis/camel.tar", "davis/dog.tar", "davis/car-roundabout.tar")
EVERY_NTH_CLIP_FRAME = 5


def train(
    data: Annotated[
        Path,
        Option("Folder with tiny_imagenet_200, squeezenet_v1.0_imagenet and the photo sets."),
    ],
    out: Annotated[
        Path,
        Option("Folder for checkpoints and the weights; a stopped run goes on from it."),
    ],
) -> None:
    """Run the stages, or go on with them, and write ``compact.safetensors`` with its card."""
    console = Terminal(stderr=True)
    torch.manual_seed(0)
    network = Vgg16(CLASSIFY.channels, len(imagenet_classes()), hidden=0, batch_norm=True)
    labelled, validation = (
        tiny_imagenet(data / "tiny_imagenet_200", split) for split in ("train", "val")
    )
    optimise(network, CLASSIFY, [labelled], out / "classify.pt", console)
    taught = taught_examples(data, labelled, out, console)
    optimise(network, DISTIL, taught, out / "distil.pt", console)
    optimise(network, SETTLE, taught, out / "settle.pt", console)
    accuracy = top1(network, validation, DISTIL.side_px)
    console.print(f"Tiny ImageNet top-1 at {DISTIL.side_px} px: {100 * accuracy:.1f} %")
    export(network, out / "compact.safetensors", accuracy)


def tiny_imagenet(folder: Path, split: str) -> Examples:
    """All images of the ``train`` or ``val`` split.

    Raises:
        SourceError: an image is missing.
    """
    position = {wnid: index for index, (wnid, _) in enumerate(imagenet_classes())}
    readers = {Path(name).name: read for name, read in archive_members(folder / f"{split}.zip")}
    with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [row["file"] for row in rows if row["file"] not in readers]
    if missing:
        raise SourceError(f"{folder / split}.zip lacks {missing[0]} and {len(missing) - 1} more")
    images = np.stack([decode_image(row["file"], readers[row["file"]]()) for row in rows])
    return Examples(images, np.array([position[row["wnid"]] for row in rows], np.int64))


def taught_examples(data: Path, labelled: Examples, out: Path, console: Console) -> list[Examples]:
    """The teacher's lessons on Tiny ImageNet and on crops of every training photo.

    They are computed once, and kept in ``out``.
    """
    teacher = load_classifier(
        "squeezenet", str(data / "squeezenet_v1.0_imagenet" / "compressed_SqueezeNet.net")
    )
    sides = (DISTIL.side_px // 8, DISTIL.side_px // 16)

    def tiny() -> Examples:
        return taught_crops(
            list(labelled.images), teacher, 1, CLASSIFY.side_px, sides, console, labelled.labels
        )

    def photos() -> Examples:
        return taught_crops(
            training_photos(data, console), teacher, CROPS_PER_PHOTO, DISTIL.side_px, sides, console
        )

    return [
        kept(out / f"lessons_tiny_imagenet_{sides[0]}.npz", tiny),
        kept(out / f"lessons_photos_{sides[0]}_{CROPS_PER_PHOTO}.npz", photos),
    ]


def training_photos(data: Path, console: Console) -> list[Images]:
    """Every real photo that the network may be trained on."""
    photos: list[Images] = []
    for name in (*PHOTOS, *CLIPS):
        with open_source(str(data / name)) as source:
            stride = EVERY_NTH_CLIP_FRAME if name in CLIPS else 1
            photos += [
                frame.image_bgr for frame in track(source, name, source.frames, console=console)
            ][::stride]
    raccoon = (
        data / "raccoon"
    )  # its boxes are not used: only which photos belong to the training split
    raccoons = load_dataset(
        raccoon / "annotations.tar", raccoon / "images.tar", raccoon / "train.txt"
    )
    photos += [sample.read() for sample in raccoons]
    return photos


def kept(path: Path, make: Callable[[], Examples]) -> Examples:
    """The examples in a file, which is made first where it does not exist."""
    if not path.exists():
        made = make()
        assert made.lessons is not None
        first, second = made.lessons.attention
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(
                file,
                images=made.images,
                labels=made.labels,
                scores=made.lessons.scores,
                first=first,
                second=second,
            )
    with np.load(path) as stored:
        lessons = Lessons(stored["scores"], (stored["first"], stored["second"]))
        return Examples(stored["images"], stored["labels"], lessons)


def export(network: Vgg16, path: Path, accuracy: float) -> None:
    """Write the weights as float16 safetensors, with a card that says how they were trained."""
    card: dict[str, Any] = {
        "network": (
            "VGG16 (configuration D), channels 16 32 64 128 256, global average pooling, 1,000"
            " ImageNet-1k scores"
        ),
        "trained_on": {
            "classify": "Tiny ImageNet 200, train split (60,000 images)",
            "distil, settle": (
                "SqueezeNet v1.0's scores and attention on Tiny ImageNet 200 train and on crops of"
                " photos: animal_pose_voc train, imagenet_sample, coco128, raccoon train, every"
                " fifth frame of three DAVIS clips"
            ),
        },
        "recipes": [asdict(recipe) for recipe in (CLASSIFY, DISTIL, SETTLE)],
        "tiny_imagenet_val_top1": round(accuracy, 4),
        "licence": "Apache-2.0; the training images are for research use",
    }
    with whole_file(path) as part:
        part.write_bytes(save(folded_weights(network), {"card": json.dumps(card)}))


def folded_weights(network: Vgg16) -> dict[str, np.ndarray]:
    """The float16 weights by torchvision's names for a network without batch norm.

    Each batch norm is folded into its convolution.
    """
    weights: dict[str, np.ndarray] = {}
    index, layers = 0, list(network.features)
    for place, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            norm = layers[place + 1]
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weights[f"features.{index}.weight"] = _half(layer.weight * scale.view(-1, 1, 1, 1))
            weights[f"features.{index}.bias"] = _half(norm.bias - norm.running_mean * scale)
        if not isinstance(layer, nn.BatchNorm2d):
            index += 1
    for name, value in network.classifier.named_parameters():
        weights[f"classifier.{name}"] = _half(value)
    return weights


def _half(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a float16 array."""
    return np.ascontiguousarray(tensor.detach().contiguous().numpy().astype(np.float16))


if __name__ == "__main__":
    run(train)
