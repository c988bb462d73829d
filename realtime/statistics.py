"""The statistics of a run: times of every stage and outcomes of every frame, as percentiles."""

import math
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.boxes import iou
from realtime.frames import STAGES, FrameRecord

SMALLEST_MS, BUCKET_RATIO, BUCKETS = 1e-3, 1.01, 2100  # from a microsecond to a quarter of an hour
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}
CORLOC_IOU = 0.5
MEASURABLE = 0.05


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    """p50 to p99.9 and the maximum, by linear interpolation between order statistics."""
    if not values_ms:
        return {}
    found = np.percentile(np.asarray(values_ms), list(PERCENTILES.values()))
    return {name: round(float(value), 3) for name, value in zip(PERCENTILES, found, strict=True)}


class Times(Protocol):
    """A collection of times in milliseconds."""

    def add(self, value_ms: float) -> None:
        """Add one."""

    def percentiles(self) -> dict[str, float]:
        """p50 to p99.9 and the maximum; empty where there is none."""
        ...

    def distribution(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(times in rising order, share of all that are at or below)."""
        ...


class EveryTime:
    """Every time, so that percentiles are exact.

    Attributes:
        values_ms: in the order in which they came.
    """

    def __init__(self) -> None:
        self.values_ms = array("d")

    def add(self, value_ms: float) -> None:
        """See ``Times.add``."""
        self.values_ms.append(value_ms)

    def percentiles(self) -> dict[str, float]:
        """See ``Times.percentiles``."""
        return percentiles(self.values_ms)

    def distribution(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See ``Times.distribution``."""
        values = np.sort(np.asarray(self.values_ms))
        return values, np.arange(1, len(values) + 1) / len(values)


class Histogram:
    """Times in buckets of equal ratio (as in HdrHistogram), in 17 kB for however many.

    Attributes:
        count: how many times were added.
        max_ms: the largest of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.max_ms = 0.0
        self._min_ms = math.inf
        self._counts = np.zeros(BUCKETS, np.int64)

    def add(self, value_ms: float) -> None:
        """Count one time."""
        steps = math.log(max(value_ms, SMALLEST_MS) / SMALLEST_MS) / math.log(BUCKET_RATIO)
        self._counts[min(int(steps), BUCKETS - 1)] += 1
        self.count += 1
        self.max_ms = max(self.max_ms, value_ms)
        self._min_ms = min(self._min_ms, value_ms)

    def merge(self, other: "Histogram") -> None:
        """Count all that the other has counted, too."""
        self._counts += other._counts
        self.count += other.count
        self.max_ms = max(self.max_ms, other.max_ms)
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


AnyTimes = TypeVar("AnyTimes", bound=Times)


class StageTimes(Generic[AnyTimes]):
    """The times of frames, by stage and in total. All figures of stages in summaries, on the page
    and in plots are from here.

    Args:
        kind: what times are collected in: ``EveryTime``, or ``Histogram`` for runs without an end.

    Attributes:
        stages: the times of each stage that there was, in milliseconds.
        total: from the start of a frame's reading until it was written.
    """

    def __init__(self, kind: Callable[[], AnyTimes]) -> None:
        self._kind = kind
        self.stages: dict[str, AnyTimes] = {}
        self.total = kind()

    def add(self, stages_ms: Mapping[str, float], total_ms: float) -> None:
        """Count a frame that was shown."""
        self.total.add(total_ms)
        for stage, value in stages_ms.items():
            self.of(stage).add(value)

    def of(self, stage: str) -> AnyTimes:
        """The times of a stage."""
        return self.stages.setdefault(stage, self._kind())

    @property
    def names(self) -> list[str]:
        """The stages that there were, in a frame's order."""
        return [stage for stage in STAGES if stage in self.stages]

    def summary(self) -> dict[str, Any]:
        """``latency_ms`` (in total) and ``stages_ms``, as percentiles."""
        stages = {stage: self.stages[stage].percentiles() for stage in self.names}
        return {"latency_ms": self.total.percentiles(), "stages_ms": stages}


def counts_of(outcomes: Counter[str]) -> dict[str, int]:
    """``frames`` (shown), ``dropped`` and ``failed``."""
    return {
        "frames": outcomes["shown"],
        "dropped": outcomes["dropped"],
        "failed": outcomes["failed"],
    }


class Localized:
    """In how many of the shown frames a box is shown, and in how many none is sure enough.

    ``localized`` and ``nothing_sure`` are their names in summaries. In the frames of neither kind,
    the box has no reader.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, record: FrameRecord) -> None:
        """Count a frame that was shown, with its answer."""
        if record.shown_boxes:
            self.counts["localized"] += 1
        elif record.found is not None and record.found.nothing_sure:
            self.counts["nothing_sure"] += 1

    def summary(self) -> dict[str, int]:
        """Both counts."""
        return {name: self.counts[name] for name in ("localized", "nothing_sure")}


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
        self.localized = Localized()
        self.times = StageTimes(EveryTime)
        self.truth_ious = array("d")
        self._started_ns = self._ended_ns = self._before_ns = 0

    def start(self) -> None:
        """Start the clock of ``fps``, or let it go on where there was a run before."""
        self._before_ns += self._ended_ns - self._started_ns
        self._started_ns = self._ended_ns = time.monotonic_ns()

    def add(self, record: FrameRecord) -> None:
        """Count a finished frame; it becomes the newest."""
        self._ended_ns = time.monotonic_ns()
        self.outcomes[record.outcome] += 1
        if record.outcome != "shown" or record.found is None:
            return
        self.localized.add(record)
        self.times.add(record.stages_ms, record.total_ms)
        self.compare(record)

    @property
    def total_ms(self) -> "array[float]":
        """The total time of each frame that was shown, see ``StageTimes.total``."""
        return self.times.total.values_ms

    def compare(self, record: FrameRecord) -> None:
        """Hold a shown frame's box against the true one, where that is known. No box is sure
        enough: the frame counts as wrong.
        """
        truth, found = record.frame.truth_xyxy_px, record.found
        if truth is None or found is None:
            return
        if found.box_xyxy_px is not None:
            self.truth_ious.append(float(iou(found.box_xyxy_px, truth)))
        elif found.nothing_sure:
            self.truth_ious.append(0.0)

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
        """The run in numbers: fps, frames, dropped, localized, verdict, latency and stages in
        milliseconds, CorLoc where truth is known.

        Stages, in a frame's order: ``read`` (decoding), ``wait`` (in the queue before the loop),
        ``prepare``, ``engine`` (from
        handing it over to having the answer: with several under way, their waiting for each other
            too), ``draw``, ``write``.
        ``latency_ms`` is a frame's age when it has been written, counted from the start of its
        reading.
        """
        return {
            "fps": round(self.fps, 2),
            **counts_of(self.outcomes),
            **self.localized.summary(),
            "verdict": self.verdict,
            **self.times.summary(),
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


class WaitingTimes(Run):
    """Measures what the loop waited for, and keeps nothing of each frame. It is for runs without an
    end, and for those whose rows hold everything.
    """

    def add(self, record: FrameRecord) -> None:
        """Keep nothing of the frame."""


ROLLING_FRAMES, ROLLING_S = 600, 10.0


class Account:
    """One source's part of a live run.

    Attributes:
        outcomes: frames by outcome.
        causes: frames that were not shown, by cause.
        localized: of those that were shown.
        times: of all frames that were shown.
        age: from capture to display, of all that were shown.
        recent: of the last finished frames that were shown: when, age, total, stages.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.localized = Localized()
        self.times = StageTimes(Histogram)
        self.age = Histogram()
        self.recent: deque[tuple[float, float, float, dict[str, float]]] = deque(
            maxlen=ROLLING_FRAMES
        )

    def add(self, record: FrameRecord, now_s: float) -> None:
        """Enter a finished frame."""
        self.outcomes[record.outcome] += 1
        if record.cause:
            self.causes[record.cause] += 1
        if record.outcome != "shown" or record.found is None:
            return
        self.localized.add(record)
        self.age.add(record.age_ms)
        self.times.add(record.stages_ms, record.total_ms)
        self.recent.append((now_s, record.age_ms, record.total_ms, record.stages_ms))

    def merge(self, other: "Account") -> None:
        """Enter all that the other holds, too."""
        self.outcomes += other.outcomes
        self.causes += other.causes
        self.localized.counts += other.localized.counts
        self.age.merge(other.age)
        self.times.total.merge(other.times.total)
        for stage, times in other.times.stages.items():
            self.times.of(stage).merge(times)
        self.recent = deque(sorted([*self.recent, *other.recent], key=lambda entry: entry[0]))

    def counts(self) -> dict[str, Any]:
        """``frames`` (shown), ``dropped``, ``failed``, and why: ``causes``; and those of
        ``Localized``.
        """
        counted = {**counts_of(self.outcomes), "causes": dict(self.causes)}
        return {**counted, **self.localized.summary()}

    def figures(self) -> dict[str, Any]:
        """``latency_ms`` (from the start of reading), ``age_ms`` (from capture) and ``stages_ms``
        of all frames.
        """
        found = self.times.summary()
        stages = found.pop("stages_ms")
        return {**found, "age_ms": self.age.percentiles(), "stages_ms": stages}

    def rolling(self, now_s: float, started_s: float) -> dict[str, Any]:
        """``fps``, ``latency_ms``, ``age_ms`` and ``stages_ms`` of the last ``ROLLING_S``, and
        ``counts`` of all.
        """
        recent = [entry for entry in self.recent if entry[0] > now_s - ROLLING_S]
        # more than are kept came within that time
        full = len(recent) == len(self.recent) == ROLLING_FRAMES
        since_s = recent[0][0] if full else max(now_s - ROLLING_S, started_s)
        times = StageTimes(EveryTime)
        for _, _, total_ms, stages_ms in recent:
            times.add(stages_ms, total_ms)
        return {
            **self.counts(),
            "fps": round(len(recent) / max(now_s - since_s, 1e-3), 2),
            "age_ms": percentiles([age_ms for _, age_ms, _, _ in recent]),
            **times.summary(),
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
                    "fps": round(account.outcomes["shown"] / elapsed_s, 2),
                    **account.counts(),
                    **account.figures(),
                }
                for name, account in self._accounts.items()
            }
            both = self._all()
            figures = {
                "fps": round(self.fps, 2),
                **both.counts(),
                "verdict": self.verdict,
                **both.figures(),
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
