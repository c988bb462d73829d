"""How often what a dense head says of its boxes is right, names and confidences, on sets that
nothing was chosen on: ``python -m calib.research.said --data DATA --out docs/said.json``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.evaluation.metrics import CORLOC_IOU
from calib.research.command_line import run
from calib.research.detector import collections
from engines.boxes import iou
from engines.choose import open_localizer
from engines.files import whole_file
from engines.localizer import Detection, Localizer
from engines.options import MOST_OBJECTS, EngineOptions, Option

SURE = 0.8
NORMAL_95 = 1.96
LIMITS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
NAMED_SETS = ("animals", "VOC 2007", "coco128")
SAME_NAMES = {
    "airplane": "aeroplane",
    "couch": "sofa",
    "diningtable": "dining table",
    "laptop": "screen",
    "motorcycle": "motorbike",
    "pottedplant": "potted plant",
    "tv": "screen",
    "tvmonitor": "screen",
}
"""What the head calls classes of the sets; a laptop's screen is one."""


@dataclass(frozen=True)
class Seen:
    """A box that was found.

    Attributes:
        first: whether it is the best of its image.
        single: whether the image has exactly one object.
        confidence: of the box.
        iou: with the nearest object.
        label, finer: what it is called.
        truth: what that object is called.
    """

    first: bool
    single: bool
    confidence: float
    iou: float
    label: str
    finer: str
    truth: str

    @property
    def right(self) -> bool:
        """Whether the box is right."""
        return self.iou > CORLOC_IOU


def main(
    data: Annotated[Path, Option("Folder of the data sets.")],
    out: Annotated[Path, Option("The figures to write (.json); the page lies beside it (.md).")],
    head: Annotated[str, Option("A dense head: FILE or NAME.")] = "lite0_dense",
    model: Annotated[str, Option("Its network.")] = "lite0",
) -> None:
    """Ask the head about every image, print the tables, and write them."""
    console = Console(stderr=True)
    choice = EngineOptions(model, head=head, objects=MOST_OBJECTS)
    with open_localizer(choice) as localizer:
        localizer.abstain_below(0.0)
        threshold = localizer.limits.shown_from if localizer.limits else 0.0
        seen = {
            name: look(samples, localizer, console, name)
            for name, samples in collections(data).items()
        }
    report: dict[str, Any] = {
        "shown_from": threshold,
        "sets": {name: figures(boxes, threshold) for name, boxes in seen.items()},
        "names": {name: names(seen[name], threshold) for name in NAMED_SETS},
    }
    page = rendered(report)
    for path, text in {out: json.dumps(report, indent=1), out.with_suffix(".md"): page}.items():
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    print(page)


def look(
    samples: Sequence[Sample], localizer: Localizer, console: Console, name: str
) -> list[Seen]:
    """All boxes of the images of a set."""
    found = []
    for sample in track(samples, name, console=console):
        image = sample.read()
        clipped = sample.clipped(image)
        truths = (*clipped.truths, *clipped.ignored)
        true = np.array([truth.box_xyxy_px for truth in truths])
        answer = localizer.localize([image])[0]
        for place, each in enumerate(answer.detections):
            overlaps = iou(np.array(each.box_xyxy_px), true)
            nearest = int(overlaps.argmax())
            truth = truths[nearest].class_name
            single = sample.single and len(truths) == 1
            found.append(seen_of(each, place == 0, single, float(overlaps[nearest]), truth))
    return found


def seen_of(found: Detection, first: bool, single: bool, overlap: float, truth: str) -> Seen:
    """What is recorded of a detection."""
    label, finer = (found.said.label, found.said.finer) if found.said else ("", "")
    confidence = found.confidence or 0.0
    return Seen(first, single, confidence, overlap, label, finer, SAME_NAMES.get(truth, truth))


def share(right: Sequence[bool] | NDArray[np.bool_]) -> dict[str, float]:
    """The share of right ones, with Wilson's interval of 95 %, and how many there are."""
    count, rights = len(right), int(np.sum(right))
    if not count:
        return {"count": 0, "share": 0.0, "low": 0.0, "high": 1.0}
    part, square = rights / count, NORMAL_95**2 / count
    middle = (part + square / 2) / (1 + square)
    reach = float(np.sqrt(square * (part * (1 - part) + square / 4))) / (1 + square)
    ends = {"low": middle - reach, "high": middle + reach}
    return {"count": count, "share": round(part, 4), **{k: round(v, 4) for k, v in ends.items()}}


def figures(boxes: Sequence[Seen], threshold: float) -> dict[str, Any]:
    """How true the confidences of a set's boxes are, and what the threshold leaves."""
    first = [each for each in boxes if each.first]
    right = [each for each in first if each.right]
    shown = [each for each in first if each.confidence >= threshold]
    return {
        "first_sure": share([each.right for each in first if each.confidence >= SURE]),
        "all_sure": share([each.right for each in boxes if each.confidence >= SURE]),
        "bins": [
            share([each.right for each in first if low <= each.confidence < high])
            for low, high in zip(LIMITS[:-1], [*LIMITS[1:-1], 1.01], strict=True)
        ],
        "corloc": share([each.right for each in first]),
        "corloc_shown": share([each.right and each.confidence >= threshold for each in first]),
        "right_shown": share([each.confidence >= threshold for each in right]),
        "shown_right": share([each.right for each in shown]),
    }


def names(boxes: Sequence[Seen], threshold: float) -> dict[str, Any]:
    """How many of the right boxes that are shown have a name, and how many names are right."""
    right = [each for each in boxes if each.right and each.confidence >= threshold]
    named = [each for each in right if each.label != "object"]
    return {
        "named": share([each.label != "object" for each in right]),
        "right": share([each.label == each.truth for each in named]),
        "finer": share([bool(each.finer) for each in named]),
    }


def rendered(report: Mapping[str, Any]) -> str:
    """The tables in Markdown."""

    def cell(found: Mapping[str, float]) -> str:
        if not found["count"]:
            return "-"
        low, high = 100 * found["low"], 100 * found["high"]
        return f"{100 * found['share']:.1f} ({low:.0f} to {high:.0f}; {found['count']})"

    columns = ("first_sure", "all_sure", "right_shown", "corloc", "corloc_shown", "shown_right")
    lines = [
        f"Shown from {100 * report['shown_from']:.0f} %. Shares in per cent, with intervals of"
        " 95 % and counts.",
        "",
        "| set | first boxes that say 80 % or more: right | all such boxes: right | right first"
        " boxes: shown | first boxes: right | right and shown | shown first boxes: right |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, found in report["sets"].items():
        lines.append(f"| {name} | " + " | ".join(cell(found[each]) for each in columns) + " |")
    bins = [f"{100 * low:.0f} to {100 * high:.0f}" for low, high in pairwise(LIMITS)]
    lines += ["", "| first boxes that say so many %: right | " + " | ".join(bins) + " |"]
    lines.append("|---|" + "---:|" * len(bins))
    for name, found in report["sets"].items():
        lines.append(f"| {name} | " + " | ".join(cell(each) for each in found["bins"]) + " |")
    lines += [
        "",
        "| set | right boxes that are shown: named | names that are right | of them with"
        " a finer one |",
        "|---|---:|---:|---:|",
    ]
    for name, found in report["names"].items():
        row = " | ".join(cell(found[each]) for each in ("named", "right", "finer"))
        lines.append(f"| {name} | {row} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
