"""Reads PASCAL VOC 2007 from its published files: one tar of 450 MB for each half, without
unpacking it.

Everingham et al., "The PASCAL Visual Object Classes Challenge 2007": 20 classes, 5,011 images to
learn from, 4,952 to test.
"""

from pathlib import Path

from calib.data.datasets import Sample, labelled
from calib.data.remarks import Remarks
from calib.data.xml_dialects import xml_label
from engines.downloads import Download, downloaded
from engines.errors import SourceError
from realtime.sources.images import archive_members

ADDRESS = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007"
"""The publisher's server for https; what is mostly cited, ``host.robots.ox.ac.uk``, is plain
http.
"""
ARCHIVES = {
    "trainval": Download(
        f"{ADDRESS}/VOCtrainval_06-Nov-2007.tar",
        "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
        460_032_000,
        "VOCtrainval_06-Nov-2007.tar",
    ),
    "test": Download(
        f"{ADDRESS}/VOCtest_06-Nov-2007.tar",
        "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
        451_020_800,
        "VOCtest_06-Nov-2007.tar",
    ),
}
ROOT = "VOCdevkit/VOC2007"


def load_voc2007(split: str, folder: Path) -> list[Sample]:
    """The images of a half with their boxes; ``difficult`` objects are left out, so an image may
    have none.

    Args:
        split: ``trainval`` or ``test``.
        folder: where the archive lies, or is downloaded to.

    Raises:
        DownloadError: the archive is not there and cannot be fetched.
        SourceError: it is damaged, or not the one that VOC publishes.
    """
    archive = downloaded(ARCHIVES[split], folder)
    members = dict(archive_members(archive, {".jpg", ".xml", ".txt"}))
    try:
        names = members[f"{ROOT}/ImageSets/Main/{split}.txt"]().decode().split()
        annotations = [members[f"{ROOT}/Annotations/{name}.xml"] for name in names]
        images = [members[f"{ROOT}/JPEGImages/{name}.jpg"] for name in names]
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
