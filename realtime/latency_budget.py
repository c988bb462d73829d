"""Keeps a latency budget: a localizer that goes to cheaper settings when frames take too long, and
back.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console

from engines.choose import open_localizer
from engines.engine import Ticket
from engines.errors import ModelError, SightlineError
from engines.localizer import ImageBgr, Localization, Localizer, Outputs
from engines.maps import method_of
from engines.networks.registry import Classifier
from engines.options import EngineOptions
from engines.presets import Preset, presets
from realtime.statistics import Run

WINDOW_FRAMES = 20
FEWEST_FRAMES = 10  # of one preset, before it is judged
SETTLING_FRAMES = 3  # after a step: caches are cold
MARGIN = 0.85  # of the budget, which a better preset must be expected to keep to
HOLD_S = 3.0  # for so long without a break, before it is tried
LONGEST_HOLD_S = 60.0
NOTHING_TELLS = "nothing tells how sure these boxes are: all are shown"
TRIAL_S = 10.0  # a better preset that is left sooner than that has failed


@dataclass(frozen=True)
class Step:
    """A decision: from which preset to which, and why, in words."""

    source: int
    target: int
    why: str


class BudgetController:
    """Decides which preset to use from the times of frames. It reads no clock and runs nothing.

    Preset 0 is the best and dearest. It steps down as soon as the 90th percentile of the last
    frames is over the budget, to the best preset that is expected to hold it. It steps up by one
    when, for ``HOLD_S`` on end, the better preset has been expected to keep to ``MARGIN`` of the
    budget. A preset that fails its trial is held off for twice as long the next time, so that
    settings do not flap where the budget lies between two presets.

    Args:
        budget_ms: for one frame.
        costs: of each preset in the engine, relative to each other.
    """

    def __init__(self, budget_ms: float, costs: Sequence[float]) -> None:
        self.budget_ms, self.preset = budget_ms, 0
        self._costs = list(costs)
        self._usable = [True] * len(self._costs)
        self._hold_s = [HOLD_S] * len(self._costs)
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_FRAMES)
        self._settling = SETTLING_FRAMES
        self._fits_since_s: float | None = None
        self._tried_at_s: float | None = None

    @property
    def p90_ms(self) -> float:
        """90th percentile of the last frames of this preset."""
        return (
            float(np.percentile([frame_ms for frame_ms, _ in self._window], 90))
            if self._window
            else 0.0
        )

    @property
    def missed(self) -> bool:
        """Whether even the cheapest usable preset is over the budget now."""
        return (
            not self.cheaper()
            and len(self._window) == WINDOW_FRAMES
            and self.p90_ms > self.budget_ms
        )

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
            self._tried_at_s, self._hold_s[self.preset] = None, HOLD_S  # it has held
        if len(self._window) < FEWEST_FRAMES:
            return None
        return self._down() if self.p90_ms > self.budget_ms else self._up(now_s)

    def stepped(self, step: Step, now_s: float) -> None:
        """Note that the frames from now on are of the step's target."""
        if step.target > self.preset and self._tried_at_s is not None:
            self._hold_s[self.preset] = min(LONGEST_HOLD_S, 2 * self._hold_s[self.preset])
        self._tried_at_s = now_s if step.target < self.preset else None
        self.preset = step.target
        self._settling = SETTLING_FRAMES
        self._fits_since_s = None
        self._window.clear()

    def give_up(self, preset: int) -> None:
        """Never step to this preset: it cannot be run here."""
        self._usable[preset] = False

    def cheaper(self) -> list[int]:
        """The usable presets below this one, the nearest first."""
        return [
            preset for preset in range(self.preset + 1, len(self._costs)) if self._usable[preset]
        ]

    def expected_ms(self, preset: int) -> float:
        """What the last frames would have taken on another preset, 90th percentile: the engine's
        part scales with its cost.
        """
        share = self._costs[preset] / self._costs[self.preset]
        return float(
            np.percentile(
                [frame_ms + (share - 1) * engine_ms for frame_ms, engine_ms in self._window], 90
            )
        )

    def _down(self) -> Step | None:
        self._fits_since_s = None
        cheaper = self.cheaper()
        if not cheaper:
            return None
        target = next(
            (preset for preset in cheaper if self.expected_ms(preset) <= self.budget_ms),
            cheaper[-1],
        )
        return Step(
            self.preset,
            target,
            f"p90 {self.p90_ms:.1f} ms is over the budget of {self.budget_ms:g} ms",
        )

    def _up(self, now_s: float) -> Step | None:
        better = next(
            (preset for preset in range(self.preset - 1, -1, -1) if self._usable[preset]), None
        )
        if better is None or self.expected_ms(better) > MARGIN * self.budget_ms:
            self._fits_since_s = None
            return None
        self._fits_since_s = now_s if self._fits_since_s is None else self._fits_since_s
        if now_s - self._fits_since_s < self._hold_s[better]:
            return None
        expected = f"{self.expected_ms(better):.1f} ms expected"
        return Step(
            self.preset,
            better,
            f"p90 {self.p90_ms:.1f} ms leaves room: {expected} of {self.budget_ms:g} ms",
        )


class BudgetLocalizer(Localizer):
    """A localizer whose preset follows a latency budget. One thread uses it: that of the frame
    loop. An answer is of the preset that its call began with.

    The engine of the next cheaper preset is built in the background as soon as a preset is entered.
    The engine of any other preset is built when it is asked for. Frames go on as they are until an
    engine is ready. While an engine is being built, which takes processor time from the frames,
    nothing is decided. Engines further than one preset away are closed.

    Args:
        choice: the best settings, see ``engines.presets.presets``.
        budget_ms: for one frame, see ``BudgetController``.
        notify: gets each step in words as it is made.
        streams, batch: see ``engines.choose.open_localizer``.

    Raises:
        SightlineError: the best settings cannot be run.

    Attributes:
        preset: the preset of the next call.
        steps: of this run: ``frame`` after which it was decided, ``from``, ``to``, ``why``.
    """

    def __init__(
        self,
        choice: EngineOptions,
        budget_ms: float,
        notify: Callable[[str], None],
        *,
        streams: int = 1,
        batch: int = 1,
    ) -> None:
        self._ladder = presets(choice)
        self._notify = notify
        self._streams = streams
        self._images = batch
        self._controller = BudgetController(budget_ms, [preset.cost for preset in self._ladder])
        self.notes: list[str] = []
        self._now = self._opened(self._ladder[0].choice, self.notes.append)
        self._looked_for, self._names = self._now.wanted_class, self._now.names
        self._open = {self._ladder[0].choice: self._now}
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="open engine")
        self._opening: tuple[int, Future[Localizer]] | None = None
        self._next_step: Step | None = None
        self._use(self._now)
        self.begin()

    def begin(self) -> None:
        """Start the account of a run. The preset stays."""
        self.steps: list[dict[str, Any]] = []
        self._missed = ""

    def _use(self, localizer: Localizer) -> None:
        """Use this localizer from the next call on."""
        self._now = localizer
        self.look_for(self._looked_for, new_preset=True)
        self.engine = localizer.engine
        self.class_names = localizer.class_names
        self.batch = localizer.batch
        self.size_px = localizer.size_px
        self.limits = localizer.limits

    @property
    def preset(self) -> Preset:
        return self._ladder[self._controller.preset]

    @property
    def setting(self) -> str:
        """The preset's name."""
        return self.preset.name

    @property
    def heat_map_every(self) -> int:
        """See ``Localizer.heat_map_every``."""
        return self.preset.heat_map_every

    @property
    def identity(self) -> dict[str, Any]:
        """The best settings and the budget. How long frames take decides the answers, too."""
        best = asdict(self._ladder[0].choice)
        return {"engine": {"budget_ms": self._controller.budget_ms, "best": best}}

    @property
    def wanted_class(self) -> int | None:
        """See ``Localizer.wanted_class``."""
        return self._looked_for

    @property
    def names(self) -> tuple[str, ...]:
        """Of the best preset, see ``Localizer.names``."""
        return self._names

    @property
    def least_confidence(self) -> float:
        """See ``Localizer.least_confidence``."""
        return self._now.least_confidence

    def look_for(self, class_index: int | None, new_preset: bool = False) -> None:
        """See ``Localizer.look_for``. Where a name is asked for, a preset without these names looks
        for whatever scores best, and that is said once.

        Raises:
            InputError: see there.
        """
        without = self._lacks(class_index, self._now)
        self._now.look_for(None if without else class_index)
        if without and (new_preset or class_index != self._looked_for):
            self._notify(f"{self.preset.name} does not name boxes: any object is shown")
        self._looked_for = class_index

    def _lacks(self, wanted: int | None, localizer: Localizer) -> bool:
        """Whether a name is wanted that boxes of this localizer do not have."""
        is_name = wanted is not None and 0 <= wanted - len(localizer.class_names) < len(self._names)
        return is_name and localizer.names != self._names

    def abstain_below(self, confidence: float | None) -> None:
        """See ``Localizer.abstain_below``; it holds for the engines that are open.

        Raises:
            InputError, ModelError: see there.
        """
        for localizer in self._open.values():
            localizer.abstain_below(confidence)

    def expect(self, width_px: int, height_px: int) -> None:
        """See ``Localizer.expect``."""
        self._now.expect(width_px, height_px)

    def prepare(self, image_bgr: ImageBgr) -> ImageBgr:
        """See ``Localizer.prepare``."""
        return self._now.prepare(image_bgr)

    def submit(self, prepared: Sequence[ImageBgr]) -> Ticket:
        """See ``Localizer.submit``."""
        return self._now, self._now.submit(prepared)

    def collect(self, ticket: Ticket) -> Outputs:
        """See ``Localizer.collect``; the outputs are of the localizer that began the call."""
        localizer, its_ticket = ticket
        found: Outputs = localizer.collect(its_ticket)
        return found

    def read(
        self,
        outputs: Outputs,
        place: int,
        width_px: int,
        height_px: int,
        every: bool = False,
    ) -> Localization:
        """See ``Localizer.read``."""
        return outputs.localizer.read(outputs, place, width_px, height_px, every)

    def finished(
        self, setting: str, number: int, engine_ms: float, image_ms: float, now_s: float
    ) -> None:
        """Judge a finished frame, and step where that is called for; see
        ``BudgetController.observe``.

        Raises:
            Exception: an engine could not be built, for a reason that is not a ``SightlineError``
                (those give the preset up).
        """
        if setting != self.setting:
            return  # from before the last step
        self._close_far_ones()
        self._look_at_opening()
        if self._opening is None and self._next_step is None:
            self._next_step = self._controller.observe(now_s, image_ms, engine_ms)
            if self._controller.missed and not self._missed:
                cheapest = (
                    f"even the cheapest setting ({self.preset.name}) takes"
                    f" {self._controller.p90_ms:.1f} ms (p90)"
                )
                self._missed = f"{cheapest}, over the budget of {self._controller.budget_ms:g} ms"
                self._notify(self._missed)
        if self._next_step is not None:
            self._step(self._next_step, number, now_s)
        elif self._opening is None:
            self._open_next_cheaper()

    def summary(self) -> dict[str, Any]:
        """For a run's summary: ``budget_ms``, the last ``preset``, the ``steps``, and
        ``over_budget``: in words, or None.
        """
        budget = {"budget_ms": self._controller.budget_ms, "rung": self.preset.name}
        return {**budget, "steps": self.steps, "over_budget": self._missed or None}

    def close(self) -> None:
        """Free every engine, once the one that is being built is ready."""
        self._opener.shutdown(cancel_futures=True)
        for localizer in self._open.values():
            localizer.close()

    def _opened(
        self, choice: EngineOptions, notify: Callable[[str], None] | None = None
    ) -> Localizer:
        return open_localizer(choice, notify, self._streams, self._images)

    def _step(self, step: Step, number: int, now_s: float) -> None:
        """Make the step if its engine is there; else see to it that it will be."""
        target = self._ladder[step.target]
        if target.choice not in self._open:
            if self._opening is None:
                self._opening = step.target, self._opener.submit(self._opened, target.choice)
            return
        self._notify(f"frame {number}: {self.preset.name} → {target.name}: {step.why}")
        self.steps.append(
            {
                "frame": number,
                "from": self.preset.name,
                "to": target.name,
                "why": step.why,
            }
        )
        self._controller.stepped(step, now_s)
        self._use(self._open[target.choice])
        self._next_step = None

    def _open_next_cheaper(self) -> None:
        cheaper = self._controller.cheaper()
        if cheaper and self._ladder[cheaper[0]].choice not in self._open:
            self._opening = (
                cheaper[0],
                self._opener.submit(self._opened, self._ladder[cheaper[0]].choice),
            )

    def _look_at_opening(self) -> None:
        if self._opening is None or not self._opening[1].done():
            return
        (index, future), self._opening = self._opening, None
        try:
            localizer = future.result()
            if self._lacks(self._looked_for, localizer):
                localizer.close()
                raise ModelError("it does not name boxes, and a name is looked for")
            localizer.abstain_below(self._now.asked_confidence)  # it may have changed meanwhile
            self._open[self._ladder[index].choice] = localizer
        except SightlineError as error:
            self._controller.give_up(index)
            self._next_step = None
            self._notify(f"left out: {self._ladder[index].name}: {error}")

    def _close_far_ones(self) -> None:
        """Called when a frame of this preset is finished: frames come in order, so no other engine
        has one any more.
        """
        index = self._controller.preset
        near = {preset.choice for preset in self._ladder[max(0, index - 1) : index + 2]}
        if self._next_step is not None:
            near.add(self._ladder[self._next_step.target].choice)
        for choice in [choice for choice in self._open if choice not in near]:
            self._open.pop(choice).close()


class Pace:
    """What a frame takes of the loop's time, waiting for the source not counted, for the sinks
    counted.

    With several under way, answers may come in bunches: it is the mean of as many frames.
    """

    def __init__(self, run: Run, under_way: int) -> None:
        self._run = run
        self._last_ns = time.monotonic_ns()
        self._last_idle_ms = 0.0
        self._last_ms: deque[float] = deque(maxlen=under_way)

    def frame_ms(self) -> float:
        """Called once for each frame that the engine has answered."""
        now_ns, idle_ms = time.monotonic_ns(), self._run.idle_ms["source"]
        self._last_ms.append((now_ns - self._last_ns) / 1e6 - (idle_ms - self._last_idle_ms))
        self._last_ns, self._last_idle_ms = now_ns, idle_ms
        return sum(self._last_ms) / len(self._last_ms)


def open_with_notes(
    choice: EngineOptions,
    console: Console,
    streams: int = 1,
    batch: int = 1,
    first_px: tuple[int, int] | None = None,
) -> Localizer:
    """Open what was chosen and say what it is; the arguments and errors are those of
    ``engines.choose.open_localizer``.
    """
    reasons: list[str] = []
    with console.status(f"building {choice.model} ..."):
        localizer = open_localizer(choice, reasons.append, streams, batch, first_px)
    engine = localizer.engine
    what = (
        f"{choice.model} at {localizer.size_px} px on {engine.backend} {engine.precision},"
        f" {engine.device}"
    )
    console.print("; ".join([what, *reasons]), style="dim", soft_wrap=True, markup=False)
    if choice.least_confidence is None and localizer.finds_boxes and localizer.limits is None:
        console.print(NOTHING_TELLS, style="yellow")
    if method_of(choice.method).fitted and localizer.box_reader.startswith("heuristic"):
        console.print(
            f"no fitted head for this network yet ('fit' makes one); {localizer.box_reader}",
            style="yellow",
        )
    return localizer


def open_within(
    choice: EngineOptions,
    budget_ms: float | None,
    console: Console,
    streams: int = 1,
    batch: int = 1,
    first_px: tuple[int, int] | None = None,
) -> Localizer:
    """One engine, or one that changes to hold a budget of so many milliseconds a frame."""
    if budget_ms is None:
        return open_with_notes(choice, console, streams, batch, first_px)
    with console.status(f"building {choice.model} ..."):
        budgeted = BudgetLocalizer(
            choice,
            budget_ms,
            lambda line: console.print(line, style="yellow"),
            streams=streams,
            batch=batch or 1,
        )
    what = f"{choice.model} within {budget_ms:g} ms a frame, from {budgeted.preset.name}"
    console.print("; ".join([what, *budgeted.notes]), style="dim", soft_wrap=True, markup=False)
    return budgeted


def classifier_with_notes(choice: EngineOptions, console: Console) -> Classifier:
    """The network that is chosen; what was found or assumed of a foreign one is said.

    Raises:
        SightlineError: see ``EngineOptions.classifier``.
    """
    classifier = choice.classifier()
    for note in classifier.network.notes:
        console.print(note, style="dim", soft_wrap=True, markup=False)
    return classifier
