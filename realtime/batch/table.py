"""Writes the rows of all segments as one JSONL and one Parquet file, and sums them up in constant
memory.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import OutputError
from engines.files import whole_file
from realtime import frames
from realtime.batch.segment import Clip
from realtime.frames import STAGES, Column
from realtime.statistics import Histogram, StageTimes, counts_of

Row = dict[str, Any]
ROWS_PER_GROUP = 4_000  # a few kilobytes each while they wait


def read_rows(pieces: Sequence[tuple[Path, int]]) -> Iterator[Row]:
    """The rows of each piece, in order, ``frame`` moved by the piece's shift."""
    for path, shift in pieces:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row: Row = json.loads(line)
                row["frame"] += shift
                yield row


def write_rows(
    rows: Iterator[Row], jsonl: Path, parquet: Path, seen: Callable[[Row], None]
) -> None:
    """Write both files, whole or not at all; ``seen`` gets each row.

    Raises:
        OutputError: one cannot be written.
    """
    import pyarrow as pa  # only where whole files are worked through
    import pyarrow.parquet as pq

    schema, group = arrow_schema(), list[Row]()
    try:
        with ExitStack() as stack:
            parts = stack.enter_context(whole_file(jsonl)), stack.enter_context(whole_file(parquet))
            file = stack.enter_context(parts[0].open("w", encoding="utf-8"))
            writer = stack.enter_context(pq.ParquetWriter(parts[1], schema, compression="zstd"))
            for row in rows:
                seen(row)
                file.write(json.dumps(row) + "\n")
                group.append(row)
                if len(group) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group.clear()
            writer.write_table(pa.Table.from_pylist(group, schema))
    except pa.ArrowException as error:
        raise OutputError(f"cannot write {parquet}: {error}") from error


def arrow_schema() -> Any:
    """The ``pyarrow.Schema`` of a log, from ``realtime.frames.COLUMNS``. What a row lacks is
    null.
    """
    import pyarrow as pa

    return pa.schema(_arrow_fields(frames.COLUMNS))


def _arrow_fields(columns: Iterable[Column]) -> list[tuple[str, Any]]:
    import pyarrow as pa

    fields = []
    for column in columns:
        if column.parts:
            fields.append((column.name, pa.list_(pa.struct(_arrow_fields(column.parts)))))
        elif column.type.startswith("list<"):
            fields.append((column.name, pa.list_(pa.type_for_alias(column.type[5:-1]))))
        elif column.type:
            fields.append((column.name, pa.type_for_alias(column.type)))
    return fields


MOST_BINS = 400


@dataclass
class ObjectTally:
    """One followed object: when it was seen first and last, in how many frames, how sure on the
    whole, and as what.
    """

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
        times: of the frames that were shown.
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
        self.times = StageTimes(Histogram)
        self.times_s = np.full(bins, np.nan)
        self.counts, self.failed = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.stage_sums = {stage: np.zeros(bins) for stage in STAGES}
        self.slowest_ms, self.score_sum, self.area_sum = (
            np.zeros(bins),
            np.zeros(bins),
            np.zeros(bins),
        )

    def add(self, row: Row) -> None:
        """Count a row."""
        place = min(
            len(self.counts) - 1,
            max(0, (row["frame"] - self._first) * len(self.counts) // self._frames),
        )
        self.outcomes[row["outcome"]] += 1
        if np.isnan(self.times_s[place]):
            self.times_s[place] = row["pts_s"]
        if row["outcome"] != "shown":
            self.causes[row["cause"]] += 1
            self.failed[place] += 1
            return
        found = {stage: row.get(f"{stage}_ms") for stage in STAGES}
        stages_ms = {stage: value for stage, value in found.items() if value is not None}
        self.times.add(stages_ms, row["total_ms"])
        for stage, value in stages_ms.items():
            self.stage_sums[stage][place] += value
        for each in row.get("objects", ()):
            self.objects.setdefault(each["track_id"], ObjectTally(row["pts_s"])).add(
                row["pts_s"], each
            )
        self.counts[place] += 1
        self.slowest_ms[place] = max(self.slowest_ms[place], row["total_ms"])
        self.score_sum[place] += row["score"]
        if row["x0"] is not None:
            self.area_sum[place] += (
                (row["x1"] - row["x0"]) * (row["y1"] - row["y0"]) / self._picture_px
            )

    def summary(self) -> dict[str, Any]:
        """``frames``, ``dropped``, ``failed``, ``causes``, ``latency_ms`` and ``stages_ms`` as in
        ``Run.summary``.
        """
        return {
            **counts_of(self.outcomes),
            "causes": dict(self.causes),
            **self.times.summary(),
        }
