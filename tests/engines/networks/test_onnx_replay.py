"""Foreign graphs with fewer nodes: padding and normalizations in convolutions, and any number of
images. Each beside ONNX Runtime, which runs the file as it is.
"""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import ModelError
from engines.graph import needed
from engines.networks.registry import load_classifier
from tests.hostile import NODE, SIDE, saved

RNG = np.random.default_rng(12)
LEFT = ["Conv", "Relu", "MaxPool", "GlobalAveragePool", "Flatten", "MatMul"]
MIXED = [
    NODE("Relu", ["c"], ["r0"]),
    NODE("MaxPool", ["r0"], ["r"], kernel_shape=[2, 2], strides=[2, 2]),
]
END = [
    NODE("GlobalAveragePool", ["r"], ["g"]),
    NODE("Flatten", ["g"], ["f"]),
    NODE("MatMul", ["f", "d"], ["y"]),
]
FLOATS = {
    "w": RNG.standard_normal((6, 3, 3, 3)),
    "d": RNG.standard_normal((6, 5)),
    "none": np.array(0.0),
    "far": np.array(-np.inf),
    "scale": RNG.uniform(0.5, 1.5, 6),
    "shift": RNG.standard_normal(6),
    "mean": RNG.standard_normal(6),
    "variance": RNG.uniform(0.5, 1.5, 6),
}
NORMAL = ["scale", "shift", "mean", "variance"]


def classifier(nodes, batch=1, **tensors):
    made = {name: np.asarray(value, np.float32) for name, value in FLOATS.items()} | tensors
    return helper.make_model(
        helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in made.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString())


def replayed(tmp_path, model, images=1):
    """(kinds of the nodes that are left, the scores of some images, those of the file itself)."""
    graph, forward = load_classifier(str(saved(tmp_path, model))).forward_graph(images)
    kinds = [node.op_type for node in needed(graph.nodes, [forward.scores])]
    graph.output(forward.scores, "out")
    x = RNG.standard_normal((images, 3, SIDE, SIDE)).astype(np.float32)
    found = session(graph.model()).run(None, {"pixels": x})[0]
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    alone = [session(model).run(None, {"x": np.repeat(each[None], batch, 0)})[0][:1] for each in x]
    return kinds, found, np.concatenate(alone)


def padded(*rest, pads=(0, 0, 1, 2, 0, 0, 0, 1), value="none", before="x", **how):
    return [NODE("Pad", [before, "pads", value], ["p"], **how), *rest], {"pads": np.array(pads)}


CONVOLVED = NODE("Conv", ["x", "w"], ["c0"], pads=[1, 1, 1, 1])
WINDOW = {"kernel_shape": [3, 3], "strides": [2, 2]}
CASES = {
    "zeros": (padded(NODE("Conv", ["p", "w"], ["c"])), [], True),
    "besides its own": (padded(NODE("Conv", ["p", "w"], ["c"], pads=[1, 0, 0, 0])), [], True),
    "reflected": (padded(NODE("Conv", ["p", "w"], ["c"]), mode="reflect"), [], False),
    "minus infinity for a pool": (
        padded(NODE("MaxPool", ["p"], ["c"], **WINDOW), value="far", before="c0"),
        [CONVOLVED],
        True,
    ),
    "zeros for a pool of any values": (
        padded(NODE("MaxPool", ["p"], ["c"], **WINDOW), before="c0"),
        [CONVOLVED],
        False,
    ),
    "zeros for a pool behind ReLU": (
        padded(NODE("MaxPool", ["p"], ["c"], **WINDOW), before="c1"),
        [CONVOLVED, NODE("Relu", ["c0"], ["c1"])],
        True,
    ),
    "zeros for a mean": (
        padded(NODE("AveragePool", ["p"], ["c"], **WINDOW), before="c0"),
        [CONVOLVED],
        True,
    ),
    "zeros for a mean that leaves out its own": (
        padded(NODE("AveragePool", ["p"], ["c"], pads=[1, 1, 1, 1], **WINDOW), before="c0"),
        [CONVOLVED],
        False,
    ),
    "channels": (
        padded(
            NODE("Conv", ["p", "w9"], ["c"]),
            pads=(0, 1, 0, 0, 0, 2, 0, 0),
        ),
        [],
        False,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_padding_goes_into_what_reads_it(tmp_path, kind):
    (nodes, tensors), first, goes = CASES[kind]
    tensors["w9"] = RNG.standard_normal((6, 6, 3, 3)).astype(np.float32)
    kinds, found, expected = replayed(
        tmp_path, classifier([*first, *nodes, *MIXED, *END], **tensors)
    )
    assert ("Pad" not in kinds) == goes
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_computed_padding_goes_into_the_convolution(tmp_path):
    """As exporters write TensorFlow's SAME."""
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Slice", ["s", "two", "four"], ["sides"]),
        NODE("Mod", ["sides", "three"], ["ends"]),
        NODE("Concat", ["zeros", "zeros", "zeros", "ends"], ["pads"], axis=0),
        NODE("Pad", ["x", "pads"], ["p"]),
        NODE("Conv", ["p", "w"], ["c"], strides=[2, 2]),
    ]
    tensors = {"two": [2], "four": [4], "three": [3], "zeros": [0, 0]}
    integers = {name: np.array(value) for name, value in tensors.items()}
    kinds, found, expected = replayed(tmp_path, classifier([*nodes, *MIXED, *END], **integers))
    assert kinds == LEFT
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_normalization_goes_into_the_convolution_before_it(tmp_path, bias):
    nodes = [
        NODE("Conv", ["x", "w", "shift"] if bias else ["x", "w"], ["c0"]),
        NODE("BatchNormalization", ["c0", *NORMAL], ["c"], epsilon=1e-3),
    ]
    kinds, found, expected = replayed(tmp_path, classifier([*nodes, *MIXED, *END]))
    assert kinds == LEFT
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_normalization_of_what_others_read_stays(tmp_path):
    nodes = [
        NODE("Conv", ["x", "w"], ["c0"]),
        NODE("BatchNormalization", ["c0", *NORMAL], ["n"]),
        NODE("Add", ["n", "c0"], ["c"]),
    ]
    kinds, found, expected = replayed(tmp_path, classifier([*nodes, *MIXED, *END]))
    assert kinds.count("BatchNormalization") == kinds.count("Conv") == 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_does_nothing_is_left_out(tmp_path):
    nodes = [
        NODE("Conv", ["x", "w"], ["c0"]),
        NODE("Identity", ["c0"], ["c1"]),
        NODE("Dropout", ["c1"], ["c2"]),
        NODE("Transpose", ["c2"], ["t"], perm=[0, 3, 2, 1]),
        NODE("Transpose", ["t"], ["t2"], perm=[0, 3, 2, 1]),
        NODE("Cast", ["t2"], ["c"], to=TensorProto.FLOAT),
    ]
    kinds, found, expected = replayed(tmp_path, classifier([*nodes, *MIXED, *END]))
    assert kinds == LEFT
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def of_tokens(batch):
    """With the number of images in every shape: a class token, and rows with it in the middle."""
    side = SIDE // 8
    shapes = {
        "rows": [batch, 6, side * side],
        "tokens": [batch, 1, 6],
        "apart": [1 + side * side, batch * 2, 3],
        "together": [1 + side * side, batch, 6],
        "flat": [batch, -1],
    }
    nodes = [
        NODE("Conv", ["x", "w8"], ["c"], strides=[8, 8]),
        NODE("Relu", ["c"], ["r"]),
        NODE("Reshape", ["r", "rows"], ["q"]),
        NODE("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        NODE("Expand", ["token", "tokens"], ["first"]),
        NODE("Concat", ["first", "t"], ["all"], axis=1),
        NODE("Transpose", ["all"], ["turned"], perm=[1, 0, 2]),
        NODE("Reshape", ["turned", "apart"], ["heads"]),
        NODE("Softmax", ["heads"], ["soft"], axis=0),
        NODE("Reshape", ["soft", "together"], ["back"]),
        NODE("Transpose", ["back"], ["batched"], perm=[1, 0, 2]),
        NODE("Add", ["batched", "all"], ["sum"]),
        NODE("ReduceMean", ["sum"], ["m"], axes=[1], keepdims=1),
        NODE("Reshape", ["m", "flat"], ["f"]),
        NODE("MatMul", ["f", "d"], ["y"]),
    ]
    return classifier(
        nodes,
        batch,
        w8=RNG.standard_normal((6, 3, 8, 8)).astype(np.float32) / 8,
        token=RNG.standard_normal((1, 1, 6)).astype(np.float32),
        **{name: np.array(shape) for name, shape in shapes.items()},
    )


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("images", [1, 3])
def test_a_file_for_so_many_images_takes_any_number(tmp_path, batch, images):
    _, found, expected = replayed(tmp_path, of_tokens(batch), images)
    assert found.shape == (images, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_mixes_its_images_is_refused_for_others(tmp_path):
    nodes = [
        NODE("Conv", ["x", "w"], ["c"]),
        NODE("Relu", ["c"], ["r"]),
        NODE("GlobalAveragePool", ["r"], ["g"]),
        NODE("Reshape", ["g", "mixed"], ["f"]),
        NODE("Slice", ["f", "zero", "six", "one"], ["s"]),
        NODE("MatMul", ["s", "d"], ["y"]),
    ]
    places = {"mixed": [1, 12], "zero": [0], "six": [6], "one": [1]}
    model = classifier(nodes, 2, **{name: np.array(value) for name, value in places.items()})
    with pytest.raises(ModelError, match="no vector of class scores for each image"):
        load_classifier(str(saved(tmp_path, model)))
