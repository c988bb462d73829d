"""Operators that are written as others: those of ONNX that are defined by others, those of ONNX
Runtime's optimizer, labels, training mode, 8-bit integers. Each beside ONNX Runtime.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.networks.preprocessing import IMAGENET
from engines.networks.registry import load_classifier
from tests.hostile import (
    DENSE,
    NODE,
    SIDE,
    WEIGHT,
    answer,
    behind_the_convolution,
    image,
    load,
    of_functions,
    saved,
    scores,
    small_model,
    small_nodes,
)
from tests.processors import NORMALIZES

RNG = np.random.default_rng(8)
ONES = np.ones(4, np.float32)
CELLS = (SIDE - 2) ** 2
VENDOR = helper.make_opsetid("com.microsoft", 1)


def by_onnxruntime(path):
    """The class scores of the image that ``answer`` takes, or what the file gives last."""
    pixels = np.random.default_rng(2).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    x = ((pixels[..., ::-1] - np.array(IMAGENET.mean)) / IMAGENET.std).transpose(0, 3, 1, 2)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    return np.ravel(session.run(None, {"x": x.astype(np.float32)})[-1])


def with_imports(model, *imports):
    model.opset_import.extend(imports)
    model.ir_version = 10
    return model


def of_tokens(*nodes, opset=23, **tensors):
    """Nodes from ``t`` to ``u``, ``[1, tokens, channels]`` both."""
    shapes = {"flat": [1, 4, CELLS], "apart": [1, 4, SIDE - 2, SIDE - 2]}
    return behind_the_convolution(
        NODE("Reshape", ["c", "flat"], ["c3"]),
        NODE("Transpose", ["c3"], ["t"], perm=[0, 2, 1]),
        *nodes,
        NODE("Transpose", ["u"], ["u3"], perm=[0, 2, 1]),
        NODE("Reshape", ["u3", "apart"], ["r"]),
        opset=opset,
        **{name: np.array(shape) for name, shape in shapes.items()},
        **tensors,
    )


TURNED = RNG.random((1, CELLS, 1)).astype(np.float32)
MADE_OF_OTHERS = {
    "GroupNormalization": lambda: behind_the_convolution(
        NODE("GroupNormalization", ["c", "s", "b"], ["r"], num_groups=2),
        opset=21,
        s=RNG.random(4).astype(np.float32),
        b=ONES,
    ),
    "GroupNormalization of opset 18": lambda: behind_the_convolution(
        NODE("GroupNormalization", ["c", "s", "b"], ["r"], num_groups=2),
        opset=18,
        s=RNG.random(2).astype(np.float32),
        b=ONES[:2],
    ),
    "RMSNormalization": lambda: of_tokens(NODE("RMSNormalization", ["t", "s"], ["u"]), s=ONES),
    "Swish": lambda: behind_the_convolution(NODE("Swish", ["c"], ["r"], alpha=1.5), opset=24),
    "Attention": lambda: of_tokens(
        NODE("Attention", ["t", "t", "t"], ["u"], q_num_heads=2, kv_num_heads=2)
    ),
    "RotaryEmbedding": lambda: of_tokens(
        NODE("RotaryEmbedding", ["t", "cos", "sin"], ["u"], num_heads=2), cos=TURNED, sin=TURNED
    ),
    "MeanVarianceNormalization": lambda: behind_the_convolution(
        NODE("MeanVarianceNormalization", ["c"], ["m"], axes=[0, 1, 2, 3]),
        NODE("Relu", ["m"], ["r"]),
        opset=13,
    ),
    "CastLike": lambda: behind_the_convolution(NODE("CastLike", ["c", "d"], ["r"]), opset=19),
    "FusedConv": lambda: with_imports(
        small_model(
            [
                NODE("FusedConv", ["x", "w"], ["r"], domain="com.microsoft", activation="Relu"),
                *small_nodes()[2:],
            ]
        ),
        VENDOR,
    ),
    "FusedMatMul": lambda: with_imports(
        small_model(
            [
                *small_nodes()[:-1],
                NODE("FusedMatMul", ["f", "d"], ["y"], domain="com.microsoft", transB=1, alpha=0.5),
            ],
            {"w": WEIGHT, "d": DENSE.T.copy()},
        ),
        VENDOR,
    ),
    "Gelu": lambda: with_imports(
        behind_the_convolution(NODE("Gelu", ["c"], ["r"], domain="com.microsoft")), VENDOR
    ),
    "QuickGelu": lambda: with_imports(
        behind_the_convolution(NODE("QuickGelu", ["c"], ["r"], domain="com.microsoft")), VENDOR
    ),
    "BiasGelu": lambda: with_imports(
        of_tokens(NODE("BiasGelu", ["t", "b"], ["u"], domain="com.microsoft"), opset=17, b=ONES),
        VENDOR,
    ),
    "SkipLayerNormalization": lambda: with_imports(
        of_tokens(
            NODE("SkipLayerNormalization", ["t", "t", "s"], ["u"], domain="com.microsoft"),
            opset=17,
            s=RNG.random(4).astype(np.float32),
        ),
        VENDOR,
    ),
    "LayerNormalization before opset 17": lambda: of_tokens(
        NODE("LayerNormalization", ["t", "s"], ["u"], axis=-1),
        opset=13,
        s=RNG.random(4).astype(np.float32),
    ),
    "Resize of opset 10": lambda: behind_the_convolution(
        NODE("Resize", ["c", "by"], ["r"], mode="linear"),
        opset=10,
        by=np.array([1, 1, 2, 2], np.float32),
    ),
}
NORMALIZED = [name for name in MADE_OF_OTHERS if "Normalization" in name]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=NORMALIZES if kind in NORMALIZED else ()) for kind in MADE_OF_OTHERS],
)
def test_an_operator_that_is_made_of_others(tmp_path, kind):
    model = MADE_OF_OTHERS[kind]()
    model.ir_version = 10
    path = saved(tmp_path, model)
    found = answer(path)
    np.testing.assert_allclose(
        found["scores_out"].ravel(), by_onnxruntime(path), rtol=1e-3, atol=2e-5
    )
    assert found["map"].max() > 0


def test_local_functions_are_written_out(tmp_path):
    found = answer(saved(tmp_path, of_functions(2, 3)))
    expected = answer(saved(tmp_path, small_model(), "usual.onnx"))
    np.testing.assert_array_equal(found["map"], expected["map"])


def with_end(*nodes, outputs, **tensors):
    """The small classifier, whose scores other nodes read."""
    return small_model(
        [*small_nodes(), *nodes], {"w": WEIGHT, "d": DENSE, **tensors}, outputs=outputs
    )


def of_ml(model):
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    return model


ENDS = {
    "a label": lambda: with_end(
        NODE("ArgMax", ["y"], ["best"], axis=1), outputs=[scores("best", TensorProto.INT64)]
    ),
    "the label of probabilities": lambda: with_end(
        NODE("Softmax", ["y"], ["p"]),
        NODE("ArgMax", ["p"], ["best"], axis=1, keepdims=0),
        NODE("Cast", ["best"], ["small"], to=TensorProto.INT32),
        outputs=[scores("small", TensorProto.INT32)],
    ),
    "the best three": lambda: with_end(
        NODE("TopK", ["y", "three"], ["values", "places"], axis=1),
        outputs=[scores("values"), scores("places", TensorProto.INT64)],
        three=np.array([3]),
    ),
    "a label by name": lambda: of_ml(
        with_end(
            NODE("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
            NODE(
                "LabelEncoder",
                ["best"],
                ["name"],
                domain="ai.onnx.ml",
                keys_int64s=range(5),
                values_strings="abcde",
            ),
            outputs=[scores("name", TensorProto.STRING)],
        )
    ),
    "a table of probabilities": lambda: of_ml(
        with_end(
            NODE("Softmax", ["y"], ["p"]),
            NODE("ZipMap", ["p"], ["table"], domain="ai.onnx.ml", classlabels_int64s=range(5)),
            outputs=[scores("table")],
        )
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_of_labels_the_scores_are_taken(tmp_path, kind):
    found = answer(saved(tmp_path, ENDS[kind]()))
    expected = answer(saved(tmp_path, small_model(), "usual.onnx"))
    np.testing.assert_array_equal(found["scores_out"], expected["scores_out"])


def test_what_the_class_scores_do_not_need_may_be_anything(tmp_path):
    boxes = NODE("NonMaxSuppression", ["b", "s"], ["kept"])
    odd = NODE("Anything", ["f"], ["z"], domain="org.me")
    found = with_end(
        boxes,
        odd,
        outputs=[scores(), scores("kept", TensorProto.INT64)],
        b=np.ones((1, 1, 4), np.float32),
        s=np.ones((1, 1, 1), np.float32),
    )
    expected = answer(saved(tmp_path, small_model(), "usual.onnx"))
    np.testing.assert_array_equal(
        answer(saved(tmp_path, found))["scores_out"], expected["scores_out"]
    )


def normalised(*outputs, opset=13, **attributes):
    parts = {name: RNG.uniform(0.5, 1.5, 4).astype(np.float32) for name in ("s", "b", "m", "v")}
    node = NODE("BatchNormalization", ["c", *parts], ["r", *outputs], **attributes)
    return behind_the_convolution(node, opset=opset, **parts)


def dropped(train):
    half = np.array(0.5, np.float32)
    return behind_the_convolution(
        NODE("Dropout", ["c", "half", "train"], ["r"]), half=half, train=np.array(train)
    )


TRAINING = {
    "normalization": lambda: normalised("m2", "v2", opset=17, training_mode=1),
    "normalization of old": lambda: normalised("m1", "v1", "m2", "v2", opset=9),
    "dropout": lambda: dropped(True),
}


@pytest.mark.parametrize("kind", TRAINING)
def test_in_training_mode_a_network_is_used_as_at_inference(tmp_path, kind):
    model = TRAINING[kind]()
    path = saved(tmp_path, model)
    notes = load_classifier(str(path)).network.notes
    assert any("exported in training mode" in note for note in notes)
    node = model.graph.node[1]
    for each in [each for each in node.attribute if each.name == "training_mode"]:
        node.attribute.remove(each)
    del node.output[1:]
    del node.input[5 if node.op_type == "BatchNormalization" else 2 :]
    expected = by_onnxruntime(saved(tmp_path, model, "inference.onnx"))
    np.testing.assert_allclose(answer(path)["scores_out"].ravel(), expected, rtol=1e-3, atol=1e-5)


def test_networks_at_inference_pass_with_dropout_and_normalisation(tmp_path):
    path = saved(tmp_path, dropped(False))
    notes = load_classifier(str(saved(tmp_path, normalised(opset=17)))).network.notes
    assert load(path)
    assert not any("training mode" in note for note in notes)
    low = np.array(-np.inf, np.float32)
    assert load(saved(tmp_path, behind_the_convolution(NODE("Clip", ["c", "low"], ["r"]), low=low)))


def quantised(symmetric):
    """As ONNX Runtime's quantizer writes it; where the zero is the least, the ReLU is left out."""
    deviation = np.abs(WEIGHT).max((1, 2, 3)) / 127
    integers = np.round(WEIGHT / deviation[:, None, None, None]).astype(np.int8)
    kind, zero = (np.int8, 0) if symmetric else (np.uint8, 0)
    tensors = {
        "w8": integers,
        "ws": deviation.astype(np.float32),
        "wz": np.zeros(4, np.int8),
        "cs": np.array(0.08, np.float32),
        "cz": np.array(zero, kind),
        "d": DENSE,
    }
    nodes = [
        NODE("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=0),
        NODE("Conv", ["x", "w"], ["c"]),
        NODE("QuantizeLinear", ["c", "cs", "cz"], ["c8"]),
        NODE("DequantizeLinear", ["c8", "cs", "cz"], ["r"]),
        *small_nodes()[2:],
    ]
    return small_model(nodes, tensors)


@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_are_computed_as_the_floats_that_they_stand_for(tmp_path, symmetric):
    path = saved(tmp_path, quantised(symmetric))
    found, expected = answer(path)["scores_out"].ravel(), by_onnxruntime(path)
    assert found.argmax() == expected.argmax()
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert answer(path)["map"].max() > 0
    assert any("8-bit" in note for note in load_classifier(str(path)).network.notes)


def test_one_logit_has_a_map_whichever_class_it_is(tmp_path):
    model = small_model(tensors={"w": WEIGHT, "d": DENSE[:, :1]}, inputs=[image()])
    onnx.helper.set_model_props(model, {"names": "['cat']"})
    path = saved(tmp_path, model)
    found, logit = answer(path), by_onnxruntime(path)[0]
    yes = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(found["score"], max(yes, 1 - yes), rtol=1e-4)
    assert found["class_index"] == [int(logit > 0)]
    assert found["map"].max() > 0
    assert any("one score" in note for note in load_classifier(str(path)).network.notes)


def test_the_newest_opset_is_read(tmp_path):
    newest = small_model(opset=onnx.defs.onnx_opset_version())
    found = answer(saved(tmp_path, newest))
    expected = answer(saved(tmp_path, small_model(), "usual.onnx"))
    np.testing.assert_array_equal(found["map"], expected["map"])
