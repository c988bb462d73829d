"""Ours and our peers' calls in turns, so that whatever the machine does meanwhile meets all of them alike."""

import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from calib.bench.loop import WARM_UP_CALLS
from calib.bench.machine import Neighbours
from calib.bench.peers import Call
from calib.bench.stability import WINDOW_ROUNDS, Rule, until_settled, window_values
from engines.base import Array, Engine
from realtime.latency import percentiles

REST_S = 0.1
TURNS = Rule(WINDOW_ROUNDS, "rounds")


def row_of(name: str, samples_ms: Sequence[float], first_p50_ms: float) -> dict[str, Any]:
    """``name``, ``p50_ms``, ``p90_ms``, ``ratio`` (its median over ours), ``windows_ms`` (medians) and every sample."""
    found = percentiles(array("d", samples_ms))
    return {
        "name": name, "p50_ms": found["p50"], "p90_ms": found["p90"],
        "ratio": round(found["p50"] / first_p50_ms, 3),
        "windows_ms": [round(value, 4) for value in window_values(samples_ms, WINDOW_ROUNDS)],
        "samples_ms": [round(value, 4) for value in samples_ms],
    }  # fmt: skip


def engine_call(engine: Engine, feed: Mapping[str, Array]) -> Call:
    """A call that runs the engine once."""
    return lambda: engine.infer(feed)


def take_turns(
    calls: Mapping[str, Call], seconds: float, console: Console, title: str, rest_s: float = REST_S
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time A B C, C A B, ...: in every round each has its turn, so that a change of the machine's pace meets all alike.

    Between calls the machine rests: the thread pools of PyTorch and ONNX Runtime spin for a while after their work, and
    would otherwise take processor time from whoever comes next. Every round has an order of its own, for what is left of that.

    Args:
        calls: name to what does one image's work.
        seconds: time limit.
        console: for progress.
        title: of the progress.
        rest_s: between calls.

    Returns:
        (milliseconds of every call by name, whether they settled in the terms of ``Rule.report``).
    """
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()

    names, order = list(calls), np.random.default_rng(0)

    def one_round() -> dict[str, float]:
        times_ms = dict.fromkeys(names, 0.0)
        for name in order.permutation(names):
            time.sleep(rest_s)
            before = time.perf_counter()
            calls[name]()
            times_ms[name] = (time.perf_counter() - before) * 1e3
        return times_ms

    with console.status(f"{title}: {len(calls)} in turns, until {TURNS}, {seconds:g} s at most ..."):
        neighbours = Neighbours()
        samples_ms, stable = until_settled(one_round, TURNS, seconds, time.perf_counter)
    return samples_ms, {**TURNS.report(stable, seconds), "busy_elsewhere": neighbours.share()}
