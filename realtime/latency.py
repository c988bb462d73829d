"""What a run took: every stage of every frame, as percentiles, a table and a plot. No outlier is removed."""

import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from engines.boxes import iou
from engines.files import picture_kind, signed, whole_file
from engines.text import displayable
from realtime.frames import FrameRecord

STAGES = ("read", "wait", "prepare", "engine", "draw", "write")
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}
LATENCY = "time per frame"
LATENCY_FILE = picture_kind(LATENCY)
CORLOC_IOU = 0.5
MEASURABLE = 0.05


class Run:
    """The measurements of a run, as far as it got; a few numbers a frame, so that hours fit.

    Attributes:
        idle_ms: how long the loop had nothing to do but wait for the ``source``, or for the ``engine``.
        work_ms: how long it took for its own work: ``prepare``, ``drawing``, ``sink`` (writing, logs included).
    """

    def __init__(self) -> None:
        self.idle_ms = {"source": 0.0, "engine": 0.0}
        self.work_ms = {"prepare": 0.0, "drawing": 0.0, "sink": 0.0}
        self.outcomes: Counter[str] = Counter()
        self.total_ms = array("d")
        self.stages_ms: dict[str, array[float]] = {}
        self.truth_ious = array("d")
        self.scores = array("d")
        self._started_ns = self._ended_ns = self._before_ns = 0

    def start(self) -> None:
        """The clock of ``fps`` starts here; where there was a run before, goes on."""
        self._before_ns += self._ended_ns - self._started_ns
        self._started_ns = self._ended_ns = time.monotonic_ns()

    def add(self, record: FrameRecord) -> None:
        """Count a finished frame; it becomes the newest."""
        self._ended_ns = time.monotonic_ns()
        self.outcomes[record.outcome] += 1
        if record.outcome != "shown" or record.found is None:
            return
        self.total_ms.append(record.total_ms)
        self.scores.append(record.found.score)
        for stage, value in record.stages_ms.items():
            self.stages_ms.setdefault(stage, array("d")).append(value)
        self.compare(record)

    def compare(self, record: FrameRecord) -> None:
        """Hold a shown frame's box against the true one, where that is known."""
        if record.frame.truth_xyxy_px and record.found and record.found.box_xyxy_px:
            self.truth_ious.append(float(iou(record.found.box_xyxy_px, record.frame.truth_xyxy_px)))

    def accuracy(self) -> dict[str, float]:
        """``corloc`` and ``mean_iou``, where the truth is known of any frame."""
        if not self.truth_ious:
            return {}
        ious = np.asarray(self.truth_ious)
        return {"corloc": round(float(np.mean(ious > CORLOC_IOU)), 4), "mean_iou": round(float(ious.mean()), 4)}

    @property
    def fps(self) -> float:
        """Frames shown per second of the whole run."""
        return 1e3 * self.outcomes["shown"] / self._elapsed_ms if self._elapsed_ms > 0 else 0.0

    @property
    def _elapsed_ms(self) -> float:
        return (self._before_ns + self._ended_ns - self._started_ns) / 1e6

    @property
    def verdict(self) -> str:
        """See ``verdict_of``."""
        return verdict_of(self.idle_ms, self.work_ms, self._elapsed_ms)

    def summary(self) -> dict[str, Any]:
        """The run in numbers: fps, frames, dropped, verdict, latency and stages in milliseconds, CorLoc where truth is known.

        Stages, in a frame's order: ``read`` (decoding), ``wait`` (in the queue before the loop), ``prepare``, ``engine`` (from
        handing it over to having the answer: with several under way, their waiting for each other too), ``draw``, ``write``.
        ``latency_ms`` is a frame's age when it has been written, counted from the start of its reading.
        """
        return {
            "fps": round(self.fps, 2), "frames": self.outcomes["shown"], "dropped": self.outcomes["dropped"],
            "failed": self.outcomes["failed"], "verdict": self.verdict, "latency_ms": percentiles(self.total_ms),
            "stages_ms": {stage: percentiles(self.stages_ms[stage]) for stage in STAGES if stage in self.stages_ms},
            **self.accuracy(),
        }  # fmt: skip


def verdict_of(idle_ms: Mapping[str, float], work_ms: Mapping[str, float], elapsed_ms: float) -> str:
    """What a run is limited by: ``source-limited``, ``engine-``, ``prepare-``, ``drawing-``, ``sink-`` or ``loop-limited``.

    Stages overlap, so the longest of them need not be the one that holds the others up; what is waited for is. Where that is
    neither source nor engine, it is the loop's own work, and of that the stage that took most. A stage that took less than
    ``MEASURABLE`` of the run limits nothing: then it is what lies between the stages, the loop.
    """
    waited, own_ms = max(idle_ms, key=lambda side: idle_ms[side]), elapsed_ms - sum(idle_ms.values())
    if idle_ms[waited] >= own_ms:
        return f"{waited}-limited"
    stage = max(work_ms, key=lambda side: work_ms[side])
    return f"{stage}-limited" if work_ms[stage] >= MEASURABLE * elapsed_ms else "loop-limited"


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    """p50 to p99.9 and the maximum, by linear interpolation between order statistics."""
    if not values_ms:
        return {}
    found = np.percentile(np.asarray(values_ms), list(PERCENTILES.values()))
    return {name: round(float(value), 3) for name, value in zip(PERCENTILES, found, strict=True)}


def latency_table(title: str, summary: dict[str, Any]) -> Group:
    """The run as a table for the terminal."""
    table = Table(title=Text(displayable(title)), title_justify="left")
    table.add_column("stage")
    shown = ("p50", "p90", "p99", "max")
    for name in shown:
        table.add_column(f"{name} ms", justify="right")
    for stage, values in {**summary["stages_ms"], "total": summary["latency_ms"]}.items():
        if values:
            table.add_row(stage, *(f"{values[name]:.2f}" for name in shown), style="bold" if stage == "total" else "")
    return Group(table, _caption(summary))


def print_summaries(summaries: Sequence[dict[str, Any]], console: Console) -> None:
    """Each run as a table, with what was wrong with its source and the files that it wrote."""
    for summary in summaries:
        if "stages_ms" in summary:
            console.print(latency_table(summary["source"], summary))
        for line in (*summary.get("trouble", ()), *summary.get("not_read", ())):
            console.print(
                displayable(f"{summary['source']}: {line}"), style="yellow", highlight=False, soft_wrap=True, markup=False
            )
        if summary.get("skipped"):
            console.print("  done already, of the same content and settings", style="dim")
        for kind, path in summary.get("files", {}).items():
            line = f"  {kind.replace('_', ' '):13} {displayable(path)}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _caption(summary: dict[str, Any]) -> str:
    parts = [f"{summary['frames']} frames", f"{summary['fps']:.1f} fps end to end"]
    if summary.get("failed"):
        parts.append(f"{summary['failed']} failed")
    if summary["dropped"]:
        parts.append(f"{summary['dropped']} dropped")
    if "corloc" in summary:
        parts.append(f"CorLoc {100 * summary['corloc']:.1f} %, mean IoU {summary['mean_iou']:.2f}")
    if "steps" in summary:
        parts.append(f"budget {summary['budget_ms']:g} ms: {len(summary['steps'])} steps, last {summary['rung']}")
    return "  ·  ".join(parts)


def set_title(axes: Any, text: str) -> None:
    """Put any text above a plot: nothing in it is a formula, and what the font lacks is a question mark."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    axes.set_title("".join(c if ord(c) in known else "?" for c in displayable(text)), parse_math=False)


def plot_latency(run: Run, path: Path, title: str) -> None:
    """Two panels: each frame's stages stacked over time, and the distribution of each stage.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    stages = [stage for stage in STAGES if stage in run.stages_ms]
    colours = dict(zip(STAGES, ("#4C78A8", "#C8CCD2", "#72B7B2", "#E45756", "#F2A541", "#9D8CC2"), strict=True))
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    frames = np.arange(len(run.total_ms))
    stacked = np.array([run.stages_ms[stage] for stage in stages])
    left.stackplot(frames, stacked, labels=stages, colors=[colours[s] for s in stages], linewidth=0)
    left.set(xlabel="frame", ylabel="milliseconds", xlim=(0, max(1, len(frames) - 1)))
    set_title(left, title)
    left.set_ylim(0, 1.25 * float(np.percentile(run.total_ms, 99)))
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], loc="upper right", frameon=False, ncols=len(stages), fontsize=8)
    for stage in stages:
        values = np.sort(np.asarray(run.stages_ms[stage]))
        share = np.arange(1, len(values) + 1) / len(values)
        right.step(values, 100 * share, color=colours[stage], label=stage, linewidth=1.6)
    right.set(xscale="log", xlabel="milliseconds", ylabel="% of frames at or below", ylim=(0, 101), title="per stage")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(LATENCY))
