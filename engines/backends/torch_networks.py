"""The known networks as PyTorch modules, written apart from ``engines.networks``, and how each gets
its weights.
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.errors import EngineError, ModelError
from engines.networks.registry import NETWORKS, Classifier

Weights = dict[str, Tensor]

CONVOLUTIONS_PER_BLOCK = (2, 2, 3, 3, 3)


class ReferenceNetwork(nn.Module):
    """A network of PyTorch's own parts, written apart from ``engines.networks``."""

    def activations(self, x_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(class scores ``[N, classes]`` before any softmax, what each layer wrote, under the names
        of ``Forward.layers``).
        """
        raise NotImplementedError

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Class scores before any softmax."""
        return self.activations(x_nchw)[0]

    def last_linear(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias, in float32, of the layer that gives the scores of the mean of the last
        maps; None where none does.
        """
        return None


class Vgg16(ReferenceNetwork):
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

    def last_linear(self) -> tuple[Tensor, Tensor] | None:
        """See ``ReferenceNetwork.last_linear``."""
        if self.hidden or not isinstance(self.classifier, nn.Linear):
            return None
        return self.classifier.weight.float(), self.classifier.bias.float()

    def _classify(self, features_nchw: Tensor) -> Tensor:
        if self.hidden:
            flat = functional.adaptive_avg_pool2d(features_nchw, self.grid).flatten(1)
        else:
            flat = features_nchw.mean(dim=(2, 3))
        scores: Tensor = self.classifier(flat)
        return scores


class VggConvolutions(Vgg16):
    """The convolutions of VGG16 alone, whose one score is the Gestalt Total."""

    def forward(self, x_nchw: Tensor) -> Tensor:
        """The Gestalt Total ``[N, 1]``."""
        return self.activations(x_nchw)[0]

    def activations(self, x_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(Gestalt Total ``[N, 1]``, what each layer wrote)."""
        _, kept = super().activations(x_nchw)
        return kept["conv5_3"].mean(dim=(1, 2, 3))[:, None], kept


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


class SqueezeNet(ReferenceNetwork):
    """SqueezeNet v1.0 in its Caffe form: no padding in the first layer, pools that round up,
    padding 1 in the last.

    Shapes: float32 ``[N, 3, H, W]``, BGR 0..255 less the channel means, to ``[N, classes]``.
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


class AlexNet(ReferenceNetwork):
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


class EfficientNetLite(ReferenceNetwork):
    """EfficientNet-Lite: its shape is read off the weights.

    Args:
        weights: under the names of ``engines.networks.efficientnet_lite``.
    """

    STRIDES: ClassVar[tuple[int, ...]] = (1, 2, 2, 2, 1, 2, 1)

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._names = frozenset(weights)
        for name, value in weights.items():  # buffers go with the module to a device and a type
            self.register_buffer(_buffer(name), value)
        numbers = {int(n.split(".")[0][5:]) for n in weights if n.startswith("block")}
        self.count = max(numbers) + 1

    def activations(self, x_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(class scores, what each layer wrote: ``stem``, ``block0`` ... ``head``)."""
        kept = {"stem": functional.relu6(self._convolved(x_nchw, "stem", 2))}
        x, stage, widths = kept["stem"], -1, (0, 0)
        for number in range(self.count):
            name = f"block{number}"
            now = (self._width(name), int(self._read(f"{name}.depthwise.weight").shape[2]))
            first = now != widths
            stage += first
            widths = now
            x = kept[name] = self._block(x, name, self.STRIDES[stage] if first else 1)
        kept["head"] = functional.relu6(self._convolved(x, "head"))
        flat = kept["head"].mean(dim=(2, 3))
        scores = functional.linear(flat, self._read("fc.weight"), self._read("fc.bias"))
        return scores, kept

    def last_linear(self) -> tuple[Tensor, Tensor] | None:
        """See ``ReferenceNetwork.last_linear``."""
        return self._read("fc.weight").float(), self._read("fc.bias").float()

    def _read(self, name: str) -> Tensor:
        return self.get_buffer(_buffer(name))

    def _width(self, name: str) -> int:
        return len(self._read(f"{name}.project.bias"))

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        inner = x
        if f"{name}.expand.weight" in self._names:
            inner = functional.relu6(self._convolved(x, f"{name}.expand"))
        filtered = functional.relu6(self._convolved(inner, f"{name}.depthwise", stride))
        narrow = self._convolved(filtered, f"{name}.project")
        return narrow + x if narrow.shape == x.shape else narrow

    def _convolved(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self._read(f"{name}.weight"), self._read(f"{name}.bias")
        kernel = weight.shape[2]
        groups = x.shape[1] // weight.shape[1]
        totals = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:]]
        if not any(total % 2 for total in totals):
            pads = [total // 2 for total in totals]
            return functional.conv2d(x, weight, bias, stride, pads, groups=groups)
        down, across = ((total // 2, total - total // 2) for total in totals)
        padded = functional.pad(x, (*across, *down))  # PyTorch pads the last axis first
        return functional.conv2d(padded, weight, bias, stride, groups=groups)


def _buffer(name: str) -> str:
    """The name of a weight as PyTorch allows it for buffers."""
    return name.replace(".", "__")


def vgg16(weights: Weights) -> Vgg16:
    """VGG16 in the published form or the compact one, as the weights say; or its convolutions
    alone.
    """
    if "fc_a.weight" in weights:
        raise ModelError(
            "PyTorch's VGG16 has no layers of adaptation: use another backend", option="backend"
        )
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    caffe = iter(places)
    names = {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"} | {
        f"conv{block}_{number}": f"features.{next(caffe)}"
        for block, repeats in enumerate(CONVOLUTIONS_PER_BLOCK, start=1)
        for number in range(1, repeats + 1)
    }
    parts = {name: name.rpartition(".") for name in weights}
    weights = {
        f"{names.get(parts[name][0], parts[name][0])}.{parts[name][2]}": value
        for name, value in weights.items()
    }
    channels = [len(weights[f"features.{i}.bias"]) for i in (0, 5, 10, 17, 24)]
    if not any(name.startswith("classifier") for name in weights):
        convolutions = VggConvolutions(channels, hidden=0)
        convolutions.load_state_dict(weights, strict=False)
        return convolutions
    if "classifier.6.bias" in weights:
        classes, hidden = len(weights["classifier.6.bias"]), len(weights["classifier.0.bias"])
    else:
        classes, hidden = len(weights["classifier.bias"]), 0
    network = Vgg16(channels, classes, hidden)
    network.load_state_dict(weights)
    return network


def squeezenet(weights: Weights) -> SqueezeNet:
    """SqueezeNet with these weights."""
    network = SqueezeNet(classes=len(weights["conv_final.bias"]))
    network.load_state_dict(
        {f"fires.{k}" if k.startswith("fire") else k: v for k, v in weights.items()}
    )
    return network


def alexnet(weights: Weights) -> AlexNet:
    """AlexNet in Caffe's form or torchvision's, as the weights say."""
    caffe = len(weights["conv1.weight"]) == 96
    network = AlexNet(caffe, len(weights["fc8.weight"]), len(weights["fc7.weight"]))
    network.load_state_dict(weights)
    return network


def efficientnet_lite(weights: Weights) -> EfficientNetLite:
    """EfficientNet-Lite with these weights."""
    return EfficientNetLite(weights)


def torch_network(classifier: Classifier) -> ReferenceNetwork:
    """The classifier as a module of its own, with the same weights, without gradients for them.

    Raises:
        EngineError: there is no such module, as for classifiers from ONNX files.
    """
    if not classifier.network.torch_module:
        known = [name for name, network in NETWORKS.items() if network.torch_module]
        raise EngineError(
            f"the torch backend runs {', '.join(known)}, not {classifier.name}: use backend"
            " openvino",
            option="backend",
        )
    weights = {
        name: torch.from_numpy(np.array(value)) for name, value in classifier.weights.items()
    }
    network: ReferenceNetwork = resolve_name(classifier.network.torch_module)(weights)
    return network.eval().requires_grad_(False)
