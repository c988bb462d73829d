"""Writes an evaluation of photos as one HTML file, or as Markdown with its pictures beside it.

The pictures are photos with the true and the found box beside their maps, and plots. Reports of
sequences (``calib.evaluation.sequences``) use the same documents and pictures.
"""

import os
import re
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from calib.evaluation.evaluate import Case
from calib.evaluation.metrics import centre_correct, corloc, iou_histogram
from engines.errors import OutputError, SightlineError
from engines.files import Kind, checked_output, checked_suffix, file_key, whole_file
from engines.localizer import ImageBgr, Localizer
from engines.text import displayable
from realtime.annotate import PREDICTED_BGR, SHADE_BGR, TRUTH_BGR, heat_map
from realtime.documents import templates
from realtime.teaching.why import Explain, explanation_json

SUFFIXES = (".html", ".md")
MARKDOWN_MARK = "<!-- Sightline evaluation -->\n"
REPORT_FILE = Kind(
    "report",
    SUFFIXES,
    b'<!-- Sightline evaluation -->|<!DOCTYPE html>.{,200}?<meta name="generator"'
    b' content="Sightline evaluation">',
)
PICTURES = (".jpg", ".png")
CASES_PER_GROUP = 4
NAMES = {
    "whole_image": "whole image",
    "mean_box": "mean box",
    "best_constant": "best constant box",
    "centre_box": "centre box of average size",
}
TEMPLATES = Path(__file__).parent / "assets"
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


@dataclass(frozen=True)
class Shown:
    """A case and its picture.

    Attributes:
        why: see ``realtime.teaching.why.explanation_json``; None where nothing explains it.
    """

    case: Case
    picture: Picture
    why: Mapping[str, Any] | None = None


def check_report(path: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse, before any work, a report that cannot be written without loss. The folder of the
    pictures of a Markdown report is checked, too.

    Args:
        path: the report.
        inputs: the files that the same command reads.

    Raises:
        OutputError: see ``engines.files.checked_output``; or the folder is one of the inputs, or
            holds pictures of others.
    """
    inputs = list(inputs)
    checked_output(path, REPORT_FILE, inputs)
    folder = pictures_folder(path)
    if path.suffix.lower() != ".md" or not os.path.lexists(folder):
        return
    if not folder.is_dir() or file_key(folder) in {file_key(each) for each in inputs if each}:
        raise OutputError(
            f"report {displayable(str(path))}: its pictures need the folder {folder.name}; choose"
            " another name"
        )
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found = [each.name for each in folder.iterdir() if each.suffix in PICTURES]
    except OSError as error:
        raise OutputError(
            f"cannot read {displayable(str(folder))}: {error.strerror or error}"
        ) from error
    others = [name for name in found if f"({link_to(folder, name)})" not in text]
    if others:
        raise OutputError(
            f"report {displayable(str(path))}: the folder of its pictures,"
            f" {displayable(folder.name)}, holds {displayable(others[0])}, which no report there"
            " names; choose another name, or remove that folder"
        )


def write_report(
    path: Path,
    title: str,
    report: Mapping[str, Any],
    cases: Sequence[Case],
    localizer: Localizer,
    facts: Mapping[str, str],
    explain: Explain | None = None,
    labels: Path | None = None,
) -> None:
    """Write what ``evaluate`` found, whole or not at all.

    Args:
        path: ``.html`` embeds its pictures; ``.md`` has them in the folder ``<stem>_files`` beside
            it.
        title: the first heading.
        report: see ``calib.evaluation.evaluate.report_of``.
        cases: at least one case.
        localizer: the localizer that found them, which computes the maps that are shown.
        facts: model, method, machine and so on, each with its name.
        explain: explains the boxes that are shown; None to leave that out.
        labels: the user's own labels, of which the page says how to take the worst cases into one's
            folder of labels; None where they are of a published set.

    Raises:
        OutputError: the ending is neither, or the place cannot be written.
    """
    checked_suffix(path, SUFFIXES, "report")
    bars = class_bars(cases) if len(report["corloc_per_class"]) > 1 else None
    groups = {
        name: [
            Shown(
                case,
                case_picture(case, localizer, f"{name}_{place}.jpg"),
                _explained(case, explain),
            )
            for place, case in enumerate(group, start=1)
        ]
        for name, group in example_cases(cases).items()
    }
    quality = quality_plot(cases)
    sure = confidence_plot(report) if "reliability" in report else None
    content = {
        "title": title,
        "report": report,
        "rows": measures(report),
        "facts": facts,
        "bars": bars,
        "groups": groups,
        "quality": quality,
        "sure": sure,
        "add": _command_to_add(labels, groups.get("worst", [])) if labels else "",
    }
    cases_shown = [shown.picture for group in groups.values() for shown in group]
    pictures = [*cases_shown, *(each for each in (bars, quality, sure) if each)]
    write_document(path, "report", content, pictures)


def _explained(case: Case, explain: Explain | None) -> dict[str, Any] | None:
    """Why a case has its box; None where that cannot be said."""
    if explain is None:
        return None
    x0, y0, x1, y1 = case.found_xyxy
    try:
        return explanation_json(explain(case.sample.read(), (x0, y0, x1, y1)))
    except SightlineError:
        return None


def _command_to_add(labels: Path, worst: Sequence[Shown]) -> str:
    """The command that takes some labelled images into one's folder of labels."""
    names = dict.fromkeys(shown.case.sample.name for shown in worst)
    words = ["sightline", "label", "--add", str(labels)]
    for name in names:
        words += ["--only", name]
    return displayable(shlex.join(words))


def write_document(
    path: Path, template: str, content: Mapping[str, Any], pictures: Sequence[Picture]
) -> None:
    """Write one HTML file that holds its pictures, or Markdown with a folder of them beside it.

    Args:
        path: the document; its ending, ``.html`` or ``.md``, decides.
        template: a file of ``assets``, without its ending.
        content: the values that the template needs.
        pictures: all pictures that the content names.

    Raises:
        OutputError: a file cannot be written; none is left.
    """
    if path.suffix.lower() == ".html":
        write_all({path: rendered(f"{template}.html", embedded, content).encode()})
        return
    folder = pictures_folder(path)
    text = MARKDOWN_MARK + rendered(
        f"{template}.md", lambda picture: link_to(folder, picture.name), content
    )
    write_all(
        {path: text.encode()} | {folder / picture.name: picture.content for picture in pictures}
    )


def pictures_folder(path: Path) -> Path:
    """The folder of the pictures of a Markdown report."""
    return path.with_name(f"{path.stem}_files")


def link_to(folder: Path, name: str) -> str:
    """The address of a picture in a Markdown report."""
    return "/".join(quote(each, errors="surrogateescape") for each in (folder.name, name))


def example_cases(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases that a report shows, up to 4 of each kind, no case twice.

    Returns:
        ``best``, with the best case first; ``median``, from the middle of the ranking; ``worst``,
        with the worst case first.
    """
    ranked = sorted(cases, key=lambda case: -case.iou)
    count = min(CASES_PER_GROUP, max(1, len(ranked) // 3))
    best, rest = ranked[:count], ranked[count:]
    worst, rest = rest[-count:][::-1], rest[:-count]
    start = (len(rest) - count) // 2
    groups = {"best": best, "median": rest[max(0, start) : start + count], "worst": worst}
    return {name: group for name, group in groups.items() if group}


def measures(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """CorLoc, mean IoU and box accuracy of the head, then of each constant box, the best last."""
    rows = {"this head": {key: report[key] for key in ("corloc", "mean_iou", "box_acc_v2")}}
    for kind, share in sorted(report["baselines"].items(), key=lambda item: item[1]):
        rows[NAMES[kind]] = {
            "corloc": share,
            "mean_iou": report["baselines_mean_iou"][kind],
            "box_acc_v2": report["baselines_box_acc_v2"][kind],
        }
    return rows


def rendered(template: str, link: Callable[[Picture], str], content: Mapping[str, Any]) -> str:
    """Fill a template.

    Args:
        template: a file of ``assets``.
        link: gives the address of a picture.
        content: the values that the template needs.
    """
    environment = templates(TEMPLATES, escape=template.endswith(".html"))
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.1f} %",
        "plain": _plain,
        "link": link,
    }
    return environment.get_template(template).render(content)


def embedded(picture: Picture) -> str:
    """The address of a picture that is part of the document, as a ``data:`` URL."""
    kind = {"jpg": "jpeg", "png": "png"}[picture.name.rpartition(".")[2]]
    return f"data:image/{kind};base64,{b64encode(picture.content).decode()}"


def _plain(text: str) -> str:
    """Escape text so that Markdown shows it as it is, in tables, too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", text)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files: all of them, or none.

    All are written under other names first. The first file gets its name last, so that a document
    never lacks its pictures.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(whole_file(path)).write_bytes(content)


def case_picture(case: Case, localizer: Localizer, name: str) -> Picture:
    """The photo with the true box in green and the found box in red, and its map beside it.

    Args:
        case: what was found.
        localizer: the localizer that found it; it runs once more, for the map.
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
    """Draw a box with anti-aliased lines just inside its edges.

    A dark line lies under a thinner coloured one, so that the box is visible on any photo.

    Args:
        canvas: the image, which is changed.
        box_xyxy_px: the box in the image's pixels.
        colour_bgr: of the upper line.
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
    """A plot with a bar for the CorLoc of each class, the best first, and its number of images.

    A short line marks the CorLoc of the best constant box. Of more than ``MOST_CLASSES`` classes,
    those with the most images are shown.
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
    """A histogram of the IoUs with their mean, and a plot of centre correctness over the margin."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    ious = np.array([case.iou for case in cases])
    found = np.array([case.found_xyxy for case in cases])
    true = np.array([case.true_xyxy for case in cases])
    margins = np.linspace(0, 0.5, 11)
    curve = [100 * float(centre_correct(found, true, margin).mean()) for margin in margins]
    figure = Figure(figsize=(6.4, 2.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(10) / 10 + 0.05, iou_histogram(ious), width=0.09, color=OURS)
    left.axvline(ious.mean(), color=DARK, linewidth=1.2)
    left.set(xlabel=f"IoU (mean {ious.mean():.3f})", ylabel="cases", xlim=(0, 1))
    right.plot(margins, curve, color=OURS)
    right.set(
        xlabel="margin cut off at each side",
        ylabel="centre inside, %",
        xlim=(0, 0.5),
        ylim=(0, 100),
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25)
    return stored(figure, "quality.png")


def confidence_plot(report: Mapping[str, Any]) -> Picture:
    """Plots of reliability, and of CorLoc over coverage with a mark for ``at_min_score``."""
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
    """Draw the share of right boxes over their confidence. Larger points are more boxes.

    Args:
        axes: matplotlib's axes, which are changed.
        rows: see ``calib.evaluation.metrics.reliability``.
    """
    boxes = max(sum(row["boxes"] for row in rows), 1)
    axes.plot([0, 100], [0, 100], color=OTHERS, linewidth=1)
    said, right = [100 * row["said"] for row in rows], [100 * row["right"] for row in rows]
    axes.scatter(said, right, s=[8 + 120 * row["boxes"] / boxes for row in rows], color=OURS)
    axes.set(
        xlabel="confidence, %", ylabel="right, %", title="reliability", xlim=(0, 103), ylim=(0, 103)
    )


def draw_coverage(axes: Any, covered: Mapping[str, Mapping[str, float]], what: str) -> None:
    """Draw the share of right boxes over the share of boxes that is kept.

    Args:
        axes: matplotlib's axes, which are changed.
        covered: see ``calib.evaluation.metrics.coverage``.
        what: what has a box or none: images or frames.
    """
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
    """A matplotlib figure as a PNG of that name."""
    content = BytesIO()
    figure.savefig(content, format="png")
    return Picture(name, content.getvalue())


def _percent(ious: Sequence[float]) -> float:
    """The CorLoc of boxes, from 0 to 100."""
    return 100 * corloc(np.array(ious))


def plain(text: str) -> str:
    """Escape text so that matplotlib draws it as it is. A dollar sign would begin a formula."""
    return text.replace("$", r"\$")
