"""Train the compact VGG16 that Sightline ships: ``python -m calib.shipped.train --data DATA --out DIR``.

Three stages, one network of 1,000 ImageNet-1k scores:

1. ``classify``: cross-entropy on Tiny ImageNet at its native 64 px, over the 200 classes that it has.
2. ``distil``: at the shipped input size, from a teacher, SqueezeNet: its softened scores (Hinton et al. 2015, equation 1)
   and where it looks (Zagoruyko & Komodakis 2017) on Tiny ImageNet and on random crops of real photos, which is where the
   student learns what photos look like.
3. ``settle``: the same, but labelled images go by their labels instead of the teacher's scores, which are often wrong there.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save
from torch import nn

from calib.data.datasets import load_dataset
from calib.shipped.optimise import Examples, Images, Lessons, Recipe, optimise, top1
from calib.shipped.teacher import taught_crops
from engines.backends.torch_networks import Vgg16
from engines.base import SourceError
from engines.classifiers import imagenet_classes, load_classifier
from engines.files import whole_file
from engines.terminal import Terminal
from realtime.sources import archive_members, decode_image, open_source

CLASSIFY = Recipe("classify", side_px=64, steps=5600, batch=(128,), peak_rate=0.1)
DISTIL = Recipe("distil", side_px=128, steps=2600, batch=(48, 64), peak_rate=0.04)
SETTLE = replace(DISTIL, stage="settle", steps=1000, batch=(64, 48), peak_rate=0.03, scores_of_labelled=False)
CROPS_PER_PHOTO = 16
PHOTOS = ("animal_pose_voc/train.zip", "imagenet_sample/images_256.zip", "coco128/train2017.tar")
CLIPS = ("davis/camel.tar", "davis/dog.tar", "davis/car-roundabout.tar")
EVERY_NTH_CLIP_FRAME = 5


def train(
    data: Annotated[Path, typer.Option(help="Folder with tiny_imagenet_200, squeezenet_v1.0_imagenet and the photo sets.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the weights; a stopped run goes on from it.")],
) -> None:
    """Run (or go on with) the stages and write ``compact.safetensors`` with its card."""
    console = Terminal(stderr=True)
    torch.manual_seed(0)
    network = Vgg16(CLASSIFY.channels, len(imagenet_classes()), hidden=0, batch_norm=True)
    labelled, validation = (tiny_imagenet(data / "tiny_imagenet_200", split) for split in ("train", "val"))
    optimise(network, CLASSIFY, [labelled], out / "classify.pt", console)
    taught = taught_examples(data, labelled, out, console)
    optimise(network, DISTIL, taught, out / "distil.pt", console)
    optimise(network, SETTLE, taught, out / "settle.pt", console)
    accuracy = top1(network, validation, DISTIL.side_px)
    console.print(f"Tiny ImageNet top-1 at {DISTIL.side_px} px: {100 * accuracy:.1f} %")
    export(network, out / "compact.safetensors", accuracy)


def tiny_imagenet(folder: Path, split: str) -> Examples:
    """The ``train`` or ``val`` split, whole.

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
    """What the teacher says of Tiny ImageNet and of crops of every training photo; computed once, then kept in ``out``."""
    teacher = load_classifier("squeezenet", str(data / "squeezenet_v1.0_imagenet" / "compressed_SqueezeNet.net"))
    sides = (DISTIL.side_px // 8, DISTIL.side_px // 16)

    def tiny() -> Examples:
        return taught_crops(list(labelled.images), teacher, 1, CLASSIFY.side_px, sides, console, labelled.labels)

    def photos() -> Examples:
        return taught_crops(training_photos(data, console), teacher, CROPS_PER_PHOTO, DISTIL.side_px, sides, console)

    return [
        kept(out / f"lessons_tiny_imagenet_{sides[0]}.npz", tiny),
        kept(out / f"lessons_photos_{sides[0]}_{CROPS_PER_PHOTO}.npz", photos),
    ]


def training_photos(data: Path, console: Console) -> list[Images]:
    """Every real photo that may be learned from."""
    photos: list[Images] = []
    for name in (*PHOTOS, *CLIPS):
        with open_source(str(data / name)) as source:
            stride = EVERY_NTH_CLIP_FRAME if name in CLIPS else 1
            photos += [frame.image_bgr for frame in track(source, name, source.frames, console=console)][::stride]
    raccoon = data / "raccoon"  # its boxes are not used: only which photos belong to the training split
    raccoons = load_dataset(raccoon / "annotations.tar", raccoon / "images.tar", raccoon / "train.txt")
    photos += [sample.read() for sample in raccoons]
    return photos


def kept(path: Path, make: Callable[[], Examples]) -> Examples:
    """The examples stored at ``path``, made first where it does not exist."""
    if not path.exists():
        made = make()
        assert made.lessons is not None
        first, second = made.lessons.attention
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(file, images=made.images, labels=made.labels, scores=made.lessons.scores, first=first, second=second)
    with np.load(path) as stored:
        lessons = Lessons(stored["scores"], (stored["first"], stored["second"]))
        return Examples(stored["images"], stored["labels"], lessons)


def export(network: Vgg16, path: Path, accuracy: float) -> None:
    """Write the weights, batch norm folded, as float16 safetensors with a card of how they came to be."""
    card: dict[str, Any] = {
        "network": "VGG16 (configuration D), channels 16 32 64 128 256, global average pooling, 1,000 ImageNet-1k scores",
        "trained_on": {
            "classify": "Tiny ImageNet 200, train split (60,000 images)",
            "distil, settle": "SqueezeNet v1.0's scores and attention on Tiny ImageNet 200 train and on crops of photos: "
            "animal_pose_voc train, imagenet_sample, coco128, raccoon train, every fifth frame of three DAVIS clips",
        },
        "recipes": [asdict(recipe) for recipe in (CLASSIFY, DISTIL, SETTLE)],
        "tiny_imagenet_val_top1": round(accuracy, 4),
        "licence": "Apache-2.0; the training images are for research use",
    }
    with whole_file(path) as part:
        part.write_bytes(save(folded_weights(network), {"card": json.dumps(card)}))


def folded_weights(network: Vgg16) -> dict[str, np.ndarray]:
    """float16 weights under torchvision's names without batch norm, each batch norm folded into its convolution."""
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
    return np.ascontiguousarray(tensor.detach().contiguous().numpy().astype(np.float16))


if __name__ == "__main__":
    typer.run(train)
