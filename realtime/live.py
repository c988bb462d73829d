"""Streaming: the newest frame of a camera, stream or file at its own pace, shown, recorded and logged as it comes."""

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from engines.localizer import Localizer
from realtime.governed import Governed
from realtime.latency import Run, latency_table
from realtime.pipeline import latest_frames, run_frames
from realtime.sinks import JsonlSink, Sink, VideoSink, WindowSink, has_display
from realtime.sources import open_source


def stream(
    spec: str, localizer: Localizer | Governed, console: Console, *, window: bool = True, record: Path | None = None,
    log: Path | None = None, seconds: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run until the source ends, ``seconds`` have passed, the window is quit, or Ctrl-C.

    Args:
        spec: see ``realtime.sources.open_source``.
        localizer: the engine, or the engines that a budget is held with.
        console: shows a rolling latency table.
        window: open one where there is a display.
        record: annotated MP4 to write.
        log: JSONL to write.
        seconds: when to stop.

    Returns:
        The summary of the run, with ``interrupted``.

    Raises:
        SightlineError: the source or a result fails; what was recorded until then is kept.
    """
    run, interrupted = Run(), False
    with open_source(spec) as source:
        try:
            with ExitStack() as stack:
                sinks: list[Sink] = []
                if window and has_display():
                    sinks.append(stack.enter_context(WindowSink(f"Sightline - {source.name}")))
                if record is not None:
                    sinks.append(stack.enter_context(VideoSink(record, source.time_base, source.rate_fps, keep_partial=True)))
                if log is not None:
                    sinks.append(stack.enter_context(JsonlSink(log, keep_partial=True)))
                records = latest_frames(source, paced=not source.live)
                stop_at = time.monotonic() + seconds if seconds is not None else float("inf")
                table = stack.enter_context(Live(console=console, refresh_per_second=4, transient=True))
                shown_at = 0.0
                for _ in stack.enter_context(closing(run_frames(records, localizer, sinks, run, under_way=1))):
                    now = time.monotonic()
                    if now >= stop_at:
                        break
                    if now - shown_at >= 0.5:
                        table.update(latency_table(f"{source.name} (Ctrl-C ends)", run.summary()))
                        shown_at = now
        except KeyboardInterrupt:
            interrupted = True
    governed = localizer.summary() if isinstance(localizer, Governed) else {}
    return {"source": spec, **run.summary(), "interrupted": interrupted, **governed}
