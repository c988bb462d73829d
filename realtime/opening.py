"""Opening an engine for a command, with a line on the console that says what runs where, and why."""

from rich.console import Console

from engines.choose import Choice, open_localizer
from engines.localizer import Localizer
from realtime.governed import Governed


def open_told(choice: Choice, console: Console, streams: int = 1, batch: int = 1) -> Localizer:
    """Open what was chosen and say what it is; the arguments and errors are those of ``engines.choose.open_localizer``."""
    reasons: list[str] = []
    with console.status(f"building {choice.model} ..."):
        localizer = open_localizer(choice, reasons.append, streams, batch)
    engine = localizer.engine
    what = f"{choice.model} at {localizer.size_px} px on {engine.backend} {engine.precision}, {engine.device}"
    console.print("; ".join([what, *reasons]), style="dim", soft_wrap=True)
    if localizer.box_reader.startswith("heuristic") and choice.method != "heuristic":
        console.print(f"no fitted head for this network yet ('fit' makes one); {localizer.box_reader}", style="yellow")
    return localizer


def open_within(
    choice: Choice, budget_ms: float | None, console: Console, streams: int = 1, batch: int = 1
) -> Localizer | Governed:
    """One engine, or one that changes to hold a budget of so many milliseconds a frame."""
    if budget_ms is None:
        return open_told(choice, console, streams, batch)
    with console.status(f"building {choice.model} ..."):
        governed = Governed(choice, budget_ms, lambda line: console.print(line, style="yellow"), streams=streams, batch=batch)
    what = f"{choice.model} within {budget_ms:g} ms a frame, from {governed.rung.name}"
    console.print("; ".join([what, *getattr(governed.engine, "losses", ())]), style="dim", soft_wrap=True)
    return governed
