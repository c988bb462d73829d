"""Where an engine's tensors lie in a buffer, and whose turn it is: what a GPU engine decides without a GPU.

Each slot has one block of host memory and one of device memory for all inputs, and one of each for all outputs, so that a
frame is one copy to the device and one back, however many tensors there are.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.base import Array, EngineError, TensorSpec

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
        return {spec.name: base + start for spec, start in zip(self.specs, self.offsets, strict=True)}


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
            raise EngineError(f"all {len(self._busy)} slots of the engine are busy: collect a result before submitting more")
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


def check_tensors(
    found: Mapping[str, tuple[str, tuple[int, ...]]], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Hold a compiled engine's tensors against those of the graph that it should be of.

    Args:
        found: name to (``input`` or ``output``, shape) as the engine says.
        inputs: of the graph; one that nothing reads may be gone from the engine.
        outputs: of the graph.

    Raises:
        EngineError: it is another graph's engine.
    """
    sides = {**{s.name: ("input", s.shape) for s in inputs}, **{s.name: ("output", s.shape) for s in outputs}}
    missing = [s.name for s in outputs if s.name not in found]
    wrong = [name for name, value in found.items() if sides.get(name) != value]
    if missing or wrong:
        name = (missing or wrong)[0]
        raise EngineError(f"this engine is of another graph (tensor '{name}' does not fit): run 'build --rebuild'")
