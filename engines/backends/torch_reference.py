"""The reference, with which compiled graphs are compared: PyTorch autograd on independent modules.

On an NVIDIA GPU it runs in half precision, with static memory, slots and replayed CUDA graphs, for
machines without TensorRT. What only a GPU has (pinned memory, streams, events, graphs) is left out
on the processor, where the same class runs in the tests.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.backends.registry import EngineRequest
from engines.backends.torch_dense import TorchDenseHead
from engines.backends.torch_head import TorchHead, TorchHeuristic
from engines.backends.torch_networks import torch_network
from engines.build import CANDIDATES, IMAGE, WANTED_CLASS, AnyHead, check_head, stamp
from engines.dense import DenseHead
from engines.engine import Array, Engine, GpuTimes, TensorSpec
from engines.errors import EngineError, ModelError
from engines.head import Head, Heuristic
from engines.maps import PIXELS, MapSpec
from engines.networks.network import Shape
from engines.networks.registry import Classifier
from engines.typed_graph import GRADIENT_SCALE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def exact_floats() -> Iterator[None]:
    """Products of float32 are float32's inside: PyTorch's convolutions on a GPU round to TF32 else.

    What was set before is set again behind it.
    """
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


class TorchEngine(Engine):
    """See ``engines.engine.Engine``; the same inputs and outputs as ``engines.build.build_graph``.

    Args:
        classifier, spec, head, batch: as for ``build_graph``.
        device: PyTorch's name of it.
        precision: of the network; what comes before and behind it is computed in fp32.
        slots: how many calls may be under way.
    """

    backend = "torch"

    def __init__(
        self,
        classifier: Classifier,
        spec: MapSpec | None = None,
        head: AnyHead | None = None,
        batch: int = 1,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        slots: int = 1,
    ) -> None:
        super().__init__(slots)
        self._answers: dict[int, dict[str, Array]] = {}
        self._spec = spec or (head.spec if head else MapSpec())
        if head is not None:
            check_head(head, classifier, self._spec)
        if self._spec.relu_rule != "plain":
            raise EngineError(
                f"the torch backend knows the plain ReLU rule, not {self._spec.relu_rule}: use"
                " backend openvino",
                option="backend",
            )
        self._head = head
        self._preprocessing = classifier.preprocessing
        self._last = classifier.last_layer()
        self._classless = classifier.network.classless
        self.precision, self._place, self._dtype = (
            precision,
            torch.device(device),
            DTYPES[precision],
        )
        self._network = torch_network(classifier).to(self._place, self._dtype)
        levels = (classifier.preprocessing.mean, classifier.preprocessing.std)
        self._mean, self._std = (
            torch.tensor(v, device=self._place).view(1, 3, 1, 1) for v in levels
        )
        self._scale = GRADIENT_SCALE if precision == "fp16" else 1.0
        self._reader = _reader_of(head, classifier.shape, self._place)
        self.device = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
        self.inputs = (
            TensorSpec(IMAGE, np.dtype(np.uint8), (batch, *classifier.shape, 3)),
            TensorSpec(WANTED_CLASS, np.dtype(np.int64), (batch,)),
        )
        blank = self._run(np.zeros(self.inputs[0].shape, np.uint8), np.zeros(batch, np.int64))
        self.outputs = tuple(
            TensorSpec(name, value.dtype, value.shape) for name, value in blank.items()
        )
        self.metadata = stamp(classifier, self._spec, head, None, self._classes)

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        """Eager PyTorch has no other half: the work is done here."""
        self._answers[place] = self._run(feeds[IMAGE], feeds[WANTED_CLASS])

    def _finish(self, place: int) -> dict[str, Array]:
        return self._answers.pop(place)

    def _free(self) -> None:
        """Nothing is held that Python does not free."""

    def _run(self, image_nhwc_bgr: Array, wanted_class: Array) -> dict[str, Array]:
        image = torch.from_numpy(np.ascontiguousarray(image_nhwc_bgr)).to(self._place)
        computed = self.compute(image, torch.from_numpy(np.asarray(wanted_class)).to(self._place))
        return {name: tensor.cpu().numpy() for name, tensor in computed.items()}

    @exact_floats()
    def compute(self, image_nhwc_bgr: Tensor, wanted_class: Tensor) -> dict[str, Tensor]:
        """The engine's outputs, all computed where the inputs are."""
        pixels = image_nhwc_bgr.permute(0, 3, 1, 2).float()
        if self._preprocessing.order == "rgb":
            pixels = pixels.flip(1)
        pixels = pixels.contiguous().requires_grad_(True)
        scores, layers = self._network.activations(
            ((pixels - self._mean) / self._std).to(self._dtype)
        )
        scores = scores.float()
        self._classes = scores.shape[1]
        chosen = torch.where(wanted_class < 0, scores.argmax(1), wanted_class)
        maps = self._maps(scores, chosen, {**layers, PIXELS: pixels})
        score, logit = (
            each.gather(1, chosen[:, None])[:, 0].detach() for each in (scores.softmax(1), scores)
        )
        if self._classless:
            score = torch.zeros_like(score)
        outputs = {
            "class_index": chosen,
            "score": score,
            "map": maps[self._spec.signal, self._spec.layer],
            "logit": logit,
        }
        if isinstance(self._reader, TorchDenseHead):
            with torch.no_grad():
                last = layers[self._last]
                linear = self._network.last_linear()
                outputs[CANDIDATES] = self._reader(layers, last, scores, linear, wanted_class)
        elif isinstance(self._reader, TorchHeuristic):
            outputs["box_xyxy"] = self._reader(outputs["map"])
        elif self._reader is not None:
            outputs["box_xyxy"] = self._reader(maps, chosen)
        return outputs

    def _maps(
        self, scores: Tensor, chosen: Tensor, tensors: dict[str, Tensor]
    ) -> dict[tuple[str, str], Tensor]:
        """(signal, layer) to maps, by autograd."""
        if self._spec.objective == "gestalt":
            objective = tensors[self._last].float().mean(dim=(1, 2, 3)).sum()
        elif self._spec.objective == "probability":
            objective = scores.softmax(1).gather(1, chosen[:, None]).sum()
        else:
            objective = scores.gather(1, chosen[:, None]).sum()
        features = self._head.features if isinstance(self._head, Head) else ()
        wanted = dict.fromkeys(
            [(self._spec.signal, self._spec.layer), *((f.signal, f.layer) for f in features)]
        )
        layers = list(dict.fromkeys(layer for signal, layer in wanted if signal != "activation"))
        found = (
            torch.autograd.grad(objective * self._scale, [tensors[layer] for layer in layers])
            if layers
            else ()
        )
        gradients = {
            layer: gradient.float() / self._scale
            for layer, gradient in zip(layers, found, strict=True)
        }
        floats = {layer: tensor.detach().float() for layer, tensor in tensors.items()}
        return {
            (signal, layer): self._map(signal, floats[layer], gradients.get(layer))
            for signal, layer in wanted
        }

    def _map(self, signal: str, x: Tensor, gradient: Tensor | None) -> Tensor:
        if signal == "activation":
            return x.mean(1)
        if gradient is None:
            raise ModelError(f"signal '{signal}' is read of a layer that was not differentiated")
        if signal == "gradcam":
            return (gradient.mean(dim=(2, 3), keepdim=True) * x).mean(1).relu()
        if signal == "layercam":
            return (gradient.relu() * x).mean(1).relu()
        if signal != "gradient":
            raise ModelError(
                f"the torch backend knows no signal '{signal}': use backend openvino",
                option="backend",
            )
        return gradient.abs().amax(1) if self._spec.aggregation == "max" else gradient.abs().mean(1)


def _reader_of(
    head: AnyHead | None, shape: Shape, device: torch.device
) -> TorchDenseHead | TorchHead | TorchHeuristic | None:
    """What reads boxes off the maps of a network with an input of that shape."""
    if isinstance(head, DenseHead):
        return TorchDenseHead(head, shape, device)
    if isinstance(head, Heuristic):
        return TorchHeuristic(head)
    return None if head is None else TorchHead(head, device)


WARM_UP_RUNS = 3  # before a capture, as PyTorch's notes on CUDA graphs ask for


def open_torch(
    classifier: Classifier,
    spec: MapSpec,
    head: AnyHead | None,
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
    the device. On a GPU it has a stream of its own, so that calls overlap.
    """

    host: dict[str, Tensor]
    device: dict[str, Tensor]
    computed: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    stream: Any = None
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
        head: AnyHead | None = None,
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
        self._slots = [self._new_slot() for _ in range(slots)]

    def _free(self) -> None:
        for slot in self._slots:
            if slot.stream is not None:
                slot.stream.synchronize()
        self._slots = []

    def _on_stream(self, slot: _Slot) -> AbstractContextManager[Any]:
        return torch.cuda.stream(slot.stream) if self._gpu else nullcontext()

    def _new_slot(self) -> _Slot:
        host = {s.name: torch.from_numpy(np.zeros(s.shape, s.dtype)) for s in self.inputs}
        host = {name: tensor.pin_memory() for name, tensor in host.items()} if self._gpu else host
        slot = _Slot(
            host, {name: tensor.to(self._place, copy=True) for name, tensor in host.items()}
        )
        if self._gpu:
            torch.cuda.synchronize(self._place)  # the copies are on another stream
            slot.stream = torch.cuda.Stream(self._place)  # type: ignore[no-untyped-call]
        with self._on_stream(slot):
            for _ in range(WARM_UP_RUNS if self._gpu else 1):
                slot.computed = self._compute(slot)
        if slot.stream is not None:
            slot.stream.synchronize()
            slot.graph = torch.cuda.CUDAGraph()
            slot.events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(4))  # type: ignore[no-untyped-call]
            with torch.cuda.graph(slot.graph, stream=slot.stream):
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
        with self._on_stream(slot):
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
        return {name: tensor.numpy().copy() for name, tensor in slot.results.items()}
