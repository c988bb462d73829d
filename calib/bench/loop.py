"""The frame loop's bench: frames a second from a source to drawn frames and a log, and which side of the loop limits it."""

import tempfile
import time
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from calib.bench.machine import Neighbours, machine
from calib.bench.stability import WINDOW_FRAMES, Rule, mean, window_values
from engines.choose import Choice, open_localizer
from engines.localizer import ImageBgr, Localizer
from realtime.frames import FrameRecord
from realtime.latency import Run
from realtime.pipeline import run_frames
from realtime.readers import every_frame
from realtime.sinks import JsonlSink, Sink
from realtime.sources import open_source

WARM_UP_CALLS = 5
FRAMES = Rule(WINDOW_FRAMES, "frames")


def bench_end_to_end(choice: Choice, source: str, seconds: float, console: Console) -> tuple[dict[str, Any], Run]:
    """A source to drawn frames and a JSONL log (no encoding), in the terms of ``Run.summary``.

    A source that ends is run again and again, until its frames have settled or the time is up.

    Returns:
        (``Run.summary`` and ``windows`` (``ms_per_frame`` from one finished frame to the next, and ``latency_ms``), ``passes``,
        ``warm_up_calls``, ``stability``, ``source``, ``engine``, ``machine``; every frame's times).
    """
    localizer = open_localizer(choice, streams=0)
    with closing(localizer.engine), console.status(f"{source}: until {FRAMES}, {seconds:g} s at most ..."):
        warm_up(localizer)
        neighbours = Neighbours()
        run, intervals_ms, passes, stable = _repeated(source, localizer, seconds, time.perf_counter)
    summary = run.summary()
    if intervals_ms:
        summary["fps"] = round(1e3 * summary["frames"] / sum(intervals_ms), 2)
    windows = {
        "ms_per_frame": window_values(intervals_ms, WINDOW_FRAMES, mean),
        "latency_ms": window_values(run.total_ms, WINDOW_FRAMES),
    }
    return {
        **summary, "windows": {name: [round(v, 4) for v in values] for name, values in windows.items()}, "passes": passes,
        "warm_up_calls": WARM_UP_CALLS, "source": source,
        "stability": {**FRAMES.report(stable, seconds), "busy_elsewhere": neighbours.share()},
        "engine": engine_facts(choice, localizer), "machine": machine(),
    }, run  # fmt: skip


def warm_up(localizer: Localizer) -> None:
    """Calls that do not count: the first ones allocate, and some engines compile then."""
    blank = np.zeros((localizer.size_px, localizer.size_px, 3), np.uint8)
    for _ in range(WARM_UP_CALLS):
        localizer.localize([blank])


def _repeated(
    source: str, localizer: Localizer, seconds: float, clock: Callable[[], float]
) -> tuple[Run, "array[float]", int, bool]:
    """(every frame's stages, ms from one finished frame to the next, passes begun, whether they settled).

    Opening the source is not counted; the first frame of a pass is, from the moment it is asked for.
    """
    run, intervals_ms, passes, begin = Run(), array("d"), 0, clock()
    settled, more = False, True
    with tempfile.TemporaryDirectory() as folder, JsonlSink(Path(folder) / "log.jsonl") as log:
        sinks: list[Sink] = [log, DrawnOnly()]
        while more:
            before, passes = len(intervals_ms), passes + 1
            with open_source(source) as frames, closing(run_frames(every_frame(frames), localizer, sinks, run)) as loop:
                last = clock()
                for _ in loop:
                    now = clock()
                    intervals_ms.append((now - last) * 1e3)
                    last, settled = now, _settled(run, intervals_ms)
                    if settled or now - begin >= seconds:
                        more = False
                        break
                more = more and not frames.live and len(intervals_ms) > before
    return run, intervals_ms, passes, settled


def _settled(run: Run, intervals_ms: "array[float]") -> bool:
    if len(intervals_ms) % FRAMES.length:
        return False
    return FRAMES.settled({"interval": intervals_ms, "latency": run.total_ms}, {"interval": mean})


class DrawnOnly:
    """Has every frame drawn, and keeps none."""

    needs_picture = True

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """Nothing to keep."""

    def __enter__(self) -> "DrawnOnly":
        return self

    def __exit__(self, *_: object) -> None: ...


def engine_facts(choice: Choice, localizer: Localizer) -> str:
    """Network, size, backend and precision in words, and what the processor costs."""
    engine = localizer.engine
    what = f"{choice.model} at {localizer.size_px} px, {engine.backend} {engine.precision}"
    return "; ".join([what, *getattr(engine, "losses", ())])
