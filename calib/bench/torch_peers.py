"""What PyTorch's users run for a sensitivity map, on the same network and pixels: autograd, its
compiler, Captum, Grad-CAM.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engines.backends.torch_networks import Vgg16, torch_network
from engines.backends.torch_reference import DTYPES, WARM_UP_RUNS
from engines.engine import Array
from engines.networks.registry import Classifier

Call = Callable[[], Array]


class FromPixels(nn.Module):
    """A classifier with its normalisation in front.

    It takes float32 pixels 0..255 ``[N, 3, S, S]`` in its channel order, and gives scores.

    Raises:
        EngineError: there is no module for this network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = torch_network(classifier)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(classifier.preprocessing, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values)

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        """Class scores before any softmax, ``[N, classes]``."""
        scores: Tensor = self.network((pixels_nchw - self.mean) / self.std)
        return scores


class TorchPeers:
    """Calls that do the work of one image. Each begins with the same uint8 image.

    None computes gradients of the weights.

    Args:
        classifier: the network.
        image_nhwc_bgr: uint8 ``[1, S, S, 3]``.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``fp16`` or ``bf16``.

    Raises:
        EngineError: there is no module for this network.
    """

    def __init__(
        self,
        classifier: Classifier,
        image_nhwc_bgr: Array,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self._classifier, self._image = classifier, image_nhwc_bgr
        self._place, self._dtype = torch.device(device), DTYPES[precision]
        if self._place.type == "cpu":
            torch.set_num_threads(1)  # as all that it takes turns with
        self._network = FromPixels(classifier).eval().to(self._place, self._dtype)
        if self._place.type == "cuda":
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self) -> Call:
        """Class scores alone, ``[1, classes]``."""

        def call() -> Array:
            with torch.inference_mode():
                return _on_host(self._network(self._pixels()))

        return call

    def autograd(self) -> Call:
        """|d best score / d pixel|, largest over channels, ``[1, S, S]``."""
        return self._sensitivity(self._network)

    def compiled(self) -> Call:
        """The same through ``torch.compile``, which needs a C++ compiler."""
        return self._sensitivity(torch.compile(self._network))

    def captum_saliency(self) -> Call:
        """The same by Captum. It takes the best score inside, without a forward pass."""
        from captum.attr import Saliency

        saliency = Saliency(lambda pixels: self._network(pixels).amax(1))

        def call() -> Array:
            return _on_host(saliency.attribute(self._pixels().requires_grad_(True)).amax(1))

        return call

    def grad_cam(self) -> Call:
        """pytorch-grad-cam at the activations of the last convolution, ``[1, S, S]`` in 0..1.

        Its users' networks want gradients for every weight. Here only the last convolution's bias
        does, so that the backward
        pass ends there: the cheapest that the library can be.
        """
        with torchvision_stand_in():
            from pytorch_grad_cam import GradCAM
        network = FromPixels(
            self._classifier
        ).eval()  # its own: the library leaves hooks in the modules
        inner = network.network
        last, activated = (
            (inner.features[-3], inner.features[-2])
            if isinstance(inner, Vgg16)
            else (inner.conv_final,) * 2
        )
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias.requires_grad_(True)
        cam = GradCAM(network, [activated])

        def call() -> Array:
            return np.asarray(cam(self._pixels(), None))

        return call

    def captured_autograd(self) -> Call:
        """As ``autograd``, recorded as a CUDA graph once and replayed."""
        return self._captured(lambda pixels: _gradient(self._network, pixels))

    def captured_forward(self) -> Call:
        """As ``forward``, recorded as a CUDA graph once and replayed."""
        return self._captured(lambda pixels: self._network(pixels).detach())

    def _captured(self, work: Callable[[Tensor], Tensor]) -> Call:
        pixels = self._pixels().requires_grad_(True)
        stream = torch.cuda.Stream(self._place)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                work(pixels)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = work(pixels)

        def call() -> Array:
            with torch.cuda.stream(stream):
                pixels.detach().copy_(self._pixels())
                graph.replay()
                return _on_host(result)

        return call

    def _sensitivity(self, network: Callable[[Tensor], Tensor]) -> Call:
        return lambda: _on_host(_gradient(network, self._pixels().requires_grad_(True)))

    def _pixels(self) -> Tensor:
        pixels = torch.from_numpy(self._image).to(self._place).permute(0, 3, 1, 2).to(self._dtype)
        return (
            pixels.flip(1) if self._classifier.preprocessing.order == "rgb" else pixels
        ).contiguous()


def _gradient(network: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """|d best score / d pixel|, largest over channels."""
    (gradient,) = torch.autograd.grad(network(pixels).amax(1).sum(), pixels)
    return gradient.abs().amax(1)


def _on_host(values: Tensor) -> Array:
    return np.asarray(values.float().cpu().numpy())


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Put empty names in torchvision's place while pytorch-grad-cam is imported.

    This is needed where torchvision is not installed.

    The library imports image transforms and detection operators for helpers of its own; Grad-CAM
    uses none of them.
    """
    if find_spec("torchvision") is not None:
        yield
        return
    names: dict[str, tuple[str, ...]] = {
        "torchvision": (),
        "torchvision.transforms": ("Compose", "Normalize", "ToTensor"),
        "torchvision.transforms.functional": ("resize",),
    }
    for name, attributes in names.items():
        module: Any = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
