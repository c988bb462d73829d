"""The statistics of a run: times of every stage and outcomes of every frame, as percentiles, tables
and a plot.
"""

import math
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from engines.boxes import iou
from engines.files import picture_kind, signed, whole_file
from engines.text import displayable
from realtime.capture import Connection
from realtime.frames import STAGES, FrameRecord

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}
LATENCY = "time per frame"
LATENCY_FILE = picture_kind(LATENCY)
CORLOC_IOU = 0.5
MEASURABLE = 0.05


class Run:
    """The measurements of a run, as far as it got; a few numbers a frame, so that hours fit.

    Attributes:
        idle_ms: how long the loop had nothing to do but wait for the ``source``, or for the
            ``engine``.
        work_ms: how long it took for its own work: ``prepare``, ``drawing``, ``sink`` (writing,
            logs included).
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
        return {
            "corloc": round(float(np.mean(ious > CORLOC_IOU)), 4),
            "mean_iou": round(float(ious.mean()), 4),
        }

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
        """The run in numbers: fps, frames, dropped, verdict, latency and stages in milliseconds,
        CorLoc where truth is known.

        Stages, in a frame's order: ``read`` (decoding), ``wait`` (in the queue before the loop),
        ``prepare``, ``engine`` (from
        handing it over to having the answer: with several under way, their waiting for each other
            too), ``draw``, ``write``.
        ``latency_ms`` is a frame's age when it has been written, counted from the start of its
        reading.
        """
        return {
            "fps": round(self.fps, 2),
            "frames": self.outcomes["shown"],
            "dropped": self.outcomes["dropped"],
            "failed": self.outcomes["failed"],
            "verdict": self.verdict,
            "latency_ms": percentiles(self.total_ms),
            "stages_ms": {
                stage: percentiles(self.stages_ms[stage])
                for stage in STAGES
                if stage in self.stages_ms
            },
            **self.accuracy(),
        }


def verdict_of(
    idle_ms: Mapping[str, float], work_ms: Mapping[str, float], elapsed_ms: float
) -> str:
    """What a run is limited by: ``source-limited``, ``engine-``, ``prepare-``, ``drawing-``,
    ``sink-`` or ``loop-limited``.

    Stages overlap, so the longest of them need not be the one that holds the others up; what is
    waited for is. Where that is neither source nor engine, it is the loop's own work, and of that
    the stage that took most. A stage that took less than
    ``MEASURABLE`` of the run limits nothing: then it is what lies between the stages, the loop.
    """
    waited, own_ms = (
        max(idle_ms, key=lambda side: idle_ms[side]),
        elapsed_ms - sum(idle_ms.values()),
    )
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
            table.add_row(
                stage,
                *(f"{values[name]:.2f}" for name in shown),
                style="bold" if stage == "total" else "",
            )
    return Group(table, _caption(summary))


def print_summaries(summaries: Sequence[dict[str, Any]], console: Console) -> None:
    """Each run as a table, with what was wrong with its source and the files that it wrote."""
    for summary in summaries:
        if "stages_ms" in summary:
            console.print(latency_table(summary["source"], summary))
        for line in (*summary.get("trouble", ()), *summary.get("not_read", ())):
            console.print(
                displayable(f"{summary['source']}: {line}"),
                style="yellow",
                highlight=False,
                soft_wrap=True,
                markup=False,
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
        parts.append(
            f"budget {summary['budget_ms']:g} ms: {len(summary['steps'])} steps, last"
            f" {summary['rung']}"
        )
    return "  ·  ".join(parts)


def set_title(axes: Any, text: str) -> None:
    """Put any text above a plot: nothing in it is a formula, and what the font lacks is a question
    mark.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    axes.set_title(
        "".join(c if ord(c) in known else "?" for c in displayable(text)), parse_math=False
    )


class WaitingTimes(Run):
    """What the loop waited for, and nothing of each frame: for runs without an end, and those whose
    rows hold all of it.
    """

    def add(self, record: FrameRecord) -> None:
        """Nothing is kept."""


def plot_latency(run: Run, path: Path, title: str) -> None:
    """Two panels: each frame's stages stacked over time, and the distribution of each stage.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    stages = [stage for stage in STAGES if stage in run.stages_ms]
    colours = dict(
        zip(STAGES, ("#4C78A8", "#C8CCD2", "#72B7B2", "#E45756", "#F2A541", "#9D8CC2"), strict=True)
    )
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    frames = np.arange(len(run.total_ms))
    stacked = np.array([run.stages_ms[stage] for stage in stages])
    left.stackplot(frames, stacked, labels=stages, colors=[colours[s] for s in stages], linewidth=0)
    left.set(xlabel="frame", ylabel="milliseconds", xlim=(0, max(1, len(frames) - 1)))
    set_title(left, title)
    left.set_ylim(0, 1.25 * float(np.percentile(run.total_ms, 99)))
    handles, labels = left.get_legend_handles_labels()
    left.legend(
        handles[::-1], labels[::-1], loc="upper right", frameon=False, ncols=len(stages), fontsize=8
    )
    for stage in stages:
        values = np.sort(np.asarray(run.stages_ms[stage]))
        share = np.arange(1, len(values) + 1) / len(values)
        right.step(values, 100 * share, color=colours[stage], label=stage, linewidth=1.6)
    right.set(
        xscale="log",
        xlabel="milliseconds",
        ylabel="% of frames at or below",
        ylim=(0, 101),
        title="per stage",
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(LATENCY))


SMALLEST_MS, BUCKET_RATIO, BUCKETS = 1e-3, 1.01, 2100  # from a microsecond to a quarter of an hour
ROLLING_FRAMES, ROLLING_S = 600, 10.0


class Histogram:
    """Times in buckets of equal ratio (as in HdrHistogram), in 17 kB for however many.

    Attributes:
        count: how many times were added.
        max_ms: the largest of them.
    """

    def __init__(self) -> None:
        self.count, self.max_ms, self._min_ms = 0, 0.0, math.inf
        self._counts = np.zeros(BUCKETS, np.int64)

    def add(self, value_ms: float) -> None:
        """Count one time."""
        steps = math.log(max(value_ms, SMALLEST_MS) / SMALLEST_MS) / math.log(BUCKET_RATIO)
        self._counts[min(int(steps), BUCKETS - 1)] += 1
        self.count, self.max_ms, self._min_ms = (
            self.count + 1,
            max(self.max_ms, value_ms),
            min(self._min_ms, value_ms),
        )

    def merge(self, other: "Histogram") -> None:
        """Count all that the other has counted, too."""
        self._counts += other._counts
        self.count, self.max_ms = self.count + other.count, max(self.max_ms, other.max_ms)
        self._min_ms = min(self._min_ms, other._min_ms)

    def distribution(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(times, share of all that are at or below), in milliseconds, where there are any."""
        places = np.nonzero(self._counts)[0]
        shares = np.cumsum(self._counts)[places] / max(1, self.count)
        return np.minimum(SMALLEST_MS * BUCKET_RATIO ** (places + 1), self.max_ms), shares

    def percentiles(self) -> dict[str, float]:
        """p50 to p99.9, true to 1 %, and the maximum."""
        if not self.count:
            return {}
        ends = np.cumsum(self._counts)
        found = {}
        for name, percent in PERCENTILES.items():
            bucket = int(np.searchsorted(ends, math.ceil(percent / 100 * self.count)))
            middle_ms = SMALLEST_MS * BUCKET_RATIO ** (bucket + 0.5)
            found[name] = round(min(max(middle_ms, self._min_ms), self.max_ms), 3)
        return {**found, "max": round(self.max_ms, 3)}


class Account:
    """One source's part of the ledger.

    Attributes:
        outcomes: frames by (outcome, cause).
        recent: of the last finished frames that were shown: when, age, total, stages.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.age, self.total = Histogram(), Histogram()
        self.stages: dict[str, Histogram] = {}
        self.recent: deque[tuple[float, float, float, dict[str, float]]] = deque(
            maxlen=ROLLING_FRAMES
        )

    def add(self, record: FrameRecord, now_s: float) -> None:
        """Enter a finished frame."""
        self.outcomes[record.outcome, record.cause] += 1
        if record.outcome != "shown" or record.found is None:
            return
        self.age.add(record.age_ms)
        self.total.add(record.total_ms)
        for stage, value in record.stages_ms.items():
            self.stages.setdefault(stage, Histogram()).add(value)
        self.recent.append((now_s, record.age_ms, record.total_ms, record.stages_ms))

    def merge(self, other: "Account") -> None:
        """Enter all that the other holds, too."""
        self.outcomes += other.outcomes
        self.age.merge(other.age)
        self.total.merge(other.total)
        for stage, times in other.stages.items():
            self.stages.setdefault(stage, Histogram()).merge(times)
        self.recent = deque(sorted([*self.recent, *other.recent], key=lambda entry: entry[0]))

    def counts(self) -> dict[str, Any]:
        """``frames`` (shown), ``dropped``, ``failed``, and why: ``causes``."""
        of = {
            name: sum(n for (o, _), n in self.outcomes.items() if o == name)
            for name in ("shown", "dropped", "failed")
        }
        causes = {cause: n for (_, cause), n in self.outcomes.items() if cause}
        return {
            "frames": of["shown"],
            "dropped": of["dropped"],
            "failed": of["failed"],
            "causes": causes,
        }

    def times(self) -> dict[str, Any]:
        """``latency_ms`` (from the start of reading), ``age_ms`` (from capture) and ``stages_ms``
        of all frames.
        """
        stages = {
            stage: self.stages[stage].percentiles() for stage in STAGES if stage in self.stages
        }
        return {
            "latency_ms": self.total.percentiles(),
            "age_ms": self.age.percentiles(),
            "stages_ms": stages,
        }

    def rolling(self, now_s: float, started_s: float) -> dict[str, Any]:
        """``fps``, ``latency_ms``, ``age_ms`` and ``stages_ms`` of the last ``ROLLING_S``, and
        ``counts`` of all.
        """
        recent = [entry for entry in self.recent if entry[0] > now_s - ROLLING_S]
        full = (
            len(recent) == len(self.recent) == ROLLING_FRAMES
        )  # more than are kept came within that time
        since_s = recent[0][0] if full else max(now_s - ROLLING_S, started_s)
        stages: dict[str, list[float]] = {}
        for entry in recent:
            for stage, value in entry[3].items():
                stages.setdefault(stage, []).append(value)
        return {
            **self.counts(),
            "fps": round(len(recent) / max(now_s - since_s, 1e-3), 2),
            "age_ms": percentiles([entry[1] for entry in recent]),
            "latency_ms": percentiles([entry[2] for entry in recent]),
            "stages_ms": {stage: percentiles(stages[stage]) for stage in STAGES if stage in stages},
        }


class LiveRun(Run):
    """The measurements of a live run. The loop enters frames; any thread may ask.

    Args:
        sources: their names.
    """

    def __init__(self, sources: list[str]) -> None:
        super().__init__()
        self._accounts = {name: Account() for name in sources}
        self._lock = threading.Lock()
        self._started_s = time.monotonic()

    def start(self) -> None:
        """See ``Run.start``."""
        super().start()
        self._started_s = time.monotonic()

    def add(self, record: FrameRecord) -> None:
        """Enter a finished frame."""
        with self._lock:
            self._ended_ns = time.monotonic_ns()
            self.outcomes[record.outcome] += 1
            self._accounts.setdefault(record.frame.source, Account()).add(
                record, self._ended_ns / 1e9
            )
            if record.outcome == "shown":
                self.compare(record)  # a number a frame, of the demo alone

    def summary(self) -> dict[str, Any]:
        """``Run.summary`` of all, with ``age_ms`` and ``causes``, and the same of each source under
        ``sources``.
        """
        with self._lock:
            elapsed_s = max((self._ended_ns - self._started_ns) / 1e9, 1e-9)
            sources = {
                name: {
                    "fps": round(account.outcomes["shown", ""] / elapsed_s, 2),
                    **account.counts(),
                    **account.times(),
                }
                for name, account in self._accounts.items()
            }
            both = self._all()
            figures = {
                "fps": round(self.fps, 2),
                **both.counts(),
                "verdict": self.verdict,
                **both.times(),
                **self.accuracy(),
            }
            return {**figures, "sources": sources}

    def rolling(self) -> dict[str, Any]:
        """The last seconds, see ``Account.rolling``: of all, and of each source under
        ``sources``.
        """
        with self._lock:
            now_s = time.monotonic()
            sources = {
                name: account.rolling(now_s, self._started_s)
                for name, account in self._accounts.items()
            }
            fps = round(sum(source["fps"] for source in sources.values()), 2)
            return {**self._all().rolling(now_s, self._started_s), "fps": fps, "sources": sources}

    def _all(self) -> Account:
        both = Account()
        for account in self._accounts.values():
            both.merge(account)
        return both


def live_table(rolling: dict[str, Any], connections: Sequence[Connection]) -> Group:
    """The last seconds of a live run for the terminal: a row for each source, and the stages of
    all.
    """
    table = Table(title="the last seconds (Ctrl-C ends)", title_justify="left")
    for name in (
        "source",
        "fps",
        "age p50",
        "p99 ms",
        "shown",
        "dropped",
        "failed",
        "back",
        "state",
    ):
        table.add_column(name, justify="left" if name in ("source", "state") else "right")
    for each in connections:
        figures = rolling["sources"][each.name]
        ages = [
            f"{figures['age_ms'][name]:.1f}" if figures["age_ms"] else "" for name in ("p50", "p99")
        ]
        counts = [str(figures[name]) for name in ("frames", "dropped", "failed")]
        size = f" {each.width_px}x{each.height_px}" if each.width_px else ""
        state = (
            f"{each.state}{size}"
            if each.state == "live"
            else f"{each.state}: {each.trouble}".removesuffix(": ")
        )
        table.add_row(
            each.name, f"{figures['fps']:.1f}", *ages, *counts, str(each.reconnects), state
        )
    stages = "   ".join(
        f"{stage} {times['p50']:.1f}" for stage, times in rolling["stages_ms"].items()
    )
    return Group(table, f"p50 ms:   {stages}")
