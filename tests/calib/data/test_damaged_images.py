"""Images with a good head and damaged pixels, images that are not there, images without labels: the
others are still used.
"""

import json

import cv2
import pytest

from calib.data.datasets import load_dataset
from calib.data.images import look_at
from calib.data.labels import Remarks
from calib.evaluation.sequences import load_sequences
from calib.precision.calibrate import CalibrateOptions
from tests.command_line import command, refused
from tests.realtime.media import picture

ROW = "cat,10,20,40,60\n"


@pytest.fixture
def labels(tmp_path):
    """Twelve labelled pictures; every other one a JPEG."""
    names = [f"{index:02d}.{('png', 'jpg')[index % 2]}" for index in range(12)]
    (tmp_path / "set").mkdir()
    for index, name in enumerate(names):
        cv2.imwrite(str(tmp_path / "set" / name), picture(index))
    (tmp_path / "set.csv").write_text(
        "file,class,x0,y0,x1,y1\n" + "".join(f"{name},{ROW}" for name in names)
    )
    return tmp_path / "set.csv"


def cut(labels, *names):
    """Cut the files off in the middle of their pixels: their head still tells a size."""
    for path in [labels.parent / "set" / name for name in names] or sorted(
        (labels.parent / "set").iterdir()
    ):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        assert path.suffix == ".png" or look_at(path.read_bytes(), path.name).size_px == (
            128,
            96,
        ), "only its pixels tell"


def test_evaluate_leaves_damaged_images_out_and_names_them(labels):
    cut(labels, "02.png", "05.jpg")
    result = command("evaluate", labels, "--weights", "random", "--method", "heuristic", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["images"], report["labels_skipped"]) == (10, 2)
    for name in ("02.png", "05.jpg"):
        assert (
            sum(
                line.startswith("note: left out: ") and name in line
                for line in result.stderr.splitlines()
            )
            == 1
        )


def test_fit_leaves_damaged_images_out_and_names_them(labels, tmp_path):
    cut(labels, "00.png", "11.jpg")
    options = ("--weights", "random", "--size", 64, "--out", tmp_path / "head.safetensors")
    result = command("fit", labels, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["images"] == 10
    assert "00.png" in result.stderr
    assert "11.jpg" in result.stderr
    cut(labels, "04.png")
    assert "9 images have exactly one box" in refused("fit", labels, *options)


def test_images_of_the_training_set_are_the_kept_ones_too(labels):
    cut(labels, "02.png")
    other = labels.with_name("other.csv")
    other.write_text(f"file,class,x0,y0,x1,y1\n01.jpg,{ROW}")
    options = ("--images", labels.parent / "set", "--weights", "random", "--method", "heuristic")
    assert "1 images are both" in refused("evaluate", other, "--train", labels, *options)
    (labels.parent / "set" / "new.png").write_bytes(cv2.imencode(".png", picture(40))[1].tobytes())
    other.write_text(f"file,class,x0,y0,x1,y1\nnew.png,{ROW}")
    result = command("evaluate", other, "--train", labels, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["labels_skipped"] == 0, "what is measured is whole"
    assert "02.png" in result.stderr


def test_no_whole_image_is_one_line(labels, tmp_path):
    cut(labels)
    for name, *options in (
        ("evaluate",),
        ("fit", "--out", tmp_path / "head.safetensors"),
        ("finetune", "--out", tmp_path / "w.safetensors"),
    ):
        line = refused(name, labels, *options, "--weights", "random")
        assert "01.jpg" in line
        assert "5 more cannot be used either" in line, "PNG files were left out before"


def test_calibration_uses_the_whole_images(labels, capsys):
    cut(labels, "02.png", "05.jpg")
    images, samples = CalibrateOptions(str(labels)).read()
    assert len(images) == len(samples) == 10
    assert "02.png" in capsys.readouterr().err


def test_sequences_go_on_without_a_damaged_frame(tmp_path):
    rows = [f"{index},10,20,40,60\n" for index in range(4)]
    (tmp_path / "walk_boxes.csv").write_text("frame,x0,y0,x1,y1\n" + "".join(rows))
    (tmp_path / "walk").mkdir()
    for index in range(4):
        content = cv2.imencode(".png", picture(index))[1].tobytes()
        (tmp_path / "walk" / f"{index}.png").write_bytes(
            content[: len(content) // 2] if index == 2 else content
        )
    remarks = Remarks()
    assert len(load_sequences(tmp_path, None, remarks)) == 3
    assert remarks.left_out == 1


def test_an_image_that_is_not_there_is_left_out(labels):
    (labels.parent / "set" / "03.jpg").unlink()
    options = ("--weights", "random", "--method", "heuristic")
    result = command("evaluate", labels, *options, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["images"], report["labels_skipped"]) == (11, 1)
    assert "03.jpg" in result.stderr
    for path in (labels.parent / "set").iterdir():
        path.unlink()
    line = refused("evaluate", labels, *options)
    assert "00.png" in line
    assert "11 more cannot be used either" in line


@pytest.mark.parametrize("named", ["", "data.yaml", "labels", "labels/train"])
def test_yolos_images_without_a_text_file_are_counted(tmp_path, named):
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("names: [cat]")
    for index in range(6):
        cv2.imwrite(str(tmp_path / "images" / "train" / f"{index}.png"), picture(index))
    for index in range(2):
        (tmp_path / "labels" / "train" / f"{index}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    remarks = Remarks()
    assert len(load_dataset(tmp_path / named, remarks=remarks)) == 2
    assert not remarks.left_out
    said = [line for line in remarks.lines() if "without a text file" in line]
    assert len(said) == 1
    assert "2.png" in said[0]
    assert "and 1 more" in said[0]
