"""Several images a call of networks that were exported for one."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from engines.errors import ModelError
from engines.networks.registry import load_classifier
from tests.engines.double import run_in_float64
from tests.engines.foreign import KINDS, SIDE, export

RNG = np.random.default_rng(4)
IMAGES = RNG.standard_normal((3, 3, SIDE, SIDE))


def outputs_of(classifier, images):
    """Scores, and the map of every stage."""
    graph, forward = classifier.forward_graph(len(images))
    graph.output(forward.scores, "scores_out")
    for place, layer in enumerate(classifier.network.head_layers):
        graph.output(forward.layers[layer], f"stage_{place}")
    return run_in_float64(graph.model(), {"pixels": images})


@pytest.mark.parametrize("kind", KINDS)
def test_several_images_give_what_each_gives_alone(tmp_path, kind):
    export(kind, tmp_path / "net.onnx")
    classifier = load_classifier(str(tmp_path / "net.onnx"))
    together = outputs_of(classifier, IMAGES)
    alone = [outputs_of(classifier, IMAGES[i : i + 1]) for i in range(len(IMAGES))]
    assert len(together) > 2
    for name, found in together.items():
        expected = np.concatenate([each[name] for each in alone])
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())


def test_a_view_that_an_exporter_writes_as_a_gather_of_all_values(tmp_path):
    """So does PyTorch's newer one behind a pool over a map with channels last."""
    weights = {
        "kernel": RNG.standard_normal((6, 3, 3, 3)).astype(np.float32),
        "matrix": RNG.standard_normal((6, 5)).astype(np.float32),
        "vector": np.array([6], np.int64),
        "places": np.arange(6).reshape(1, 6, 1, 1),
        "row": np.array([1, 6], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Reshape", ["g", "vector"], ["v"]),
        helper.make_node("Gather", ["v", "places"], ["p"], axis=0),
        helper.make_node("Reshape", ["p", "row"], ["r"]),
        helper.make_node("MatMul", ["r", "matrix"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "net.onnx",
    )
    classifier = load_classifier(str(tmp_path / "net.onnx"))
    assert "Gather" not in {node.op_type for node in classifier.forward_graph()[0].nodes}
    together = outputs_of(classifier, IMAGES)["scores_out"]
    alone = [outputs_of(classifier, IMAGES[i : i + 1])["scores_out"] for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-9)


def test_what_would_mix_images_is_refused_in_words(tmp_path):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.fc((x * x.softmax(0)).mean((2, 3)))

    export(Mixing, tmp_path / "net.onnx")
    classifier = load_classifier(str(tmp_path / "net.onnx"))
    assert outputs_of(classifier, IMAGES[:1])["scores_out"].shape == (1, 5)
    with pytest.raises(ModelError, match=r"takes one image a call: node '.*Softmax' \(Softmax\)"):
        outputs_of(classifier, IMAGES)


def test_a_size_that_the_export_fixed_is_said(tmp_path):
    export(KINDS[2], tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="was exported for images of 32 px and does not take 48"):
        load_classifier(str(tmp_path / "net.onnx"), size_px=48)
