"""What the rows of a clip come to, in memory that does not grow with its length: percentiles, and curves over time."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from realtime.batch.clip import Clip
from realtime.batch.rows import Row
from realtime.latency import STAGES
from realtime.ledger import Histogram

MOST_BINS = 400


@dataclass
class ObjectTally:
    """One followed object: when it was seen first and last, in how many frames, how sure on the whole, and as what."""

    first_s: float
    last_s: float = 0.0
    frames: int = 0
    confidence_sum: float = 0.0
    names: Counter[str] = field(default_factory=Counter)

    def add(self, pts_s: float, row: Row) -> None:
        """Count its part of a row."""
        self.last_s, self.frames = pts_s, self.frames + 1
        self.confidence_sum += row["confidence"]
        self.names[row["class_name"]] += 1

    @property
    def name(self) -> str:
        """The class that it was taken for most often."""
        return self.names.most_common(1)[0][0]


class Tally:
    """Counts rows. Curves have a point for each of up to ``MOST_BINS`` equal runs of frames.

    Attributes:
        outcomes: frames by outcome.
        causes: of those that failed.
        stages, total: times.
        times_s: ``[bins]``: when each run of frames begins, since the first frame of the source.
        counts: ``[bins]``: frames shown.
        failed: ``[bins]``: frames lost.
        stage_sums: of each stage, ``[bins]``.
        slowest_ms, score_sum, area_sum: ``[bins]``; areas are shares of the picture.
        objects: of several that were followed, each, by number.
    """

    def __init__(self, clip: Clip) -> None:
        self._first, self._frames = clip.segments[0].first_frame, max(1, clip.selected_frames)
        self._picture_px = clip.width_px * clip.height_px
        bins = min(MOST_BINS, self._frames)
        self.objects: dict[int, ObjectTally] = {}
        self.outcomes, self.causes = Counter[str](), Counter[str]()
        self.stages, self.total = dict[str, Histogram](), Histogram()
        self.times_s = np.full(bins, np.nan)
        self.counts, self.failed = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.stage_sums = {stage: np.zeros(bins) for stage in STAGES}
        self.slowest_ms, self.score_sum, self.area_sum = np.zeros(bins), np.zeros(bins), np.zeros(bins)

    def add(self, row: Row) -> None:
        """Count a row."""
        place = min(len(self.counts) - 1, max(0, (row["frame"] - self._first) * len(self.counts) // self._frames))
        self.outcomes[row["outcome"]] += 1
        if np.isnan(self.times_s[place]):
            self.times_s[place] = row["pts_s"]
        if row["outcome"] != "shown":
            self.causes[row["cause"]] += 1
            self.failed[place] += 1
            return
        self.total.add(row["total_ms"])
        for stage in STAGES:
            value = row.get(f"{stage}_ms")
            if value is not None:
                self.stages.setdefault(stage, Histogram()).add(value)
                self.stage_sums[stage][place] += value
        for each in row.get("objects", ()):
            self.objects.setdefault(each["track_id"], ObjectTally(row["pts_s"])).add(row["pts_s"], each)
        self.counts[place] += 1
        self.slowest_ms[place] = max(self.slowest_ms[place], row["total_ms"])
        self.score_sum[place] += row["score"]
        if row["x0"] is not None:
            self.area_sum[place] += (row["x1"] - row["x0"]) * (row["y1"] - row["y0"]) / self._picture_px

    def summary(self) -> dict[str, Any]:
        """``frames``, ``dropped``, ``failed``, ``causes``, ``latency_ms`` and ``stages_ms`` as in ``Run.summary``."""
        return {
            "frames": self.outcomes["shown"], "dropped": self.outcomes["dropped"], "failed": self.outcomes["failed"],
            "causes": dict(self.causes), "latency_ms": self.total.percentiles(),
            "stages_ms": {stage: self.stages[stage].percentiles() for stage in STAGES if stage in self.stages},
        }  # fmt: skip
