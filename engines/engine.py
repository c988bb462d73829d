"""The base of all engines checks inputs, slots and tickets, and a backend fills in three methods.
Engines made of several engines derive from another base here.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engines.errors import EngineError, InputError

Array = NDArray[Any]
Ticket = Any
"""What ``submit`` gives for a call that is under way, to be handed to ``collect`` as it is."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and static shape of an engine's input or output."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: onnx.ValueInfoProto) -> "TensorSpec":
        """What a graph says of its input or output."""
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        return cls(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


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


class Engine(ABC):
    """A compiled graph, and calls of it that can be under way at once.

    ``infer`` runs and waits. ``submit`` and ``collect`` are its two halves, so that a caller can do
    other things meanwhile and keep several calls under way. One thread at a time: an engine may be
    handed from the one that opened it to the one that feeds it.

    Inputs, slots, tickets and the closed state are checked here, for every backend alike. A backend
    calls ``__init__`` of this class, sets the attributes without a default, and fills in
    ``_start``, ``_finish`` and ``_free``.

    Args:
        slots: how many calls may be under way at once.

    Attributes:
        backend: name of the backend, such as ``openvino``.
        precision: ``fp32``, ``bf16`` ...
        device: the processor in words.
        inputs, outputs: in the graph's order.
        metadata: what ``engines.build`` stamped on the graph.
        slots: how many calls may be under way at once; with that many the processor never waits for
            the caller.
        losses: what this machine costs the engine, in words for the user.
        on_gpu: whether it is made for a GPU.
        times: of the call that was collected last, where a GPU measures them; else None.
        captured: whether calls run as recorded CUDA graphs; None where there is no GPU to do so.

    Raises:
        EngineError: there is not even one slot.
    """

    backend: str
    precision: str
    device: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    losses: Sequence[str] = ()
    on_gpu: bool = False
    times: GpuTimes | None = None
    captured: bool | None = None

    def __init__(self, slots: int = 1) -> None:
        if slots < 1:
            raise EngineError(f"an engine needs at least one slot, not {slots}")
        self.slots = slots
        self._free_slots = deque(range(slots))
        self._under_way: dict[Ticket, int] = {}
        self._tickets = count()
        self._closed = False
        self._in_use = threading.Lock()

    def submit(self, feeds: Mapping[str, Array]) -> Ticket:
        """Start a call and come back at once, where the backend can.

        Args:
            feeds: as for ``infer``; left alone by the caller until the call is collected.

        Returns:
            The ticket to ``collect``.

        Raises:
            InputError: see ``infer``.
            EngineError: the engine is closed, or ``slots`` calls are under way.
        """
        check_feeds(self.inputs, feeds)
        with self._alone():
            if not self._free_slots:
                raise EngineError(
                    f"{self.slots} calls are under way, which is all this engine takes: collect one"
                    " first"
                )
            self._start(self._free_slots[0], feeds)
            ticket = next(self._tickets)
            self._under_way[ticket] = self._free_slots.popleft()
            return ticket

    def collect(self, ticket: Ticket) -> dict[str, Array]:
        """Wait for a call and take its outputs, as ``infer`` returns them. Once for each ticket, in
        the order of submission.

        Raises:
            EngineError: the call failed, was collected before, or is not the oldest; or the engine
                is closed.
        """
        with self._alone():
            if ticket not in self._under_way:
                raise EngineError("this call was collected before: submit another one")
            if ticket != next(iter(self._under_way)):
                raise EngineError(
                    "results are collected in the order in which they were submitted: collect the"
                    " older one first"
                )
            try:
                return self._finish(self._under_way[ticket])
            finally:
                self._free_slots.append(self._under_way.pop(ticket))

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and wait.

        Args:
            feeds: one array per input, of exactly the specified type and shape.

        Returns:
            One array per output, the caller's to keep.

        Raises:
            InputError: a feed is missing, unknown, or of the wrong type or shape.
            EngineError: the engine is closed, a submitted call is not collected yet, or the call
                failed.
        """
        self._check_open()
        if self._under_way:
            raise EngineError("a submitted call is not collected yet: collect it before 'infer'")
        return self.collect(self.submit(feeds))

    def close(self) -> None:
        """Free what the engine holds, once the calls under way have ended. Calling it twice is
        fine.

        Raises:
            EngineError: another thread is in the middle of a call.
        """
        if self._closed:
            return
        with self._alone():
            self._closed = True
            self._free()
            self._under_way.clear()

    @property
    def under_way(self) -> int:
        """How many calls are submitted and not collected."""
        return len(self._under_way)

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
        if self._closed:
            raise EngineError("this engine is closed: build it again")

    def _describe(self, model: onnx.ModelProto) -> None:
        """Take inputs, outputs and metadata from the graph that is compiled."""
        self.inputs = tuple(TensorSpec.of(value) for value in model.graph.input)
        self.outputs = tuple(TensorSpec.of(value) for value in model.graph.output)
        self.metadata = {prop.key: prop.value for prop in model.metadata_props}

    @abstractmethod
    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        """Put a call on its way in the slot of that number, which is free. The feeds fit
        ``inputs``.
        """

    @abstractmethod
    def _finish(self, place: int) -> dict[str, Array]:
        """Wait for the call in that slot, and return its outputs, the caller's to keep. Sets
        ``times`` where a GPU measures them.
        """

    @abstractmethod
    def _free(self) -> None:
        """Let go of everything, once what is under way has ended. Called once."""


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> None:
    """Raise InputError, naming tensor, what came, what was expected and what to do, unless the
    feeds fit the specs.
    """
    expected = {spec.name: spec for spec in specs}
    for name in feeds:
        if name not in expected:
            raise InputError(
                f"unknown input '{name}': this engine takes {', '.join(expected)}; leave it out"
            )
    for name, spec in expected.items():
        if name not in feeds:
            raise InputError(f"input '{name}' is missing: pass an array {spec}")
        came = feeds[name]
        if came.dtype != spec.dtype or came.shape != spec.shape:
            got = TensorSpec(name, came.dtype, came.shape)
            todo = (
                "convert it with .astype"
                if came.shape == spec.shape
                else "resize it or build for that shape"
            )
            raise InputError(f"input '{name}': got {got}, expected {spec}; {todo}")


Compile = Callable[[onnx.ModelProto], Engine]
NOBODY = -1
DETECTION_WIDTH = 6


@dataclass(frozen=True)
class Found:
    """One object: its box in fractions of width and height, its class, its score."""

    box_xyxy: tuple[float, ...]
    class_index: int
    score: float


class CompoundEngine(Engine):
    """See ``engines.engine.Engine``; one image a call.

    Outputs: as of ``engines.build.build_graph``, and ``detections`` float32 ``[1, objects, 6]``:
        x0, y0, x1, y1 in 0..1, class
    and score of each object, best first; class -1 where there are fewer.

    Args:
        first: takes the image and the wanted class.
        others: asked by ``search``.
        map_shape: of the map that ``search`` gives, (h, w).
        objects: how many detections at most.

    Attributes:
        calls: how many engine calls were made since the engine was opened.
    """

    def __init__(
        self,
        first: Engine,
        others: Sequence[Engine],
        map_shape: tuple[int, int],
        objects: int,
        metadata: Mapping[str, str],
    ) -> None:
        super().__init__(first.slots)
        self.backend = first.backend
        self.precision = first.precision
        self.device = first.device
        self.losses = first.losses
        self.inputs = first.inputs
        self.metadata = metadata
        self.outputs = (
            TensorSpec("class_index", np.dtype(np.int64), (1,)),
            TensorSpec("score", np.dtype(np.float32), (1,)),
            TensorSpec("map", np.dtype(np.float32), (1, *map_shape)),
            TensorSpec("box_xyxy", np.dtype(np.float32), (1, 4)),
            TensorSpec("detections", np.dtype(np.float32), (1, objects, DETECTION_WIDTH)),
        )
        self.calls = 0
        self._first = first
        self._others = tuple(others)
        self._objects = objects
        self._asked: dict[int, tuple[Ticket, Mapping[str, Array]]] = {}

    @abstractmethod
    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """Find the objects of one image.

        Args:
            outputs: of the first graph.
            feeds: what it was given.

        Returns:
            (the objects, best first, at least one; the map ``[h, w]``).
        """

    def first_feeds(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """What the first graph gets of the feeds: all of them, as they are."""
        return feeds

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        """Starts the first graph."""
        self.calls += 1
        self._asked[place] = (self._first.submit(self.first_feeds(feeds)), feeds)

    def _finish(self, place: int) -> dict[str, Array]:
        """The search itself is done here."""
        ticket, feeds = self._asked.pop(place)
        outputs = self._first.collect(ticket)
        found, map_hw = self.search(outputs, feeds)
        rows = np.full((1, self._objects, DETECTION_WIDTH), 0, np.float32)
        rows[:, :, 4] = NOBODY
        for row, each in enumerate(found[: self._objects]):
            rows[0, row] = [*each.box_xyxy, each.class_index, each.score]
        return {
            "class_index": outputs["class_index"],
            "score": outputs["score"],
            "map": map_hw[None].astype(np.float32),
            "box_xyxy": np.array([found[0].box_xyxy], np.float32),
            "detections": rows,
        }

    def ask(self, engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one of the others, counted."""
        self.calls += 1
        return engine.infer(feeds)

    def _free(self) -> None:
        for engine in (self._first, *self._others):
            engine.close()
