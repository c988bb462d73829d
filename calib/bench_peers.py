"""What the engine is timed against, in the same run: PyTorch and ONNX Runtime doing the same network's work."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from engines.build import WANTED_CLASS, build_graph
from engines.classifiers import Classifier
from engines.graph import Graph
from engines.preprocess import IMAGE, append_preprocessing

Call = Callable[[], object]


def peers(classifier: Classifier, image_nhwc: np.ndarray) -> dict[str, Call]:
    """Name to a call that does one image's work; only those whose library is installed and that can run the network.

    Args:
        classifier: the network.
        image_nhwc: uint8 BGR ``[1, S, S, 3]``.
    """
    found: dict[str, Call] = {}
    if find_spec("torch") is not None and classifier.weights:
        found |= _torch_peers(classifier, image_nhwc)
    if find_spec("onnxruntime") is not None:
        found |= _onnxruntime_peers(classifier, image_nhwc)
    return found


def _torch_peers(classifier: Classifier, image_nhwc: np.ndarray) -> dict[str, Call]:
    import torch

    from engines.backends.torch import torch_network

    network = torch_network(classifier)
    x = torch.from_numpy(image_nhwc).permute(0, 3, 1, 2).float().contiguous()

    def forward() -> object:
        with torch.inference_mode():
            return network(x).argmax(1).numpy()

    def autograd() -> object:
        pixels = x.clone().requires_grad_(True)
        scores = network(pixels)
        (gradient,) = torch.autograd.grad(scores.amax(1).sum(), pixels)
        return gradient.abs().amax(1).numpy()

    return {"torch eager forward + autograd": autograd, "torch eager forward only": forward}


def _onnxruntime_peers(classifier: Classifier, image_nhwc: np.ndarray) -> dict[str, Call]:
    import onnxruntime

    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.size_px, classifier.preprocessing)
    graph.output(classifier.append(graph, x).scores, "scores")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def session(model: bytes) -> "onnxruntime.InferenceSession":
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    forward = session(graph.model().SerializeToString())
    whole = session(build_graph(classifier).SerializeToString())
    feed = {IMAGE: image_nhwc, WANTED_CLASS: np.array([-1])}
    return {
        "ONNX Runtime, our graph": lambda: whole.run(None, feed),
        "ONNX Runtime forward only": lambda: forward.run(None, {IMAGE: image_nhwc}),
    }
