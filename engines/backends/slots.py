"""The layout of tensors in a GPU engine's buffers, and the order in which its slots are used. It
needs no GPU.

Each slot has one block of host memory and one of device memory for all inputs, and one of each for
all outputs, so that a frame is one copy to the device and one back, however many tensors there
are.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engines.engine import Array, TensorSpec, check_feeds
from engines.errors import EngineError

ALIGNMENT = 256  # bytes: what cudaMalloc aligns to, and TensorRT expects of every tensor


@dataclass(frozen=True)
class Layout:
    """Tensors one behind the other in one block of memory.

    Attributes:
        specs: the tensors.
        offsets: where each begins, in bytes, a multiple of ``ALIGNMENT``.
        size: bytes of the whole block, never 0.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, specs: Sequence[TensorSpec]) -> "Layout":
        """Lay out tensors in their order."""
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += -(-size_of(spec) // ALIGNMENT) * ALIGNMENT
        return cls(tuple(specs), tuple(offsets), max(end, ALIGNMENT))

    def views(self, block: Array) -> dict[str, Array]:
        """The tensors inside a uint8 block of ``size`` bytes, without copying."""
        return {
            spec.name: block[start : start + size_of(spec)].view(spec.dtype).reshape(spec.shape)
            for spec, start in zip(self.specs, self.offsets, strict=True)
        }

    def addresses(self, base: int) -> dict[str, int]:
        """The address of each tensor, where the block begins at ``base``."""
        return {
            spec.name: base + start for spec, start in zip(self.specs, self.offsets, strict=True)
        }


def size_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize


class Ring:
    """Slots that are filled and emptied in turn: what was submitted first is collected first."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise EngineError(f"an engine needs at least one slot, not {slots}")
        self._free: deque[int] = deque(range(slots))
        self._busy: deque[int] = deque()

    @property
    def waiting(self) -> int:
        """How many are submitted and not collected."""
        return len(self._busy)

    def take(self) -> int:
        """The next free slot, now busy.

        Raises:
            EngineError: all are busy.
        """
        if not self._free:
            raise EngineError(
                f"all {len(self._busy)} slots of the engine are busy: collect a result before"
                " submitting more"
            )
        self._busy.append(self._free.popleft())
        return self._busy[-1]

    def undo(self) -> None:
        """Give back the slot that was taken last: nothing came of it."""
        self._free.appendleft(self._busy.pop())

    def oldest(self) -> int:
        """The slot that was taken first.

        Raises:
            EngineError: nothing was submitted.
        """
        if not self._busy:
            raise EngineError("nothing was submitted to this engine: there is no result to collect")
        return self._busy[0]

    def release(self) -> None:
        """Free the slot that was taken first."""
        self._free.append(self._busy.popleft())


@dataclass(frozen=True)
class GpuTimes:
    """What one call took on the GPU, in trtexec's terms: milliseconds between events on its stream.

    Attributes:
        h2d_ms: inputs, from pinned memory to the device.
        compute_ms: the graph.
        d2h_ms: outputs, from the device to pinned memory.
    """

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class SlottedEngine(ABC):
    """The calls of ``engines.engine.Engine`` for an engine whose slots take turns.

    One thread at a time: it may be handed from the one that opened it to the one that feeds it.

    Args:
        slots: how many calls may be under way.

    Attributes:
        times: of the call that was collected last; None before, and where no GPU measures them.
        backend, precision, device, inputs, slots: see ``engines.engine.Engine``.
    """

    backend: str
    precision: str
    device: str
    inputs: tuple[TensorSpec, ...]
    times: GpuTimes | None = None

    def __init__(self, slots: int) -> None:
        self._ring = Ring(slots)
        self.slots = slots
        self._in_use = threading.Lock()

    def submit(self, feeds: Mapping[str, Array]) -> int:
        """Start a call. See ``engines.engine.Engine.submit``."""
        check_feeds(self.inputs, feeds)
        with self._alone():
            place = self._ring.take()
            try:
                self._start(place, feeds)
            except BaseException:
                self._ring.undo()
                raise
            return place

    def collect(self, ticket: int) -> dict[str, Array]:
        """Wait for a call. See ``engines.engine.Engine.collect``."""
        with self._alone():
            if ticket != self._ring.oldest():
                raise EngineError(
                    "results are collected in the order in which they were submitted: collect the"
                    " older one first"
                )
            try:
                return self._finish(ticket)
            finally:
                self._ring.release()

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``engines.engine.Engine.infer``."""
        self._check_open()
        if self._ring.waiting:
            raise EngineError("a submitted call is not collected yet: collect it before 'infer'")
        return self.collect(self.submit(feeds))

    def close(self) -> None:
        """See ``engines.engine.Engine.close``."""
        if self._is_open():
            with self._alone():
                self._free()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the engine for one call.

        Raises:
            EngineError: it is closed, or another thread is in the middle of a call.
        """
        self._check_open()
        if not self._in_use.acquire(blocking=False):
            raise EngineError(
                "this engine is in the middle of a call in another thread: one at a time submits,"
                " collects or closes"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _check_open(self) -> None:
        if not self._is_open():
            raise EngineError("this engine is closed: build it again")

    @abstractmethod
    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        """Put a call on its way in that slot; the feeds fit and are read before it comes back."""

    @abstractmethod
    def _finish(self, place: int) -> dict[str, Array]:
        """Wait for that slot's call; its outputs, the caller's to keep. Sets ``times`` where it
        can.
        """

    @abstractmethod
    def _is_open(self) -> bool:
        """Whether it was not closed yet."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of everything, once what is under way has ended."""


def check_tensors(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """Hold a compiled engine's tensors against those of the graph that it should be of.

    Args:
        found: name to (``input`` or ``output``, shape) as the engine says.
        inputs: of the graph; one that nothing reads may be gone from the engine.
        outputs: of the graph.

    Raises:
        EngineError: it is another graph's engine.
    """
    sides = {
        **{s.name: ("input", s.shape) for s in inputs},
        **{s.name: ("output", s.shape) for s in outputs},
    }
    missing = [s.name for s in outputs if s.name not in found]
    wrong = [name for name, value in found.items() if sides.get(name) != value]
    if missing or wrong:
        name = (missing or wrong)[0]
        raise EngineError(
            f"this engine is of another graph (tensor '{name}' does not fit): run 'build --rebuild'"
        )
