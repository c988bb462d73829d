"""Measures tracking: sequences with a true box in each frame, localized whole and with tracking in
the same run.

The measures are CorLoc and mean IoU over frames, and these:

- Success is the area under the curve of the share of frames over an IoU threshold, and precision is
  the share of centres within 20 pixels (Wu, Lim & Yang, "Online Object Tracking: A Benchmark", CVPR
  2013, section 3).
- Jitter is the mean absolute change of a box's edges from frame to frame, less that of the true
  box.
- Recovery is the time from the end of a second of black frames until a box is right.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.data.datasets import Sample, decodable, load_dataset
from calib.data.labels import Remarks
from calib.evaluation.metrics import CORLOC_IOU, corloc, coverage, kept_of, reliability, rounded
from calib.evaluation.report import (
    DARK,
    OTHERS,
    OURS,
    SUFFIXES,
    Picture,
    draw_coverage,
    draw_reliability,
    outline,
    plain,
    stored,
    write_document,
)
from engines.boxes import iou, overlap
from engines.errors import ModelError, SourceError
from engines.files import checked_suffix
from engines.localizer import ImageBgr, Localization, Localizer
from engines.text import displayable
from realtime.annotate import PREDICTED_BGR, TRUTH_BGR
from realtime.frames import BoxPx, Track
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.options import FollowOptions
from realtime.tracking.tracker import Tracker

Boxes = NDArray[np.float64]
RATE_FPS = 25.0
"""The assumed frame rate of sequences, which are files of pictures."""
SUCCESS_IOUS = np.linspace(0, 1, 21)
PRECISION_PX = 20.0
NOWHERE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Followed:
    """One sequence, localized in whole frames and tracked.

    Attributes:
        name: of the sequence.
        samples: its T frames.
        true: the true boxes ``[T, 4]`` in pixels, as are all boxes here; nan where there is no
            object.
        whole: the boxes that were found in whole frames.
        raw: the boxes that the head found, before they were averaged with those before.
        followed: the boxes of the tracker; ``NOWHERE`` where it is not confident enough.
        tracks: the tracker's record of each frame.
        whole_ms, followed_ms: the time of each frame, from image to box.
        recovery_s: the time from the end of a second of black frames until a box is right; nan
            where none is.
    """

    name: str
    samples: tuple[Sample, ...]
    true: Boxes
    whole: Boxes
    raw: Boxes
    followed: Boxes
    tracks: tuple[Track, ...]
    whole_ms: NDArray[np.float64]
    followed_ms: NDArray[np.float64]
    recovery_s: float

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Whether the object is in each frame, bool ``[T]``."""
        return ~np.isnan(self.true[:, 0])

    def ious(self, boxes: Boxes) -> NDArray[np.float64]:
        """The IoU of boxes ``[T, 4]`` with the true ones, of the frames with an object."""
        return np.asarray(iou(boxes[self.seen], self.true[self.seen]))


def load_sequences(
    folder: Path, limit: int | None, remarks: Remarks | None = None
) -> list[Sample] | None:
    """Read every sequence of a folder: a ``NAME_boxes.csv`` each.

    Frames whose pixels are damaged are left out, as if a camera had dropped them.

    Args:
        folder: where the files are.
        limit: the most frames of each sequence; None for all.
        remarks: collects what was left out.

    Returns:
        The frames of all sequences; None where there is no such file, or no such folder.

    Raises:
        SourceError: a file cannot be used, or no frame can be decoded.
    """
    files = sorted(folder.glob("*_boxes.csv")) if folder.is_dir() else []
    samples = [sample for file in files for sample in load_dataset(file, remarks=remarks)[:limit]]
    return decodable(samples, remarks) or None


def follow_sequences(
    samples: Sequence[Sample], localizer: Localizer, options: FollowOptions, console: Console
) -> list[Followed]:
    """Localize every sequence of a labelled set in whole frames, and track its object.

    Raises:
        SourceError: the set has photos that are in no sequence.
        ModelError: the engine has no head.
        InputError: the selected place lies outside the first frame.
    """
    if not localizer.finds_boxes:
        raise ModelError(
            "this engine has no box head: fit one with 'fit', and name it", option="head"
        )
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.sequence, []).append(sample)
    if "" in groups:
        raise SourceError(
            "only sequences with a box per frame can be followed: NAME_boxes.csv, OTB or VOT text",
            option="follow",
        )
    return [_followed(name, frames, localizer, options, console) for name, frames in groups.items()]


def _followed(
    name: str,
    samples: Sequence[Sample],
    localizer: Localizer,
    options: FollowOptions,
    console: Console,
) -> Followed:
    """Localize one sequence in whole frames, and track its object in the same run."""
    begin = partial(_tracker, samples[0].read(), options)
    tracker = begin()
    whole: list[BoxPx] = []
    followed: list[BoxPx] = []
    tracks: list[Track] = []
    times_ms: list[tuple[float, float]] = []
    for number, sample in enumerate(track(samples, f"following {name}", console=console)):
        image = sample.read()
        marks = [time.perf_counter()]
        whole.append(_box(localizer.localize([image])[0]))
        marks.append(time.perf_counter())
        found, said = follow_frame(tracker, localizer, image, number / RATE_FPS)
        marks.append(time.perf_counter())
        followed.append(_box(found) if said.confidence >= (options.min_score or 0.0) else NOWHERE)
        tracks.append(said)
        times_ms.append(((marks[1] - marks[0]) * 1e3, (marks[2] - marks[1]) * 1e3))
    true = np.array(
        [s.truths[0].box_xyxy_px if s.truths else (np.nan,) * 4 for s in samples], np.float64
    )
    raw = np.array([said.raw_xyxy_px or NOWHERE for said in tracks], np.float64)
    took = np.array(times_ms)
    return Followed(
        name,
        tuple(samples),
        true,
        np.array(whole, np.float64),
        raw,
        np.array(followed, np.float64),
        tuple(tracks),
        took[:, 0],
        took[:, 1],
        recovery_s(samples, true, localizer, begin()),
    )


def _tracker(first: ImageBgr, options: FollowOptions) -> Tracker:
    """A tracker for frames like this one."""
    height, width = first.shape[:2]
    selected_px = options.box_in(width, height)
    wanted = options.class_name is not None
    return Tracker(width, height, load_confidence_model(), 1, selected_px, wanted)


def _box(found: Localization) -> BoxPx:
    """The found box, or ``NOWHERE``."""
    return found.box_xyxy_px or NOWHERE


def follow_frame(
    tracker: Tracker, localizer: Localizer, image_bgr: ImageBgr, pts_s: float
) -> tuple[Localization, Track]:
    """Track the objects in one frame.

    Args:
        tracker: of the sequence.
        localizer: an engine with a head.
        image_bgr: the next frame of the sequence.
        pts_s: its time.
    """
    tracker.see(image_bgr, pts_s)
    height, width = image_bgr.shape[:2]
    outputs = localizer.infer([localizer.prepare(image_bgr)])
    return tracker.update(localizer.read(outputs, 0, width, height, every=True))


def recovery_s(
    samples: Sequence[Sample], true: Boxes, localizer: Localizer, tracker: Tracker
) -> float:
    """Track the object with a second of black frames after the first third of the sequence.

    Returns:
        The seconds from the end of the black frames until a box is right; nan where none is.
    """
    start = len(samples) // 3
    length = round(RATE_FPS)
    for number, sample in enumerate(samples):
        image = sample.read()
        black = start <= number < start + length
        found, _ = follow_frame(
            tracker, localizer, np.zeros_like(image) if black else image, number / RATE_FPS
        )
        if number >= start + length and float(iou(_box(found), true[number])) > CORLOC_IOU:
            return (number + 1 - start - length) / RATE_FPS
    return float("nan")


def measures(sequence: Followed, boxes: Boxes) -> dict[str, float]:
    """``corloc``, ``mean_iou``, ``success_auc``, ``precision_20px`` and ``jitter_px`` of boxes.

    Args:
        sequence: has the true boxes.
        boxes: ``[T, 4]`` in pixels.
    """
    ious, seen = sequence.ious(boxes), sequence.seen
    centres = (
        boxes[seen, :2] + boxes[seen, 2:] - sequence.true[seen, :2] - sequence.true[seen, 2:]
    ) / 2
    change = np.diff(boxes, axis=0) - np.diff(sequence.true, axis=0)
    there = (boxes[:, 2] > 0) & seen
    change = change[there[1:] & there[:-1]]
    return {
        "corloc": corloc(ious),
        "mean_iou": float(ious.mean()),
        "success_auc": float(np.mean([(ious > least).mean() for least in SUCCESS_IOUS])),
        "precision_20px": float((np.linalg.norm(centres, axis=1) <= PRECISION_PX).mean()),
        "jitter_px": float(np.abs(change).mean()) if len(change) else 0.0,
    }


def report_of(sequences: Sequence[Followed]) -> dict[str, Any]:
    """The report of sequences, by the names that ``evaluate --follow --json`` prints.

    ``followed``, ``raw`` and ``whole`` have the means of ``measures`` over the sequences, and the
    frames per second. The means of ``followed`` are at the top, too, by the names of
    ``calib.evaluation.evaluate.report_of``. ``sequences`` has the figures of each sequence. For
    ``coverage`` and ``reliability`` see ``calib.evaluation.metrics``.
    """
    each = {s.name: _row(s) for s in sequences}
    kinds: dict[str, dict[str, float]] = {}
    for kind in ("followed", "raw", "whole"):
        rows = [row[kind] for row in each.values()]
        kinds[kind] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    kinds["whole"]["fps"] = 1e3 / float(np.median(np.concatenate([s.whole_ms for s in sequences])))
    kinds["followed"]["fps"] = 1e3 / float(
        np.median(np.concatenate([s.followed_ms for s in sequences]))
    )
    confidences = np.concatenate(
        [np.array([t.confidence for t in s.tracks])[s.seen] for s in sequences]
    )
    right = np.concatenate([s.ious(s.followed) for s in sequences]) > CORLOC_IOU
    shown = np.concatenate([s.followed[s.seen, 2] > 0 for s in sequences])
    report = rounded(
        {
            "images": len(confidences),
            **{name: value for name, value in kinds["followed"].items() if name != "fps"},
            "ms_per_image": 1e3 / kinds["followed"]["fps"],
            "baselines": {"whole_frame": kinds["whole"]["corloc"]},
            "frames": sum(len(s.samples) for s in sequences),
            **kinds,
            "shown": float(shown.mean()),
            "corloc_shown": kept_of(right[shown], len(right))["corloc"],
            "coverage": coverage(confidences, right),
            "reliability": reliability(confidences, right),
            "sequences": each,
        }
    )
    return dict(report)


def _row(sequence: Followed) -> dict[str, Any]:
    """The figures of one sequence in the report."""
    kinds = {
        kind: measures(sequence, getattr(sequence, kind)) for kind in ("followed", "raw", "whole")
    }
    back_s = sequence.recovery_s if np.isfinite(sequence.recovery_s) else None
    return {"frames": len(sequence.samples), **kinds, "recovery_s": back_s}


def sequences_table(report: Mapping[str, Any]) -> Table:
    """The report as a table for the terminal, with a row for each sequence."""
    table = Table(title=f"{report['frames']} frames, IoU over {CORLOC_IOU}", title_justify="left")
    for name in (
        "sequence",
        "whole frame",
        "followed",
        "mean IoU",
        "jitter px",
        "of whole",
        "back after",
    ):
        table.add_column(name, justify="left" if name == "sequence" else "right")
    rows = {"mean": report} | report["sequences"]
    for name, row in rows.items():
        followed, whole = row["followed"], row["whole"]
        back = row.get("recovery_s")
        shares = [f"{100 * kind['corloc']:.1f} %" for kind in (whole, followed)]
        ratio = followed["jitter_px"] / max(whole["jitter_px"], 1e-9)
        after = "" if name == "mean" else "never" if back is None else f"{back:.2f} s"
        table.add_row(
            name,
            *shares,
            f"{followed['mean_iou']:.3f}",
            f"{followed['jitter_px']:.1f}",
            f"{ratio:.2f}",
            after,
            style="bold" if name == "mean" else "",
        )
    return table


STRIP_FRAMES, STRIP_WIDTH_PX = 6, 300
SHADES = {"searching": "#F3E3B3", "unsure": "#E7D6EE", "lost": "#F4C9C4"}
"""The colours of the states in plots. ``following`` has none."""


def write_sequence_report(
    path: Path,
    title: str,
    report: Mapping[str, Any],
    sequences: Sequence[Followed],
    facts: Mapping[str, str],
) -> None:
    """Write the report of sequences, whole or not at all.

    Args:
        path: see ``calib.evaluation.report.write_report``.
        title: the first heading.
        report: see ``report_of``.
        sequences: those that it is of.
        facts: model, method, machine and so on, each with its name.

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
    """A picture of a few frames, evenly spread over the sequence. The true box is green and the
    tracked one red.
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
        said = sequence.tracks[number]
        true = sequence.true[number]
        found = sequence.followed[number]
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
    """A plot of the IoU of each frame, whole and tracked, with the confidence and the states."""
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
    """Plots of success over the IoU threshold, of reliability, and of CorLoc over coverage."""
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
