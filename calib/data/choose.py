"""Opens the labelled images that a user named: a label file, or a published data set by its name.

PASCAL VOC 2007 is read from its published files, one tar of 450 MB for each half, without unpacking
them (Everingham et al., "The PASCAL Visual Object Classes Challenge 2007": 20 classes, 5,011 images
to learn from, 4,952 to test).

ImageNet's 1,000 classes are mapped to the classes of VOC and COCO: a dog is any of 118 breeds. Some
classes of those sets are no class of ImageNet (person, giraffe, knife ...). They are left out,
because a network that knows only ImageNet's classes cannot name them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from calib.data.datasets import Sample, decodable, labelled, load_dataset, of_classes
from calib.data.labels import Remarks
from calib.data.xml_dialects import xml_label
from engines.downloads import Download, cache_dir, downloaded
from engines.errors import SourceError
from engines.networks.registry import imagenet_classes
from engines.options import ADVANCED, LOOK_AT, Option
from realtime.sources.images import archive_members

VOC_ADDRESS = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007"
"""The publisher's server for https; what is mostly cited, ``host.robots.ox.ac.uk``, is plain
http.
"""
VOC_ARCHIVES = {
    "trainval": Download(
        f"{VOC_ADDRESS}/VOCtrainval_06-Nov-2007.tar",
        "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
        460_032_000,
        "VOCtrainval_06-Nov-2007.tar",
    ),
    "test": Download(
        f"{VOC_ADDRESS}/VOCtest_06-Nov-2007.tar",
        "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
        451_020_800,
        "VOCtest_06-Nov-2007.tar",
    ),
}
VOC_ROOT = "VOCdevkit/VOC2007"


def load_voc2007(split: str, folder: Path) -> list[Sample]:
    """Load the images of one half with their boxes.

    Objects that are marked ``difficult`` are left out, so an image may have none.

    Args:
        split: ``trainval`` or ``test``.
        folder: where the archive lies, or is downloaded to.

    Raises:
        DownloadError: the archive is not there and cannot be fetched.
        SourceError: it is damaged, or not the one that VOC publishes.
    """
    archive = downloaded(VOC_ARCHIVES[split], folder)
    members = dict(archive_members(archive, {".jpg", ".xml", ".txt"}))
    try:
        names = members[f"{VOC_ROOT}/ImageSets/Main/{split}.txt"]().decode().split()
        annotations = [members[f"{VOC_ROOT}/Annotations/{name}.xml"] for name in names]
        images = [members[f"{VOC_ROOT}/JPEGImages/{name}.jpg"] for name in names]
    except KeyError as error:
        raise SourceError(
            f"{archive} lacks {error}: it is cut off or not VOC 2007's; remove it to download it"
            " anew"
        ) from error
    remarks, samples = Remarks(), []
    for name, annotation, image in zip(names, annotations, images, strict=True):
        label = xml_label(annotation(), f"{archive}: {name}.xml")
        with remarks.leaving_out():
            samples.append(labelled(label, image, f"{archive}: image {label.image}", remarks))
    remarks.tell()
    return samples


PUBLISHED: Mapping[str, Callable[[str, Path], list[Sample]]] = {"voc2007": load_voc2007}


ImagesOption = Annotated[
    Path | None, Option("Folder, zip, tar or video, where it is not beside the labels.", LOOK_AT)
]
IdsOption = Annotated[
    Path | None,
    Option("Text file that names the images to use, by file stem, one a line.", LOOK_AT),
]


@dataclass(frozen=True)
class DataOptions:
    """The labelled images that a command reads: a label file of the user's own, see
    ``calib.data.datasets.load_dataset``, or a published set.
    """

    data: Annotated[
        Path | None,
        Option(
            "Labels: CSV, VOC or ImageNet-LOC XML, COCO json, OTB or VOT text, YOLO or CVAT"
            " folders ...",
            None,
        ),
    ] = None
    images: ImagesOption = None
    ids: IdsOption = None
    dataset: Annotated[
        str | None,
        Option(
            "A published set in place of DATA, downloaded when it is not there: voc2007.", LOOK_AT
        ),
    ] = None
    dataset_dir: Annotated[
        Path | None, Option("Where its archives lie, or are to be kept.", ADVANCED)
    ] = None
    classes: Annotated[
        str | None,
        Option(
            "Only objects of these classes: dog,cat. Heads are fitted where there is one of them.",
            LOOK_AT,
        ),
    ] = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files and folders that are read."""
        return tuple(each for each in (self.data, self.images, self.ids) if each)

    @property
    def name(self) -> str:
        """Name of the set, for cards."""
        return self.dataset or (self.data.stem if self.data else "")

    @property
    def title(self) -> str:
        """Name of the set with its folder, for pages and pictures."""
        return self.dataset or (
            f"{self.data.resolve().parent.name}/{self.data.stem}" if self.data else ""
        )


def labels_beside(choice: DataOptions, data: Path, ids: Path | None) -> DataOptions:
    """Options for another label file, with the same classes and the same place of the images."""
    return DataOptions(data, choice.images, ids, classes=choice.classes)


def load_chosen(
    choice: DataOptions, split: str, remarks: Remarks | None = None, limit: int | None = None
) -> list[Sample]:
    """Load the first ``limit`` labelled images of what was chosen.

    That is a user's own set, or ``trainval`` or ``test`` of a published one.

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
                "the folder of a published set goes with its name: with a label file, say where"
                " the images are",
                option=("dataset_dir", "dataset", "images"),
            )
        return decodable(
            load_dataset(choice.data, choice.images, choice.ids, classes, remarks)[:limit], remarks
        )
    if choice.data is None and choice.dataset is not None:
        if choice.dataset not in PUBLISHED:
            raise SourceError(
                f"unknown data set '{choice.dataset}': use {', '.join(PUBLISHED)}",
                option="dataset",
            )
        if choice.images or choice.ids:
            raise SourceError(
                f"images and ids go with a label file: {choice.dataset} names its own images",
                option=("images", "ids"),
            )
        samples = PUBLISHED[choice.dataset](split, choice.dataset_dir or cache_dir() / "datasets")
        return of_classes(samples, classes, f"{choice.dataset} {split}")[:limit]
    given = "both are given" if choice.data else "neither is given"
    raise SourceError(
        f"give either a label file or a data set, {' or '.join(PUBLISHED)}: {given}",
        option="dataset",
    )


_BALLS = (430, 522, 574, 722, 768, 805, 852, 890)
KNOWN: dict[str, Sequence[int]] = {
    "dog": range(151, 269),
    "cat": range(281, 286),
    "horse": (339,),
    "sheep": (348, 349),
    "cow": (345, 346),
    "elephant": (101, 385, 386),
    "zebra": (340,),
    "bear": range(294, 298),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "car": (407, 436, 468, 511, 609, 627, 656, 661, 751, 817),
    "bus": (654, 779, 874),
    "truck": (555, 569, 675, 717, 864, 867),
    "bicycle": (444, 671),
    "motorcycle": (665, 670),
    "motorbike": (665, 670),
    "airplane": (404, 895),
    "aeroplane": (404, 895),
    "boat": (472, 484, 554, 576, 625, 780, 814, 871, 914),
    "train": (466, 547, 705, 820),
    "traffic light": (920,),
    "bench": (703,),
    "umbrella": (879,),
    "backpack": (414,),
    "tie": (457, 906),
    "sports ball": _BALLS,
    "skis": (795,),
    "tennis racket": (752,),
    "bottle": (440, 737, 898, 907),
    "wine glass": (572,),
    "cup": (504, 968),
    "bowl": (659, 809),
    "banana": (954,),
    "orange": (950,),
    "broccoli": (937,),
    "hot dog": (934,),
    "pizza": (963,),
    "chair": (423, 559, 765),
    "couch": (831,),
    "sofa": (831,),
    "potted plant": (738,),
    "pottedplant": (738,),
    "bed": (564,),
    "dining table": (532,),
    "diningtable": (532,),
    "toilet": (861,),
    "tv": (851,),
    "tvmonitor": (664, 851),
    "laptop": (620, 681),
    "mouse": (673,),
    "remote": (761,),
    "keyboard": (508,),
    "cell phone": (487,),
    "microwave": (651,),
    "oven": (827,),
    "toaster": (859,),
    "sink": (896,),
    "refrigerator": (760,),
    "clock": (409, 530, 892),
    "vase": (883,),
    "teddy bear": (850,),
    "stop sign": (919,),
}
SAME_NAMES = {
    "airplane": "aeroplane",
    "couch": "sofa",
    "diningtable": "dining table",
    "motorcycle": "motorbike",
    "pottedplant": "potted plant",
    "tv": "screen",
    "tvmonitor": "screen",
}
"""What the shipped dense head calls classes of COCO and VOC, where it differs."""


@cache
def everyday_names(names: tuple[str, ...], wanted: frozenset[str]) -> tuple[str, ...]:
    """What a data set calls each class of a network. It is '' where the set has no such class.

    Args:
        names: of the network's classes; ImageNet's are translated, any other stand for themselves.
        wanted: the classes of the data set.
    """
    if names != tuple(name for _, name in imagenet_classes()):
        return tuple(name if name in wanted else "" for name in names)
    index = {i: name for name, indices in KNOWN.items() if name in wanted for i in indices}
    return tuple(index.get(i, name if name in wanted else "") for i, name in enumerate(names))
