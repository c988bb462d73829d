import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from calib.data.datasets import load_dataset
from engines.errors import InputError, OutputError, SourceError
from realtime.teaching.labels import Box, LabelFolder, checked_box

SIZE_PX = 64, 48
MUG = Box("my mug", (10.0, 8.0, 30.0, 28.0))


def jpeg(value=90):
    image = np.full((SIZE_PX[1], SIZE_PX[0], 3), value, np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    return LabelFolder(tmp_path / "labels")


def test_what_is_saved_is_read_by_the_readers_of_data_sets(folder):
    one, two = folder.add_image("cam-000001", jpeg()), folder.add_image("cam-000002", jpeg())
    folder.save(one, [MUG, Box("my cup", (40.0, 8.0, 60.0, 28.0))], SIZE_PX)
    folder.save(two, [], SIZE_PX)
    samples = load_dataset(folder.table, None, None, [], None)
    assert [len(each.truths) for each in samples] == [2, 0]
    assert samples[0].truths[0].class_name == "my mug"
    assert samples[0].truths[0].box_xyxy_px == MUG.box_xyxy_px


def test_the_coco_file_is_read_as_the_same_labels(folder):
    one, two = folder.add_image("cam", jpeg()), folder.add_image("cam", jpeg())
    assert (one, two) == ("cam.jpg", "cam_2.jpg")
    folder.save(one, [MUG], SIZE_PX)
    folder.save(two, [], SIZE_PX)
    path = folder.folder / "labels.json"
    path.write_text(json.dumps(folder.coco()), encoding="utf-8")
    samples = load_dataset(path, None, None, [], None)
    assert [[each.box_xyxy_px for each in one.truths] for one in samples] == [
        [MUG.box_xyxy_px],
        [],
    ]


def test_changes_are_undone_one_by_one(folder):
    file = folder.add_image("cam", jpeg())
    folder.save(file, [MUG], SIZE_PX)
    folder.save(file, [], SIZE_PX)
    folder.remove(file)
    assert folder.all() == {}
    found = []
    while folder.can_undo:
        assert folder.undo() == file
        found.append(folder.all().get(file))
    assert found == [(), (MUG,), None]
    assert folder.undo() is None
    assert (folder.folder / file).exists(), "an image is never removed"


def test_what_another_program_changed_is_kept(folder):
    one, two = folder.add_image("a", jpeg()), folder.add_image("b", jpeg())
    folder.save(one, [MUG], SIZE_PX)
    with folder.table.open("a", encoding="utf-8") as file:
        file.write(f"{two},my cup,1,1,20,20\n")
    folder.save(one, [], SIZE_PX)
    assert LabelFolder(folder.folder).all() == {
        one: (),
        two: (Box("my cup", (1.0, 1.0, 20.0, 20.0)),),
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("image,label\na.jpg,cat\n", "other columns"),
        ("file,class,x0,y0,x1,y1\na.jpg,cat,1,2,x,4\n", "line 2"),
        ("file,class,x0,y0,x1,y1\na.jpg,cat,1,2\n", "line 2"),
    ],
)
def test_a_table_that_is_none_of_ours_is_left_alone(tmp_path, text, why):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=why):
        LabelFolder(tmp_path)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("box", "why"),
    [
        (Box("", (1, 1, 20, 20)), "no name yet"),
        (Box("  \t ", (1, 1, 20, 20)), "no name yet"),
        (Box("x" * 61, (1, 1, 20, 20)), "at most 60 letters"),
        (Box("cup", (5, 5, 7, 20)), "too small"),
        (Box("cup", (70, 5, 90, 20)), "too small"),
    ],
)
def test_boxes_that_cannot_be_are_refused_in_one_line(folder, box, why):
    file = folder.add_image("cam", jpeg())
    with pytest.raises(InputError, match=why):
        folder.save(file, [box], SIZE_PX)
    assert folder.all() == {}


def test_names_and_edges_are_put_right():
    found = checked_box(Box(" My  MUG ", (50.0, 60.0, -3.0, 4.0)), SIZE_PX, {"my mug": 3})
    assert found == Box("my mug", (0.0, 4.0, 50.0, 48.0))


def test_one_object_has_one_box(folder):
    file = folder.add_image("cam", jpeg())
    near = Box("my mug", (10.0, 8.0, 30.0, 28.5))
    with pytest.raises(InputError, match="has a box here already"):
        folder.save(file, [MUG, near], SIZE_PX)
    folder.save(file, [MUG, Box("my cup", near.box_xyxy_px)], SIZE_PX)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        LabelFolder(tmp_path / "file" / "labels").add_image("cam", jpeg())


def test_whatever_ends_the_run_loses_at_most_one_box(tmp_path):
    """A process that labels as fast as it can is killed: each label that it told of is there."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from realtime.teaching.labels import Box, LabelFolder\n"
        "folder = LabelFolder(Path(sys.argv[1]))\n"
        "jpeg = bytes.fromhex(sys.stdin.readline())\n"
        "for number in range(10**6):\n"
        "    file = folder.add_image(f'cam-{number}', jpeg)\n"
        "    folder.save(file, [Box('mug', (1.0, 1.0, 20.0, 20.0))], (64, 48))\n"
        "    print(file, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as process:
        process.stdin.write(jpeg().hex() + "\n")
        process.stdin.flush()
        told = [process.stdout.readline().strip()]
        time.sleep(0.1)
        process.kill()
        told += [line.strip() for line in process.stdout]
    found = LabelFolder(tmp_path).all()
    assert set(told) <= set(found)
    assert len(found) <= len(told) + 1
    assert all((tmp_path / file).read_bytes() == jpeg() for file in found)
    with (tmp_path / "labels.csv").open(encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == len(found) + 1
