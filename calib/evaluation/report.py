"""Writes an evaluation of photos or sequences as one HTML file, or as Markdown with its pictures
beside it.
"""

import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from calib.evaluation.evaluate import Case
from calib.evaluation.metrics import CORLOC_IOU
from calib.evaluation.pictures import (
    DARK,
    OTHERS,
    OURS,
    Picture,
    case_picture,
    class_bars,
    draw_coverage,
    draw_reliability,
    outline,
    plain,
    quality_plot,
    stored,
    sure_plot,
)
from calib.evaluation.sequences import SUCCESS_IOUS, Followed
from engines.boxes import overlap
from engines.errors import OutputError
from engines.files import Kind, checked_output, checked_suffix, file_key, whole_file
from engines.localizer import Localizer
from engines.text import displayable
from realtime.annotate import PREDICTED_BGR, TRUTH_BGR
from realtime.documents import templates

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
NAMES = {"whole_image": "whole image", "mean_box": "mean box", "best_constant": "best constant box"}
TEMPLATES = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Shown:
    """A case beside its picture."""

    case: Case
    picture: Picture


def check_report(path: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse a report that cannot be written without loss, before any work; so, too, the folder of
    a Markdown's pictures.

    Args:
        path: of the report.
        inputs: what the same command reads.

    Raises:
        OutputError: see ``engines.files.checked_output``; or the folder is read, or holds pictures
            of others.
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
) -> None:
    """Write what ``evaluate`` found, whole or not at all.

    Args:
        path: ``.html`` embeds its pictures; ``.md`` has them in the folder ``<stem>_files`` beside
            it.
        title: of the data set.
        report: the numbers.
        cases: at least one.
        localizer: which found them, for the maps of the cases that are shown.
        facts: model, method, machine ...: each with its name.

    Raises:
        OutputError: the ending is neither, or the place cannot be written.
    """
    checked_suffix(path, SUFFIXES, "report")
    bars = class_bars(cases) if len(report["corloc_per_class"]) > 1 else None
    groups = {
        name: [
            Shown(case, case_picture(case, localizer, f"{name}_{place}.jpg"))
            for place, case in enumerate(group, start=1)
        ]
        for name, group in example_cases(cases).items()
    }
    quality, sure = quality_plot(cases), sure_plot(report) if "reliability" in report else None
    content = {
        "title": title,
        "report": report,
        "rows": measures(report),
        "facts": facts,
        "bars": bars,
        "groups": groups,
        "quality": quality,
        "sure": sure,
    }
    cases_shown = [shown.picture for group in groups.values() for shown in group]
    pictures = [*cases_shown, *(each for each in (bars, quality, sure) if each)]
    write_document(path, "report", content, pictures)


def write_document(
    path: Path, template: str, content: Mapping[str, Any], pictures: Sequence[Picture]
) -> None:
    """Write one HTML file that holds its pictures, or Markdown with them in a folder beside it, as
    the name's ending says.

    Args:
        path: ``.html`` or ``.md``.
        template: of ``assets``, without ending.
        content: for the template.
        pictures: all that the content names.

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
    """Where the pictures of a Markdown report lie."""
    return path.with_name(f"{path.stem}_files")


def link_to(folder: Path, name: str) -> str:
    """A picture's address in a Markdown report."""
    return "/".join(quote(each, errors="surrogateescape") for each in (folder.name, name))


def example_cases(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Up to 4 ``best`` cases, best first; ``median`` ones, around the middle; and ``worst``, worst
    first. None comes twice.
    """
    ranked = sorted(cases, key=lambda case: -case.iou)
    count = min(CASES_PER_GROUP, max(1, len(ranked) // 3))
    best, rest = ranked[:count], ranked[count:]
    worst, rest = rest[-count:][::-1], rest[:-count]
    start = (len(rest) - count) // 2
    groups = {"best": best, "median": rest[max(0, start) : start + count], "worst": worst}
    return {name: group for name, group in groups.items() if group}


def measures(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """CorLoc, mean IoU and box accuracy by name: of the head, then of each constant box, the best
    last.
    """
    rows = {"this head": {key: report[key] for key in ("corloc", "mean_iou", "box_acc_v2")}}
    for kind, share in sorted(report["baselines"].items(), key=lambda item: item[1]):
        mean_iou, accuracy = (
            report["baselines_mean_iou"][kind],
            report["baselines_box_acc_v2"][kind],
        )
        rows[NAMES[kind]] = {"corloc": share, "mean_iou": mean_iou, "box_acc_v2": accuracy}
    return rows


def rendered(template: str, link: Callable[[Picture], str], content: Mapping[str, Any]) -> str:
    """A template of ``assets`` with its content; ``link`` says where a picture is."""
    environment = templates(TEMPLATES, escape=template.endswith(".html"))
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.1f} %",
        "plain": _plain,
        "link": link,
    }
    return environment.get_template(template).render(content)


def embedded(picture: Picture) -> str:
    """A picture as an address that holds it."""
    kind = {"jpg": "jpeg", "png": "png"}[picture.name.rpartition(".")[2]]
    return f"data:image/{kind};base64,{b64encode(picture.content).decode()}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", text)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """All are written before any takes its place; the first takes it last, so that a document never
    lacks its pictures.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(whole_file(path)).write_bytes(content)


STRIP_FRAMES, STRIP_WIDTH_PX = 6, 300
WINDOW_BGR = (255, 220, 120)
SHADES = {"searching": "#F3E3B3", "widened": "#E7D6EE", "lost": "#F4C9C4"}
"""Of the states in plots; following has none."""


def write_sequence_report(
    path: Path,
    title: str,
    report: Mapping[str, Any],
    sequences: Sequence[Followed],
    facts: Mapping[str, str],
) -> None:
    """Write what following came to, whole or not at all; ``path`` as for
    ``calib.evaluation.report.write_report``.

    Raises:
        OutputError: the ending is neither, or the place cannot be written.
    """
    checked_suffix(path, SUFFIXES, "report")
    shown: list[dict[str, Any]] = [
        {
            "name": each.name,
            "row": report["sequences"][each.name],
            "plot": course(each),
            "strip": film_strip(each),
        }
        for each in sequences
    ]
    content: dict[str, Any] = {
        "title": title,
        "report": report,
        "facts": facts,
        "shown": shown,
        "curves": curves(report, sequences),
        "shades": SHADES,
    }
    pictures: list[Picture] = [
        content["curves"],
        *(each[kind] for each in shown for kind in ("plot", "strip")),
    ]
    write_document(path, "sequences", content, pictures)


def film_strip(sequence: Followed) -> Picture:
    """A few frames, evenly spread: truth green, followed box red, the window, if the engine saw
    one, in a thin light line.
    """
    panels = []
    for number in np.linspace(
        0, len(sequence.samples) - 1, min(STRIP_FRAMES, len(sequence.samples))
    ).astype(int):
        image = sequence.samples[number].read()
        scale = STRIP_WIDTH_PX / image.shape[1]
        panel = np.asarray(
            cv2.resize(
                image, (STRIP_WIDTH_PX, round(image.shape[0] * scale)), interpolation=cv2.INTER_AREA
            ),
            np.uint8,
        )
        said, true, found = (
            sequence.tracks[number],
            sequence.true[number],
            sequence.followed[number],
        )
        if said.window_xyxy_px:
            x0, y0, x1, y1 = (round(edge * scale) for edge in said.window_xyxy_px)
            cv2.rectangle(panel, (x0, y0), (x1 - 1, y1 - 1), WINDOW_BGR, 1)
        text = f"{number}  {said.state} {said.confidence:.2f}"
        if sequence.seen[number]:
            outline(panel, [float(edge) * scale for edge in true], TRUTH_BGR)
            text += f"  IoU {overlap(found, true):.2f}"
        if found[2] > 0:
            outline(panel, [float(edge) * scale for edge in found], PREDICTED_BGR)
        panel[:20] //= 3
        cv2.putText(
            panel,
            displayable(text),
            (6, 14),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.42,
            (255, 255, 255),
            1,
            cv2.LINE_AA,
        )
        panels.append(panel)
    rows = [
        np.hstack(panels[start : start + 3])
        for start in range(0, len(panels) - len(panels) % 3 or 1, 3)
    ]
    if len(panels) < 3:
        rows = [np.hstack(panels)]
    encoded = cv2.imencode(".jpg", np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return Picture(f"{sequence.name}_strip.jpg", encoded.tobytes())


def course(sequence: Followed) -> Picture:
    """IoU frame by frame, whole and followed, the confidence, and the states behind them."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    figure = Figure(figsize=(6.4, 2.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    frames = np.arange(len(sequence.samples))
    for number, said in enumerate(sequence.tracks):
        if said.state in SHADES:
            axes.axvspan(number - 0.5, number + 0.5, color=SHADES[said.state], linewidth=0)
    for boxes, colour, name in (
        (sequence.whole, OTHERS, "whole frame"),
        (sequence.followed, OURS, "followed"),
    ):
        ious = np.full(len(frames), np.nan)
        ious[sequence.seen] = sequence.ious(boxes)
        axes.plot(frames, ious, color=colour, label=name, linewidth=1.6)
    axes.plot(
        frames,
        [said.confidence for said in sequence.tracks],
        ":",
        color=DARK,
        label="confidence",
        linewidth=1.1,
    )
    axes.axhline(CORLOC_IOU, color=DARK, linewidth=0.6)
    axes.set(
        xlabel="frame",
        ylabel="IoU",
        ylim=(0, 1),
        xlim=(-0.5, len(frames) - 0.5),
        title=plain(sequence.name),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=8)
    return stored(figure, f"{sequence.name}_course.png")


def curves(report: Mapping[str, Any], sequences: Sequence[Followed]) -> Picture:
    """Success over the IoU threshold; what the confidence said against what was right; CorLoc over
    coverage.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    figure = Figure(figsize=(9.6, 2.8), dpi=160, layout="constrained")
    success, reliable, covered = figure.subplots(1, 3)
    for kind, colour in (("whole", OTHERS), ("followed", OURS)):
        ious = [each.ious(getattr(each, kind)) for each in sequences]
        shares = [100 * np.mean([(each > least).mean() for each in ious]) for least in SUCCESS_IOUS]
        success.plot(
            SUCCESS_IOUS, shares, color=colour, label=f"{kind} {report[kind]['success_auc']:.3f}"
        )
    success.legend(frameon=False, fontsize=8)
    success.set(xlabel="IoU over", ylabel="frames, %", title="success (area)")
    draw_reliability(reliable, report["reliability"])
    draw_coverage(covered, report["coverage"], "frames")
    for axes in (success, reliable, covered):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return stored(figure, "curves.png")
