"""Engines on GPUs under every order that a GPU may work in: no output is read too early, no memory
is used again too soon, nothing is left behind.

The driver is simulated (``tests.engines.driver``). A schedule says what is asked of an engine, and
which stream goes on when.
"""

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from engines.backends import tensorrt as backend
from engines.backends.cuda import BindingsDriver
from engines.build import IMAGE, WANTED_CLASS
from engines.engine import TensorSpec
from engines.errors import EngineError
from tests.engines.driver import OUT_OF_MEMORY, Pycuda
from tests.engines.gpu import machine_with_gpu

SHAPE = (1, 2, 3, 3)
INPUTS = (
    TensorSpec(IMAGE, np.dtype(np.uint8), SHAPE),
    TensorSpec(WANTED_CLASS, np.dtype(np.int64), (1,)),
)
OUTPUTS = (
    TensorSpec("class_index", np.dtype(np.int64), (1,)),
    TensorSpec("map", np.dtype(np.float32), SHAPE[:3]),
)
MODEL = helper.make_model(
    helper.make_graph(
        [],
        "made up",
        *(
            [
                helper.make_tensor_value_info(
                    spec.name, helper.np_dtype_to_tensor_dtype(spec.dtype), spec.shape
                )
                for spec in specs
            ]
            for specs in (INPUTS, OUTPUTS)
        ),
    )
)
assert MODEL.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
ACTIONS = ("submit", "collect", "submit", "collect", "there", "infer", "fails", "ctrl-c")
CALLS = ("cuMemcpyHtoDAsync", "cuGraphLaunch", "execute", "cuEventRecord", "cuEventSynchronize")
ENDS = ("close", "close there", "drop", "fails")


def answer(feeds):
    """What the made-up plan computes: it depends on every byte of the inputs."""
    image, wanted = feeds[IMAGE], feeds[WANTED_CLASS]
    return {
        "class_index": wanted + 7,
        "map": (image.astype(np.float32) * [1, 3, 5]).sum(-1, dtype=np.float32) + wanted[0],
    }


@dataclass(frozen=True)
class Schedule:
    """What is asked of an engine, and in which order the GPU works: ``choices`` are taken one by
    one, and then the first stream always goes on.
    """

    actions: tuple[str, ...]
    choices: bytes
    slots: int
    spin: bool
    capture: bool
    end: str
    pycuda: bool


SCHEDULES = st.builds(
    Schedule,
    actions=st.lists(st.sampled_from(ACTIONS), max_size=16).map(tuple),
    choices=st.binary(max_size=600),
    slots=st.integers(1, 3),
    spin=st.booleans(),
    capture=st.booleans(),
    end=st.sampled_from(ENDS),
    pycuda=st.booleans(),
)


def schedule_of(seed):
    order = random.Random(seed)
    actions = tuple(order.choices(ACTIONS, k=16))
    choices = order.randbytes(800)
    flags = [order.random() < 0.5 for _ in range(3)]
    return Schedule(actions, choices, order.randint(1, 3), *flags[:2], order.choice(ENDS), flags[2])


class Caller:
    """Asks an engine, keeps what it answers, and knows what it should have answered."""

    def __init__(self, engine, machine):
        self.engine, self.machine, self.under_way = engine, machine, []
        self.answers, self.sent = [], 0

    def submit(self):
        if len(self.under_way) == self.engine.slots:
            return self.collect()
        self.sent += 1
        image = np.random.default_rng(self.sent).integers(1, 255, SHAPE).astype(np.uint8)
        feeds = {IMAGE: image, WANTED_CLASS: np.array([self.sent])}
        expected = answer(feeds)
        ticket = self.engine.submit(feeds)
        image[:] = 0  # it was taken at once
        self.under_way.append((ticket, expected))

    def collect(self):
        if self.under_way:
            ticket, expected = self.under_way.pop(0)
            self.answers.append((self.engine.collect(ticket), expected))

    def infer(self):
        while self.under_way:
            self.collect()
        self.submit()
        self.collect()

    def there(self):
        """In another thread."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.submit).result()
            pool.submit(self.collect).result()

    def fails(self):
        """A call of the driver fails once."""
        call = CALLS[self.sent % len(CALLS)]
        self.machine.driver.failing[call] = OUT_OF_MEMORY
        try:
            for each in (self.submit, self.collect):
                with suppress(EngineError):
                    each()
        finally:
            self.machine.driver.failing.clear()

    def interrupted(self):
        """Ctrl-C comes while it waits, and the engine is used on."""
        self.machine.driver.interrupted = True
        with suppress(KeyboardInterrupt):
            self.collect()
        self.machine.driver.interrupted = False

    def check(self):
        """All answers, also the old ones: nobody may have written on them since."""
        for found, expected in self.answers:
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)


def run(schedule):
    """Raise AssertionError, or what the engine raised, if it does not stand this schedule."""
    choices = iter(schedule.choices)
    made_up = SimpleNamespace(inputs=INPUTS, outputs=OUTPUTS, infer=answer)
    with pytest.MonkeyPatch.context() as patch:
        machine = machine_with_gpu(
            patch,
            read=lambda plan: made_up,
            choose=lambda count: next(choices, 0) % count,
            face=Pycuda if schedule.pycuda else BindingsDriver,
        )
        driver = machine.driver
        if schedule.end == "fails":
            driver.failing["cuMemcpyHtoDAsync"] = OUT_OF_MEMORY
            with pytest.raises(EngineError):
                backend.TensorRtEngine(b"", MODEL, "fp32", schedule.slots)
            driver.failing.clear()
        engine = backend.TensorRtEngine(
            b"", MODEL, "fp32", schedule.slots, schedule.spin, schedule.capture
        )
        caller = Caller(engine, machine)
        try:
            assert engine.captured == schedule.capture
            for action in schedule.actions:
                getattr(caller, {"ctrl-c": "interrupted"}.get(action, action))()
                caller.check()
                assert not driver.races
        finally:
            if schedule.end == "close there":
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(engine.close).result()
            elif schedule.end != "drop":
                engine.close()
            caller.engine = None
            del engine
            if any(driver.alive.values()):
                gc.collect()
        caller.check()
        assert not driver.races
        assert not any(driver.alive.values()), driver.alive
        assert not driver.current


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SCHEDULES)
def test_any_schedule(schedule):
    run(schedule)


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(max_examples=5000, deadline=None)
@given(SCHEDULES)
def test_thousands_of_schedules(schedule):
    run(schedule)


def ends_at_once(patch):
    """``collect`` does not wait for its event."""
    for face in (Pycuda, BindingsDriver):
        made = face.__init__

        def init(self, driver, made=made):
            made(self, driver)
            event = self.Event

            def Event(flags):
                one = event(flags)
                one.synchronize, one.query = lambda: None, lambda: True
                one.time_till = lambda later: 1.0
                return one

            self.Event = Event

        patch.setattr(face, "__init__", init)


def never_waits(place):
    """The stream of that number waits for no other."""

    def plant(patch):
        streams = backend._Streams

        def made(*three):
            three[place].wait_for_event = lambda event: None
            return streams(*three)

        patch.setattr(backend, "_Streams", made)

    return plant


def gives_its_own_memory(patch):
    """Outputs are what the next call of the slot writes on."""

    def finish(session, place, spin, real=backend._Session.finish):
        _, times = real(session, place, spin)
        return dict(session._slots[place].views[1]), times

    patch.setattr(backend._Session, "finish", finish)


def forgets_what_is_under_way(patch):
    """A slot is filled again after a call that failed or was left, without waiting for it."""

    class Slot(backend._Slot):
        under_way = property(lambda self: False, lambda self, value: None)

    patch.setattr(backend, "_Slot", Slot)


def frees_at_once(patch):
    """``close`` waits for nothing."""
    patch.setattr(backend._Streams, "synchronize", lambda self: None)


def one_slot_for_all(patch):
    """All calls use the memory of the first slot."""
    start, finish = backend._Session.start, backend._Session.finish
    patch.setattr(backend._Session, "start", lambda self, place, feeds: start(self, 0, feeds))
    patch.setattr(backend._Session, "finish", lambda self, place, spin: finish(self, 0, spin))


@pytest.mark.parametrize(
    "plant",
    [
        ends_at_once,
        never_waits(1),
        never_waits(2),
        gives_its_own_memory,
        forgets_what_is_under_way,
        frees_at_once,
        one_slot_for_all,
    ],
    ids=lambda plant: plant.__qualname__.split(".")[0],
)
def test_a_planted_race_is_caught(plant, monkeypatch):
    plant(monkeypatch)
    caught = 0
    for seed in range(60):
        try:
            run(schedule_of(seed))
        except (AssertionError, KeyError, EngineError):
            caught += 1
            break
    assert caught, "no schedule showed it"
    monkeypatch.undo()
    run(schedule_of(seed))
