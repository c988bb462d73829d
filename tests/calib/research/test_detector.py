"""The comparison with a detector: its figures against hand arithmetic, and the page."""

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.detector import (
    Answer,
    Measured,
    System,
    all_objects,
    compared,
    figures,
    measure,
    on_front,
    plot_pareto,
    rendered,
)

WHOLE, LEFT, RIGHT = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 50.0, 100.0), (50.0, 0.0, 100.0, 100.0)
MOST = (0.0, 0.0, 100.0, 80.0)
"""IoU 0.8 with the whole, 0.4 with a half."""


def measured(truths, **answers):
    found = {name: Answer([(box, 0.5) for box in boxes], 2.0) for name, boxes in answers.items()}
    return Measured(len(truths) == 1, truths, found)


@pytest.fixture
def sets():
    return {
        "animals": [
            measured([WHOLE], ours=[MOST], theirs=[LEFT]),
            measured([WHOLE], ours=[], theirs=[(0.0, 0.0, 100.0, 60.0)]),
            measured([LEFT, RIGHT], ours=[LEFT], theirs=[MOST, RIGHT, LEFT]),
            measured([LEFT, RIGHT], ours=[LEFT], theirs=[RIGHT, LEFT]),
        ],
        "VOC 2007": [
            measured([LEFT, RIGHT], ours=[LEFT], theirs=[RIGHT, LEFT]),
            measured([WHOLE], ours=[MOST], theirs=[WHOLE]),
        ],
        "coco128": [measured([LEFT, RIGHT], ours=[RIGHT], theirs=[MOST])],
    }


def test_first_boxes_and_pairs_are_counted(sets):
    ours, theirs = figures("ours", sets), figures("theirs", sets)
    assert ours["animals"] == {
        "images": 2,
        "ms": 2.0,
        "iou_50": 0.5,
        "iou_70": 0.5,
        "mean_iou": 0.4,
    }
    # an IoU of exactly a half is not over it
    assert (theirs["animals"]["iou_50"], theirs["animals"]["mean_iou"]) == (0.5, 0.55)
    assert ours["VOC 2007"]["images"] == 1
    assert (ours["coco128"]["iou_50"], theirs["coco128"]["iou_50"]) == (1.0, 0.0)
    assert ours["two animals"] == {"images": 2, "first_two": 0.0, "among_all": 0.0}
    assert theirs["two animals"] == {"images": 2, "first_two": 0.5, "among_all": 1.0}
    assert ours["VOC 2007, all objects"]["recall_10"] == pytest.approx(2 / 3, abs=1e-4)
    assert theirs["VOC 2007, all objects"]["recall_10"] == 1


def test_average_precision_counts_wrong_boxes_that_are_surer():
    """One right box of two objects, behind a wrong one that is surer: precision a half up to a
    recall of a half, at 51 of pycocotools' 101 recalls.
    """
    wrong, right = (MOST, 0.9), (RIGHT, 0.8)
    one = Measured(False, [LEFT, RIGHT], {"a": Answer([wrong, right], 1.0)})
    found = all_objects("a", [one])
    assert found["ap_50"] == pytest.approx(0.5 * 51 / 101)
    assert found["recall_10"] == pytest.approx(0.5)
    nothing = Measured(False, [LEFT], {"a": Answer([], 1.0)})
    assert all_objects("a", [nothing]) == {"ap_50": 0.0, "recall_10": 0.0}


def test_every_system_is_asked_in_every_turn_and_the_order_changes():
    class Peer:
        def prepare(self, image):
            return image

        def forward(self, prepared):
            asked.append("forward")

    asked = []

    def system(name):
        def find(image):
            asked.append(name)
            return [(MOST, 0.5)]

        return System(name, find, None, "")

    image = np.zeros((100, 90, 3), np.uint8)
    samples = [
        Sample(f"{i}", lambda: image, (Truth("cat", (-1.0, 0.0, 91.0, 50.0)),)) for i in range(9)
    ]
    forward_ms = []
    found = measure(
        samples, [system("a"), system("b")], Peer(), forward_ms, Console(quiet=True), "x"
    )
    assert asked.count("a") == asked.count("b") == 9
    assert {"ab", "ba"} <= {"".join(asked)[i : i + 2] for i in range(20)}
    assert asked.count("forward") == len(forward_ms) == 2
    assert [each.truths_xyxy for each in found] == [[(0.0, 0.0, 90.0, 50.0)]] * 9
    assert all(each.single for each in found)


@pytest.fixture
def report(sets):
    return {
        "machine": "a machine",
        "detector": {"name": "theirs", "forward_ms": 1.0},
        "systems": {
            name: {
                "facts": "64 px, fp32",
                "engine_calls": 1.0,
                "ms": 2.0,
                "sets": figures(name, sets),
            }
            for name in ("ours", "theirs")
        },
    }


def test_accuracy_over_time_is_drawn_and_says_which_no_other_beats(report, tmp_path):
    systems = report["systems"]
    assert on_front(systems, "iou_50") == ["ours"], "as fast, and better"
    systems["theirs"]["ms"] = 1.0
    assert on_front(systems, "iou_50") == ["theirs", "ours"]
    plot_pareto(report, tmp_path / "detector.png")
    assert min(cv2.imread(str(tmp_path / "detector.png")).shape[:2]) > 300


def test_the_page_says_where_the_detector_wins(report):
    wins = {(line["set"], line["measure"]): line["detector_wins"] for line in compared(report)}
    assert wins["animals", "mean_iou"]
    assert not wins["animals", "iou_70"]
    page = rendered(report)
    table, _, rest = page.partition("## Where the detector wins")
    lost, _, won = rest.partition("as good or better")
    assert "| ours | 64 px, fp32 | 1.00 | 2.00 | 2.00 | 83.3 |" in table
    assert "| animals (2) | 40.0 | 55.0 |" in table
    assert "- animals, first box, mean IoU x 100: 55.0, which is 15.0 more." in lost
    assert "- animals, first box, IoU over 0.7, % of images: 50.0 against 0.0." in won
    assert "\n\n\n" not in page
