"""A history of benches on one machine: a line of JSON for each, and a picture of all beside it."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from calib.bench.compare import OURS, interval
from engines.errors import OutputError
from engines.files import (
    checked_output,
    checked_suffix,
    parsed_json,
    picture_kind,
    signed,
    whole_file,
)

PICTURE = "bench history"
FRAME = "end to end, a frame"
NEEDED = {"when", "commit", "processor", "ms", "times_ours"}
ROOT = Path(__file__).parents[2]


def processor_of(machine: str) -> str:
    """The part of ``machine()`` that does not change with versions: the processor, its cores, a cap
    and the system.
    """
    return machine.partition(", Python ")[0]


def read_history(path: Path) -> list[dict[str, Any]]:
    """The benches of a history, the oldest first; none where there is no file.

    Raises:
        OutputError: it is something else.
    """
    if not path.exists():
        return []
    try:
        rows = [parsed_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise OutputError(
            f"history {path}: {error}; name another file", option="history"
        ) from error
    if not rows or not all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows):
        raise OutputError(
            f"history {path}: that is no history of 'sightline bench'; name another file",
            option="history",
        )
    return rows


def check_history(path: Path, machine: str) -> None:
    """Refuse a history that cannot be gone on with, before any work.

    Raises:
        OutputError: it is another file, that of another machine, or its picture is another's.
    """
    checked_suffix(path, (".jsonl",), "history")
    checked_output(path.with_suffix(".png"), picture_kind(PICTURE))
    for row in read_history(path):
        if row["processor"] != processor_of(machine):
            raise OutputError(
                f"history {path} is that of another machine ({row['processor']}; this is"
                f" {processor_of(machine)}): name another file",
                option="history",
            )


def history_row(result: dict[str, Any]) -> dict[str, Any]:
    """What a history keeps of a bench: median, and between what it lies (see ``interval``), of the
    processor time of a frame and of our calls, in milliseconds, and of peers as multiples of ours.
    """
    each = result["processor_ms_per_frame"]
    ms = {FRAME: [each["p50"], each["low"], each["high"]]}
    times = {}
    for engine in result["engines"]:
        for row in engine["peers"]:
            name = f"{engine['engine']}: {row['name']}"
            if row["name"].startswith(OURS):
                low, high = interval(row["samples_ms"])
                ms[name] = [row["p50_ms"], round(low, 3), round(high, 3)]
            else:
                times[name] = [row["ratio"], row["ratio_low"], row["ratio_high"]]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": processor_of(result["machine"]),
        "busy_elsewhere": result["stability"]["busy_elsewhere"],
        "ms": ms,
        "times_ours": times,
    }


def _commit() -> str:
    """Of the checkout that runs, or empty where it is none."""
    try:
        words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def go_on(path: Path, result: dict[str, Any]) -> list[Path]:
    """Add a bench to a history, and draw it again.

    Returns:
        The files that were written.

    Raises:
        OutputError: it cannot be written.
    """
    rows = [*read_history(path), history_row(result)]
    with whole_file(path) as part:
        part.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    draw_history(rows, path.with_suffix(".png"))
    return [path, path.with_suffix(".png")]


def draw_history(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw every figure over the benches, with its interval; milliseconds beside multiples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=110, layout="constrained")
    titles = {"ms": "processor time, ms", "times_ours": "peers, as multiples of ours"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name in dict.fromkeys(name for row in rows for name in row[kind]):
            places = [at for at, row in enumerate(rows) if name in row[kind]]
            middle, low, high = np.array([rows[at][kind][name] for at in places]).T
            away = np.maximum(0, [middle - low, high - middle])
            axes.errorbar(places, middle, away, marker="o", markersize=4, capsize=2, label=name)
        axes.set_title(title, loc="left")
        axes.set_ylim(bottom=0)
        step = max(1, len(rows) // 12)
        shown = range(0, len(rows), step)
        labels = [rows[at]["commit"] or rows[at]["when"][:10] for at in shown]
        axes.set_xticks(list(shown), labels, rotation=45, ha="right", fontsize=7)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.22), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[-1]['processor']}: {len(rows)} benches", fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(PICTURE))
