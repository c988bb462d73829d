"""Bency's tables on a few photos, and their measures against slow definitions."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.papers.bency import (
    Choice,
    Searched,
    chosen_on,
    detection_of,
    in_context,
    localization_of,
    measured,
    pair_probabilities,
    pictures_of,
)
from engines.networks import vgg
from tests.command_line import command, refused
from tests.realtime.media import picture


def test_context_is_equations_2_to_4():
    rng = np.random.default_rng(0)
    labels = (rng.random((12, 3)) < 0.5).astype(float)
    scores = rng.random((4, 3))
    found = in_context(scores, pair_probabilities(labels), 0.3)
    for n in range(4):
        for i in range(3):
            expected = scores[n, i]
            for j in range(3):
                if j != i:
                    both = sum(row[i] == 1 and row[j] == 1 for row in labels)
                    alone = sum(row[j] == 1 for row in labels)
                    expected += 0.3 * both / alone * scores[n, j]
            assert found[n, i] == pytest.approx(expected)


def sample(name, *truths):
    boxes = tuple(Truth(kind, box) for kind, box in truths)
    return Sample(name, lambda: np.zeros((40, 80, 3), np.uint8), boxes)


@pytest.fixture
def found():
    """Two images of 80 x 40, two classes: in the first the cat's heat lies on the cat, and the
    dog's on nothing; in the second the dog's heat lies on the dog, with a hot speck beside it.
    """
    heats = np.zeros((2, 2, 4, 4), np.float32)
    heats[0, 0, :2, :2] = 2.0
    heats[0, 1, 3, 3] = 1.5
    heats[1, 1, 2:, :2] = 1.0
    heats[1, 1, 0, 3] = 0.5
    heats[1, 0, 0, 0] = 0.1
    samples = (
        sample("a", ("cat", (0.0, 0.0, 40.0, 20.0))),
        sample("b", ("dog", (0.0, 20.0, 40.0, 40.0))),
    )
    scores = np.array([[0.9, 0.1], [0.2, 0.8]])
    return Searched(samples, ((80, 40), (80, 40)), scores, heats)


def test_peaks_are_ranked_by_heat_or_by_the_images_score(found):
    """By heat, the dog that is not there (1.5) goes before the one that is (1.0)."""
    assert localization_of(found, ("cat", "dog"), by_score=False) == {"cat": 1.0, "dog": 0.5}
    assert localization_of(found, ("cat", "dog"), by_score=True) == {"cat": 1.0, "dog": 1.0}
    assert localization_of(found, ("cat", ""), by_score=True) == {"cat": 1.0}


def test_rectangles_over_each_classs_threshold(found):
    """The dog's box is right in its image; the dog in the other image has more heat."""
    aps = detection_of(found, ("cat", "dog"), {"dog": 0.6}, 0.4)
    assert aps == {"cat": 1.0, "dog": 0.5}


def test_a_box_is_right_over_half_and_not_at_half(found):
    """Section 4.2: the IoU exceeds 0.5. The true box is twice as wide as what has heat."""
    wide = sample("a", ("cat", (0.0, 0.0, 80.0, 20.0)))
    halved = replace(found, samples=(wide, found.samples[1]))
    assert detection_of(halved, ("cat", "dog"), {}, 0.4)["cat"] == 0.0
    narrower = sample("a", ("cat", (0.0, 0.0, 79.0, 20.0)))
    halved = replace(found, samples=(narrower, found.samples[1]))
    assert detection_of(halved, ("cat", "dog"), {}, 0.4)["cat"] == 1.0


def test_pictures_show_each_class_and_its_failures(found):
    pictures = pictures_of(found, ("cat", "dog"), Choice({}, 0.5, 0.0, np.zeros((2, 2))))
    assert {name: len(some) for name, some in pictures.items()} == {"cat": 1, "dog": 1}
    empty = replace(found, heats=found.heats[:, ::-1])
    assert len(pictures_of(empty, ("cat", "dog"), Choice({}, 0.5, 0.0, np.zeros((2, 2))))) == 3


def test_thresholds_and_alpha_are_chosen_on_what_was_set_aside(found):
    chosen = chosen_on(found, ("cat", "dog"), found.samples)
    assert set(chosen.thresholds) == {"cat", "dog"}
    assert chosen.alpha == 0.0  # no two classes come together, so that none is better
    numbers = measured(found, ("cat", "dog"), chosen)
    assert numbers["map"]["classification"] == 1.0
    assert numbers["map"]["localization"] == 0.75
    assert numbers["map"]["in_context"] == 1.0
    none = measured(found, ("cat", "dog"), Choice({}, 0.5, 0.0, np.zeros((2, 2))))
    assert none["map"]["detection"] == pytest.approx(0.75)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    for split, count in (("trainval", 20), ("test", 4), ("val", 4)):
        rows = ["file,class,x0,y0,x1,y1"]
        for index in range(count):
            name = f"{split}{index}.png"
            cv2.imwrite(str(folder / name), np.roll(picture(index), 5 * index, axis=1))
            rows.append(f"{name},{'cat' if index % 3 else 'dog'},4,30,28,54")
            if index % 4 == 0:
                rows.append(f"{name},dog,60,2,100,40")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return folder


def test_the_tables_are_printed_beside_the_papers(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    convolutions = {
        name: value
        for name, value in vgg.random_weights((4, 4, 8, 8, 8), hidden=0).items()
        if name.startswith("features")
    }
    bare = tmp_path / "bare.npz"
    np.savez(bare, **convolutions)
    given = ("--data", scenes, "--weights", bare, "--size", "64", "--json")
    page = tmp_path / "page.html"
    first = command("reproduce", "beam-voc", *given, "--out", page)
    found = json.loads(first.stdout)
    assert found["images"] == 4
    assert set(found["ap"]["localization"]) == {"cat", "dog"}
    assert "25.7 (VOC 2007 test)" in first.stderr
    assert found["readings"]["cases"] >= 4
    assert set(found["default"]["ap"]["detection"]) == {"cat", "dog"}
    text = page.read_text()
    assert text.count("data:image/jpeg") >= 4
    assert "<h2>cat</h2>" in text
    again = command("reproduce", "beam-voc", *given)
    assert json.loads(again.stdout)["map"] == found["map"]
    assert "pool5 of" not in again.stderr
    (fitted,) = (tmp_path / "cache").rglob("bency-*.safetensors")
    alone = tmp_path / "coco"
    alone.mkdir()
    for path in scenes.glob("val*"):
        (alone / path.name).write_bytes(path.read_bytes())
    on_coco = command("reproduce", "beam-coco", "--data", alone, "--weights", fitted, *given[4:])
    assert json.loads(on_coco.stdout)["alpha"] == 0
    assert "49.2" in on_coco.stderr
    assert "Nothing was chosen" in on_coco.stderr
    told = refused("reproduce", "beam-coco", "--data", alone, "--weights", bare, "--size", "64")
    assert "no trainval images to train on" in told
