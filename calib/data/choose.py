"""Opens the labelled images that a user named: a label file, or a published data set by its
name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from calib.data.datasets import Sample, decodable, load_dataset, of_classes
from calib.data.remarks import Remarks
from calib.data.voc import load_voc2007
from engines.downloads import cache_dir
from engines.errors import SourceError

PUBLISHED: Mapping[str, Callable[[str, Path], list[Sample]]] = {"voc2007": load_voc2007}


@dataclass(frozen=True)
class DataChoice:
    """The options of commands that read labelled images; see ``calib.data.datasets.load_dataset``
    for the first three.

    Attributes:
        data, images, ids: labels of the user's own; None with ``dataset``.
        dataset: a name in ``PUBLISHED``, in place of ``data``.
        dataset_dir: where its archives lie or are to be kept; None for the cache.
        classes: names between commas of the classes to keep; None for all.
    """

    data: Path | None = None
    images: Path | None = None
    ids: Path | None = None
    dataset: str | None = None
    dataset_dir: Path | None = None
    classes: str | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files and folders that are read."""
        return tuple(each for each in (self.data, self.images, self.ids) if each)

    @property
    def name(self) -> str:
        """Of the set, for cards."""
        return self.dataset or (self.data.stem if self.data else "")

    @property
    def title(self) -> str:
        """Of the set, with its folder, for pages and pictures."""
        return self.dataset or (
            f"{self.data.resolve().parent.name}/{self.data.stem}" if self.data else ""
        )


OPTIONS: Mapping[str, Any] = {
    "data": Annotated[
        Path | None,
        typer.Argument(
            help=(
                "Labels: CSV, VOC or ImageNet-LOC XML, COCO json, OTB or VOT text, YOLO or CVAT"
                " folders ..."
            )
        ),
    ],
    "images": Annotated[
        Path | None,
        typer.Option(help="Folder, zip, tar or video, where it is not beside the labels."),
    ],
    "ids": Annotated[
        Path | None,
        typer.Option(help="Text file that names the images to use, by file stem, one a line."),
    ],
    "dataset": Annotated[
        str | None,
        typer.Option(
            help="A published set in place of DATA, downloaded when it is not there: voc2007."
        ),
    ],
    "dataset_dir": Annotated[
        Path | None, typer.Option(help="Where its archives lie, or are to be kept.")
    ],
    "classes": Annotated[
        str | None,
        typer.Option(
            help=(
                "Only objects of these classes: dog,cat. Heads are fitted where there is one of"
                " them."
            )
        ),
    ],
}


def labels_beside(choice: DataChoice, data: Path, ids: Path | None) -> DataChoice:
    """Another label file for the same kinds of objects, whose images lie where the first one's
    do.
    """
    return DataChoice(data, choice.images, ids, classes=choice.classes)


def load_chosen(
    choice: DataChoice, split: str, remarks: Remarks | None = None, limit: int | None = None
) -> list[Sample]:
    """The first ``limit`` labelled images of what was chosen: a user's own, ``trainval`` or
    ``test`` of a published set.

    A user's own are decoded once, so that all that follows has the same images: those whose pixels
    are damaged are left out. ``remarks`` takes what is left out of a user's own or guessed, besides
    that it is said.

    Raises:
        SourceError: not exactly one set is named, options contradict each other, or the set cannot
            be read.
        DownloadError: a published set cannot be fetched.
    """
    classes = [name.strip() for name in (choice.classes or "").split(",") if name.strip()]
    if choice.data is not None and choice.dataset is None:
        if choice.dataset_dir is not None:
            raise SourceError(
                "--dataset-dir is where the archives of --dataset lie: with a label file, say"
                " --images"
            )
        return decodable(
            load_dataset(choice.data, choice.images, choice.ids, classes, remarks)[:limit], remarks
        )
    if choice.data is None and choice.dataset is not None:
        if choice.dataset not in PUBLISHED:
            raise SourceError(
                f"unknown data set '{choice.dataset}': --dataset takes {', '.join(PUBLISHED)}"
            )
        if choice.images or choice.ids:
            raise SourceError(
                f"--images and --ids go with a label file: {choice.dataset} names its own images"
            )
        samples = PUBLISHED[choice.dataset](split, choice.dataset_dir or cache_dir() / "datasets")
        return of_classes(samples, classes, f"{choice.dataset} {split}")[:limit]
    given = "both are given" if choice.data else "neither is given"
    raise SourceError(f"give either a label file or --dataset {'|'.join(PUBLISHED)}: {given}")
