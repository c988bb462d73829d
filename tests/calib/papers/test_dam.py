"""The table of DAM on a few photos, and its figures by hand."""

import json

import cv2
import numpy as np
import pytest

from calib.papers.dam import figures_of
from engines.networks import vgg
from tests.command_line import command, refused
from tests.realtime.media import picture


def test_figures_by_hand():
    """Two images: a box that is half of the true one and one that misses it."""
    true = np.array([[0.0, 0.0, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
    found = np.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2]])
    numbers = figures_of(found, true, ["cat", ""], true)
    assert numbers["default"]["mean_iou"] == 1
    assert numbers["dam"]["mean_iou"] == pytest.approx(0.25)
    assert numbers["whole_image"]["mean_iou"] == pytest.approx((0.5 + 0.25) / 2)
    centres = numbers["dam"]["center_correctness"]
    assert (centres["0.0"], centres["0.2"], centres["0.3"]) == (0.5, 0.5, 0.0)
    assert numbers["classes"] == {"cat": {"images": 1, "mean_iou": 0.5}}
    assert sum(numbers["iou_histogram"]) == 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Cats by their WordNet id, one of another class, one of two, one empty."""
    folder = tmp_path_factory.mktemp("imagenet")
    rows = ["file,class,x0,y0,x1,y1"]
    for index, (kind, boxes) in enumerate(
        (("n02123045", 1), ("n02124075", 1), ("n02123045", 2), ("n02123045", 1), ("unknown", 1))
    ):
        image = np.zeros((60, 60, 3), np.uint8) if index == 3 else picture(index)
        cv2.imwrite(str(folder / f"{index}.png"), image)
        rows += [f"{index}.png,{kind},{4 + 9 * i},30,{28 + 9 * i},54" for i in range(boxes)]
    (folder / "val.csv").write_text("\n".join(rows))
    return folder


def test_the_table_counts_images_with_one_object_and_goes_on_where_it_was_stopped(
    photos, tmp_path, monkeypatch
):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    given = ("--data", photos, "--model", "compact", "--weights", "random", "--size", "32")
    first = command("reproduce", "dam-imagenet", *given, "--json")
    found = json.loads(first.stdout)
    assert found["images"] == 2
    assert found["classes"]["cat"]["images"] == 2
    assert "0.4679" in first.stderr
    (kept,) = tmp_path.rglob("dam-*.jsonl")
    lines = kept.read_text().split("\n")
    lines = [line for line in lines if line]
    assert len(lines) == 2
    kept.write_text(lines[0] + "\n" + lines[1][:20])  # as a run leaves it that was killed
    page = tmp_path / "page.html"
    again = json.loads(command("reproduce", "dam-imagenet", *given, "--out", page, "--json").stdout)
    assert again["dam"] == found["dam"]
    assert page.read_text().count("data:image/jpeg") == 4  # two cats, and both as failures


def test_a_network_without_classes_is_refused(photos, tmp_path):
    weights = vgg.random_weights((4, 4, 8, 8, 8), hidden=0)
    bare = {name: value for name, value in weights.items() if name.startswith("features")}
    np.savez(tmp_path / "bare.npz", **bare)
    told = refused(
        "reproduce", "dam-imagenet", "--data", photos, "--weights", tmp_path / "bare.npz"
    )
    assert "these weights have none" in told
