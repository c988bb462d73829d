"""Decides when a measurement is stable, and compares two benches: what became slower by more than
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
TOLERANCE = 0.05
WINDOW_ROUNDS = 5
WINDOW_FRAMES = 100

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


def spread(values: Sequence[float]) -> float:
    """The largest value less the smallest, as a share of the median.

    It is nan where there are fewer than two values.
    """
    if len(values) < 2:
        return float("nan")
    return (max(values) - min(values)) / max(float(np.median(values)), 1e-12)


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
    """Says when a measurement has settled: when its last ``WINDOWS`` windows agree.

    Attributes:
        length: samples in a window.
        unit: what a sample is called: ``rounds``, ``frames``.
        tolerance: largest less smallest window, as a share of their median.
    """

    length: int
    unit: str
    tolerance: float = TOLERANCE

    def settled(
        self, series: Mapping[str, Sequence[float]], measures: Mapping[str, Measure] | None = None
    ) -> bool:
        """Whether every series has settled. Only whole windows count.

        Args:
            series: name to samples, in order.
            measures: what is taken of a window, by the same names; the median where there is
                none.
        """
        return bool(series) and all(
            self._agree(samples, (measures or {}).get(name, median))
            for name, samples in series.items()
        )

    def _agree(self, samples: Sequence[float], measure: Measure) -> bool:
        if len(samples) < WINDOWS * self.length:
            return False
        return spread(window_values(samples, self.length, measure)[-WINDOWS:]) <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{WINDOWS} successive windows of {self.length} {self.unit} within"
            f" {100 * self.tolerance:g} %"
        )

    def report(self, stable: bool, seconds: float) -> dict[str, object]:
        """What the JSON says of it: the rule, and whether it was met in time."""
        return {
            "stable": stable,
            "windows": WINDOWS,
            "window": self.length,
            "unit": self.unit,
            "tolerance": self.tolerance,
            "time_limit_s": seconds,
        }


def until_settled(
    take: Callable[[], Mapping[str, float]], rule: Rule, seconds: float, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], bool]:
    """Take samples until every series has settled or the time is up.

    Args:
        take: one more sample of each series.
        rule: see ``Rule``.
        seconds: the time limit; at least ``WINDOWS`` samples are taken whatever it is.
        clock: seconds that pass.

    Returns:
        (every sample by name, whether they settled).
    """
    start, series = clock(), {name: [value] for name, value in take().items()}
    count = 1
    while count % rule.length or not rule.settled(
        series
    ):  # looked at as a window ends: it is the whole series that is read
        if count >= WINDOWS and clock() - start >= seconds:
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
OURS = "Sightline"


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
        if result.get("fps"):
            found["end to end, ms per frame"] = (
                1e3 / result["fps"],
                windows.get("ms_per_frame", []),
            )
        if result["latency_ms"].get("p50"):
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
