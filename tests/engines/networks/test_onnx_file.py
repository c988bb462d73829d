"""Classifiers from ONNX files: any layout of known operators, of any opset, under any names."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import ModelError
from engines.networks.registry import load_classifier

RNG = np.random.default_rng(3)
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def write_model(path, nodes, tensors, opset=13, size=32, outputs=("scores",), batch=1):
    """``batch`` may be a name, as exporters write dynamic axes."""
    shape = [batch, 3, size, size]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path
    )
    return str(path)


def small_net(path, *, softmax=False, batch=1, opset=13):
    """conv, batch norm, relu, overlapping pool, global average, a reshape by a computed shape,
    gemm.
    """
    tensors = {
        "w": 0.3 * RNG.standard_normal((6, 3, 5, 5)).astype(np.float32),
        "gamma": RNG.uniform(0.5, 1.5, 6).astype(np.float32),
        "beta": RNG.standard_normal(6).astype(np.float32),
        "mean": RNG.standard_normal(6).astype(np.float32),
        "var": RNG.uniform(0.5, 1.5, 6).astype(np.float32),
        "fc": RNG.standard_normal((4, 6)).astype(np.float32),
        "fc_b": RNG.standard_normal(4).astype(np.float32),
        "zero": np.array([0]),
        "minus": np.array([-1]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], strides=[2, 2], pads=[2, 2, 2, 2]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["pixels"]),  # a name that we use ourselves
        helper.make_node("MaxPool", ["pixels"], ["p"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"]),
        helper.make_node("Shape", ["g"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["s0"]),
        helper.make_node("Concat", ["s0", "minus"], ["to"], axis=0),
        helper.make_node("Reshape", ["g", "to"], ["f"]),
        helper.make_node("Gemm", ["f", "fc", "fc_b"], ["raw" if softmax else "scores"], transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["raw"], ["scores"], axis=1))
    return write_model(path, nodes, tensors, opset, batch=batch), tensors


def torch_map(tensors, image_rgb):
    t = {k: torch.from_numpy(v) for k, v in tensors.items()}
    pixels = torch.from_numpy(image_rgb.transpose(2, 0, 1)[None].astype(np.float32)).requires_grad_(
        True
    )
    x = (pixels - torch.tensor(MEAN, dtype=torch.float32).view(1, 3, 1, 1)) / torch.tensor(
        STD, dtype=torch.float32
    ).view(1, 3, 1, 1)
    x = torch.nn.functional.conv2d(x, t["w"], stride=2, padding=2)
    x = torch.relu(torch.nn.functional.batch_norm(x, t["mean"], t["var"], t["gamma"], t["beta"]))
    scores = torch.nn.functional.max_pool2d(x, 3, 2).mean(dim=(2, 3)) @ t["fc"].T + t["fc_b"]
    scores.max().backward()
    return scores.detach().numpy()[0], pixels.grad.abs().amax(1)[0].numpy()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_a_file_becomes_a_localization_graph(tmp_path, softmax, batch, opset):
    path, tensors = small_net(tmp_path / "net.onnx", softmax=softmax, batch=batch, opset=opset)
    classifier = load_classifier(path)
    assert classifier.size_px == 32
    image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    scores, expected = torch_map(tensors, image[:, :, ::-1].copy())
    found = OpenVinoEngine(build_graph(classifier), "fp32").infer(
        {IMAGE: image[None], WANTED_CLASS: np.array([-1])}
    )
    assert found["class_index"] == [scores.argmax()]
    np.testing.assert_allclose(found["map"][0], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        found["score"], np.exp(scores).max() / np.exp(scores).sum(), rtol=1e-4
    )


def test_lrn_with_any_bias_is_computed_right(tmp_path):
    """OpenVINO's own LRN takes the bias for 1."""
    from tests import oracles

    kernel = RNG.standard_normal((5, 3, 32, 32)).astype(np.float32) / 60
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"]),
        helper.make_node("LRN", ["c"], ["l"], size=3, alpha=0.9, beta=0.6, bias=2.0),
        helper.make_node("Flatten", ["l"], ["scores"]),
    ]
    path = write_model(tmp_path / "lrn.onnx", nodes, {"w": kernel})
    image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    model = build_graph(load_classifier(path), expose=["scores"])
    found = OpenVinoEngine(model, "fp32").infer({IMAGE: image[None], WANTED_CLASS: np.array([-1])})
    x = ((image[:, :, ::-1] - MEAN) / STD).transpose(2, 0, 1)[None]
    expected = oracles.lrn(oracles.conv(x, kernel.astype(np.float64)), 3, 0.9, 0.6, 2.0)
    np.testing.assert_allclose(found["scores_out"].ravel(), expected.ravel(), rtol=1e-4, atol=1e-5)


def test_an_even_lrn_window_is_refused(tmp_path):
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"]),
        helper.make_node("LRN", ["c"], ["l"], size=4, name="norm"),
        helper.make_node("Flatten", ["l"], ["scores"]),
    ]
    path = write_model(tmp_path / "lrn.onnx", nodes, {"w": np.zeros((5, 3, 32, 32), np.float32)})
    with pytest.raises(ModelError, match=r"node 'norm' \(LRN\): an even window"):
        build_graph(load_classifier(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"not a model", "is not an ONNX model"), (b"", "is empty"), (None, "cannot read model")],
)
def test_files_that_are_no_model(tmp_path, content, words):
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        load_classifier(str(path))


def test_a_model_without_a_convolution_is_refused(tmp_path):
    nodes = [
        helper.make_node("Flatten", ["image"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["scores"]),
    ]
    path = write_model(tmp_path / "m.onnx", nodes, {"w": np.zeros((3 * 32 * 32, 4), np.float32)})
    with pytest.raises(ModelError, match="the network has no map"):
        build_graph(load_classifier(path))
