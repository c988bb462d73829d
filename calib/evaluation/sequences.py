"""Measures tracking: sequences with a true box in each frame, localized whole and with tracking in
the same run.

Measures: CorLoc and mean IoU over frames; success (area under the share of frames over an IoU
threshold) and precision (share of centres within 20 pixels) as in Wu, Lim & Yang, "Online Object
Tracking: A Benchmark", CVPR 2013, section 3; jitter: mean absolute change of a box's edges less
that of the true box's, from frame to frame; recovery: seconds until a box is right after a second
of black.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.data.datasets import Sample, decodable, load_dataset
from calib.data.labels import Remarks
from calib.evaluation.metrics import CORLOC_IOU, corloc
from calib.evaluation.reliability import coverage, kept_of, reliability, rounded
from engines.boxes import iou
from engines.errors import ModelError, SourceError
from engines.localizer import ImageBgr, Localization, Localizer
from realtime.frames import BoxPx, Track
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.options import FollowOptions
from realtime.tracking.tracker import Tracker

Boxes = NDArray[np.float64]
RATE_FPS = 25.0
"""Of sequences: files of pictures do not say."""
SUCCESS_IOUS = np.linspace(0, 1, 21)
PRECISION_PX = 20.0
NOWHERE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Followed:
    """One sequence, localized and followed.

    Attributes:
        name: of it.
        samples: its frames.
        true, whole, raw, followed: boxes ``[T, 4]`` in pixels: nan where there is no object; the
            whole frame's; the tracker's before and after it is calmed, ``NOWHERE`` where it
            abstains.
        tracks: what following said of each frame.
        whole_ms, followed_ms: time of each frame, from image to box.
        recovery_s: from the end of a second of black until a box is right again; nan where it never
            is.
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
        """Frames that the object is in."""
        return ~np.isnan(self.true[:, 0])

    def ious(self, boxes: Boxes) -> NDArray[np.float64]:
        """Of boxes with the truth, over the frames that the object is in."""
        return np.asarray(iou(boxes[self.seen], self.true[self.seen]))


def load_sequences(
    folder: Path, limit: int | None, remarks: Remarks | None = None
) -> list[Sample] | None:
    """Every ``NAME_boxes.csv`` of a folder, of each the first ``limit`` frames; None where it has
    none, or is no folder.

    Frames whose pixels are damaged are left out, as if a camera had dropped them.

    Raises:
        SourceError: a file cannot be used, or no frame can be decoded.
    """
    files = sorted(folder.glob("*_boxes.csv")) if folder.is_dir() else []
    samples = [sample for file in files for sample in load_dataset(file, remarks=remarks)[:limit]]
    return decodable(samples, remarks) or None


def follow_sequences(
    samples: Sequence[Sample], localizer: Localizer, options: FollowOptions, console: Console
) -> list[Followed]:
    """Localize and follow every sequence of a labelled set.

    Raises:
        SourceError: it holds photos, not sequences.
        ModelError: the engine has no head.
        InputError: what is selected lies outside the first frame.
    """
    if "box_xyxy" not in [spec.name for spec in localizer.engine.outputs]:
        raise ModelError("this engine has no box head: fit one with 'fit' and pass it with --head")
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.sequence, []).append(sample)
    if "" in groups:
        raise SourceError(
            "--follow is for sequences with a box per frame: NAME_boxes.csv, OTB or VOT text"
        )
    return [_followed(name, frames, localizer, options, console) for name, frames in groups.items()]


def _followed(
    name: str,
    samples: Sequence[Sample],
    localizer: Localizer,
    options: FollowOptions,
    console: Console,
) -> Followed:
    first = samples[0].read()
    begin = _beginner(first, options)
    tracker, whole, followed, tracks = begin(), [], [], []
    times_ms: list[tuple[float, float]] = []
    for number, sample in enumerate(track(samples, f"following {name}", console=console)):
        image = sample.read()
        marks = [time.perf_counter()]
        whole.append(_box(localizer.localize([image])[0]))
        marks.append(time.perf_counter())
        found, said = follow_frame(tracker, localizer, image, number / RATE_FPS)
        marks.append(time.perf_counter())
        followed.append(_box(found) if said.confidence >= options.min_score else NOWHERE)
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


def _beginner(first: ImageBgr, options: FollowOptions) -> Callable[[], Tracker]:
    height, width = first.shape[:2]
    return lambda: Tracker(
        width,
        height,
        load_confidence_model(),
        options.box_in(width, height),
        every_frame=options.every_frame,
    )


def _box(found: Localization) -> BoxPx:
    return found.box_xyxy_px or NOWHERE


def follow_frame(
    tracker: Tracker, localizer: Localizer, image_bgr: ImageBgr, pts_s: float
) -> tuple[Localization, Track]:
    """One frame, followed: an engine call, waited for, where the tracker asks for one."""
    window = tracker.window(image_bgr, pts_s)
    if window is None:
        return tracker.update(None)
    x0, y0, x1, y1 = (int(edge) for edge in window)
    return tracker.update(localizer.localize([image_bgr[y0:y1, x0:x1]])[0])


def recovery_s(
    samples: Sequence[Sample], true: Boxes, localizer: Localizer, tracker: Tracker
) -> float:
    """Follow once more, with a second of black from the first third on: seconds from its end until
    a box is right.
    """
    start, length = len(samples) // 3, round(RATE_FPS)
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
    """``corloc, mean_iou, success_auc, precision_20px, jitter_px`` of one kind of boxes."""
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
    """``followed``, ``raw`` and ``whole``: means over the sequences of ``measures``, and fps; under
    ``sequences`` each one's.

    Those of ``followed`` are at the top too, under the names of
    ``calib.evaluation.evaluate.report_of``.
    ``coverage`` and ``reliability``: see ``calib.evaluation.reliability``.
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
    sure = np.concatenate([np.array([t.confidence for t in s.tracks])[s.seen] for s in sequences])
    right = np.concatenate([s.ious(s.followed) for s in sequences]) > CORLOC_IOU
    shown = np.concatenate([s.followed[s.seen, 2] > 0 for s in sequences])
    report = rounded(
        {
            "images": len(sure),
            **{name: value for name, value in kinds["followed"].items() if name != "fps"},
            "ms_per_image": 1e3 / kinds["followed"]["fps"],
            "baselines": {"whole_frame": kinds["whole"]["corloc"]},
            "frames": sum(len(s.samples) for s in sequences),
            **kinds,
            "shown": float(shown.mean()),
            "corloc_shown": kept_of(right[shown], len(right))["corloc"],
            "coverage": coverage(sure, right),
            "reliability": reliability(sure, right),
            "sequences": each,
        }
    )
    return dict(report)


def _row(sequence: Followed) -> dict[str, Any]:
    kinds = {
        kind: measures(sequence, getattr(sequence, kind)) for kind in ("followed", "raw", "whole")
    }
    back_s = sequence.recovery_s if np.isfinite(sequence.recovery_s) else None
    return {"frames": len(sequence.samples), **kinds, "recovery_s": back_s}


def sequences_table(report: Mapping[str, Any]) -> Table:
    """The report for the terminal: a row for each sequence."""
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
