"""The command that computes the papers' tables again: on a few photos, with small networks."""

import json

import cv2
import numpy as np
import pytest

from calib.papers import linear, sensitivity
from calib.papers.linear import in_order
from calib.papers.reproduce import TABLES, labelled
from calib.papers.sensitivity import heuristic_boxes, peak_boxes
from engines.choose import open_localizer
from engines.errors import SourceError
from engines.head import Heuristic, load_head
from engines.maps import MapSpec
from tests.command_line import command, refused
from tests.realtime.media import picture


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder as VOC's two parts: photos of a bright square, some with a second object."""
    folder = tmp_path_factory.mktemp("voc")
    for split, count in (("trainval", 24), ("test", 8)):
        rows = ["file,class,x0,y0,x1,y1"]
        for index in range(count):
            name = f"{split}{index}.png"
            cv2.imwrite(str(folder / name), np.roll(picture(index), 3 * index, axis=1))
            rows.append(f"{name},{'cat' if index % 2 else 'dog'},4,30,{28 + index},54")
            if index % 4 == 0:
                rows.append(f"{name},cat,60,2,100,40")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return folder


def reproduced(table, folder, *more):
    given = ("--data", folder, "--model", "compact", "--weights", "random", "--size", "32")
    return command("reproduce", table, *given, *more, "--json")


def test_the_heuristic_prints_the_papers_numbers_beside_ours(scenes, tmp_path):
    page = tmp_path / "page.html"
    done = reproduced("heuristic", scenes, "--out", page)
    found = json.loads(done.stdout)
    assert set(found["corloc"]) == {"10", "20", "30"}
    assert found["images"] == 8
    assert "27.2 %" in done.stderr
    assert "38.4 %" in done.stderr
    assert "32.5 %" in done.stderr
    text = page.read_text()
    assert text.count("data:image/jpeg") >= 6
    assert "failures" in text
    again = reproduced("heuristic", scenes, "--limit", "5")  # the maps are there already
    assert json.loads(again.stdout)["images"] == 5
    assert "maps of" not in again.stderr


@pytest.fixture(autouse=True)
def short_descent(monkeypatch):
    """Three tenths of a percent of the steps."""
    monkeypatch.setattr(linear, "ITERATIONS", 100)


def test_the_linear_mapping_beside_constant_boxes_and_the_defaults(scenes, tmp_path):
    page = tmp_path / "page.md"
    done = reproduced("sensitivity-voc2007", scenes, "--out", page)
    found = json.loads(done.stdout)
    assert set(found["constants"]) >= {"constant centre box of average size", "the whole image"}
    assert 0 <= found["corloc"]["every object"]["all"] <= 1
    for text in ("63.8 %", "40.1 %", "55 %", "diverges", "Sightline's defaults"):
        assert text in done.stderr
    assert "| aeroplane | 63.8 % |" in page.read_text()
    kinds = json.loads(reproduced("aggregation", scenes).stdout)["corloc"]
    assert set(kinds) == {"max", "mean"}


def test_a_set_without_a_split_is_measured_in_four_parts(scenes, tmp_path):
    (tmp_path / "val.csv").write_text((scenes / "trainval.csv").read_text())
    for name in scenes.glob("trainval*.png"):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    found = json.loads(reproduced("sensitivity-imagenet", tmp_path).stdout)
    assert set(found["corloc"]) == {"probability", "class"}
    assert found["images"] == 24


def test_more_images_than_products_are_kept_of_are_streamed(scenes, monkeypatch):
    usual = json.loads(reproduced("aggregation", scenes).stdout)
    monkeypatch.setattr(sensitivity, "MOST_BY_PRODUCTS", 23)
    streamed = json.loads(reproduced("aggregation", scenes).stdout)
    assert streamed["images"] == usual["images"]
    assert set(streamed["corloc"]) == {"max", "mean"}


def test_a_published_head_gives_the_box_of_equation_4(scenes, tmp_path):
    network = ("--model", "compact", "--weights", "random", "--size", "32", "--method", "gestalt")
    for kind in ("paper", "paper-sgd"):
        out = tmp_path / f"{kind}.safetensors"
        how = ("--kind", kind, "--as-published", "--aggregation", "mean", "--classes", "dog")
        done = command("fit", scenes / "trainval.csv", *network, *how, "--out", out)
        assert done.returncode == 0, done.stderr
        head = load_head(out)
        assert head.spec == MapSpec("gestalt", "mean")
        given = {"weights": "random", "size_px": 32, "method": "gestalt", "precision": "fp32"}
        with open_localizer("compact", head=str(out), backend="openvino", **given) as localizer:
            image = localizer.prepare(picture(3))
            outputs = localizer.infer([image])
        found = head.weight[0].astype(np.float64) @ outputs["map"][0].ravel() + head.bias[0]
        expected = in_order(found)
        np.testing.assert_allclose(outputs["box_xyxy"][0], expected, atol=1e-4)
    wrong = ("--as-published", "--kind", "linear", "--out", tmp_path / "x.safetensors")
    assert "paper" in refused("fit", scenes / "trainval.csv", *network, *wrong)


def test_the_published_heuristic_reads_the_gestalt_map_of_the_pixels():
    given = {"weights": "random", "size_px": 32, "precision": "fp32", "backend": "openvino"}
    with open_localizer("compact", method="heuristic", as_published=True, **given) as localizer:
        assert "gradient at pixels, max, blur 0.625" in localizer.description["head"]
        assert localizer.description["spec"]["objective"] == "gestalt"
    with open_localizer(
        "compact", method="heuristic", as_published=True, sigma_px=4, aggregation="mean", **given
    ) as localizer:
        outputs = localizer.infer([localizer.prepare(picture(3))])
    found = heuristic_boxes(
        outputs["map"].reshape(1, -1), 32, Heuristic(MapSpec("gestalt", "mean"), 4 / 32, 0.2)
    )
    np.testing.assert_allclose(outputs["box_xyxy"][0], found[0], atol=1e-6)


def test_pixels_over_a_share_of_the_peak():
    maps = np.zeros((1, 64), np.float32)
    maps[0, [3 * 8 + 2, 5 * 8 + 6]] = (0.21, 1.0)
    np.testing.assert_allclose(peak_boxes(maps, 8, 0.01), [[2 / 8, 3 / 8, 7 / 8, 6 / 8]])
    maps[0, 3 * 8 + 2] = 0.19
    np.testing.assert_allclose(peak_boxes(maps, 8, 0.01), [[6 / 8, 5 / 8, 7 / 8, 6 / 8]])


def test_cocos_own_folder_is_read(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    cv2.imwrite(str(tmp_path / "val2014" / "7.jpg"), picture(1))
    labels = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 128, "height": 96}],
        "categories": [{"id": 17, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 17, "bbox": [4, 30, 24, 20]}],
    }
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(labels))
    (sample,) = labelled(tmp_path, "val")
    assert sample.truths[0].class_name == "cat"
    with pytest.raises(SourceError):
        labelled(tmp_path, "trainval")


def test_what_cannot_be_reproduced_is_one_line(scenes, tmp_path):
    assert "there are sensitivity-voc2007" in refused("reproduce", "table9", "--data", scenes)
    assert "holds neither" in refused("reproduce", "heuristic", "--data", tmp_path)
    with pytest.raises(SourceError, match="signs for it"):
        labelled(None, "val")


def test_each_table_names_a_function_that_is_there():
    for name, table in TABLES.items():
        assert table.name == name
        assert table.load()
