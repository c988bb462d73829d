"""Decides when a measurement has settled, and compares two benches: what became slower by more than
the noise of the runs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from engines.errors import SourceError, sightline_command
from engines.files import parsed_json

WRITE_RESULT = sightline_command("bench", json=True)
WINDOWS = 3
"""So many at least, where samples are cut into windows."""
TOLERANCE = 0.025
PEER_TOLERANCE = 0.1
OURS = "Sightline"
LEAST_BLOCKS = 8
WINDOW_ROUNDS = 5
WINDOW_FRAMES = 25
DRAWS = 500
CONFIDENCE = 95

Measure = Callable[[NDArray[np.float64]], float]
"""One number for a window of samples."""


def median(values: NDArray[np.float64]) -> float:
    """The median of the samples."""
    return float(np.median(values))


def mean(values: NDArray[np.float64]) -> float:
    """The mean of the samples. Of times from frame to frame, it gives the throughput."""
    return float(np.mean(values))


def window_values(samples: Sequence[float], length: int, measure: Measure = median) -> list[float]:
    """Compute ``measure`` of each complete window of ``length`` successive samples.

    Samples behind the last complete window are left out.

    Fewer samples than ``WINDOWS`` windows would take are cut into that many shorter ones, so that
    there is a spread to see.
    """
    if len(samples) < WINDOWS * length:
        length = max(1, len(samples) // WINDOWS)
    count = len(samples) // length
    return [
        measure(window)
        for window in np.asarray(samples, np.float64)[: count * length].reshape(count, length)
    ]


def interval(blocks: Sequence[float]) -> tuple[float, float]:
    """Between which values the median of the blocks lies, with a confidence of ``CONFIDENCE`` %.

    They are those of the medians of ``DRAWS`` samples, drawn of the blocks with replacement (the
    percentile bootstrap: Efron & Tibshirani, "An introduction to the bootstrap", 1993, chapter
    13). The draws are always the same.
    """
    values = np.asarray(blocks, np.float64)
    places = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    ends = [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2]
    low, high = np.percentile(np.median(values[places], axis=1), ends)
    return float(low), float(high)


def notch(values: Sequence[float]) -> float:
    """Half the width of a box plot's notch, as a share of the median.

    It is nan where there are fewer than two values.

    Medians of two samples whose notches do not overlap differ with about 95 % confidence (McGill,
    Tukey & Larsen, "Variations of box plots", The American Statistician 1978): 1.57 times the range
    between the quartiles, over the root of the sample's size.
    """
    if len(values) < 2:
        return float("nan")
    lower, middle, upper = np.percentile(values, [25, 50, 75])
    return float(1.57 * (upper - lower) / np.sqrt(len(values)) / max(middle, 1e-12))


@dataclass(frozen=True)
class Rule:
    """Says when a measurement has settled: when chance moves none of its figures by more than
    ``tolerance``, see ``interval``. A figure is the median of a series' blocks.

    Attributes:
        length: successive samples whose mean is a block: neighbours in time are alike.
        unit: what a sample is called: ``rounds``, ``frames``.
        tolerance: half the width of an interval, as a share of its figure.
        paired: whether each sample counts as a multiple of the first series' sample of the same
            round: what slows all calls of a round down then moves no figure. Series that are not
            of ours need be known to ``PEER_TOLERANCE`` only.
    """

    length: int
    unit: str
    tolerance: float = TOLERANCE
    paired: bool = False

    def margins(self, series: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Half the width of each figure's interval, as a share of the figure. It is infinite where
        there are fewer than ``LEAST_BLOCKS`` blocks.
        """
        first = np.asarray(next(iter(series.values()), ()), np.float64)
        found = {}
        for name, samples in series.items():
            values = np.asarray(samples, np.float64)
            values = values / first if self.paired else values
            count = len(values) // self.length
            blocks = values[: count * self.length].reshape(count, self.length).mean(axis=1)
            found[name] = np.inf
            if count >= LEAST_BLOCKS:
                low, high = interval(blocks.tolist())
                found[name] = (high - low) / 2 / max(float(np.median(blocks)), 1e-12)
        return found

    def settled(self, series: Mapping[str, Sequence[float]]) -> bool:
        """Whether every series has settled. Only whole blocks count."""
        margins = self.margins(series)
        return bool(margins) and all(
            margin <= self._tolerance_of(name) for name, margin in margins.items()
        )

    def _tolerance_of(self, name: str) -> float:
        loose = self.paired and not name.startswith(OURS)
        return max(self.tolerance, PEER_TOLERANCE) if loose else self.tolerance

    def __str__(self) -> str:
        peers = f" (of peers' to {100 * PEER_TOLERANCE:g} %)" if self.paired else ""
        return f"{CONFIDENCE} % sure of each figure to {100 * self.tolerance:g} %{peers}"

    def report(
        self, series: Mapping[str, Sequence[float]], stable: bool, seconds: float
    ) -> dict[str, object]:
        """What the JSON says of it: the rule, whether it was met in time, and the figure that is
        least sure, with its margin (None where there are too few samples to tell).
        """
        margins = self.margins(series)
        widest = max(margins, key=lambda name: margins[name] / self._tolerance_of(name), default="")
        known = bool(widest) and np.isfinite(margins[widest])
        return {
            "stable": stable,
            "rule": str(self),
            "block": self.length,
            "unit": self.unit,
            "tolerance": self.tolerance,
            "confidence": CONFIDENCE,
            "widest": widest,
            "margin": round(margins[widest], 4) if known else None,
            "time_limit_s": round(seconds, 1),
        }


def until_settled(
    take: Callable[[], Mapping[str, float]],
    rule: Rule,
    seconds: float,
    clock: Callable[[], float],
    least: int = WINDOWS,
) -> tuple[dict[str, list[float]], bool]:
    """Take samples until every series has settled or the time is up.

    Args:
        take: one more sample of each series.
        rule: see ``Rule``.
        seconds: the time limit.
        clock: seconds that pass.
        least: so many samples are taken, whatever the time limit is.

    Returns:
        (every sample by name, whether they settled).
    """
    start, series = clock(), {name: [value] for name, value in take().items()}
    count = 1
    while count % rule.length or not rule.settled(series):  # looked at as a block ends
        if count >= least and clock() - start >= seconds:
            return series, False
        for name, value in take().items():
            series[name].append(value)
        count += 1
    return series, True


LEAST_CHANGE = 0.03
"""A smaller change is none, however quiet both runs were: another build of the same code shifts
memory by as much.
"""
HIDDEN = 0.1
"""Noise that is worth a word."""
CONDITIONS = ("machine", "engine", "source")


@dataclass(frozen=True)
class Change:
    """One figure that both files hold, in milliseconds. Less is better.

    Attributes:
        name: what was timed.
        before_ms, after_ms: medians (of ``ms per frame`` means).
        noise: share by which medians may differ by chance, see ``notch``; nan where a file keeps
            too few windows to tell.
        is_ours: whether it is ours. Peers only show whether the machine itself changed its pace.
    """

    name: str
    before_ms: float
    after_ms: float
    noise: float
    is_ours: bool = True

    @property
    def change(self) -> float:
        """The share by which ``after`` is slower. It is negative where ``after`` is faster."""
        return self.after_ms / self.before_ms - 1

    @property
    def limit(self) -> float:
        """The largest change that may be noise."""
        return max(LEAST_CHANGE, 0.0 if np.isnan(self.noise) else self.noise)

    @property
    def verdict(self) -> str:
        """``slower``, ``faster`` or ``same``."""
        if abs(self.change) <= self.limit:
            return "same"
        return "slower" if self.change > 0 else "faster"

    @property
    def regressed(self) -> bool:
        """Whether the figure is ours and got slower by more than the noise."""
        return self.is_ours and self.verdict == "slower"


def load_bench(path: Path) -> dict[str, Any]:
    """Read what ``bench --json`` printed into a file.

    Raises:
        SourceError: the file cannot be read, or is not that.
    """
    try:
        found = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {path} as JSON: {error}; write it with: {WRITE_RESULT} > {path.name}"
        ) from error
    if not isinstance(found, dict) or not {"latency_ms", "peers", "machine", "engine"} <= set(
        found
    ):
        raise SourceError(
            f"{path} is not a result of bench: write one with: {WRITE_RESULT} > {path.name}"
        )
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Describe the conditions under which the two runs were not measured alike."""
    pairs = ((name, before.get(name), after.get(name)) for name in CONDITIONS)
    return [f"{name}: {old} / {new}" for name, old, new in pairs if old != new]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Compare every figure that both files hold.

    Raises:
        SourceError: they have none of ours in common.
    """
    old, new = _figures(before), _figures(after)
    found = []
    for name in old:
        if name in new:
            (before_ms, before_windows), (after_ms, after_windows) = old[name], new[name]
            noise = notch(before_windows) + notch(after_windows)
            found.append(
                Change(
                    name, before_ms, after_ms, noise, OURS in name or name.startswith("end to end")
                )
            )
    if not any(change.is_ours for change in found):
        raise SourceError("the two files have no figure in common: bench the same networks")
    return found


def _figures(result: dict[str, Any]) -> dict[str, tuple[float, list[float]]]:
    """All figures of a result. Each name has its milliseconds and its windows."""
    try:
        windows = result.get("windows", {})
        found = {}
        if processor := result.get("processor_ms_per_frame"):
            found["end to end, processor ms per frame"] = (
                processor["p50"],
                windows.get("processor_ms_per_frame", []),
            )
        elif result.get("fps"):
            found["end to end, ms per frame"] = (
                1e3 / result["fps"],
                windows.get("ms_per_frame", []),
            )
        if not processor and result["latency_ms"].get("p50"):
            found["end to end, latency"] = (
                result["latency_ms"]["p50"],
                windows.get("latency_ms", []),
            )
        for engine in result.get("engines") or [result]:
            for row in engine["peers"]:
                found[f"{engine['engine']}: {row['name']}"] = (
                    row["p50_ms"],
                    row.get("windows_ms", []),
                )
            for times in engine.get("gpu", ()):
                found[f"{engine['engine']}: {OURS}, batch {times['batch']}, GPU Compute"] = (
                    times["compute_ms"]["p50"],
                    [],
                )
    except (AttributeError, KeyError, TypeError) as error:
        raise SourceError(
            f"a result of bench is incomplete ({error}): write it again with: {WRITE_RESULT}"
        ) from error
    return found


def compare(
    before_path: Path, after_path: Path, across_machines: bool
) -> tuple[list[Change], list[str]]:
    """Compare two files.

    Returns:
        (changes, differences of the conditions).

    Raises:
        SourceError: a file is not a bench, or the conditions differ and ``across_machines`` is
            false.
    """
    before, after = load_bench(before_path), load_bench(after_path)
    differing = differences(before, after)
    if differing and not across_machines:
        raise SourceError(
            f"{before_path} and {after_path} were not measured alike ({'; '.join(differing)}): "
            "bench both alike, or compare them anyway",
            option="across_machines",
        )
    lone = set(_figures(before)) ^ set(_figures(after))
    return changes(before, after), [
        *(f"not measured alike: {text}" for text in differing),
        *(f"only in one of the two: {name}" for name in sorted(lone) if OURS in name),
    ]


def compare_table(found: list[Change], differing: list[str], names: tuple[str, str]) -> Group:
    """The comparison as a table for the terminal."""
    table = Table(title=f"{names[0]} to {names[1]}", title_justify="left")
    for column in ("", "before ms", "after ms", "change", "noise", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right")
    colours = {"slower": "red", "faster": "green", "same": ""}
    for change in found:
        style = colours[change.verdict] if change.is_ours else "dim"
        noise = "unknown" if np.isnan(change.noise) else f"{100 * change.noise:.1f} %"
        figures = (
            f"{change.before_ms:.2f}",
            f"{change.after_ms:.2f}",
            f"{100 * change.change:+.1f} %",
            noise,
        )
        table.add_row(
            change.name,
            *figures,
            change.verdict if change.is_ours else f"({change.verdict})",
            style=style,
        )
    notes = [Text(difference, style="yellow") for difference in differing]
    return Group(
        table, *notes, Text(_pace(found), style="yellow"), Text(summary(found), style="bold")
    )


def summary(found: list[Change]) -> str:
    """The outcome of the comparison in one line."""
    regressed = [change.name for change in found if change.regressed]
    if regressed:
        return f"slower beyond noise: {'; '.join(regressed)}"
    widest = max(change.limit for change in found if change.is_ours)
    hidden = (
        f", but noise hides changes of up to {100 * widest:.0f} %: let both runs settle"
        if widest > HIDDEN
        else ""
    )
    return f"nothing of ours is slower beyond noise{hidden}"


def _pace(found: list[Change]) -> str:
    """Say whether the peers changed too. Then the machine may be the cause."""
    theirs = [change.change for change in found if not change.is_ours]
    pace = float(np.median(theirs)) if theirs else 0.0
    if abs(pace) <= 0.05:
        return ""
    return (
        f"the peers changed too, by {100 * pace:+.0f} % (median): the machine's pace differed; run"
        " both again, close together"
    )


def compare_report(found: list[Change], differing: list[str]) -> dict[str, Any]:
    """The comparison for the JSON."""
    rows = [
        {
            "name": c.name,
            "before_ms": round(c.before_ms, 4),
            "after_ms": round(c.after_ms, 4),
            "change": round(c.change, 4),
            "noise": None if np.isnan(c.noise) else round(c.noise, 4),
            "verdict": c.verdict,
            "judged": c.is_ours,
        }
        for c in found
    ]
    return {
        "regressed": [c.name for c in found if c.regressed],
        "differences": differing,
        "rows": rows,
    }


def print_comparison(
    paths: Sequence[str], across_machines: bool, console: Console, as_json: bool
) -> bool:
    """Compare two files, say what came out, and whether something of ours regressed.

    Raises:
        SourceError: see ``compare``, or there are not two files.
    """
    if len(paths) != 2:
        raise SourceError(
            "compare takes two results: sightline bench compare before.json after.json"
        )
    found, differing = compare(Path(paths[0]), Path(paths[1]), across_machines)
    console.print(compare_table(found, differing, (paths[0], paths[1])))
    if as_json:
        print(json.dumps(compare_report(found, differing)))
    return any(change.regressed for change in found)
