"""Pictures of an evaluation: photos with the true and the found box beside their maps, and one bar
for each class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import cv2
import numpy as np

from calib.evaluation.evaluate import Case
from calib.evaluation.metrics import centre_correct, corloc, iou_histogram
from engines.localizer import ImageBgr, Localizer
from realtime.annotate import PREDICTED_BGR, SHADE_BGR, TRUTH_BGR, heat_map

PANEL_PX = (420, 300)  # the largest width and height of a photo
GAP_PX = 6
LINE_PX = 2
SHIFT = 4  # OpenCV draws at fractions of a pixel: coordinates carry this many binary places
MOST_CLASSES = 60
OURS, OTHERS, DARK = "#4C78A8", "#B8BEC7", "#222222"


@dataclass(frozen=True)
class Picture:
    """An encoded picture.

    Attributes:
        name: of its file, with the ending.
        content: JPEG or PNG.
    """

    name: str
    content: bytes


def case_picture(case: Case, localizer: Localizer, name: str) -> Picture:
    """The photo, true box green and found box red, and at its right the sensitivity map of the same
    size.

    Args:
        case: what was found.
        localizer: which found it; it runs once more, for the map.
        name: of the picture's file (``.jpg``).
    """
    image = case.sample.read()
    height, width = image.shape[:2]
    scale = min(PANEL_PX[0] / width, PANEL_PX[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    photo = np.asarray(
        cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC),
        np.uint8,
    )
    for box, colour in ((case.true_xyxy, TRUTH_BGR), (case.found_xyxy, PREDICTED_BGR)):
        outline(photo, [edge * scale for edge in box], colour)
    gap = np.full((size[1], GAP_PX, 3), 255, np.uint8)
    heat = heat_map(localizer.localize([image])[0].map_hw, *size)
    encoded = cv2.imencode(".jpg", np.hstack([photo, gap, heat]), [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    return Picture(name, encoded.tobytes())


def outline(
    canvas: ImageBgr, box_xyxy_px: Sequence[float], colour_bgr: tuple[int, int, int]
) -> None:
    """Draw a box, anti-aliased, just inside its edges: a dark line under a thinner coloured one
    reads on any photo.
    """
    inset = LINE_PX + 0.5  # OpenCV's anti-aliased lines are a pixel wider than their thickness
    low, high = (
        tuple(
            round((edge + side * inset - 0.5) * 2**SHIFT) for edge in corner
        )  # pixel centres lie at whole coordinates
        for corner, side in ((box_xyxy_px[:2], 1), (box_xyxy_px[2:], -1))
    )
    for colour, thickness in ((SHADE_BGR, 2 * LINE_PX), (colour_bgr, LINE_PX)):
        cv2.rectangle(canvas, low, high, colour, thickness, cv2.LINE_AA, SHIFT)


def class_bars(cases: Sequence[Case]) -> Picture:
    """CorLoc of each class as a bar, best first, with its number of images; a thin line marks the
    best constant box.

    Of more than ``MOST_CLASSES`` classes, those with the most images are shown.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.class_name, []).append(case)
    kept = sorted(groups.items(), key=lambda item: -len(item[1]))[:MOST_CLASSES]
    rows = sorted(
        ((_percent([c.iou for c in group]), name, group) for name, group in kept),
        key=lambda row: row[:2],
    )
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(rows)), dpi=200, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    values = [value for value, _, _ in rows]
    axes.barh(places, values, height=0.66, color=OURS, label="this head")
    for place, value in enumerate(values):
        axes.text(108, place, f"{value:.0f}", ha="right", va="center", fontsize=9)
    if "best_constant" in cases[0].constant_ious:
        marks = [
            _percent([c.constant_ious["best_constant"] for c in group]) for _, _, group in rows
        ]
        axes.plot(
            marks,
            places,
            "|",
            color=DARK,
            markersize=16,
            markeredgewidth=1.6,
            label="best constant box",
        )
    axes.set_yticks(places, [f"{plain(name)}  ({len(group)})" for _, name, group in rows])
    cut = (
        f"\nthe {len(rows)} of {len(groups)} classes with the most images"
        if len(rows) < len(groups)
        else ""
    )
    axes.set(
        xlabel=f"CorLoc, %  (number of images in brackets){cut}",
        xlim=(0, 108),
        ylim=(-0.6, len(rows) - 0.4),
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper right", frameon=False, ncols=2, fontsize=9)
    return stored(figure, "classes.png")


def quality_plot(cases: Sequence[Case]) -> Picture:
    """How IoUs are distributed, their mean marked; the share of centres inside the true box over
    the margin it is cut by.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    ious = np.array([case.iou for case in cases])
    found, true = (
        np.array([case.found_xyxy for case in cases]),
        np.array([case.true_xyxy for case in cases]),
    )
    margins = np.linspace(0, 0.9, 19)
    curve = [100 * float(centre_correct(found, true, margin).mean()) for margin in margins]
    figure = Figure(figsize=(6.4, 2.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(10) / 10 + 0.05, iou_histogram(ious), width=0.09, color=OURS)
    left.axvline(ious.mean(), color=DARK, linewidth=1.2)
    left.set(xlabel=f"IoU (mean {ious.mean():.3f})", ylabel="cases", xlim=(0, 1))
    right.plot(margins, curve, color=OURS)
    right.set(
        xlabel="margin that the true box is cut by",
        ylabel="centre inside, %",
        xlim=(0, 0.9),
        ylim=(0, 100),
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25)
    return stored(figure, "quality.png")


def sure_plot(report: Mapping[str, Any]) -> Picture:
    """What the confidence said against what was right; CorLoc over coverage, ``at_min_score``
    marked.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    figure = Figure(figsize=(6.4, 2.8), dpi=200, layout="constrained")
    reliable, covered = figure.subplots(1, 2)
    draw_reliability(reliable, report["reliability"])
    draw_coverage(covered, report["coverage"], "images")
    if (asked := report.get("at_min_score")) and asked["kept"]:
        place = 100 * asked["kept"], 100 * asked["corloc"]
        covered.plot(*place, "o", color=DARK, markersize=7, markerfacecolor="none")
        covered.annotate(
            f"{asked['min_score']:g}",
            place,
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
        )
    for axes in (reliable, covered):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25)
    return stored(figure, "sure.png")


def draw_reliability(axes: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """What was said against what was right, points as large as there are boxes; on the line both
    are the same.
    """
    boxes = max(sum(row["boxes"] for row in rows), 1)
    axes.plot([0, 100], [0, 100], color=OTHERS, linewidth=1)
    said, right = [100 * row["said"] for row in rows], [100 * row["right"] for row in rows]
    axes.scatter(said, right, s=[8 + 120 * row["boxes"] / boxes for row in rows], color=OURS)
    axes.set(
        xlabel="confidence, %", ylabel="right, %", title="reliability", xlim=(0, 103), ylim=(0, 103)
    )


def draw_coverage(axes: Any, covered: Mapping[str, Mapping[str, float]], what: str) -> None:
    """How many of the boxes that are kept are right, over how many are."""
    points = [each for each in covered.values() if each["kept"]]
    axes.plot(
        [100 * each["kept"] for each in points],
        [100 * each["corloc"] for each in points],
        ".-",
        color=OURS,
    )
    axes.set(
        xlabel=f"{what} with a box, %",
        ylabel="of them right, %",
        title="coverage",
        xlim=(0, 103),
        ylim=(0, 103),
    )


def stored(figure: Any, name: str) -> Picture:
    """A figure as a PNG of that name."""
    content = BytesIO()
    figure.savefig(content, format="png")
    return Picture(name, content.getvalue())


def _percent(ious: Sequence[float]) -> float:
    return 100 * corloc(np.array(ious))


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
