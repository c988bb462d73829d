"""Fits the dense head that is shipped with EfficientNet-Lite0, on VOC 2007 trainval and
animal_pose_voc train.

Run it as ``python -m calib.research.dense --data FOLDER --out HEAD``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console

from calib.data.datasets import Sample, load_dataset
from calib.heads.dense import default_spec, fit_dense
from calib.heads.dense_scenes import MAIN
from calib.heads.linear import FOLDS, group_numbers
from calib.research.command_line import run
from calib.research.dense_domains import DRAWN_FRAMES, further
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import class_names, load_classifier
from engines.options import Option

SIZE_PX = 320
SMALL_PHOTOS = 2500
"""Of Tiny ImageNet's training photos, so many serve the box layer, the names and the confidence."""
RARE = ("bottle",)
"""Of the things that few of VOC's photos show by themselves, all photos of Tiny ImageNet serve."""
OF_EACH_KIND = 600
BLURRED = "moving"
"""The confidence gets too high where nothing is, when it is fitted to images of this kind."""
ALL, FITTED, LEFT_OUT = "all", "fitted", "left out"
"""Parts of the photos, see ``training_images``."""
CLASSES = 1000
PEOPLE_SAY = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "screen",
}
"""Words for VOC's names that nobody says."""
FINER = {
    "aeroplane": "404 895",
    "bicycle": "444 671",
    "bird": "7-24 80-100 127-146",
    "boat": "472 484 554 576 625 628 724 780 814 871 914",
    "bottle": "440 720 737 898 907",
    "bus": "654 779 874",
    "car": "407 436 468 511 609 627 656 661 717 734 751 817",
    "cat": "281-285",
    "chair": "423 559 765 857",
    "cow": "345",
    "dining table": "532",
    "dog": "151-268",
    "horse": "339",
    "motorbike": "665 670",
    "person": "981-983",
    "potted plant": "738",
    "screen": "664 782 851",
    "sheep": "348 349",
    "sofa": "831",
    "train": "466 547 705 820",
}
"""Classes of ImageNet that are kinds of them, by their synsets' hypernyms."""


def main(
    data: Annotated[Path, Option("Folder with the data sets.")],
    out: Annotated[Path, Option("The head to write (.safetensors).")],
    model: Annotated[str, Option("The network.")] = "lite0",
    size: Annotated[int, Option("Input side in pixels.", min=32)] = SIZE_PX,
    leave_out: Annotated[bool, Option("Leave a fifth of the photos out.")] = False,
) -> None:
    """Fit the head and say what it reaches on images that it was not fitted on."""
    classifier = load_classifier(model, None, size, GivenInput(resize="letterbox"))
    images = training_images(data, FITTED if leave_out else ALL)
    del images[BLURRED]
    console = Console()
    fitted = fit_dense(
        images.pop(MAIN),
        classifier,
        default_spec(classifier),
        console,
        "VOC 2007 trainval, animal_pose_voc train",
        further=images,
        finer={name: numbers(ranges) for name, ranges in FINER.items()},
    )
    fitted.head.save(out)
    console.print(fitted.held_out)


def training_images(data: Path, part: str = ALL) -> dict[str, list[Sample]]:
    """The images that the head is fitted to, by their kind, see ``calib.heads.dense_scenes.MAIN``.

    Args:
        data: folder with the data sets.
        part: ``ALL``; ``LEFT_OUT``, a fifth of the photos and images made of them, or ``FITTED``,
            those of the others. Photos of one group are never apart.
    """
    voc, animals = (
        [spoken(sample) for sample in load_dataset(data / name)]
        for name in ("voc2007/trainval.csv", "animal_pose_voc/train.csv")
    )
    folder = data / "tiny_imagenet_200"
    small, words = load_dataset(folder / "train.csv"), kinds(folder / "words.txt")
    order = np.random.default_rng(7).permutation(len(small))
    many, others = (
        [called(small[i], words) for i in places] for places in np.split(order, [SMALL_PHOTOS])
    )
    rare = [each for each in others if any(truth.class_name in RARE for truth in each.truths)]
    each, first_drawn = OF_EACH_KIND, 0
    if part != ALL:
        voc, animals, many, rare = of_part([voc, animals, many, rare], part == LEFT_OUT)
    if part == LEFT_OUT:
        each, first_drawn = OF_EACH_KIND // FOLDS, DRAWN_FRAMES
    photos = [*voc, *animals]
    made = further(photos, voc, each, first_drawn)
    return {MAIN: photos, **made, "small": many, "rare": rare}


def of_part(lists: Sequence[Sequence[Sample]], left_out: bool) -> list[list[Sample]]:
    """Of lists of photos those of the fifth of their groups that is left out, or the others."""
    groups = [sample.group for some in lists for sample in some]
    numbers = group_numbers(groups, np.arange(len(groups)))
    held = np.random.default_rng(0).permutation(numbers.max() + 1) % FOLDS == 0
    mine = dict(zip(groups, (held[numbers] == left_out).tolist(), strict=True))
    return [[sample for sample in some if mine[sample.group]] for some in lists]


def spoken(sample: Sample) -> Sample:
    """The sample with names that people say. Difficult objects are to be ignored."""
    return called(sample, PEOPLE_SAY)


def called(sample: Sample, words: Mapping[str, str]) -> Sample:
    """The sample with other names for some of its objects."""
    truths = tuple(
        replace(each, class_name=words.get(each.class_name, each.class_name))
        for each in sample.truths
    )
    return replace(sample, truths=truths)


def kinds(words: Path) -> dict[str, str]:
    """Which of ``FINER`` the synsets of a list are kinds of, where they are of one."""
    numbered = {name: place for place, name in enumerate(class_names(CLASSES))}
    kind_of = {each: name for name, ranges in FINER.items() for each in numbers(ranges)}
    lines = [line.split("\t") for line in words.read_text().splitlines()]
    placed = [(synset, numbered.get(said.split(",")[0].strip())) for synset, said in lines]
    return {synset: kind_of[place] for synset, place in placed if place in kind_of}


def numbers(ranges: str) -> list[int]:
    """The numbers of ``3 7-9``: 3, 7, 8, 9."""
    found = list[int]()
    for part in ranges.split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


if __name__ == "__main__":
    run(main)
