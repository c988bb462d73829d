"""The same two labelled images in every layout that a data set may have."""

import json
import re
import shutil
import tarfile

import cv2
import pytest

from calib.data.datasets import load_dataset
from calib.data.labels import Remarks
from engines.errors import SourceError
from tests.realtime.media import picture, write_video

BOX = (10.0, 20.0, 40.0, 60.0)
NAMES = ("a.png", "b.png")
SIZE = "<size><width>128</width><height>96</height></size>"


def voc_xml(name, box=BOX, extra="", size=SIZE):
    """VOC's corners are pixels counted from 1."""
    corners = zip(
        ("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True
    )
    edges = "".join(f"<{key}>{value:g}</{key}>" for key, value in corners)
    item = f"<object><name>cat</name>{extra}<bndbox>{edges}</bndbox></object>"
    return f"<annotation><filename>{name}</filename>{size}{item}</annotation>"


def images(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        cv2.imwrite(str(folder / name), picture(index))
    return folder


def tar_of(folder):
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)


def csv(folder, box=BOX):
    images(folder / "set")
    rows = "".join(f"{name},w,cat,{','.join(map(str, box))}\n" for name in NAMES)
    (folder / "set.csv").write_text("file,source,class,x0,y0,x1,y1\n" + rows)
    return folder / "set.csv"


def tensorflow_csv(folder, box=BOX):
    images(folder / "images")
    x0, y0, x1, y1 = box
    rows = "".join(f"{name},128,96,cat,{x0 + 1},{y0 + 1},{x1},{y1}\n" for name in NAMES)
    (folder / "cats_labels.csv").write_text(
        "filename,width,height,class,xmin,ymin,xmax,ymax\n" + rows
    )
    return folder / "cats_labels.csv"


def frames_csv(folder, box=BOX):
    tar_of(images(folder / "more"))
    rows = "".join(f"more/{name},{','.join(map(str, box))}\n" for name in NAMES)
    (folder / "more_boxes.csv").write_text("\ufeffframe,x0,y0,x1,y1\n" + rows, encoding="utf-8")
    return folder / "more_boxes.csv"


def voc(folder, box=BOX):
    images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name in NAMES:
        (folder / "Annotations" / f"{name[0]}.xml").write_text(voc_xml(name, box))
    return folder / "Annotations"


def imagenet_loc(folder, box=BOX):
    """Annotations in a tar, which name images without their ending."""
    images(folder / "images" / "n1")
    (folder / "boxes" / "n1").mkdir(parents=True)
    for name in NAMES:
        (folder / "boxes" / "n1" / f"{name[0]}.xml").write_text(voc_xml(name[0], box))
    tar_of(folder / "boxes")
    return folder / "boxes.tar"


def coco(folder, box=BOX):
    images(folder / "set")
    x0, y0, x1, y1 = box
    (folder / "set.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": name, "width": 128, "height": 96}
                    for i, name in enumerate(NAMES)
                ],
                "categories": [{"id": 7, "name": "cat"}],
                "annotations": [
                    {
                        "image_id": i,
                        "category_id": 7,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "iscrowd": 0,
                    }
                    for i in (0, 1)
                ],
            }
        )
    )
    return folder / "set.json"


def otb(folder, box=BOX):
    images(folder / "set")
    x0, y0, x1, y1 = box
    line = f"{x0 + 1},{y0 + 1},{x1 - x0},{y1 - y0}\n"
    (folder / "set_groundtruth_rect.txt").write_text(line + line.replace(",", "\t"))
    return folder / "set_groundtruth_rect.txt"


def vot(folder, box=BOX):
    write_video(folder / "clip.mp4", 2)
    x0, y0, x1, y1 = box
    (folder / "clip_groundtruth.txt").write_text(f"{x0},{y0},{x1},{y0},{x1},{y1},{x0},{y1}\n" * 2)
    return folder / "clip_groundtruth.txt"


def otb_native(folder, box=BOX):
    """As OTB is published; of two objects in one sequence the second."""
    images(folder / "Jogging" / "img")
    (folder / "Jogging" / "groundtruth_rect.1.txt").write_text("1,1,5,5\n" * 2)
    path = folder / "Jogging" / "groundtruth_rect.2.txt"
    otb(folder, box).rename(path)
    shutil.rmtree(folder / "set")
    return path


def vot_native(folder, box=BOX, images_in="color"):
    """As VOT has been published since 2017."""
    images(folder / "bag" / images_in)
    vot(folder, box).rename(folder / "bag" / "groundtruth.txt")
    return folder / "bag" / "groundtruth.txt"


def vot_old(folder, box=BOX):
    return vot_native(folder, box, images_in=".")


LABELLED = (csv, tensorflow_csv, frames_csv, voc, imagenet_loc, coco)
LAYOUTS = (*LABELLED, otb, vot, otb_native, vot_native, vot_old)


def refused(words, path, **options):
    """Loading or reading every image is one line that names the file."""
    with pytest.raises(SourceError, match=words) as error:
        [sample.read() for sample in load_dataset(path, **options)]
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def notify(words, path, **options):
    """The samples of a set of which something is left out or guessed, and said."""
    remarks = Remarks()
    samples = load_dataset(path, remarks=remarks, **options)
    assert re.search(words, "\n".join(remarks.lines())), remarks.lines()
    return samples


def zoo(folder, rows):
    images(folder / "zoo")
    (folder / "zoo.csv").write_text(
        "file,class,x0,y0,x1,y1\n" + "".join(f"{row},10,20,40,60\n" for row in rows)
    )
    return folder / "zoo.csv"
