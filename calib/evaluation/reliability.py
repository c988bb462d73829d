"""Compares the stated confidence of boxes with how often they are right, and measures what is left
above a threshold.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

CONFIDENCES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
COVERAGES = tuple(round(0.1 * tenth, 1) for tenth in range(10))
Sure = NDArray[np.float64]
Right = NDArray[np.bool_]


def reliability(sure: Sure, right: Right) -> list[dict[str, float]]:
    """For each interval of ``CONFIDENCES`` that holds boxes: ``boxes``, mean confidence ``said``,
    share ``right``.
    """
    rows = []
    for low, high in pairwise(CONFIDENCES):
        inside = (sure >= low) & ((sure < high) | (high == 1.0))
        if inside.any():
            rows.append(
                {
                    "boxes": float(inside.sum()),
                    "said": float(sure[inside].mean()),
                    "right": float(right[inside].mean()),
                }
            )
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over the rows of ``reliability``:
    how far off a box is, mean.
    """
    boxes = sum(row["boxes"] for row in rows)
    return sum(row["boxes"] * abs(row["said"] - row["right"]) for row in rows) / max(boxes, 1)


def coverage(sure: Sure, right: Right) -> dict[str, dict[str, float]]:
    """By the least confidence that is asked for: ``kept``, the share of boxes that have it, and the
    ``corloc`` of those.
    """
    return {str(least): kept_of(right[sure >= least], len(right)) for least in COVERAGES}


def kept_of(right: Right, boxes: int) -> dict[str, float]:
    """``kept``: the share that those make of all boxes; ``corloc``: the share of them that is
    right, 0 where there is none.
    """
    return {
        "kept": len(right) / max(boxes, 1),
        "corloc": float(right.mean()) if len(right) else 0.0,
    }


def sureness(sure: Sure, right: Right, least: float) -> dict[str, Any]:
    """Everything above, and under ``at_min_score`` what is kept at ``least`` where that is more
    than 0.
    """
    rows = reliability(sure, right)
    asked = (
        {"at_min_score": {"min_score": least, **kept_of(right[sure >= least], len(right))}}
        if least > 0
        else {}
    )
    return {
        "reliability": rows,
        "calibration_error": calibration_error(rows),
        "coverage": coverage(sure, right),
        **asked,
    }


def rounded(value: Any) -> Any:
    """Numbers, in lists and mappings of any depth, to four places."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def print_sureness(report: Mapping[str, Any], console: Console) -> None:
    """What was said and what was right, and what ``--min-score`` keeps."""
    table = Table("said", "was right", "boxes", title="How sure", title_justify="left")
    for row in report["reliability"]:
        table.add_row(
            f"{100 * row['said']:.0f} %", f"{100 * row['right']:.0f} %", f"{row['boxes']:.0f}"
        )
    console.print(table, f"{100 * report['calibration_error']:.1f} % off in the mean")
    if asked := report.get("at_min_score"):
        kept, right = (f"{100 * asked[key]:.1f} %" for key in ("kept", "corloc"))
        console.print(
            f"at --min-score {asked['min_score']:g}, {kept} of images keep a box, and {right} of"
            " those are right"
        )
