"""The peers: other libraries that run the same network on the same image, timed in the same run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx

from engines.build import WANTED_CLASS
from engines.engine import Array
from engines.graph import Graph
from engines.install import install_extra, install_packages
from engines.networks.registry import Classifier
from engines.preprocess import IMAGE, append_preprocessing

if TYPE_CHECKING:
    from calib.bench.torch_peers import TorchPeers

Call = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """One image's work.

    Attributes:
        classifier: the network.
        image_nhwc_bgr: uint8 ``[1, S, S, 3]``.
        graph: our whole graph.
    """

    classifier: Classifier
    image_nhwc_bgr: Array
    graph: onnx.ModelProto

    @cached_property
    def torch(self) -> "TorchPeers":
        """PyTorch's peers, which share a network."""
        from calib.bench.torch_peers import TorchPeers  # only where PyTorch is installed

        return TorchPeers(self.classifier, self.image_nhwc_bgr)


def onnxruntime_whole(task: Task) -> Call:
    """Our own graph in ONNX Runtime: its outputs, in the graph's order."""
    feed = {IMAGE: task.image_nhwc_bgr, WANTED_CLASS: np.array([-1])}
    session = _session(task.graph)
    return lambda: session.run(None, feed)


def onnxruntime_forward(task: Task) -> Call:
    """The class scores alone in ONNX Runtime."""
    feed, session = {IMAGE: task.image_nhwc_bgr}, _session(forward_graph(task.classifier))
    return lambda: session.run(None, feed)


def forward_graph(classifier: Classifier) -> onnx.ModelProto:
    """The network without a backward pass: uint8 image to class scores."""
    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.size_px, classifier.preprocessing)
    scores = classifier.append(graph, x).scores
    graph.output(scores, graph.fresh("scores"))  # a network from a file may have taken the name
    return graph.model()


PEERS: dict[str, Callable[[Task], Call]] = {
    "torch eager forward + autograd": lambda task: task.torch.autograd(),
    "torch.compile forward + autograd": lambda task: task.torch.compiled(),
    "Captum Saliency": lambda task: task.torch.captum_saliency(),
    "pytorch-grad-cam GradCAM": lambda task: task.torch.grad_cam(),
    "ONNX Runtime, our graph": onnxruntime_whole,
    "torch eager forward only": lambda task: task.torch.forward(),
    "ONNX Runtime forward only": onnxruntime_forward,
}
"""Name to what makes the call; everything in fp32."""


def peers(task: Task) -> tuple[dict[str, Call], dict[str, str]]:
    """Every peer, called once, since some compile only then.

    Returns:
        (name to a call that does one image's work, name to why there is none).
    """
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            call = make(task)
            call()
        except ImportError as error:
            module = (error.name or "").partition(".")[0]
            missing[name] = f"{module or error} is not installed: {_install(module)}"
        except (
            Exception
        ) as error:  # whatever stops a peer, the others are still measured, and its row says why
            missing[name] = _first_line(error)
        else:
            found[name] = call
    return found, missing


def _install(module: str) -> str:
    if (
        module == "pytorch_grad_cam"
    ):  # no extra brings it: it would bring torchvision, which it does not need here
        return install_packages("grad-cam", options="--no-deps")
    return install_extra("bench")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def _session(model: onnx.ModelProto) -> "onnxruntime.InferenceSession":  # type: ignore[name-defined]  # noqa: F821
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
