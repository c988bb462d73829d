"""What a run tells on the terminal: a table while it goes on; at its end what was seen, how long it
took, and the files that it wrote.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from engines.text import displayable
from realtime.annotate import clock
from realtime.capture import Connection


def localized_in_words(summary: Mapping[str, Any]) -> str:
    """In how many frames something was found, for people; empty where a summary does not say it."""
    if "localized" not in summary:
        return ""
    words = f"a box in {summary['localized']} of them"
    nothing = summary["nothing_sure"]
    return f"{words}, nothing sure in view in {nothing}" if nothing else words


HELD_UP_BY = {
    "source": "the source",
    "engine": "the engine",
    "prepare": "preparing pictures for the engine",
    "drawing": "drawing",
    "sink": "writing results",
    "loop": "what lies between the stages",
}


def held_up_by(verdict: str) -> str:
    """What ``verdict_of`` gives, in words for people."""
    return HELD_UP_BY[verdict.removesuffix("-limited")]


STAGES_TITLE = "milliseconds a frame took (p50: half of the frames took less; p99: 99 of 100)"


def latency_table(title: str, summary: dict[str, Any]) -> Group:
    """The times of a run as a table for the terminal, and what came out under it."""
    return Group(_stages_table(title, summary), _caption(summary))


def _stages_table(title: str, summary: dict[str, Any]) -> Table:
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
    return table


MOST_SEEN = 12


def seen_table(summary: dict[str, Any]) -> Group:
    """What was seen in a run, for the terminal, the surest events first where there are many."""
    events = sorted(summary["events"], key=lambda each: -(each["confidence"] or 0.0))[:MOST_SEEN]
    table = Table(title=Text(displayable(f"seen in {summary['source']}")), title_justify="left")
    for name in ("name", "from", "to", "frames", "surest"):
        table.add_column(name, justify="left" if name == "name" else "right")
    for each in sorted(events, key=lambda each: (each["begin_s"], each["event"])):
        sure = each["confidence"]
        table.add_row(
            displayable(each["name"]),
            clock(each["begin_s"]),
            clock(each["end_s"]),
            str(each["frames"]),
            "" if sure is None else f"{100 * sure:.0f} %",
        )
    left = summary["event_count"] - len(events)
    if not events:
        return Group(Text(displayable(f"{summary['source']}: nothing sure was in view")))
    return Group(table, f"and {left} more") if left else Group(table)


def print_summaries(summaries: Sequence[dict[str, Any]], console: Console) -> None:
    """Of each run what was seen, how long it took, what was wrong with its source, and the files
    that it wrote.
    """
    for summary in summaries:
        if "events" in summary and not summary.get("skipped"):
            console.print(seen_table(summary))
        if "stages_ms" in summary and not summary.get("skipped"):
            console.print("\n".join(_in_words(summary)), highlight=False, markup=False)
            console.print(_stages_table(STAGES_TITLE, summary))
        for line in (*summary.get("trouble", ()), *summary.get("not_read", ())):
            console.print(
                displayable(f"{summary['source']}: {line}"),
                style="yellow",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )
        if summary.get("skipped"):
            done = f"{summary['source']}: done already, of the same content and settings"
            console.print(displayable(done), style="dim", markup=False, soft_wrap=True)
            console.print("\n".join(_in_words(summary)), highlight=False, markup=False)
        print_files(summary, console)


def print_files(summary: Mapping[str, Any], console: Console) -> None:
    """The files that a run wrote, one a line."""
    for kind, paths in summary.get("files", {}).items():
        for path in [paths] if isinstance(paths, str) else paths:
            line = f"  {kind.replace('_', ' '):13} {displayable(path)}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    clips = summary.get("clips", ())
    for name in clips[:MOST_SEEN]:
        path = Path(summary["files"]["events"]).with_name(name)
        line = f"  {'event clip':13} {displayable(str(path))}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if len(clips) > MOST_SEEN:
        console.print(f"  and {len(clips) - MOST_SEEN} more clips of events", markup=False)


def _caption(summary: dict[str, Any]) -> str:
    return "  ·  ".join(_in_words(summary))


def _in_words(summary: dict[str, Any]) -> list[str]:
    """What came out of a run, one fact in each line."""
    speed = f"{summary['fps']:.1f} frames a second"
    if "verdict" in summary and summary["frames"]:
        speed += f", held up most by {held_up_by(summary['verdict'])}"
    parts = [f"{summary['frames']} frames", speed]
    if words := localized_in_words(summary):
        parts.insert(1, words)
    if summary.get("failed"):
        parts.append(f"{summary['failed']} failed")
    if summary["dropped"]:
        parts.append(f"{summary['dropped']} dropped")
    if "corloc" in summary:
        right = f"right in {100 * summary['corloc']:.1f} % of the frames whose true box is known"
        parts.insert(-1, f"{right} (overlap, IoU, over 0.5; mean {summary['mean_iou']:.2f})")
    if "steps" in summary:
        parts.append(
            f"{summary['budget_ms']:g} ms allowed a frame: the setting was changed"
            f" {len(summary['steps'])} times, at last to '{summary['rung']}'"
        )
    return parts


def live_table(rolling: dict[str, Any], connections: Sequence[Connection]) -> Group:
    """The last seconds of a live run for the terminal: a row for each source, and the stages of
    all.
    """
    table = Table(title="the last seconds (Ctrl-C ends)", title_justify="left")
    for name in (
        "source",
        "frames/s",
        "age ms",
        "worst",
        "shown",
        "dropped",
        "failed",
        "came back",
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
    note = "age: from capture until shown, the median, and 99 of 100 are younger than the worst"
    return Group(table, f"milliseconds a frame, the median:   {stages}", Text(note, "dim"))
