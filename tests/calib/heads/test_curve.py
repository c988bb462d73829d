"""The learning curve: what it is fitted on, what it is measured on, what it shows; at last on real
photos.
"""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.heads.curve import (
    Curve,
    Forecast,
    Point,
    curve_of,
    curve_table,
    learning_curve,
    plot_curve,
    split_fifth,
)
from calib.heads.fit import default_features, fit_head
from calib.heads.linear import FeatureTable, choose_strength, feature_table, fit_rows, solve
from engines.errors import OutputError, SourceError
from engines.maps import Feature, MapSpec
from engines.networks.registry import load_classifier
from tests.command_line import command, refused

QUIET = Console(quiet=True)
FEATURES = (Feature("quantiles", "pixels", 5),)


def table(count, seed=0, shift=0.0):
    """Boxes whose centres two of 30 features tell, the rest noise."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0.3, 0.5, (count, 2)) + shift
    boxes = np.concatenate([centres - 0.2, centres + 0.2], axis=1)
    noise = rng.standard_normal((2, count, 28))
    values = np.concatenate([centres, noise[0]], axis=1).astype(np.float32)
    mirrored = np.concatenate(
        [np.array([1, 0]) + centres * np.array([-1, 1]), noise[1]], axis=1
    ).astype(np.float32)
    names = tuple(f"{i}" for i in range(count))
    return FeatureTable(values, mirrored, boxes, names, np.zeros(count, np.int64), names)


@pytest.fixture
def squares(tmp_path):
    """Labels of 30 pictures with one bright square each, one with two, one with none."""
    rng, lines = (
        np.random.default_rng(4),
        ["two.png,square,1,1,9,9", "two.png,square,20,20,30,30", "none.png,,,,,"],
    )
    (tmp_path / "sq").mkdir()
    for name in ["two", "none", *range(30)]:
        image = np.full((64, 64, 3), 30, np.uint8)
        x, y, w, h = (int(v) for v in rng.integers((4, 4, 16, 16), (24, 24, 32, 32)))
        image[y : y + h, x : x + w] = 220
        cv2.imwrite(str(tmp_path / "sq" / f"{name}.png"), image)
        lines += [f"{name}.png,square,{x},{y},{x + w},{y + h}"] if isinstance(name, int) else []
    (tmp_path / "sq.csv").write_text("file,class,x0,y0,x1,y1\n" + "\n".join(lines))
    return tmp_path / "sq.csv"


def test_heads_get_better_with_boxes_and_pass_the_constant_box():
    curve = learning_curve(table(400), table(100, seed=1), QUIET)
    assert [point.boxes for point in curve.points] == [10, 20, 50, 100, 200, 400]
    assert [len(point.corloc) for point in curve.points] == [5, 5, 5, 5, 5, 1]
    assert curve.held_out == 100
    medians = [np.median(point.mean_iou) for point in curve.points]
    assert medians[-1] > 0.9
    assert medians[-1] > curve.constant_mean_iou + 0.1 > medians[0]


def test_the_constant_box_is_fitted_on_training_boxes_and_measured_on_the_others():
    curve = learning_curve(table(40), table(20, seed=1, shift=0.4), QUIET)
    assert curve.constant_corloc == 0
    assert 0 <= curve.constant_mean_iou < 0.3


def test_a_point_does_not_depend_on_the_other_points():
    train, held_out = table(100), table(30, seed=1)
    few, many = (learning_curve(train, held_out, QUIET, counts) for counts in ((50,), (10, 20, 50)))
    assert few.points == many.points[2:]
    assert len(set(few.points[0].mean_iou)) == 5  # five different subsets


def test_rows_are_fitted_with_the_strength_that_they_alone_choose():
    notify, rows = table(60), np.arange(30)
    whole = replace(
        notify, boxes_xyxy=np.concatenate([notify.boxes_xyxy[:30][::-1], notify.boxes_xyxy[30:]])
    )
    alone = whole.take(rows)  # of these, features tell nothing
    assert alone.class_names == notify.class_names[:30]
    assert choose_strength(alone, rows) > choose_strength(whole, np.arange(60))
    expected = solve(alone, rows, choose_strength(alone, rows))
    for found, wanted in zip(fit_rows(whole, rows), expected, strict=True):
        np.testing.assert_allclose(found, wanted)


def test_the_shipped_kind_of_head_is_the_curve_s_last_point(squares):
    samples, classifier = load_dataset(squares), load_classifier("compact", "random", 64)
    head = fit_head(samples, classifier, MapSpec(), FEATURES, QUIET, "squares").head
    features = feature_table(samples, classifier, MapSpec(), FEATURES, QUIET)
    weight, bias = fit_rows(features, np.arange(30))
    np.testing.assert_allclose(head.weight[0], weight, rtol=1e-5)
    np.testing.assert_allclose(head.bias[0], bias, rtol=1e-5)


def test_without_another_set_a_fifth_is_held_out(squares):
    samples, classifier = load_dataset(squares), load_classifier("compact", "random", 64)
    curve = curve_of(samples, None, classifier, MapSpec(), FEATURES, QUIET)
    assert ([point.boxes for point in curve.points], curve.held_out) == ([10, 24], 6)
    curve = curve_of(samples[:20], samples[20:], classifier, MapSpec(), FEATURES, QUIET)
    assert ([point.boxes for point in curve.points], curve.held_out) == ([10, 18], 12)
    with pytest.raises(SourceError, match="needs 10 images"):
        curve_of(samples[:13], None, classifier, MapSpec(), FEATURES, QUIET)
    with pytest.raises(SourceError, match="none of the images"):
        curve_of(samples, samples[:2], classifier, MapSpec(), FEATURES, QUIET)


def test_of_sequences_whole_ones_are_held_out_and_of_one_a_block_of_frames():
    photos = tuple(map(str, range(53)))
    order = np.random.default_rng(0).permutation(53)
    fitted, measured = split_fifth(photos)
    assert (measured.tolist(), fitted.tolist()) == (order[:10].tolist(), order[10:].tolist()), (
        "photos as they always were"
    )
    videos = np.array([f"v{number // 9}" for number in range(90)])
    fitted, measured = split_fifth(videos)
    assert sorted([*fitted, *measured]) == list(range(90))
    assert not set(videos[fitted]) & set(videos[measured])
    assert len(set(videos[measured])) == 2
    fitted, measured = split_fifth(("clip",) * 52)
    assert sorted([*fitted, *measured]) == list(range(52))
    assert len(measured) in (10, 11)
    assert np.ptp(measured) == len(measured) - 1


def test_the_picture_and_the_table_show_the_curve(tmp_path):
    points = (Point(10, (0.5, 0.7, 0.6), (0.4, 0.42, 0.6)), Point(100, (0.8,), (0.65,)))
    curve = Curve(points, 0.55, 0.5, 40)
    plot_curve(curve, tmp_path / "c.png", "Heads")
    assert cv2.imread(str(tmp_path / "c.png")).shape[1] > 1000
    console = Console(width=100)
    with console.capture() as captured:
        console.print(curve_table(curve))
    text = captured.get()
    for words in (
        "60.0 % (50.0 - 70.0)",
        "0.420 (0.400 - 0.600)",
        "80.0 %",
        "55.0 %",
        "0.500",
        "40 held-out",
    ):
        assert words in text
    with pytest.raises(OutputError, match=r"c\.svg: the name must end in \.png"):
        plot_curve(curve, tmp_path / "c.svg", "Heads")


def test_the_command_draws_it(squares, tmp_path):
    arguments = (
        "fit",
        squares,
        "--out",
        tmp_path / "h.safetensors",
        "--weights",
        "random",
        "--size",
        64,
    )
    for name, kept in (("fitted.txt", range(20)), ("measured.txt", range(20, 30))):
        (tmp_path / name).write_text("\n".join(map(str, kept)))
    drawn = (
        *arguments,
        "--ids",
        tmp_path / "fitted.txt",
        "--curve",
        tmp_path / "c.png",
        "--curve-on",
        squares,
    )
    assert "both fitted on and measured" in refused(*drawn)
    result = command(*drawn, "--curve-ids", tmp_path / "measured.txt", "--json")
    assert result.returncode == 0, result.stderr
    curve = json.loads(result.stdout)["curve"]
    assert [point["boxes"] for point in curve["points"]] == [10, 20]
    assert curve["held_out"] == 10
    assert (tmp_path / "c.png").exists()
    assert "c.jpg: the name must end in .png" in refused(*arguments, "--curve", tmp_path / "c.jpg")
    assert "(--curve, --curve-on)" in refused(*arguments, "--curve-on", squares)


@pytest.mark.long
def test_on_real_photos_more_boxes_pass_the_constant_box(data):
    sets = (load_dataset(data / "animal_pose_voc" / f"{split}.csv") for split in ("train", "test"))
    train, held_out = ([sample for sample in samples if sample.single][::4] for samples in sets)
    classifier = load_classifier("compact", None, None)
    curve = curve_of(
        train, held_out, classifier, *default_features(classifier, "sensitivity"), QUIET
    )
    medians = {point.boxes: np.median(point.mean_iou) for point in curve.points}
    assert medians[200] > curve.constant_mean_iou
    assert medians[len(train)] > medians[50]


@pytest.mark.parametrize("half", [3.0, 12.0, 60.0])
def test_a_forecast_goes_through_what_was_measured(half):
    def at(boxes):
        return 0.8 - 0.5 * half / (half + boxes)

    found = Forecast.fitted([(0, 0.3), (8, at(8)), (16, at(16))], 20)
    assert found.at(40) == pytest.approx(at(40), abs=0.03)
    assert found.at(0) == pytest.approx(0.3)
    assert "20 boxes more" in found.words


@pytest.mark.parametrize(
    "ious", [(0.5, 0.5, 0.5), (0.5, 0.7, 0.7), (0.6, 0.5, 0.5), (0.5, 0.7, 0.68)]
)
def test_where_more_boxes_brought_nothing_nothing_is_promised(ious):
    found = Forecast.fitted([*zip((0, 8, 16), ious, strict=True)], 20)
    assert found.at(10_000) <= 0.95
    assert found.at(40) == pytest.approx(found.at(20), abs=0.03)
    assert "hardly" in found.words or found.at(40) - found.at(20) >= 0.01


def test_a_forecast_goes_no_higher_than_boxes_can_be_drawn():
    found = Forecast.fitted([(0, 0.3), (8, 0.4), (16, 0.8)], 20)
    assert found.at(1e6) <= 0.95
