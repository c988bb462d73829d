"""The reference: PyTorch autograd on independent modules. Compiled graphs are compared with it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.build import WANTED_CLASS, check_head, stamp
from engines.engine import Array, TensorSpec, Ticket, check_feeds
from engines.errors import EngineError, ModelError
from engines.features import Feature, area_matrix
from engines.fp16 import GRADIENT_SCALE
from engines.head import Head
from engines.heuristic import Heuristic
from engines.maps import PIXELS, MapSpec
from engines.networks.registry import Classifier
from engines.preprocess import IMAGE

CONVOLUTIONS_PER_BLOCK = (2, 2, 3, 3, 3)


class Vgg16(nn.Module):
    """VGG16 with any number of channels per block.

    Args:
        channels: output channels of the five blocks, ``(64, 128, 256, 512, 512)`` for the published
            network.
        classes: number of class scores.
        hidden: width of the two hidden fully connected layers; 0 for global average pooling and one
            linear layer.
        grid: side of the square grid that the fully connected layers read (7 as published); unused
            when ``hidden`` is 0.
        batch_norm: put a batch norm after each convolution (training only: it is folded at export).

    Shapes: float32 ``[N, 3, H, W]``, normalised, to ``[N, classes]``.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        classes: int = 1000,
        hidden: int = 4096,
        grid: int = 7,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = 3
        for width, repeats in zip(channels, CONVOLUTIONS_PER_BLOCK, strict=True):
            for _ in range(repeats):
                layers.append(nn.Conv2d(width_in, width, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=batch_norm))
                width_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.hidden, self.grid = hidden, grid
        if hidden:
            self.classifier: nn.Module = nn.Sequential(
                nn.Linear(width_in * grid * grid, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, classes),
            )
        else:
            self.classifier = nn.Linear(width_in, classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Class scores before any softmax."""
        return self._classify(self.features(x_nchw))

    def activations(self, x_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(class scores, what each layer wrote: ``conv1_1`` (after batch norm, if any, and ReLU)
        ... ``pool5``).
        """
        kept: dict[str, Tensor] = {}
        block, number = 1, 0
        for layer in self.features:
            x_nchw = layer(x_nchw)
            if isinstance(layer, nn.ReLU):
                number += 1
                kept[f"conv{block}_{number}"] = x_nchw
            elif isinstance(layer, nn.MaxPool2d):
                kept[f"pool{block}"] = x_nchw
                block, number = block + 1, 0
        return self._classify(x_nchw), kept

    def _classify(self, features_nchw: Tensor) -> Tensor:
        if self.hidden:
            flat = functional.adaptive_avg_pool2d(features_nchw, self.grid).flatten(1)
        else:
            flat = features_nchw.mean(dim=(2, 3))
        scores: Tensor = self.classifier(flat)
        return scores


class Fire(nn.Module):
    """Squeeze to few channels by 1x1, expand by 1x1 and 3x3 side by side (Iandola et al. 2016,
    section 3.2).
    """

    def __init__(self, width_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width_in, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, width_in, H, W]`` to ``[N, 2 * expand, H, W]``."""
        x = functional.relu(self.squeeze(x))
        return torch.cat(
            [functional.relu(self.expand1(x)), functional.relu(self.expand3(x))], dim=1
        )


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 in its Caffe form: no padding in the first layer, pools that round up,
    padding 1 in the last.
    """

    FIRES: ClassVar[dict[str, tuple[int, int, int]]] = {
        "fire2": (96, 16, 64),
        "fire3": (128, 16, 64),
        "fire4": (128, 32, 128),
        "fire5": (256, 32, 128),
        "fire6": (256, 48, 192),
        "fire7": (384, 48, 192),
        "fire8": (384, 64, 256),
        "fire9": (512, 64, 256),
    }

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        self.fires = nn.ModuleDict({name: Fire(*sizes) for name, sizes in self.FIRES.items()})
        self.conv_final = nn.Conv2d(512, classes, 1, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """``[N, 3, H, W]`` (BGR 0..255 less the channel means) to class scores ``[N, classes]``
        before any softmax.
        """
        return self.activations(x_nchw)[0]

    def activations(self, x_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(class scores, what each layer wrote: ``conv1``, ``pool1``, ``fire2`` ...
        ``conv_final``).
        """
        kept = {"conv1": functional.relu(self.conv1(x_nchw))}
        x = kept["pool1"] = self.pool(kept["conv1"])
        for name, fire in self.fires.items():
            x = kept[name] = fire(x)
            if name in ("fire4", "fire8"):
                x = kept[f"pool{name[4:]}"] = self.pool(x)
        kept["conv_final"] = functional.relu(self.conv_final(x))
        return kept["conv_final"].mean(dim=(2, 3)), kept


class AlexNet(nn.Module):
    """AlexNet as Caffe has it (normalization, groups, pools that round up), or as torchvision has
    it (none of these).

    Args:
        caffe: which of the two.
        classes: number of class scores.
        hidden: width of the two hidden fully connected layers.
    """

    def __init__(self, caffe: bool = True, classes: int = 1000, hidden: int = 4096) -> None:
        super().__init__()
        self.caffe = caffe
        widths = (96, 256, 384, 384, 256) if caffe else (64, 192, 384, 256, 256)
        groups = (1, 2, 1, 2, 2) if caffe else (1, 1, 1, 1, 1)
        self.conv1 = nn.Conv2d(3, widths[0], 11, stride=4, padding=0 if caffe else 2)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5, padding=2, groups=groups[1])
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.conv4 = nn.Conv2d(widths[2], widths[3], 3, padding=1, groups=groups[3])
        self.conv5 = nn.Conv2d(widths[3], widths[4], 3, padding=1, groups=groups[4])
        self.fc6, self.fc7 = nn.Linear(widths[4] * 36, hidden), nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Class scores before any softmax."""
        return self.activations(x_nchw)[0]

    def activations(self, x_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(class scores, what each layer wrote: ``conv1`` ..., ``pool1``, ``pool2``, ``pool5``;
        Caffe's ``norm1`` too).
        """
        kept: dict[str, Tensor] = {}
        x = x_nchw
        for number, conv in enumerate(
            (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5), start=1
        ):
            x = kept[f"conv{number}"] = functional.relu(conv(x))
            if self.caffe and number <= 2:
                x = kept[f"norm{number}"] = functional.local_response_norm(
                    x, 5, alpha=1e-4, beta=0.75, k=1.0
                )
            if number in (1, 2, 5):
                x = kept[f"pool{number}"] = functional.max_pool2d(x, 3, 2, ceil_mode=self.caffe)
        x = (x if self.caffe else functional.adaptive_avg_pool2d(x, 6)).flatten(1)
        x = functional.relu(self.fc7(functional.relu(self.fc6(x))))
        scores: Tensor = self.fc8(x)
        return scores, kept


LAST = {"compact": "conv5_3", "vgg16": "conv5_3", "squeezenet": "conv_final", "alexnet": "conv5"}


def torch_network(classifier: Classifier) -> Vgg16 | SqueezeNet | AlexNet:
    """The classifier as a module of its own, with the same weights, without gradients for them.

    Raises:
        EngineError: the classifier came from an ONNX file, for which there is no module.
    """
    weights = {
        name: torch.from_numpy(np.array(value)) for name, value in classifier.weights.items()
    }
    network: Vgg16 | SqueezeNet | AlexNet
    if classifier.name == "squeezenet":
        network = SqueezeNet(classes=len(weights["conv_final.bias"]))
        weights = {f"fires.{k}" if k.startswith("fire") else k: v for k, v in weights.items()}
    elif classifier.name == "alexnet":
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        network = AlexNet(
            shapes["conv1.weight"][0] == 96, shapes["fc8.weight"][0], shapes["fc7.weight"][0]
        )
    elif classifier.name in LAST:
        channels = [len(weights[f"features.{i}.bias"]) for i in (0, 5, 10, 17, 24)]
        whole = "classifier.6.bias" in weights
        last, hidden = (
            ("classifier.6.bias", len(weights["classifier.0.bias"]))
            if whole
            else ("classifier.bias", 0)
        )
        network = Vgg16(channels, len(weights[last]), hidden)
    else:
        raise EngineError(
            f"the torch backend runs {', '.join(LAST)}, not {classifier.name}: use --backend"
            " openvino"
        )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """See ``engines.engine.Engine``; the same inputs and outputs as ``engines.build.build_graph``.

    Args:
        classifier, spec, head, batch: as for ``build_graph``.
        device: PyTorch's name of it.
        precision: of the network; what comes before and behind it is computed in fp32.
    """

    backend: str = "torch"
    slots: int = 1

    def __init__(
        self,
        classifier: Classifier,
        spec: MapSpec | None = None,
        head: Head | Heuristic | None = None,
        batch: int = 1,
        *,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self._spec = spec or (head.spec if head else MapSpec())
        if head is not None:
            check_head(head, classifier, self._spec)
        if self._spec.relu_rule != "plain":
            raise EngineError(
                f"the torch backend knows the plain ReLU rule, not {self._spec.relu_rule}: use"
                " --backend openvino"
            )
        self._head, self._preprocessing, self._last = (
            head,
            classifier.preprocessing,
            LAST.get(classifier.name, ""),
        )
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
        self.inputs: tuple[TensorSpec, ...] = (
            TensorSpec(IMAGE, np.dtype(np.uint8), (batch, side, side, 3)),
            TensorSpec(WANTED_CLASS, np.dtype(np.int64), (batch,)),
        )
        blank = self._run(np.zeros(self.inputs[0].shape, np.uint8), np.zeros(batch, np.int64))
        self.outputs = tuple(
            TensorSpec(name, value.dtype, value.shape) for name, value in blank.items()
        )
        self.metadata: Mapping[str, str] = stamp(classifier, self._spec, head, None, self._classes)

    def submit(self, feeds: Mapping[str, Array]) -> Ticket:
        """See ``engines.engine.Engine.submit``; eager PyTorch has no other half, so the work is
        done here.
        """
        return self.infer(feeds)

    def collect(self, ticket: Ticket) -> dict[str, Array]:
        """See ``engines.engine.Engine.collect``."""
        outputs: dict[str, Array] = ticket
        return outputs

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``engines.engine.Engine.infer``."""
        check_feeds(self.inputs, feeds)
        return self._run(feeds[IMAGE], feeds[WANTED_CLASS])

    def close(self) -> None:
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
                f"the torch backend knows no signal '{signal}': use --backend openvino"
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
