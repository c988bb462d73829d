"""Holds a frame budget: decides from the times of the last frames when to step to a cheaper setting, and when to step back."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_FRAMES = 20
FEWEST_FRAMES = 10  # of one rung, before it is judged
SETTLING_FRAMES = 3  # after a step: caches are cold
MARGIN = 0.85  # of the budget, which a better rung must be expected to keep to
HOLD_S = 3.0  # for so long without a break, before it is tried
LONGEST_HOLD_S = 60.0
TRIAL_S = 10.0  # a better rung that is left sooner than that has failed


@dataclass(frozen=True)
class Step:
    """A decision: from which rung to which, and why, in words."""

    source: int
    target: int
    why: str


class Governor:
    """The decision alone: times in, rungs out; it reads no clock and runs nothing.

    Rung 0 is the best and dearest. It steps down as soon as the 90th percentile of the last frames is over the budget, to the
    best rung that is expected to hold it. It steps up by one when, for ``HOLD_S`` on end, the better rung has been expected to
    keep to ``MARGIN`` of the budget. A rung that fails its trial is held off for twice as long the next time, so that settings
    do not flap where the budget lies between two rungs.

    Args:
        budget_ms: for one frame.
        costs: of each rung in the engine, relative to each other.
    """

    def __init__(self, budget_ms: float, costs: Sequence[float]) -> None:
        self.budget_ms, self.rung = budget_ms, 0
        self._costs = list(costs)
        self._usable = [True] * len(self._costs)
        self._hold_s = [HOLD_S] * len(self._costs)
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_FRAMES)
        self._settling = SETTLING_FRAMES
        self._fits_since_s: float | None = None
        self._tried_at_s: float | None = None

    @property
    def p90_ms(self) -> float:
        """90th percentile of the last frames of this rung."""
        return float(np.percentile([frame_ms for frame_ms, _ in self._window], 90)) if self._window else 0.0

    @property
    def missed(self) -> bool:
        """Whether even the cheapest usable rung is over the budget now."""
        return not self.cheaper() and len(self._window) == WINDOW_FRAMES and self.p90_ms > self.budget_ms

    def observe(self, now_s: float, frame_ms: float, engine_ms: float) -> Step | None:
        """Take note of a finished frame.

        Args:
            now_s: of any clock that does not run backwards.
            frame_ms: what the frame took of the loop's time, waiting for the source not counted.
            engine_ms: the engine's part of it.

        Returns:
            The step to make, if any; it counts as made only when ``stepped`` says so.
        """
        if self._settling:
            self._settling -= 1
            return None
        self._window.append((frame_ms, min(engine_ms, frame_ms)))
        if self._tried_at_s is not None and now_s - self._tried_at_s >= TRIAL_S:
            self._tried_at_s, self._hold_s[self.rung] = None, HOLD_S  # it has held
        if len(self._window) < FEWEST_FRAMES:
            return None
        return self._down() if self.p90_ms > self.budget_ms else self._up(now_s)

    def stepped(self, step: Step, now_s: float) -> None:
        """The frames from now on are of the step's target."""
        if step.target > self.rung and self._tried_at_s is not None:
            self._hold_s[self.rung] = min(LONGEST_HOLD_S, 2 * self._hold_s[self.rung])
        self._tried_at_s = now_s if step.target < self.rung else None
        self.rung, self._settling, self._fits_since_s = step.target, SETTLING_FRAMES, None
        self._window.clear()

    def give_up(self, rung: int) -> None:
        """Never step to this rung: it cannot be run here."""
        self._usable[rung] = False

    def cheaper(self) -> list[int]:
        """The usable rungs below this one, the nearest first."""
        return [rung for rung in range(self.rung + 1, len(self._costs)) if self._usable[rung]]

    def expected_ms(self, rung: int) -> float:
        """What the last frames would have taken on another rung, 90th percentile: the engine's part scales with its cost."""
        share = self._costs[rung] / self._costs[self.rung]
        return float(np.percentile([frame_ms + (share - 1) * engine_ms for frame_ms, engine_ms in self._window], 90))

    def _down(self) -> Step | None:
        self._fits_since_s = None
        cheaper = self.cheaper()
        if not cheaper:
            return None
        target = next((rung for rung in cheaper if self.expected_ms(rung) <= self.budget_ms), cheaper[-1])
        return Step(self.rung, target, f"p90 {self.p90_ms:.1f} ms is over the budget of {self.budget_ms:g} ms")

    def _up(self, now_s: float) -> Step | None:
        better = next((rung for rung in range(self.rung - 1, -1, -1) if self._usable[rung]), None)
        if better is None or self.expected_ms(better) > MARGIN * self.budget_ms:
            self._fits_since_s = None
            return None
        self._fits_since_s = now_s if self._fits_since_s is None else self._fits_since_s
        if now_s - self._fits_since_s < self._hold_s[better]:
            return None
        expected = f"{self.expected_ms(better):.1f} ms expected"
        return Step(self.rung, better, f"p90 {self.p90_ms:.1f} ms leaves room: {expected} of {self.budget_ms:g} ms")
