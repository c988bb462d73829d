"""Following, measured: the measures against hand arithmetic, real sequences against whole frames,
and the report.
"""

import json

import cv2
import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.evaluation.sequences import (
    Followed,
    load_sequences,
    measures,
    report_of,
    write_sequence_report,
)
from realtime.frames import Track
from tests.command_line import command, refused
from tests.realtime.media import picture

TRUE = [(10.0, 10.0, 30.0, 30.0), (12.0, 10.0, 32.0, 30.0), (np.nan,) * 4, (14.0, 10.0, 34.0, 30.0)]


def sequence(followed, confidences=(0.9, 0.3, 0.1, 0.7), name="made"):
    boxes = np.array(followed, np.float64)
    tracks = tuple(
        Track("following", sure, 1, tuple(box))
        for sure, box in zip(confidences, followed, strict=True)
    )
    samples = tuple(
        Sample(
            f"{name}/{i}", lambda i=i: picture(i), () if np.isnan(t[0]) else (Truth("object", t),)
        )
        for i, t in enumerate(TRUE)
    )
    times = np.full(4, 5.0)
    return Followed(name, samples, np.array(TRUE), boxes, boxes, boxes, tracks, times, times, 0.2)


def test_measures_are_those_of_the_benchmark():
    made = sequence([(10, 10, 30, 30), (22, 10, 42, 30), (0, 0, 0, 0), (14, 10, 34, 40)])
    found = measures(made, made.followed)
    ious = [1.0, 10 * 20 / 600, 400 / 600]
    assert found["corloc"] == pytest.approx(2 / 3)
    assert found["mean_iou"] == pytest.approx(np.mean(ious))
    assert found["success_auc"] == pytest.approx(
        np.mean([np.mean([iou > least / 20 for iou in ious]) for least in range(21)])
    )
    assert found["precision_20px"] == 1.0
    assert found["jitter_px"] == pytest.approx(
        (10 + 0 + 10 + 0) / 4
    )  # of frames 0 and 1 only: both boxes and both truths are there


def test_coverage_and_reliability_count_boxes_by_what_was_said():
    report = report_of(
        [sequence([(10, 10, 30, 30), (80, 10, 90, 30), (0, 0, 0, 0), (14, 10, 34, 30)])]
    )
    assert report["images"] == 3
    assert report["coverage"]["0.5"] == {"kept": pytest.approx(2 / 3, abs=1e-4), "corloc": 1.0}
    assert report["coverage"]["0.0"] == {"kept": 1.0, "corloc": pytest.approx(2 / 3, abs=1e-4)}


def test_frames_without_a_box_count_as_wrong_but_not_as_shown():
    report = report_of([sequence([(10, 10, 30, 30), (0, 0, 0, 0), (0, 0, 0, 0), (14, 10, 34, 30)])])
    assert report["followed"]["corloc"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["shown"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["corloc_shown"] == 1.0


@pytest.mark.parametrize("name", ["camel", "dog", "car-roundabout"])
def test_following_beats_whole_frames_on_a_real_sequence_and_comes_back(name, data, tmp_path):
    options = ("--model", "lite0", "--follow", "--json", "--report", tmp_path / "r.md")
    result = command("evaluate", data / "davis" / f"{name}_boxes.csv", *options)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["followed"]["corloc"] >= max(0.85, found["whole"]["corloc"] - 0.03)
    assert found["followed"]["jitter_px"] <= 0.65 * found["whole"]["jitter_px"]
    assert found["sequences"][name]["recovery_s"] <= 1.0
    assert found["corloc"] == found["followed"]["corloc"]
    text = (tmp_path / "r.md").read_text()
    assert f"{100 * found['corloc']:.1f} %" in text
    assert sorted(p.name for p in (tmp_path / "r_files").iterdir()) == sorted(
        ["curves.png", f"{name}_course.png", f"{name}_strip.jpg"]
    )


def test_a_folder_of_sequences_is_read_in_order(tmp_path):
    assert load_sequences(tmp_path, None) is None
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        for index in range(3):
            cv2.imwrite(str(tmp_path / name / f"{index}.png"), picture(index))
        rows = "\n".join(f"{index},4,30,28,54" for index in range(3))
        (tmp_path / f"{name}_boxes.csv").write_text(f"frame,x0,y0,x1,y1\n{rows}\n")
    found = load_sequences(tmp_path, 2)
    assert [sample.sequence for sample in found] == ["a", "a", "b", "b"]
    assert load_sequences(tmp_path / "a_boxes.csv", None) is None


def test_photos_cannot_be_followed(data):
    assert "NAME_boxes.csv" in refused(
        "evaluate",
        data / "raccoon" / "test_labels.csv",
        "--images",
        data / "raccoon" / "images.tar",
        "--follow",
    )
    assert "--follow" in refused("batch", "demo:3", "--no-follow", "--select", "cat")


def test_the_page_is_whole(tmp_path):
    made = sequence([(10, 10, 30, 30), (0, 0, 0, 0), (0, 0, 0, 0), (14, 10, 34, 30)], name="a<b>")
    write_sequence_report(tmp_path / "r.html", "T", report_of([made]), [made], {"model": "m"})
    text = (tmp_path / "r.html").read_text()
    assert "a&lt;b&gt;" in text
    assert text.count("<img") == 3
    assert text.count("data:image/") == 3


def test_several_objects_are_not_measured_as_one(data):
    assert "--objects" in refused("evaluate", data / "davis", "--follow", "--objects", 2)
