"""Data sets in every layout, ridge against its definition, metrics by hand, training that resumes exactly."""

import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib import bench
from calib.datasets import load_dataset
from calib.evaluate import evaluate
from calib.features import FeatureTable
from calib.fit import Ridge, choose_strength, fit_head, held_out_ious
from calib.metrics import centre_correct, constant_boxes, corloc
from engines.backends.mock import MockEngine
from engines.backends.openvino import OpenVinoEngine
from engines.base import ModelError, SourceError
from engines.build import build_graph
from engines.choose import Choice
from engines.classifiers import load_classifier
from engines.head import Feature
from engines.localizer import Localizer
from engines.maps import MapSpec
from tests.realtime.media import picture, write_video

QUIET = Console(quiet=True)
BOX = (10.0, 20.0, 40.0, 60.0)


def images(folder: Path, names):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        cv2.imwrite(str(folder / name), picture(index))


def voc_xml(name, corners=(11, 21, 40, 60)):
    edges = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    item = f"<object><name>cat</name><bndbox>{edges}</bndbox></object>"
    return f"<annotation><filename>{name}</filename>{item}</annotation>"


def make(kind, folder: Path) -> Path:
    """The same two labelled images in every layout."""
    names = ["a.png", "b.png"]
    images(folder / "set", names)
    if kind == "csv":
        (folder / "set.csv").write_text("file,source,class,x0,y0,x1,y1\n" + "".join(f"{n},w,cat,10,20,40,60\n" for n in names))
        return folder / "set.csv"
    if kind == "csv and tar":
        with tarfile.open(folder / "more.tar", "w") as tar:
            tar.add(folder / "set", "more")
        (folder / "more_boxes.csv").write_text("frame,x0,y0,x1,y1\n" + "".join(f"more/{n},10,20,40,60\n" for n in names))
        return folder / "more_boxes.csv"
    if kind == "voc":
        (folder / "Annotations").mkdir()
        (folder / "set").rename(folder / "JPEGImages")
        for name in names:
            (folder / "Annotations" / f"{name[0]}.xml").write_text(voc_xml(name))
        return folder / "Annotations"
    if kind == "coco":
        (folder / "set.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": n} for i, n in enumerate(names)],
            "categories": [{"id": 7, "name": "cat"}],
            "annotations": [{"image_id": i, "category_id": 7, "bbox": [10, 20, 30, 40], "iscrowd": 0} for i in (0, 1)],
        }))  # fmt: skip
        return folder / "set.json"
    if kind == "otb":
        (folder / "set_groundtruth_rect.txt").write_text("11,21,30,40\n11\t21\t30\t40\n")
        return folder / "set_groundtruth_rect.txt"
    write_video(folder / "clip.mp4", 2)
    (folder / "clip_groundtruth.txt").write_text("10,20,40,20,40,60,10,60\n" * 2)
    return folder / "clip_groundtruth.txt"


@pytest.mark.parametrize("kind", ["csv", "csv and tar", "voc", "coco", "otb", "vot"])
def test_every_layout_gives_the_same_labels(tmp_path, kind):
    samples = load_dataset(make(kind, tmp_path))
    assert len(samples) == 2
    for index, sample in enumerate(samples):
        assert sample.single
        assert sample.truths[0].box_xyxy_px == BOX
        assert np.abs(sample.read().astype(int) - picture(index)).mean() < 3


def test_mistakes_in_data_sets_are_named(tmp_path):
    images(tmp_path / "set", ["a.png"])

    def refused(text, words):
        (tmp_path / "set.csv").write_text(text)
        with pytest.raises(SourceError, match=words):
            load_dataset(tmp_path / "set.csv")

    refused("name,x\n", "first line must name file,class,x0,y0,x1,y1")
    refused("file,class,x0,y0,x1,y1\n", "no labelled image")
    refused("file,class,x0,y0,x1,y1\nz.png,cat,0,0,5,5\n", r"names image z\.png")
    refused("file,class,x0,y0,x1,y1\na.png,cat,0,0,five,5\n", "line 2: the box is not four numbers")
    refused("file,class,x0,y0,x1,y1\na.png,cat,9,0,5,5\n", "impossible box")
    with pytest.raises(SourceError, match="does not exist"):
        load_dataset(tmp_path / "nothing.csv")


def test_an_image_set_names_the_images_to_keep(tmp_path):
    labels = make("csv", tmp_path)
    (tmp_path / "ids.txt").write_text("b  1\n\nunknown\n")
    assert [s.name for s in load_dataset(labels, ids=tmp_path / "ids.txt")] == ["b.png"]
    (tmp_path / "ids.txt").write_text("c\n")
    with pytest.raises(SourceError, match=r"that .*ids\.txt names"):
        load_dataset(labels, ids=tmp_path / "ids.txt")
    with pytest.raises(SourceError, match="cannot read"):
        load_dataset(labels, ids=tmp_path / "nothing.txt")


def test_a_frame_without_the_object_has_no_truth(tmp_path):
    images(tmp_path / "s", ["0.png", "1.png"])
    (tmp_path / "s_boxes.csv").write_text("frame,x0,y0,x1,y1\n0.png,1,2,3,4\n1.png,,,,\n")
    assert [len(s.truths) for s in load_dataset(tmp_path / "s_boxes.csv")] == [1, 0]


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_ridge_is_its_definition(shape):
    """argmin |y - x w|^2 + strength |w|^2 on standardized features, by the normal equations."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(shape) * 3 + 1, rng.random((shape[0], 4))
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    for strength in (0.1, 10.0):
        w = np.linalg.inv(z.T @ z + strength * np.eye(shape[1])) @ z.T @ (y - y.mean(0))
        weight, bias = Ridge(x, y).solve(strength)
        np.testing.assert_allclose(x @ weight.T + bias, z @ w + y.mean(0), atol=1e-8)


def test_cross_validation_finds_that_noise_wants_a_strong_penalty():
    rng = np.random.default_rng(2)
    boxes = np.clip(np.array([0.2, 0.2, 0.8, 0.8]) + 0.02 * rng.standard_normal((60, 4)), 0, 1)
    noise = rng.standard_normal((60, 50)).astype(np.float32)
    table, rows = FeatureTable(noise, noise, boxes, ("x",) * 60), np.arange(60)
    assert choose_strength(table, rows, (0.01, 1e5)) == 1e5
    ious = held_out_ious(table, rows, 1e5)
    assert ious.mean() > 0.85
    assert (ious > 0.5).all()


def test_a_head_learns_where_a_square_is(tmp_path):
    """Fitted on 40 made pictures, with a random network: the box must follow the square."""
    names, lines = [f"{i}.png" for i in range(56)], []
    (tmp_path / "sq").mkdir()
    rng = np.random.default_rng(4)
    for name in names:
        image = np.full((64, 64, 3), 30, np.uint8)
        x, y, w, h = (int(v) for v in rng.integers((4, 4, 16, 16), (24, 24, 32, 32)))
        image[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3))
        cv2.imwrite(str(tmp_path / "sq" / name), image)
        lines.append(f"{name},square,{x},{y},{x + w},{y + h}")
    (tmp_path / "sq.csv").write_text("file,class,x0,y0,x1,y1\n" + "\n".join(lines))
    samples = load_dataset(tmp_path / "sq.csv")
    classifier = load_classifier("compact", "random", 64)
    features = [Feature("quantiles", layer, 9, power) for layer in ("pixels", "conv2_2") for power in (1.0, 2.0)]
    fitted = fit_head(samples[:40], classifier, MapSpec(), features, QUIET, "squares")
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, head=fitted.head), "fp32"))
    report, cases = evaluate(samples[40:], localizer, QUIET, constant_boxes(np.array([[0.2, 0.2, 0.7, 0.7]])))
    assert len(cases) == report["images"] == 16
    assert report["corloc"] > 0.8
    assert report["corloc"] > report["baselines"]["best_constant"]
    assert set(report["center_correctness"]) == {"0.0", "0.1", "0.2", "0.3", "0.4", "0.5"}
    with pytest.raises(SourceError, match="at least 10 images"):
        fit_head(samples[:5], classifier, MapSpec(), features, QUIET, "few")


def test_evaluate_counts_an_image_once_for_each_of_its_classes(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    (tmp_path / "d.csv").write_text("file,class,x0,y0,x1,y1\na.png,cat,4,30,28,54\na.png,dog,90,0,120,20\n")
    report, _ = evaluate(load_dataset(tmp_path / "d.csv"), Localizer(MockEngine(96)), QUIET, None)
    assert report["corloc_per_class"] == {"cat": 1.0, "dog": 0.0}
    assert report["corloc"] == 0.5
    assert report["images"] == 1
    with pytest.raises(SourceError, match="exactly one"):
        evaluate(load_dataset(tmp_path / "d.csv"), Localizer(MockEngine(96)), QUIET, None, single=True)


def test_evaluate_needs_a_head(tiny_localizer):
    with pytest.raises(ModelError, match="no box head"):
        evaluate([], tiny_localizer, QUIET, None)


def test_metrics_by_hand():
    assert corloc(np.array([0.5, 0.51, 0.9, 0.1])) == 0.5  # 0.5 itself does not count
    true = np.array([[0.0, 0.0, 10.0, 10.0]] * 3)
    found = np.array([[4.0, 4, 6, 6], [0, 0, 4, 4], [8, 8, 16, 16]])  # centres 5,5 and 2,2 and 12,12
    assert centre_correct(found, true, 0.0).tolist() == [True, True, False]
    assert centre_correct(found, true, 0.5).tolist() == [True, False, False]  # the middle half is 2.5 .. 7.5


def test_the_best_constant_box_beats_the_mean_where_boxes_have_two_kinds():
    boxes = np.array([[0.0, 0, 0.5, 0.5]] * 6 + [[0.5, 0.5, 1, 1]] * 4)
    constants = constant_boxes(boxes)
    assert constants.best_constant == (0.0, 0.0, 0.5, 0.5)
    assert constants.mean_box == pytest.approx((0.2, 0.2, 0.7, 0.7))


def test_the_bench_takes_turns_and_keeps_every_call():
    order = []
    times = bench.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, QUIET, "t")
    counted = order[2 * bench.WARM_UP_CALLS + 2 :]
    assert counted == ["a", "b"] * (len(counted) // 2)
    assert len(times["a"]) == len(counted) // 2


def test_the_bench_reports_the_contracts_fields():
    whole = bench.bench_end_to_end(Choice(weights="random", head="none", size_px=64), "demo:20")
    assert set(whole) >= {"fps", "frames", "dropped", "latency_ms", "stages_ms", "verdict", "machine", "engine"}
    assert set(whole["latency_ms"]) == {"p50", "p90", "p95", "p99", "p99_9", "max"}
    assert whole["verdict"] in {"source-limited", "engine-limited", "sink-limited"}
    result = bench.bench_engine(Choice(weights="random", head="none", size_px=64), 0.1, QUIET)
    names = [peer["name"] for peer in result["peers"]]
    assert names[0].startswith("Sightline")
    assert result["peers"][0]["ratio"] == 1
    assert {"torch eager forward + autograd", "torch eager forward only", "ONNX Runtime forward only"} <= set(names)
