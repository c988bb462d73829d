"""What foreign classifiers take and give: the class is ONNX Runtime's on the input that it wants."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.errors import ModelError
from engines.localizer import Localizer
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import load_classifier
from tests.realtime.media import picture

RNG = np.random.default_rng(11)
SIDE = 32
CLASSES = 5
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
WEIGHTS = {
    "w": 0.4 * RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
    "fc": RNG.standard_normal((CLASSES, 8)).astype(np.float32),
    "one": RNG.standard_normal((1, 8)).astype(np.float32),
}
PHOTO = picture(3, SIDE, SIDE)


def written(path, head, tail, kind=TensorProto.FLOAT, shape=(1, 3, SIDE, SIDE), **more):
    """A network: nodes before the convolution, which read ``x`` and write ``n``; nodes behind the
    raw scores ``s``; and all else of ``more``: constants, outputs, metadata, weight of the scores.
    """
    constants = {**WEIGHTS, **more.get("constants", {})}
    nodes = [
        *head,
        helper.make_node("Conv", ["n", "w"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", more.get("weight", "fc")], ["s"], transB=1),
        *tail,
    ]
    outputs = more.get("outputs", [("out", TensorProto.FLOAT, None)])
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, more.get("metadata", {}))
    save(model, path)
    return str(path)


def node(kind, *names, **attributes):
    """A node of the inputs ``names[:-1]``."""
    return helper.make_node(kind, list(names[:-1]), [names[-1]], **attributes)


SAME = [node("Identity", "x", "n")]
RAW = [node("Identity", "s", "out")]


def probabilities(path, fed, name="out"):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run([name], {"x": fed})[0]


def found_in(path):
    classifier = load_classifier(path)
    engine = OpenVinoEngine(build_graph(classifier), "fp32")
    with Localizer(engine) as localizer:
        return localizer.localize([PHOTO])[0], classifier


def softmax(scores):
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


RGB = PHOTO[None, :, :, ::-1].astype(np.float32)
UNIT_NCHW = np.ascontiguousarray((RGB / 255).transpose(0, 3, 1, 2))
PER_CHANNEL = {
    "mean": MEAN.reshape(3, 1, 1).astype(np.float32),
    "std": STD.reshape(3, 1, 1).astype(np.float32),
}


@pytest.mark.parametrize("kind", ["normalises itself", "and divides", "channels last", "bytes"])
def test_the_input_is_what_the_graph_says(tmp_path, kind):
    normal = [node("Sub", "u", "mean", "d"), node("Div", "d", "std", "n")]
    constants = {**PER_CHANNEL, "byte": np.float32(255)}
    if kind == "normalises itself":
        head = [node("Identity", "x", "u"), *normal]
        path = written(tmp_path / "m.onnx", head, RAW, constants=constants)
        fed, said = UNIT_NCHW, "pixel / 255"
    elif kind == "and divides":
        head = [node("Div", "x", "byte", "u"), *normal]
        path = written(tmp_path / "m.onnx", head, RAW, constants=constants)
        fed, said = UNIT_NCHW * np.float32(255), "pixel as it is"
    elif kind == "channels last":
        head = [node("Transpose", "x", "t", perm=[0, 3, 1, 2]), node("Div", "t", "byte", "u")]
        shape = ("N", SIDE, SIDE, 3)
        path = written(tmp_path / "m.onnx", [*head, *normal], RAW, shape=shape, constants=constants)
        fed, said = RGB, "pixel as it is"
    else:
        head = [node("Cast", "x", "f32", to=1), node("Div", "f32", "byte", "u"), *normal]
        path = written(tmp_path / "m.onnx", head, RAW, kind=TensorProto.UINT8, constants=constants)
        fed, said = np.rint(UNIT_NCHW * 255).astype(np.uint8), "uint8"
    expected = probabilities(path, fed)[0]
    found, classifier = found_in(path)
    assert any(said in note for note in classifier.network.notes)
    assert found.class_index == expected.argmax()
    assert found.score == pytest.approx(softmax(expected).max(), abs=1e-4)
    assert found.map_hw.std() > 0


def test_what_is_assumed_is_said(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    fed = np.float32((UNIT_NCHW - MEAN.reshape(3, 1, 1)) / STD.reshape(3, 1, 1))
    found, classifier = found_in(path)
    assert any("ImageNet's mean" in note for note in classifier.network.notes)
    assert found.score == pytest.approx(softmax(probabilities(path, fed)[0]).max(), abs=1e-3)


def test_preprocessing_is_part_of_the_digest_where_it_is_not_the_usual(tmp_path):
    plain = load_classifier(written(tmp_path / "m.onnx", SAME, RAW))
    named = {"names": "['a', 'b', 'c', 'd', 'e']"}
    other = load_classifier(written(tmp_path / "n.onnx", SAME, RAW, metadata=named))
    unit = {**named, "task": "classify"}
    third = load_classifier(written(tmp_path / "o.onnx", SAME, RAW, metadata=unit))
    assert plain.preprocessing == other.preprocessing
    assert third.preprocessing.std == (255.0, 255.0, 255.0)
    assert len({plain.digest, other.digest, third.digest}) == 3


def test_of_two_outputs_the_class_scores_are_taken(tmp_path):
    tail = [*RAW, node("ArgMax", "out", "label", axis=1, keepdims=0), node("Identity", "r", "maps")]
    outputs = [
        ("label", TensorProto.INT64, [1]),
        ("maps", TensorProto.FLOAT, [1, 8, 15, 15]),
        ("out", TensorProto.FLOAT, [1, CLASSES]),
    ]
    path = written(tmp_path / "m.onnx", SAME, tail, outputs=outputs)
    _, classifier = found_in(path)
    assert any("of its 3 outputs 'out'" in note for note in classifier.network.notes)


def test_of_two_that_may_be_it_none_is_taken(tmp_path):
    outputs = [("out", TensorProto.FLOAT, [1, CLASSES]), ("f", TensorProto.FLOAT, [1, 8])]
    path = written(tmp_path / "m.onnx", SAME, RAW, outputs=outputs)
    with pytest.raises(ModelError, match=r"2 outputs \('out' 1x5, 'f' 1x8\).*cannot be told"):
        load_classifier(path)


def test_the_output_of_a_detector_is_refused(tmp_path):
    tail = [node("Identity", "c", "out")]
    path = written(tmp_path / "m.onnx", SAME, tail)
    with pytest.raises(ModelError, match=r"\[1, 8, 15, 15\].*detector or a segmentation"):
        build_graph(load_classifier(path))


@pytest.mark.parametrize("activated", [False, True])
def test_one_logit_is_two_classes(tmp_path, activated):
    tail = [node("Sigmoid", "s", "out")] if activated else RAW
    names = {} if activated else {"names": "['cat']"}
    path = written(tmp_path / "m.onnx", SAME, tail, weight="one", metadata=names)
    fed = np.float32((UNIT_NCHW - MEAN.reshape(3, 1, 1)) / STD.reshape(3, 1, 1))
    logit = probabilities(path, fed)[0, 0]
    yes = logit if activated else 1 / (1 + np.exp(-logit))
    found, _ = found_in(path)
    assert found.class_index == int(yes > 0.5)
    assert found.score == pytest.approx(max(yes, 1 - yes), abs=1e-3)


def test_one_number_may_be_no_score(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW, weight="one")
    with pytest.raises(ModelError, match=r"one number without a sigmoid.*name the class") as error:
        load_classifier(path)
    assert error.value.options == ("labels",)
    labels = tmp_path / "labels.txt"
    labels.write_text("ripe")
    named = load_classifier(path, given=GivenInput(labels=str(labels)))
    assert named.class_names == ("not ripe", "ripe")


def test_outputs_that_nothing_names_may_be_no_scores(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    notes = load_classifier(path).network.notes
    assert any("nothing names its 5 outputs" in note for note in notes)
    named = written(tmp_path / "n.onnx", SAME, RAW, metadata={"names": "['a','b','c','d','e']"})
    assert not any("nothing names" in note for note in load_classifier(named).network.notes)


def test_classes_that_do_not_exclude_each_other_have_a_sigmoid_each(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, [node("Sigmoid", "s", "out")])
    fed = np.float32((UNIT_NCHW - MEAN.reshape(3, 1, 1)) / STD.reshape(3, 1, 1))
    found, _ = found_in(path)
    assert found.score == pytest.approx(probabilities(path, fed)[0].max(), abs=1e-3)


def test_names_come_from_the_metadata(tmp_path):
    names = {"names": "{0: 'cat', 1: 'dog', 2: 'cow', 3: 'hen', 4: 'pig'}"}
    found, _ = found_in(written(tmp_path / "m.onnx", SAME, RAW, metadata=names))
    assert found.class_name in ("cat", "dog", "cow", "hen", "pig")
