"""Rows of all segments as one JSONL and one Parquet file, read and written row by row; and what they come to."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engines.base import OutputError
from engines.files import whole_file
from realtime.latency import STAGES

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


def write_rows(rows: Iterator[Row], jsonl: Path, parquet: Path, seen: Callable[[Row], None]) -> None:
    """Write both files, whole or not at all; ``seen`` gets each row.

    Raises:
        OutputError: one cannot be written.
    """
    import pyarrow as pa  # only where whole files are worked through
    import pyarrow.parquet as pq

    schema, group = _schema(), list[Row]()
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


def _schema() -> Any:
    """The columns, all that ``FrameRecord.row`` can have; what a row lacks is null."""
    import pyarrow as pa

    corners = [(name, pa.float64()) for name in ("x0", "y0", "x1", "y1")]
    found = [("class_id", pa.int32()), ("class_name", pa.string()), ("score", pa.float64()), *corners]
    of_track = [
        ("state", pa.string()), ("confidence", pa.float64()), ("track_id", pa.int64()), ("window", pa.list_(pa.int64())),
        ("raw", pa.list_(pa.float64())),
    ]  # fmt: skip
    times = [(f"{stage}_ms", pa.float64()) for stage in (*STAGES, "total")]
    return pa.schema([
        ("source", pa.string()), ("frame", pa.int64()), ("pts_s", pa.float64()), ("pts", pa.int64()),
        ("time_base_num", pa.int64()), ("time_base_den", pa.int64()), ("captured_ns", pa.int64()), ("outcome", pa.string()),
        ("cause", pa.string()), *found, *times, ("rung", pa.string()), ("detections", pa.list_(pa.struct(found))),
        *of_track, ("objects", pa.list_(pa.struct([*found, *of_track]))),
    ])  # fmt: skip
