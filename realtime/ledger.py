"""The ledger of a live run: what became of every captured frame, and what it took, in memory that does not grow.

A live run may last for weeks, so times are kept as counts in buckets that are 1 % wide, and the last few hundred frames as they
are, for rolling figures. Nothing is left out: the largest value is exact, every other percentile is true to 1 %.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from realtime.connection import Connection
from realtime.frames import FrameRecord
from realtime.latency import PERCENTILES, STAGES, Run, percentiles

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
        self.count, self.max_ms, self._min_ms = self.count + 1, max(self.max_ms, value_ms), min(self._min_ms, value_ms)

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
        self.recent: deque[tuple[float, float, float, dict[str, float]]] = deque(maxlen=ROLLING_FRAMES)

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
        of = {name: sum(n for (o, _), n in self.outcomes.items() if o == name) for name in ("shown", "dropped", "failed")}
        causes = {cause: n for (_, cause), n in self.outcomes.items() if cause}
        return {"frames": of["shown"], "dropped": of["dropped"], "failed": of["failed"], "causes": causes}

    def times(self) -> dict[str, Any]:
        """``latency_ms`` (from the start of reading), ``age_ms`` (from capture) and ``stages_ms`` of all frames."""
        stages = {stage: self.stages[stage].percentiles() for stage in STAGES if stage in self.stages}
        return {"latency_ms": self.total.percentiles(), "age_ms": self.age.percentiles(), "stages_ms": stages}

    def rolling(self, now_s: float, started_s: float) -> dict[str, Any]:
        """``fps``, ``latency_ms``, ``age_ms`` and ``stages_ms`` of the last ``ROLLING_S``, and ``counts`` of all."""
        recent = [entry for entry in self.recent if entry[0] > now_s - ROLLING_S]
        full = len(recent) == len(self.recent) == ROLLING_FRAMES  # more than are kept came within that time
        since_s = recent[0][0] if full else max(now_s - ROLLING_S, started_s)
        stages: dict[str, list[float]] = {}
        for entry in recent:
            for stage, value in entry[3].items():
                stages.setdefault(stage, []).append(value)
        return {
            **self.counts(), "fps": round(len(recent) / max(now_s - since_s, 1e-3), 2),
            "age_ms": percentiles([entry[1] for entry in recent]), "latency_ms": percentiles([entry[2] for entry in recent]),
            "stages_ms": {stage: percentiles(stages[stage]) for stage in STAGES if stage in stages},
        }  # fmt: skip


class Ledger(Run):
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
            self._accounts.setdefault(record.frame.source, Account()).add(record, self._ended_ns / 1e9)
            if record.outcome == "shown":
                self.compare(record)  # a number a frame, of the demo alone

    def summary(self) -> dict[str, Any]:
        """``Run.summary`` of all, with ``age_ms`` and ``causes``, and the same of each source under ``sources``."""
        with self._lock:
            elapsed_s = max((self._ended_ns - self._started_ns) / 1e9, 1e-9)
            sources = {
                name: {"fps": round(account.outcomes["shown", ""] / elapsed_s, 2), **account.counts(), **account.times()}
                for name, account in self._accounts.items()
            }
            both = self._all()
            figures = {"fps": round(self.fps, 2), **both.counts(), "verdict": self.verdict, **both.times(), **self.accuracy()}
            return {**figures, "sources": sources}

    def rolling(self) -> dict[str, Any]:
        """The last seconds, see ``Account.rolling``: of all, and of each source under ``sources``."""
        with self._lock:
            now_s = time.monotonic()
            sources = {name: account.rolling(now_s, self._started_s) for name, account in self._accounts.items()}
            fps = round(sum(source["fps"] for source in sources.values()), 2)
            return {**self._all().rolling(now_s, self._started_s), "fps": fps, "sources": sources}

    def _all(self) -> Account:
        both = Account()
        for account in self._accounts.values():
            both.merge(account)
        return both


def live_table(rolling: dict[str, Any], connections: Sequence[Connection]) -> Group:
    """The last seconds of a live run for the terminal: a row for each source, and the stages of all."""
    table = Table(title="the last seconds (Ctrl-C ends)", title_justify="left")
    for name in ("source", "fps", "age p50", "p99 ms", "shown", "dropped", "failed", "back", "state"):
        table.add_column(name, justify="left" if name in ("source", "state") else "right")
    for each in connections:
        figures = rolling["sources"][each.name]
        ages = [f"{figures['age_ms'][name]:.1f}" if figures["age_ms"] else "" for name in ("p50", "p99")]
        counts = [str(figures[name]) for name in ("frames", "dropped", "failed")]
        size = f" {each.width_px}x{each.height_px}" if each.width_px else ""
        state = f"{each.state}{size}" if each.state == "live" else f"{each.state}: {each.trouble}".removesuffix(": ")
        table.add_row(each.name, f"{figures['fps']:.1f}", *ages, *counts, str(each.reconnects), state)
    stages = "   ".join(f"{stage} {times['p50']:.1f}" for stage, times in rolling["stages_ms"].items())
    return Group(table, f"p50 ms:   {stages}")
