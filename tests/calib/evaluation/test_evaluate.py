"""What evaluate reports: of every constant box as of the head, of every class, of nothing."""

from io import StringIO

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.evaluation.evaluate import evaluate, report_table
from calib.evaluation.metrics import ConstantBoxes
from engines.engine import TensorSpec
from engines.errors import ModelError, SourceError
from engines.localizer import Localizer
from tests.engines.mock import MockEngine
from tests.engines.test_confidence import Sure
from tests.realtime.media import picture

QUIET = Console(quiet=True)


@pytest.fixture
def two_classes(tmp_path):
    """Two images: in both a cat on the bright square, which the mock finds; in one also a dog that
    it does not.
    """
    for index in (0, 1):
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture(0))
    rows = ["0.png,cat,4,30,28,54", "1.png,cat,4,30,28,54", "1.png,dog,0,0,128,48"]
    (tmp_path / "d.csv").write_text("file,class,x0,y0,x1,y1\n" + "\n".join(rows))
    return load_dataset(tmp_path / "d.csv")


def test_every_measure_of_the_head_is_also_given_for_constant_boxes(two_classes):
    constants = ConstantBoxes(mean_box=(0, 0, 1, 1), best_constant=(0, 0, 1, 0.5))
    report, _ = evaluate(two_classes, Localizer(MockEngine(96)), QUIET, constants)
    assert report["corloc"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["corloc_class_mean"] == 0.5  # cat 1, dog 0
    assert report["baselines"] == {
        "whole_image": 0,
        "mean_box": 0,
        "best_constant": pytest.approx(1 / 3, abs=1e-4),
    }
    cat, dog = 576 / (128 * 96), 0.5  # the whole image's IoU: 24 x 24 and half of 128 x 96
    assert report["baselines_mean_iou"]["whole_image"] == pytest.approx(
        (2 * cat + dog) / 3, abs=1e-4
    )
    shares = report["baselines_box_acc_v2"]
    assert shares["whole_image"] == {"0.3": 0.3333, "0.5": 0.3333, "0.7": 0.0, "mean": 0.2222}
    assert shares["best_constant"]["0.7"] == 0.3333
    assert report["box_acc_v2"]["0.7"] == 0.6667


def test_the_table_shows_mean_iou_of_constants_and_the_mean_over_classes(two_classes):
    report, _ = evaluate(two_classes, Localizer(MockEngine(96)), QUIET, None)
    console = Console(width=80, file=StringIO())
    console.print(report_table(report))
    lines = [
        line.split("│")[1:-1]
        for line in console.file.getvalue().splitlines()
        if line.startswith("│")
    ]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert rows["whole image"] == ["0.0 %", f"{report['baselines_mean_iou']['whole_image']:.3f}"]
    assert rows["mean over classes"] == ["50.0 %", ""]
    assert rows["dog"] == ["0.0 %", f"{report['mean_iou_per_class']['dog']:.3f}"]


def test_average_precision_is_of_classes_that_the_network_knows(two_classes):
    """The mock calls everything class 0: with cat as its name it finds both cats; dogs it does not
    know.
    """
    engine = MockEngine(96)
    engine.metadata = {"class_names": '["cat", "other"]'}
    report, _ = evaluate(two_classes, Localizer(engine), QUIET, None)
    assert report["detection_ap_per_class"] == {"cat": 1.0}
    assert report["detection_ap"] == 1.0
    assert report["localization_ap_per_class"] == {"cat": 1.0}
    assert sum(report["iou_histogram"]) == 3
    assert report["iou_histogram"][0] == 1  # the dog
    report, _ = evaluate(two_classes, Localizer(MockEngine(96)), QUIET, None)
    assert "detection_ap" not in report


def test_how_sure_is_counted_by_image_and_a_box_is_right_on_any_of_its_objects(two_classes):
    report, cases = evaluate(two_classes, Localizer(Sure()), QUIET, None, min_score=0.5)
    assert [case.confidence for case in cases] == pytest.approx([0.8808, 0.1192, 0.1192], abs=1e-4)
    assert [(row["boxes"], row["said"], row["right"]) for row in report["reliability"]] == [
        (1, 0.1192, 1),
        (1, 0.8808, 1),
    ]
    assert report["calibration_error"] == pytest.approx((0.8808 + 0.1192) / 2, abs=1e-4)
    assert report["at_min_score"] == {"min_score": 0.5, "kept": 0.5, "corloc": 1.0}
    assert "reliability" not in evaluate(two_classes, Localizer(MockEngine(96)), QUIET, None)[0]


def test_detections_are_scored_again_by_the_company_they_keep(two_classes):
    """Cat and dog on both photos: of two dogs, one false, the false one scores higher, but nothing
    is seen beside it.
    """

    class Finds(MockEngine):
        """A dog where there is none in the first photo, a cat and the dog in the second."""

        def __init__(self):
            super().__init__(96)
            spec = TensorSpec("detections", np.dtype(np.float32), (1, 2, 6))
            self.outputs, self.seen = (*self.outputs, spec), 0
            self.metadata = {"class_names": '["cat", "dog"]'}

        def collect(self, ticket):
            self.seen += 1
            cat, dog = [4 / 128, 30 / 96, 28 / 128, 54 / 96, 0, 0.9], [0, 0, 1, 0.5, 1, 0.5]
            rows = (
                [[0.9, 0.9, 1, 1, 1, 0.55], [0, 0, 0, 0, -1, 0]] if self.seen == 1 else [cat, dog]
            )
            return {**super().collect(ticket), "detections": np.array([rows], np.float32)}

    given = {"cat": {"dog": 1.0}, "dog": {"cat": 1.0}}
    report, _ = evaluate(two_classes, Localizer(Finds()), QUIET, None, given=given)
    assert report["detection_ap_per_class"] == {"cat": 0.5, "dog": 0.5}
    assert report["detection_ap_in_context"] == pytest.approx(
        0.75
    )  # the dog, now 0.5 + 0.1 * 0.9, is before 0.55
    assert (
        "detection_ap_in_context" not in evaluate(two_classes, Localizer(Finds()), QUIET, None)[0]
    )


def test_evaluate_counts_an_image_once_for_each_of_its_classes(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    (tmp_path / "d.csv").write_text(
        "file,class,x0,y0,x1,y1\na.png,cat,4,30,28,54\na.png,dog,90,0,120,20\n"
    )
    report, _ = evaluate(load_dataset(tmp_path / "d.csv"), Localizer(MockEngine(96)), QUIET, None)
    assert report["corloc_per_class"] == {"cat": 1.0, "dog": 0.0}
    assert report["corloc"] == 0.5
    assert report["images"] == 1
    with pytest.raises(SourceError, match="exactly one"):
        evaluate(
            load_dataset(tmp_path / "d.csv"), Localizer(MockEngine(96)), QUIET, None, single=True
        )


def test_evaluate_needs_a_head(tiny_localizer):
    with pytest.raises(ModelError, match="no box head"):
        evaluate([], tiny_localizer, QUIET, None)


def test_a_box_on_an_ignored_object_is_neither_right_nor_wrong(tmp_path, two_classes):
    """The bright square is a difficult object in the second image, and part of a crowd in the
    third.
    """
    cv2.imwrite(str(tmp_path / "2.png"), picture(0))
    rows = ["0.png,cat,4,30,28,54,0", "0.png,dog,0,0,128,60,1"]
    rows += ["1.png,cat,4,30,28,54,1", "1.png,dog,100,0,128,20,0"]
    rows += ["2.png,cat,0,0,60,96,1", "2.png,dog,100,0,128,20,0"]
    (tmp_path / "e.csv").write_text("file,class,x0,y0,x1,y1,difficult\n" + "\n".join(rows))
    samples = load_dataset(tmp_path / "e.csv", tmp_path)
    report, cases = evaluate(samples, Localizer(MockEngine(96)), QUIET, None)
    assert report["corloc"] == 1.0
    assert report["ignored_images"] == 2
    assert [case.sample.name for case in cases] == ["0.png"]
    assert "in 2 more the box is of an object to be ignored" in str(report_table(report).title)
