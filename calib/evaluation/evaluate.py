"""Measures accuracy on a labelled set, and compares it with constant boxes that need no image."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.data.choose import everyday_names
from calib.data.datasets import Sample
from calib.evaluation.metrics import (
    CORLOC_IOU,
    MARGINS,
    WHOLE_IMAGE,
    ConstantBoxes,
    Given,
    Predicted,
    best_iou,
    box_acc_v2,
    centre_correct,
    confidence_report,
    corloc,
    detection_ap,
    iou_histogram,
    is_ignored,
    is_ignored_point,
    localization_ap,
    mean_ap,
    peak_xy,
    print_confidence_report,
    rescored,
    rounded,
)
from engines.errors import ModelError, SourceError
from engines.localizer import Localization, Localizer


@dataclass(frozen=True)
class Case:
    """One prediction beside its truth, for one image and one class in it.

    Attributes:
        sample: the image.
        class_name: the class whose true boxes count.
        iou: the IoU of the found box with the true box that fits it best.
        constant_ious: the same IoU of each constant box, by its name.
        found_xyxy, true_xyxy: the two boxes of ``iou``, in pixels of the image.
        engine_ms: the time that localizing took.
        confidence: the confidence of the found box; None where the head has no confidence model.
    """

    sample: Sample
    class_name: str
    iou: float
    constant_ious: Mapping[str, float]
    found_xyxy: tuple[float, ...]
    true_xyxy: tuple[float, ...]
    engine_ms: float
    confidence: float | None = None


def evaluate(
    samples: Sequence[Sample],
    localizer: Localizer,
    console: Console,
    baselines: ConstantBoxes | None,
    single: bool = False,
    given: Given | None = None,
    min_score: float = 0.0,
) -> tuple[dict[str, Any], list[Case]]:
    """Localize every image and compare the boxes with the truth.

    An image with objects of several classes counts once for each of them, as in VOC's CorLoc per
    class. Frames without an object are left out. So are images whose box is of what is to be
    ignored, see ``Sample``: it is neither right nor wrong.

    Args:
        samples: the labelled set.
        localizer: an engine with a head.
        console: for progress.
        baselines: constant boxes of the head's own training set; None to leave them out.
        single: measure only images with exactly one object, of whatever class.
        given: how often classes occur together elsewhere; the report then also has the detection
            AP of detections that are rescored by it.
        min_score: the report says what is left without the boxes of less confidence.

    All boxes are given by ``localizer`` from then on.

    Returns:
        The report, see ``report_of``, with ``ignored_images`` where there are any; and one case
        for each image and class.

    Raises:
        ModelError: the engine has no head.
        SourceError: no image is left.
    """
    if not localizer.finds_boxes:
        raise ModelError(
            "this engine has no box head: fit one with 'fit', and name it", option="head"
        )
    localizer.abstain_below(0.0)  # every box is measured
    cases: list[Case] = []
    ignored_images = 0
    precision = AveragePrecision(samples, localizer, given)
    constants: dict[str, tuple[float, ...]] = {"whole_image": WHOLE_IMAGE}
    if baselines is not None:
        constants |= {"mean_box": baselines.mean_box, "best_constant": baselines.best_constant}
        if baselines.centre_box is not None:
            constants["centre_box"] = baselines.centre_box
    for sample in track(samples, "evaluating", console=console):
        if not sample.truths or (single and not sample.single):
            continue
        image = sample.read()
        clipped = sample.clipped(image)
        before = time.perf_counter()
        found = localizer.localize([image])[0]
        elapsed_ms = (time.perf_counter() - before) * 1e3
        assert found.box_xyxy_px is not None
        precision.add(clipped, found, (image.shape[1], image.shape[0]))
        if is_ignored(found.box_xyxy_px, clipped):
            ignored_images += 1
            continue
        size = np.array([image.shape[1], image.shape[0]] * 2)
        constants_px = {
            kind: tuple((size * fractions).tolist()) for kind, fractions in constants.items()
        }
        cases += [
            _case(clipped, name, found, constants_px, elapsed_ms)
            for name in dict.fromkeys(truth.class_name for truth in sample.truths)
        ]
    if not cases:
        raise SourceError(
            "no image with "
            + ("exactly one object" if single else "a labelled object")
            + " in this data set"
        )
    left_out = {"ignored_images": ignored_images} if ignored_images else {}
    return {**report_of(cases, min_score), **left_out, **precision.report()}, cases


class AveragePrecision:
    """Localization and detection AP over the classes of a data set that the network knows.

    Of each image, localization AP gets one point, the peak of the map, for the class that the map
    shows. Detection AP gets every detection, or the box of a method that finds only one.

    Args:
        samples: the labelled set.
        localizer: knows the names of the network's classes.
        given: see ``evaluate``.
    """

    def __init__(
        self, samples: Sequence[Sample], localizer: Localizer, given: Given | None = None
    ) -> None:
        self._given = given
        wanted = frozenset(truth.class_name for sample in samples for truth in sample.truths)
        self._names = everyday_names(localizer.class_names, wanted)
        self._truths: dict[str, dict[str, list[tuple[float, ...]]]] = {
            name: {} for name in sorted(set(self._names) - {""})
        }
        self._boxes: list[Predicted] = []
        self._points: list[Predicted] = []

    def add(self, sample: Sample, found: Localization, size_px: tuple[int, int]) -> None:
        """Add an image.

        Args:
            sample: the image, with its true boxes.
            found: what was found in it.
            size_px: its width and height.
        """
        for truth in sample.truths:
            if truth.class_name in self._truths:
                self._truths[truth.class_name].setdefault(sample.name, []).append(truth.box_xyxy_px)
        first = self._names[found.class_index]
        x, y = peak_xy(found.map_hw)
        point = x * size_px[0], y * size_px[1]
        if first and not is_ignored_point(point, sample):
            self._points.append(Predicted(sample.name, first, found.score, point))
        whole = [(found.class_index, found.score, found.box_xyxy_px)] if found.box_xyxy_px else []
        for index, score, box in [
            (d.class_index, d.score, d.box_xyxy_px) for d in found.detections
        ] or whole:
            if self._names[index] and not is_ignored(box, sample):
                self._boxes.append(Predicted(sample.name, self._names[index], score, box))

    def report(self) -> dict[str, Any]:
        """``localization_ap`` and ``detection_ap``: their means over classes, and each class's own.
        Empty where the network knows no class of the data set.
        """
        truths = {name: images for name, images in self._truths.items() if images}
        if not truths:
            return {}
        points, boxes = localization_ap(self._points, truths), detection_ap(self._boxes, truths)
        again = (
            {} if self._given is None else detection_ap(rescored(self._boxes, self._given), truths)
        )
        return {
            **({"detection_ap_in_context": round(mean_ap(again), 4)} if again else {}),
            "localization_ap": round(mean_ap(points), 4),
            "detection_ap": round(mean_ap(boxes), 4),
            "localization_ap_per_class": rounded(points),
            "detection_ap_per_class": rounded(boxes),
        }


def _case(
    sample: Sample,
    class_name: str,
    found: Localization,
    constants_xyxy: Mapping[str, tuple[float, ...]],
    engine_ms: float,
) -> Case:
    """Compare the box of an image with the true boxes of one class in it."""
    assert found.box_xyxy_px is not None
    found_xyxy = found.box_xyxy_px
    boxes = [truth.box_xyxy_px for truth in sample.truths if truth.class_name == class_name]
    nearest = max(boxes, key=lambda box: best_iou(found_xyxy, [box]))
    constant_ious = {kind: best_iou(box, boxes) for kind, box in constants_xyxy.items()}
    best = best_iou(found_xyxy, boxes)
    return Case(
        sample, class_name, best, constant_ious, found_xyxy, nearest, engine_ms, found.confidence
    )


def _confidence_report_of(cases: Sequence[Case], min_score: float) -> dict[str, Any]:
    """``calib.evaluation.metrics.confidence_report`` over images.

    A box is right if it is right for any object of its image. Empty where the head has no
    confidence model.
    """
    best: dict[str, tuple[float, float]] = {}
    for case in cases:
        if case.confidence is None:
            return {}
        best[case.sample.name] = (
            case.confidence,
            max(case.iou, best.get(case.sample.name, (0.0, 0.0))[1]),
        )
    confidences, ious = np.array(list(best.values())).T
    return dict(rounded(confidence_report(confidences, ious > CORLOC_IOU, min_score)))


def report_of(cases: Sequence[Case], min_score: float = 0.0) -> dict[str, Any]:
    """The report of at least one case, by the names that ``evaluate --json`` prints.

    Shares and IoUs are rounded to four places, times are in milliseconds.
    """
    ious = np.array([case.iou for case in cases])
    constant_ious = {
        kind: np.array([case.constant_ious[kind] for case in cases])
        for kind in cases[0].constant_ious
    }
    found, true = np.array([c.found_xyxy for c in cases]), np.array([c.true_xyxy for c in cases])
    names = np.array([case.class_name for case in cases])
    per_class = {str(name): corloc(ious[names == name]) for name in np.unique(names)}
    return {
        "images": len({case.sample.name for case in cases}),
        "corloc": round(corloc(ious), 4),
        "corloc_class_mean": round(float(np.mean(list(per_class.values()))), 4),
        "corloc_per_class": rounded(per_class),
        "mean_iou": round(float(ious.mean()), 4),
        "mean_iou_per_class": rounded(
            {name: float(ious[names == name].mean()) for name in per_class}
        ),
        "iou_histogram": iou_histogram(ious),
        "box_acc_v2": rounded(box_acc_v2(ious)),
        "center_correctness": rounded(
            {f"{m:.1f}": float(centre_correct(found, true, m).mean()) for m in MARGINS}
        ),
        "ms_per_image": round(float(np.median([case.engine_ms for case in cases])), 3),
        "baselines": rounded({kind: corloc(values) for kind, values in constant_ious.items()}),
        "baselines_mean_iou": rounded(
            {kind: float(values.mean()) for kind, values in constant_ious.items()}
        ),
        "baselines_box_acc_v2": {
            kind: rounded(box_acc_v2(values)) for kind, values in constant_ious.items()
        },
        **_confidence_report_of(cases, min_score),
    }


AP_WORDS = {
    "localization_ap": "localization AP",
    "detection_ap": "detection AP",
    "detection_ap_in_context": "detection AP, re-scored by the company of other classes",
}


def report_table(report: dict[str, Any], kind: str = "") -> Table:
    """The report as a table for the terminal.

    Args:
        report: see ``report_of``.
        kind: which images these are, as words that follow "images".
    """
    title = f"{report['images']} images{kind}, IoU over {CORLOC_IOU}"
    if "ignored_images" in report:
        title += f"; in {report['ignored_images']} more the box is of an object to be ignored"
    table = Table("", "CorLoc", "mean IoU", title=title, title_justify="left")
    table.add_row(
        "this head", f"{100 * report['corloc']:.1f} %", f"{report['mean_iou']:.3f}", style="bold"
    )
    for name, value in report["baselines"].items():
        mean_iou = report["baselines_mean_iou"][name]
        table.add_row(
            name.replace("_", " "), f"{100 * value:.1f} %", f"{mean_iou:.3f}", style="dim"
        )
    table.add_row("mean over classes", f"{100 * report['corloc_class_mean']:.1f} %", "")
    for name, value in report["corloc_per_class"].items():
        mean_iou = report["mean_iou_per_class"][name]
        table.add_row(f"  {name}", f"{100 * value:.1f} %", f"{mean_iou:.3f}")
    for key, words in AP_WORDS.items():
        if key in report:
            table.add_row(words, f"{100 * report[key]:.1f} %", "", style="dim")
    return table


def print_report(
    report: dict[str, Any], cases: Sequence[Case], published: bool, console: Console
) -> dict[str, Any]:
    """Print the report. That of a published set gains the report of its images with one object,
    which papers give, as ``single_object``.

    Args:
        report: see ``report_of``.
        cases: the cases that it is of.
        published: whether they are of a published set.
        console: prints it.

    Returns:
        The report, with ``single_object`` where there is one.
    """
    console.print(report_table(report))
    console.print(
        "CorLoc: the share of images whose box is right, which is an overlap (IoU) over"
        f" {CORLOC_IOU} with a true box. The rows below 'this head' are boxes that need no image.",
        style="dim",
    )
    if "reliability" in report:
        print_confidence_report(report, console)
    singles = [case for case in cases if case.sample.single] if published else []
    if not singles:
        return report
    report = {
        **report,
        "single_object": report_of(singles, report.get("at_min_score", {}).get("min_score", 0.0)),
    }
    console.print(report_table(report["single_object"], " with exactly one object"))
    return report
