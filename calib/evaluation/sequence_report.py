"""A report on following: plots and film strips of each sequence, success, reliability and coverage, as HTML or Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calib.evaluation.metrics import CORLOC_IOU
from calib.evaluation.pictures import DARK, OTHERS, OURS, Picture, draw_coverage, draw_reliability, outline, plain, stored
from calib.evaluation.report import SUFFIXES, write_document
from calib.evaluation.sequences import SUCCESS_IOUS, Followed
from engines.boxes import overlap
from engines.files import checked_suffix
from engines.text import displayable
from realtime.overlay import PREDICTED_BGR, TRUTH_BGR

STRIP_FRAMES, STRIP_WIDTH_PX = 6, 300
WINDOW_BGR = (255, 220, 120)
SHADES = {"searching": "#F3E3B3", "widened": "#E7D6EE", "lost": "#F4C9C4"}
"""Of the states in plots; following has none."""


def write_sequence_report(
    path: Path, title: str, report: Mapping[str, Any], sequences: Sequence[Followed], facts: Mapping[str, str]
) -> None:
    """Write what following came to, whole or not at all; ``path`` as for ``calib.evaluation.report.write_report``.

    Raises:
        OutputError: the ending is neither, or the place cannot be written.
    """
    checked_suffix(path, SUFFIXES, "report")
    shown: list[dict[str, Any]] = [
        {"name": each.name, "row": report["sequences"][each.name], "plot": course(each), "strip": film_strip(each)}
        for each in sequences
    ]
    content: dict[str, Any] = {
        "title": title, "report": report, "facts": facts, "shown": shown, "curves": curves(report, sequences),
        "shades": SHADES,
    }  # fmt: skip
    pictures: list[Picture] = [content["curves"], *(each[kind] for each in shown for kind in ("plot", "strip"))]
    write_document(path, "sequences", content, pictures)


def film_strip(sequence: Followed) -> Picture:
    """A few frames, evenly spread: truth green, followed box red, the window, if the engine saw one, in a thin light line."""
    panels = []
    for number in np.linspace(0, len(sequence.samples) - 1, min(STRIP_FRAMES, len(sequence.samples))).astype(int):
        image = sequence.samples[number].read()
        scale = STRIP_WIDTH_PX / image.shape[1]
        panel = np.asarray(
            cv2.resize(image, (STRIP_WIDTH_PX, round(image.shape[0] * scale)), interpolation=cv2.INTER_AREA), np.uint8
        )
        said, true, found = sequence.tracks[number], sequence.true[number], sequence.followed[number]
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
        cv2.putText(panel, displayable(text), (6, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
        panels.append(panel)
    rows = [np.hstack(panels[start : start + 3]) for start in range(0, len(panels) - len(panels) % 3 or 1, 3)]
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
    for boxes, colour, name in ((sequence.whole, OTHERS, "whole frame"), (sequence.followed, OURS, "followed")):
        ious = np.full(len(frames), np.nan)
        ious[sequence.seen] = sequence.ious(boxes)
        axes.plot(frames, ious, color=colour, label=name, linewidth=1.6)
    axes.plot(frames, [said.confidence for said in sequence.tracks], ":", color=DARK, label="confidence", linewidth=1.1)
    axes.axhline(CORLOC_IOU, color=DARK, linewidth=0.6)
    axes.set(xlabel="frame", ylabel="IoU", ylim=(0, 1), xlim=(-0.5, len(frames) - 0.5), title=plain(sequence.name))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=8)
    return stored(figure, f"{sequence.name}_course.png")


def curves(report: Mapping[str, Any], sequences: Sequence[Followed]) -> Picture:
    """Success over the IoU threshold; what the confidence said against what was right; CorLoc over coverage."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    figure = Figure(figsize=(9.6, 2.8), dpi=160, layout="constrained")
    success, reliable, covered = figure.subplots(1, 3)
    for kind, colour in (("whole", OTHERS), ("followed", OURS)):
        ious = [each.ious(getattr(each, kind)) for each in sequences]
        shares = [100 * np.mean([(each > least).mean() for each in ious]) for least in SUCCESS_IOUS]
        success.plot(SUCCESS_IOUS, shares, color=colour, label=f"{kind} {report[kind]['success_auc']:.3f}")
    success.legend(frameon=False, fontsize=8)
    success.set(xlabel="IoU over", ylabel="frames, %", title="success (area)")
    draw_reliability(reliable, report["reliability"])
    draw_coverage(covered, report["coverage"], "frames")
    for axes in (success, reliable, covered):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return stored(figure, "curves.png")
