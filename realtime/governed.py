"""A localizer that changes: its settings follow a governor's decisions, and its engines are built before they are needed."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from engines.base import Engine, SightlineError
from engines.choose import Choice, open_localizer
from engines.ladder import Rung, rungs
from engines.localizer import Localizer
from realtime.frames import FrameRecord
from realtime.governor import Governor, Step
from realtime.latency import Run


class Governed:
    """The settings of the hour. One thread uses it: that of the frame loop.

    The engine of the next cheaper rung is built in the background as soon as a rung is entered, any other when it is asked for;
    frames go on as they are until it is ready. While something is being built, which takes processor time from the frames,
    nothing is decided. Engines further than one rung away are closed.

    Args:
        choice: the best settings, see ``engines.ladder.rungs``.
        budget_ms: for one frame, see ``Governor``.
        told: gets each step in words as it is made.
        streams, batch: see ``engines.choose.open_localizer``.

    Raises:
        SightlineError: the best settings cannot be run.

    Attributes:
        rung: the settings for the next frame.
        localizer: their engine.
        steps: of this run: ``frame`` after which it was decided, ``from``, ``to``, ``why``.
    """

    def __init__(
        self, choice: Choice, budget_ms: float, told: Callable[[str], None], *, streams: int = 1, batch: int = 1
    ) -> None:
        self._ladder, self._told, self._streams, self._batch = rungs(choice), told, streams, batch
        self._governor = Governor(budget_ms, [rung.cost for rung in self._ladder])
        self._open = {self._ladder[0].choice: self._opened(self._ladder[0].choice)}
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="open engine")
        self._opening: tuple[int, Future[Localizer]] | None = None
        self._wanted: Step | None = None
        self.begin()

    def begin(self) -> None:
        """Start the accounts of a run; the rung stays."""
        self.steps: list[dict[str, Any]] = []
        self._missed = ""

    @property
    def rung(self) -> Rung:
        return self._ladder[self._governor.rung]

    @property
    def localizer(self) -> Localizer:
        return self._open[self.rung.choice]

    @property
    def description(self) -> dict[str, Any]:
        """What decides the results: the best settings and the budget. How long frames take does, too."""
        return {"budget_ms": self._governor.budget_ms, "best": asdict(self._ladder[0].choice)}

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.localizer.class_names

    @property
    def wanted_class(self) -> int | None:
        """See ``Localizer.wanted_class``."""
        return self.localizer.wanted_class

    @property
    def batch(self) -> int:
        """Images that one call takes."""
        return self.localizer.batch

    @property
    def engine(self) -> Engine:
        """The engine of the rung."""
        return self.localizer.engine

    @property
    def size_px(self) -> int:
        """Its input side."""
        return self.localizer.size_px

    def finished(self, record: FrameRecord, now_s: float, frame_ms: float) -> None:
        """Judge a finished frame, and step where that is called for; see ``Governor.observe``.

        Raises:
            Exception: an engine could not be built, for a reason that is not a ``SightlineError`` (those give the rung up).
        """
        if record.rung != self.rung.name:
            return  # from before the last step
        self._close_far_ones()
        self._look_at_opening()
        if self._opening is None and self._wanted is None:
            self._wanted = self._governor.observe(now_s, frame_ms, record.stages_ms["engine"])
            if self._governor.missed and not self._missed:
                cheapest = f"even the cheapest setting ({self.rung.name}) takes {self._governor.p90_ms:.1f} ms (p90)"
                self._missed = f"{cheapest}, over the budget of {self._governor.budget_ms:g} ms"
                self._told(self._missed)
        if self._wanted is not None:
            self._step(self._wanted, record, now_s)
        elif self._opening is None:
            self._open_next_cheaper()

    def summary(self) -> dict[str, Any]:
        """For a run's summary: ``budget_ms``, the last ``rung``, the ``steps``, and ``over_budget``: in words, or None."""
        budget = {"budget_ms": self._governor.budget_ms, "rung": self.rung.name}
        return {**budget, "steps": self.steps, "over_budget": self._missed or None}

    def close(self) -> None:
        """Free every engine, once what is being built is ready."""
        self._opener.shutdown(cancel_futures=True)
        for localizer in self._open.values():
            localizer.engine.close()

    def _opened(self, choice: Choice) -> Localizer:
        return open_localizer(choice, streams=self._streams, batch=self._batch)

    def _step(self, step: Step, record: FrameRecord, now_s: float) -> None:
        """Make the step if its engine is there; else see to it that it will be."""
        target = self._ladder[step.target]
        if target.choice not in self._open:
            if self._opening is None:
                self._opening = step.target, self._opener.submit(self._opened, target.choice)
            return
        self._told(f"frame {record.frame.index}: {self.rung.name} → {target.name}: {step.why}")
        self.steps.append({"frame": record.frame.index, "from": self.rung.name, "to": target.name, "why": step.why})
        self._governor.stepped(step, now_s)
        self._wanted = None

    def _open_next_cheaper(self) -> None:
        cheaper = self._governor.cheaper()
        if cheaper and self._ladder[cheaper[0]].choice not in self._open:
            self._opening = cheaper[0], self._opener.submit(self._opened, self._ladder[cheaper[0]].choice)

    def _look_at_opening(self) -> None:
        if self._opening is None or not self._opening[1].done():
            return
        (index, future), self._opening = self._opening, None
        try:
            self._open[self._ladder[index].choice] = future.result()
        except SightlineError as error:
            self._governor.give_up(index)
            self._wanted = None
            self._told(f"left out: {self._ladder[index].name}: {error}")

    def _close_far_ones(self) -> None:
        """Called when a frame of this rung is finished: frames come in order, so no other engine has one any more."""
        index = self._governor.rung
        near = {rung.choice for rung in self._ladder[max(0, index - 1) : index + 2]}
        if self._wanted is not None:
            near.add(self._ladder[self._wanted.target].choice)
        for choice in [choice for choice in self._open if choice not in near]:
            self._open.pop(choice).engine.close()


class Pace:
    """What a frame takes of the loop's time, waiting for the source not counted, for the sinks counted.

    With several under way, answers may come in bunches: it is the mean of as many frames.
    """

    def __init__(self, run: Run, under_way: int) -> None:
        self._run, self._last_ns, self._last_idle_ms = run, time.monotonic_ns(), 0.0
        self._last_ms: deque[float] = deque(maxlen=under_way)

    def frame_ms(self) -> float:
        """Called once for each frame that the engine has answered."""
        now_ns, idle_ms = time.monotonic_ns(), self._run.idle_ms["source"]
        self._last_ms.append((now_ns - self._last_ns) / 1e6 - (idle_ms - self._last_idle_ms))
        self._last_ns, self._last_idle_ms = now_ns, idle_ms
        return sum(self._last_ms) / len(self._last_ms)
