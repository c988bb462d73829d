"""PyTorch on an NVIDIA GPU: the reference in half precision, with static memory, slots and replayed
CUDA graphs.

For machines without TensorRT. What only a GPU has (pinned memory, streams, events, graphs) is left
out on the processor, where the same class runs in the tests.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.backends.registry import EngineRequest
from engines.backends.torch_reference import DTYPES, TorchEngine
from engines.build import WANTED_CLASS
from engines.engine import Array, GpuTimes
from engines.errors import EngineError
from engines.head import Head
from engines.heuristic import Heuristic
from engines.maps import MapSpec
from engines.networks.registry import Classifier
from engines.preprocess import IMAGE

WARM_UP_RUNS = 3  # before a capture, as PyTorch's notes on CUDA graphs ask for


def open_torch(
    classifier: Classifier,
    spec: MapSpec,
    head: Head | Heuristic | None,
    precision: str,
    batch: int = 1,
) -> TorchEngine:
    """On a GPU where PyTorch sees one (fp16 unless told otherwise), else the fp32 reference on the
    processor.

    Raises:
        EngineError: the precision cannot be had.
    """
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "fp16" if on_gpu else "fp32"
    if precision not in DTYPES:
        raise EngineError(f"PyTorch engines run in {', '.join(DTYPES)}, not {precision}")
    if on_gpu:
        return TorchStreamEngine(classifier, spec, head, batch, device="cuda", precision=precision)
    if precision != "fp32":
        raise EngineError(
            f"the torch backend is the fp32 reference where PyTorch sees no GPU, not {precision}:"
            " use backend openvino",
            option=("backend", "precision"),
        )
    return TorchEngine(classifier, spec, head, batch)


def open_engine(request: EngineRequest) -> TorchEngine:
    """The engine that is asked for, see ``open_torch``."""
    return open_torch(
        request.classifier, request.spec, request.head, request.precision, request.batch
    )


@dataclass
class _Slot:
    """Static memory of one call: inputs and outputs on the host (pinned on a GPU machine) and on
    the device.
    """

    host: dict[str, Tensor]
    device: dict[str, Tensor]
    computed: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    events: tuple[Any, ...] = ()
    graph: Any = None


class TorchStreamEngine(TorchEngine):
    """See ``engines.engine.Engine``.

    Args:
        classifier, spec, head, batch: as for ``TorchEngine``.
        device: ``cuda``, or ``cpu`` for tests.
        precision: ``fp16``, ``bf16`` or ``fp32``.
        slots: how many calls may be under way.
    """

    on_gpu = True

    def __init__(
        self,
        classifier: Classifier,
        spec: MapSpec | None = None,
        head: Head | Heuristic | None = None,
        batch: int = 1,
        *,
        device: str = "cuda",
        precision: str = "fp16",
        slots: int = 2,
    ) -> None:
        super().__init__(
            classifier, spec, head, batch, device=device, precision=precision, slots=slots
        )
        self._gpu = self._place.type == "cuda"
        if self._gpu:
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.device = f"{torch.cuda.get_device_name(self._place)}, PyTorch {torch.__version__}"
        self._stream: Any = torch.cuda.Stream(self._place) if self._gpu else None  # type: ignore[no-untyped-call]
        self._slots = [self._new_slot() for _ in range(slots)]

    def _free(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._slots = []

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._gpu else nullcontext()

    def _new_slot(self) -> _Slot:
        host = {s.name: torch.from_numpy(np.zeros(s.shape, s.dtype)) for s in self.inputs}
        host = {name: tensor.pin_memory() for name, tensor in host.items()} if self._gpu else host
        slot = _Slot(
            host, {name: tensor.to(self._place, copy=True) for name, tensor in host.items()}
        )
        with self._on_stream():
            for _ in range(WARM_UP_RUNS if self._gpu else 1):
                slot.computed = self._compute(slot)
        if self._stream is not None:
            self._stream.synchronize()
            slot.graph = torch.cuda.CUDAGraph()
            slot.events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(4))  # type: ignore[no-untyped-call]
            with torch.cuda.graph(slot.graph, stream=self._stream):
                slot.computed = self._compute(slot)
        slot.results = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._gpu)
            for name, tensor in slot.computed.items()
        }
        return slot

    def _compute(self, slot: _Slot) -> dict[str, Tensor]:
        return self.compute(slot.device[IMAGE], slot.device[WANTED_CLASS])

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        slot = self._slots[place]
        for name, value in feeds.items():
            slot.host[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
        with self._on_stream():
            self._passed(slot, 0)
            for name, tensor in slot.host.items():
                slot.device[name].copy_(tensor, non_blocking=True)
            self._passed(slot, 1)
            if slot.graph is not None:
                slot.graph.replay()
            else:
                slot.computed = self._compute(slot)
            self._passed(slot, 2)
            for name, tensor in slot.computed.items():
                slot.results[name].copy_(tensor, non_blocking=True)
            self._passed(slot, 3)

    @staticmethod
    def _passed(slot: _Slot, step: int) -> None:
        """Record the event behind that step: begun, copied, computed, done."""
        if slot.events:
            slot.events[step].record()

    def _finish(self, place: int) -> dict[str, Array]:
        slot = self._slots[place]
        if slot.events:
            slot.events[-1].synchronize()
            self.times = GpuTimes(
                *(earlier.elapsed_time(later) for earlier, later in pairwise(slot.events))
            )
        return self.finish({name: tensor.numpy().copy() for name, tensor in slot.results.items()})
