import ast
import io
import json

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.teaching import fit_command, import_labels, teach
from cli import NETWORK_OPTIONS
from engines.errors import InputError, SourceError
from engines.options import EngineOptions
from realtime.teaching.labels import Box, LabelFolder
from tests.conftest import ROOT


def image(place_px):
    found = np.full((60, 80, 3), 50, np.uint8)
    found[20:40, place_px : place_px + 20] = 200
    return found


def test_labels_of_another_program_are_copied_once_and_never_replaced(tmp_path):
    there = tmp_path / "coco"
    there.mkdir()
    for number in (1, 2):
        cv2.imwrite(str(there / f"{number}.png"), image(10 * number))
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 60} for n in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 20, 20], "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "my mug"}],
    }
    (there / "labels.json").write_text(json.dumps(coco))
    console = Console(file=io.StringIO(), width=500)
    labels = LabelFolder(tmp_path / "labels")
    assert import_labels(there / "labels.json", labels.folder, console) == 2
    assert labels.all() == {"1.jpg": (Box("my mug", (10.0, 20.0, 30.0, 40.0)),), "2.jpg": ()}
    labels.save("1.jpg", [], (80, 60))
    assert import_labels(there / "labels.json", labels.folder, console) == 0
    assert "2 were there" in console.file.getvalue()
    assert labels.all() == {"1.jpg": (), "2.jpg": ()}
    assert [each["file_name"] for each in labels.coco()["images"]] == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([[]], "there are 2 images, and boxes of 1"),
        ([[("mug", (1, 2, 30))], []], "a box is its name and its edges"),
        ([[(1, 2, 30, 40)], []], "a box is its name and its edges"),
        ([[("", (1, 2, 30, 40))], []], "the box has no name yet"),
        ([[("mug", (1, 2, 3, 40))], []], "this box is too small"),
    ],
)
def test_boxes_that_are_none_are_refused_in_one_line(tmp_path, boxes, why):
    with pytest.raises(InputError, match=why):
        teach([image(0), image(10)], boxes, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_too_few_boxes_are_refused(tmp_path):
    with pytest.raises(SourceError, match="at least 5"):
        teach([image(0)], [[("mug", (0, 20, 20, 40))]])


def test_the_command_that_fits_has_the_network_of_the_run(tmp_path):
    engine = EngineOptions("timm:resnet50", size_px=256, mean=(1.0, 2.0, 3.0), objects=4)
    words = fit_command(engine, NETWORK_OPTIONS)(tmp_path / "labels.csv", tmp_path / "out")
    assert words[:4] == ["fit", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "out")]
    text = " ".join(words[4:])
    assert "--kind dense" in text
    assert "--model timm:resnet50" in text
    assert "--size 256" in text
    assert "--mean 1.0,2.0,3.0" in text
    assert "--objects" not in text
    words = fit_command(EngineOptions(head="lite0_dense"), NETWORK_OPTIONS)(tmp_path, tmp_path)
    assert words[words.index("--from-head") + 1] == "lite0_dense"
    assert words[words.index("--size") + 1] == "320"


@pytest.mark.long
def test_an_object_is_taught_from_python(tmp_path):
    places = range(0, 60, 5)
    boxes = [[("my mug", (x, 20, x + 20, 40))] for x in places]
    images = [image(x) for x in places]
    localizer, fitted = teach(images, boxes, tmp_path / "labels", EngineOptions("lite0"))
    with localizer:
        (found,) = localizer.localize([image(33)])
    assert found.label == "my mug"
    assert found.box_xyxy_px == pytest.approx((33, 20, 53, 40), abs=6)
    assert fitted.held_out["corloc"] >= fitted.before["corloc"]
    assert (tmp_path / "labels" / "taught.safetensors").exists()


@pytest.mark.long
def test_two_objects_are_taught_at_once(tmp_path):
    """Two of one image, and images with one of them; each is found by its name."""

    def both(x, y):
        found = np.full((120, 160, 3), 50, np.uint8)
        if x is not None:
            found[20:60, x : x + 40] = (40, 40, 230)
        if y is not None:
            found[70:110, y : y + 40 : 4] = (230, 180, 40)
        return found

    def named(x, y):
        red = [] if x is None else [("red lid", (x, 20, x + 40, 60))]
        return red + ([] if y is None else [("blue comb", (y, 70, y + 40, 110))])

    places = [(x, (x + 60) % 120) for x in range(0, 120, 15)]
    places += [(10, None), (70, None), (None, 30), (None, 90)]
    images, boxes = [both(*each) for each in places], [named(*each) for each in places]
    engine = EngineOptions("lite0", objects=2)
    localizer, fitted = teach(images, boxes, tmp_path / "labels", engine)
    with localizer:
        assert {"red lid", "blue comb"} <= set(localizer.names)
        localizer.abstain_below(0.0)
        (found,) = localizer.localize([both(52, 8)])
    seen = {each.label: each.box_xyxy_px for each in found.detections}
    assert seen["red lid"] == pytest.approx((52, 20, 92, 60), abs=12)
    assert seen["blue comb"] == pytest.approx((8, 70, 48, 110), abs=12)
    assert fitted.held_out["recall_at_10"] >= fitted.before["recall_at_10"]


@pytest.mark.long
def test_the_notebook_does_what_it_says(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "teach.ipynb").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for cell in cells:
        if cell["cell_type"] == "code":
            *first, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(first, []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "cell", "exec"), names)
    before, (old, new), after, labels = shown
    assert all("data:image/jpeg" in each._repr_html_() for each in (before, after))
    assert new["corloc"] >= old["corloc"]
    assert labels == (["our car"], ["our car"])
    names["localizer"].close()
