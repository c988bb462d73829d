"""The page of results on small made sets: every head on every set, columns that belong, a table
that a reader can read.
"""

from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.research.results import (
    all_features,
    columns,
    constant_rows,
    named_class_rows,
    network_rows,
    rendered,
    selections,
    side_by_side,
)
from engines.maps import Feature
from engines.networks.registry import load_classifier

QUIET = Console(quiet=True)
DEMO_PHOTO = Path(__file__).parents[3] / "realtime" / "assets" / "chelsea.jpg"


def squares(folder, count, seed):
    """Pictures of a bright square on a dark ground, with its box."""
    rng = np.random.default_rng(seed)
    (folder / "s").mkdir(parents=True)
    lines = ["file,class,x0,y0,x1,y1"]
    for index in range(count):
        image = rng.integers(0, 60, (48, 64, 3)).astype(np.uint8)
        x, y, side = rng.integers(4, 30), rng.integers(4, 20), rng.integers(12, 24)
        image[y : y + side, x : x + side] += 150
        cv2.imwrite(str(folder / "s" / f"{index}.png"), image)
        lines.append(
            f"{index}.png,{'square' if index % 2 else 'box'},{x},{y},{x + side},{y + side}"
        )
    (folder / "s.csv").write_text("\n".join(lines))
    return load_dataset(folder / "s.csv")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return squares(folder / "train", 40, 0), {
        "animals": squares(folder / "a", 12, 1),
        "others": squares(folder / "b", 8, 2),
    }


@pytest.fixture(scope="module")
def rows(sets):
    return network_rows(load_classifier("compact", "random", 32), *sets, QUIET)


def test_every_combination_and_every_rival_is_measured_on_every_set(rows):
    assert {(row.objective, row.aggregation) for row in rows} == {
        (objective, aggregation)
        for objective in ("class score", "Gestalt Total")
        for aggregation in ("max", "mean")
    }
    heads = " ".join(
        row.head for row in rows if row.objective == "class score" and row.aggregation == "max"
    )
    for rival in (
        "CAM",
        "Grad-CAM",
        "LayerCAM",
        "activations",
        "heuristic",
        "SGD",
        "closed form",
        "alone",
    ):
        assert rival in heads
    for row in rows:
        assert set(row.scores) == {"animals", "others"}
        assert all(0 <= value <= 1 for pair in row.scores.values() for value in pair)
    assert len({row.scores["animals"] for row in rows}) > 5  # heads differ


def test_what_needs_no_backward_pass_reads_no_gradient():
    classifier = load_classifier("compact", "random", 32)
    for head, cost, features in selections(classifier):
        assert features, head
        if cost == "forward" and head != "CAM":
            assert {feature.signal for feature in features} == {"activation"}


def test_columns_are_those_of_the_features():
    features = (Feature("grid", "a", 2), Feature("quantiles", "b", 3), Feature("grid", "c", 1))
    assert columns(features, features[1:]).tolist() == [4, 5, 6, 7, 8, 9, 10]
    whole = all_features(load_classifier("compact", "random", 32), "gestalt", rivals=False)[-1]
    assert (whole.kind, whole.layer, whole.size) == ("grid", "pixels", 32)


def test_the_page_is_whole(rows, sets):
    page = {"rows": rows, "size_px": 32, "named": {"some map": 0.75}}
    text = rendered({"compact": page}, {"animals": 12, "others": 8}, constant_rows(*sets, QUIET))
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("| class score")]
    assert len(table) == sum(row.objective == "class score" for row in rows)
    header = next(line for line in lines if line.startswith("| objective"))
    assert all(line.count("|") == header.count("|") for line in table)
    assert lines[lines.index(header) + 1].startswith("|---")
    for words in (
        "40.1 %",
        "12.34 %",
        "best constant box",
        "some map 75.0 %",
        "animals 12, others 8",
    ):
        assert words in text


def test_halves_lie_side_by_side():
    left, right = np.full((30, 50, 3), 10, np.uint8), np.full((60, 20, 3), 200, np.uint8)
    both = side_by_side(left, right, 64)
    assert both.shape == (64, 64, 3)
    assert (both[:, :32] == 10).all()
    assert (both[:, 32:] == 200).all()


def test_a_map_that_knows_no_class_scores_one_half(tmp_path):
    """Asked twice of the same image, it gives the same side twice, and is right once; a gradient is
    asked something else.
    """
    (tmp_path / "s").mkdir()
    cat, lines = cv2.imread(str(DEMO_PHOTO)), ["file,class,x0,y0,x1,y1"]
    stripes = np.tile(np.repeat([[0, 255]], 16, axis=1), (300, 14)).astype(np.uint8)
    for index in range(8):
        photo = (
            cat[20 * index :, :] if index % 2 else cv2.merge([np.roll(stripes, index, axis=1)] * 3)
        )
        cv2.imwrite(str(tmp_path / "s" / f"{index}.png"), photo)
        lines.append(f"{index}.png,{'cat' if index % 2 else 'stripes'},0,0,100,100")
    (tmp_path / "s.csv").write_text("\n".join(lines))
    found = named_class_rows(
        load_classifier(), {"animals": load_dataset(tmp_path / "s.csv")}, QUIET
    )
    assert next(share for name, share in found.items() if "forward only" in name) == 0.5
    assert any(share != 0.5 for share in found.values())
