"""Accuracy on a labelled set, beside constant boxes that never saw it."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.datasets import Sample
from calib.metrics import CORLOC_IOU, MARGINS, WHOLE_IMAGE, ConstantBoxes, best_iou, centre_correct, corloc
from engines.base import ModelError, SourceError
from engines.localizer import Localizer


@dataclass(frozen=True)
class Case:
    """One prediction beside its truth: the true box of the image's class that fits best."""

    name: str
    class_name: str
    iou: float
    found_xyxy: tuple[float, ...]
    true_xyxy: tuple[float, ...]
    engine_ms: float


def evaluate(
    samples: Sequence[Sample], localizer: Localizer, console: Console, baselines: ConstantBoxes | None, single: bool = False
) -> tuple[dict[str, Any], list[Case]]:
    """Localize every image and compare.

    An image with objects of several classes counts once for each of them, as VOC's CorLoc per class does. Frames without an
    object are left out.

    Args:
        samples: the labelled set.
        localizer: an engine with a head.
        console: for progress.
        baselines: constant boxes of the head's own training set; None to leave them out.
        single: only images with exactly one object.

    Returns:
        (the report in the design's terms, one case per image and class).

    Raises:
        ModelError: the engine has no head.
        SourceError: no image is left.
    """
    if "box_xyxy" not in [spec.name for spec in localizer.engine.outputs]:
        raise ModelError("this engine has no box head: fit one with 'fit' and pass it with --head")
    cases: list[Case] = []
    constants: dict[str, tuple[float, ...]] = {"whole_image": WHOLE_IMAGE}
    if baselines is not None:
        constants |= {"mean_box": baselines.mean_box, "best_constant": baselines.best_constant}
    constant_ious: dict[str, list[float]] = defaultdict(list)
    for sample in track(samples, "evaluating", console=console):
        if not sample.truths or (single and not sample.single):
            continue
        image = sample.read()
        height, width = image.shape[:2]
        before = time.perf_counter()
        found = localizer.localize([image])[0]
        elapsed_ms = (time.perf_counter() - before) * 1e3
        assert found.box_xyxy_px is not None
        for name in dict.fromkeys(truth.class_name for truth in sample.truths):
            boxes = [truth.box_xyxy_px for truth in sample.truths if truth.class_name == name]
            nearest = max(boxes, key=lambda box: best_iou(found.box_xyxy_px, [box]))  # type: ignore[arg-type]
            cases.append(Case(sample.name, name, best_iou(found.box_xyxy_px, boxes), found.box_xyxy_px, nearest, elapsed_ms))
            for kind, fractions in constants.items():
                constant = np.asarray(fractions) * (width, height, width, height)
                constant_ious[kind].append(best_iou(constant.tolist(), boxes))
    if not cases:
        raise SourceError("no image with " + ("exactly one object" if single else "a labelled object") + " in this data set")
    return _report(cases, constant_ious), cases


def _report(cases: Sequence[Case], constant_ious: dict[str, list[float]]) -> dict[str, Any]:
    ious = np.array([case.iou for case in cases])
    found, true = np.array([c.found_xyxy for c in cases]), np.array([c.true_xyxy for c in cases])
    classes = sorted({case.class_name for case in cases})
    per_class = {name: corloc(np.array([c.iou for c in cases if c.class_name == name])) for name in classes}
    return {
        "images": len({case.name for case in cases}),
        "corloc": round(corloc(ious), 4),
        "corloc_per_class": {name: round(value, 4) for name, value in per_class.items()},
        "mean_iou": round(float(ious.mean()), 4),
        "center_correctness": {f"{m:.1f}": round(float(centre_correct(found, true, m).mean()), 4) for m in MARGINS},
        "ms_per_image": round(float(np.median([case.engine_ms for case in cases])), 3),
        "baselines": {kind: round(corloc(np.array(values)), 4) for kind, values in constant_ious.items()},
    }


def report_table(report: dict[str, Any]) -> Table:
    """The report as a table for the terminal."""
    title = f"{report['images']} images, IoU over {CORLOC_IOU}"
    table = Table("", "CorLoc", "mean IoU", title=title, title_justify="left")
    table.add_row("this head", f"{100 * report['corloc']:.1f} %", f"{report['mean_iou']:.3f}", style="bold")
    for name, value in report["baselines"].items():
        table.add_row(name.replace("_", " "), f"{100 * value:.1f} %", "", style="dim")
    for name, value in report["corloc_per_class"].items():
        table.add_row(f"  {name}", f"{100 * value:.1f} %", "")
    return table
