"""The interface of every engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputError

Array = NDArray[Any]

Ticket = Any

"""What ``Engine.submit`` gives for a call that is under way: each backend's own affair."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and static shape of an engine's input or output."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


class Engine(Protocol):
    """A compiled graph. Not thread-safe: one thread owns it.

    ``infer`` runs and waits. ``submit`` and ``collect`` are its two halves, so that a caller can do
    other things meanwhile and keep several calls under way.

    Attributes:
        backend: ``openvino``, ``torch``, ``mock`` ...
        precision: ``fp32``, ``bf16`` ...
        device: the processor in words.
        inputs, outputs: in the graph's order.
        metadata: what ``engines.build`` stamped on the graph.
        slots: how many calls may be under way at once; with that many the processor never waits for
            the caller.
    """

    backend: str
    precision: str
    device: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    slots: int

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
        ...

    def collect(self, ticket: Ticket) -> dict[str, Array]:
        """Wait for a call and take its outputs, as ``infer`` returns them. Once for each ticket, in
        the order of submission.

        Raises:
            EngineError: the call failed.
        """
        ...

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and wait.

        Args:
            feeds: one array per input, of exactly the specified type and shape.

        Returns:
            One array per output, the caller's to keep.

        Raises:
            InputError: a feed is missing, unknown, or of the wrong type or shape.
            EngineError: the engine is closed, or the call failed.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds, once the calls under way have ended. Calling it twice is
        fine.
        """
        ...


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
