"""The reference: PyTorch autograd on independent modules. Compiled graphs are compared with it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engines.backends.torch_networks import torch_network
from engines.build import WANTED_CLASS, check_head, stamp
from engines.engine import Array, Engine, TensorSpec
from engines.errors import EngineError, ModelError
from engines.features import Feature, area_matrix
from engines.fp16 import GRADIENT_SCALE
from engines.head import Head
from engines.heuristic import Heuristic
from engines.maps import PIXELS, MapSpec
from engines.networks.registry import Classifier
from engines.preprocess import IMAGE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        head: Head | Heuristic | None = None,
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
        side = classifier.size_px
        self.device = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
        self.inputs = (
            TensorSpec(IMAGE, np.dtype(np.uint8), (batch, side, side, 3)),
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
        return self.finish({name: tensor.cpu().numpy() for name, tensor in computed.items()})

    def compute(self, image_nhwc_bgr: Tensor, wanted_class: Tensor) -> dict[str, Tensor]:
        """All that is done on the device: ``class_index``, ``score``, ``logit``, and every map
        under ``signal:layer``.
        """
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
        named = {f"{signal}:{layer}": values for (signal, layer), values in maps.items()}
        return {"class_index": chosen, "score": score, "logit": logit, **named}

    def finish(self, computed: dict[str, Array]) -> dict[str, Array]:
        """The outputs, from what ``compute`` gave; the head is small, and read on the processor."""
        result: dict[str, Array] = {
            "class_index": computed["class_index"],
            "score": computed["score"],
            "map": computed[f"{self._spec.signal}:{self._spec.layer}"],
            "logit": computed["logit"],
        }
        if isinstance(self._head, Heuristic):
            result["box_xyxy"] = _heuristic_boxes(result["map"], self._head)
        elif self._head is not None:
            maps = [
                torch.from_numpy(computed[f"{f.signal}:{f.layer}"]) for f in self._head.features
            ]
            parts = [
                features_of(values, f) for values, f in zip(maps, self._head.features, strict=True)
            ]
            chosen = torch.from_numpy(computed["class_index"])
            kinds = (
                torch.tensor(self._head.routes)[chosen]
                if len(self._head.routes)
                else torch.zeros_like(chosen)
            )
            weight, bias = (
                torch.tensor(self._head.weight)[kinds],
                torch.tensor(self._head.bias)[kinds],
            )
            box = torch.einsum("nd,nkd->nk", torch.cat(parts, 1), weight) + bias
            box = box.clamp(0, 1)
            low, high = torch.minimum(box[:, :2], box[:, 2:]), torch.maximum(box[:, :2], box[:, 2:])
            result["box_xyxy"] = torch.cat([low, high], 1).numpy()
        return result

    def _maps(
        self, scores: Tensor, chosen: Tensor, tensors: dict[str, Tensor]
    ) -> dict[tuple[str, str], Tensor]:
        """(signal, layer) to maps, by autograd."""
        if self._spec.objective == "gestalt":
            objective = tensors[self._last].float().mean(dim=(1, 2, 3)).sum()
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


def features_of(map_nhw: Tensor, feature: Feature) -> Tensor:
    """The head's inputs from one map, ``[N, D]``, written apart from ``engines.head`` (quantiles by
    interpolation).
    """
    scaled = map_nhw**feature.power
    scaled = scaled / scaled.mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if feature.kind == "grid":
        rows, columns = (torch.from_numpy(area_matrix(n, feature.size)) for n in scaled.shape[1:])
        return torch.einsum("ih,nhw,jw->nij", rows, scaled, columns).flatten(1)
    levels = (np.arange(feature.size) + 0.5) / feature.size
    return torch.stack([_marginal_quantiles(image.double().numpy(), levels) for image in scaled])


def _marginal_quantiles(image: Array, levels: Array) -> Tensor:
    positions = []
    for axis in (0, 1):
        mass = image.sum(axis=axis)
        if mass.sum() == 0:
            positions.append(np.ones(len(levels)))
            continue
        edges = np.concatenate([[0], np.cumsum(mass)]) / mass.sum()
        positions.append(np.interp(levels, edges, np.linspace(0, 1, len(edges))))
    return torch.from_numpy(np.concatenate(positions).astype(np.float32))


def _heuristic_boxes(maps_nhw: Array, heuristic: Heuristic) -> Array:
    """The training-free boxes ``[N, 4]``, written apart from ``engines.heuristic``: pixel by
    pixel.
    """
    boxes = []
    for image in maps_nhw.astype(np.float64):
        height, width = image.shape
        blurred = image
        if heuristic.sigma:
            for axis, length in ((0, height), (1, width)):
                distance = np.subtract.outer(np.arange(length), np.arange(length)) / (
                    heuristic.sigma * length
                )
                weights = np.exp(-(distance**2) / 2)
                blurred = np.moveaxis(
                    np.tensordot(weights / weights.sum(1, keepdims=True), blurred, (1, axis)),
                    0,
                    axis,
                )
        kept = max(1, round(heuristic.share * image.size))
        ys, xs = np.nonzero(blurred >= np.sort(blurred, axis=None)[-kept])
        boxes.append(
            [xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height]
        )
    return np.array(boxes, np.float32)
