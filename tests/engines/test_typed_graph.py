"""Half precision as a change of the graph: what is computed in which type, and how little that
changes.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.build import build_graph
from engines.choose import build_chosen
from engines.errors import ModelError
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from engines.typed_graph import GRADIENT_SCALE, backward_starts, products_as_convolutions, to_half
from tests.engines.foreign import KINDS, SIDE, export
from tests.virtual_camera import DemoCamera


def run(model, images, wanted=-1):
    """Outputs by name in ONNX Runtime, which rounds to float16 wherever the graph says so."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"image_nhwc_bgr": images, "wanted_class": np.full(len(images), wanted)}
    known = {i.name for i in session.get_inputs()}
    values = session.run(None, {name: value for name, value in feeds.items() if name in known})
    return dict(zip([o.name for o in session.get_outputs()], values, strict=True))


def frames(size):
    import cv2

    camera = DemoCamera(300)
    return [
        cv2.resize(camera.shoot(i * 40)[0], (size, size), interpolation=cv2.INTER_AREA)[None]
        for i in range(3)
    ]


def types(model):
    """Element type by tensor, as ONNX infers it (strictly: a mixture is an error)."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    return {**values, **{t.name: t.data_type for t in graph.initializer}}


@pytest.mark.parametrize("method", ["sensitivity", "gestalt", "heuristic"])
def test_boxes_maps_and_scores_stay(method):
    model = build_chosen(EngineOptions(method=method))
    half = to_half(model)
    for image in frames(128):
        exact, found = run(model, image), run(half, image)
        assert found["class_index"] == exact["class_index"]
        np.testing.assert_allclose(found["score"], exact["score"], atol=2e-3)
        np.testing.assert_allclose(found["box_xyxy"], exact["box_xyxy"], atol=0.01)
        assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > 0.998
        assert found["map"].mean() == pytest.approx(exact["map"].mean(), rel=5e-3)


def test_squeezenet_too(squeezenet):
    model = build_chosen(EngineOptions("squeezenet", weights=squeezenet))
    image = frames(227)[1]
    exact, found = run(model, image), run(to_half(model), image)
    assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > 0.998


def test_inputs_outputs_and_metadata_are_the_same():
    model = build_graph(load_classifier("compact", "random", 64), batch=2)
    half = to_half(model)
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)
    assert list(half.metadata_props) == list(model.metadata_props)


def test_products_are_float16_and_what_is_delicate_float32():
    half = to_half(build_graph(load_classifier("compact", "random", 64)))
    elem = types(half)
    for node in half.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert {elem[name] for name in node.input} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Softmax", "ArgMax", "Abs", "ReduceMax"):
            assert elem[node.input[0]] == TensorProto.FLOAT, node.name
    assert sum(node.op_type == "Cast" for node in half.graph.node) < 10  # few borders
    assert half.ByteSize() < 0.6 * build_graph(load_classifier("compact", "random", 64)).ByteSize()


def test_the_gradients_scale_is_what_keeps_small_ones():
    """Scaled down to where float16 ends, the map is lost; scaled up, it is not, and comes out at
    its own size.
    """
    model, image = build_chosen(EngineOptions(method="gestalt", head="none")), frames(128)[0]
    exact = run(model, image)["map"].ravel()
    lost, kept = (
        run(to_half(model, scale), image)["map"].ravel() for scale in (2.0**-18, GRADIENT_SCALE)
    )
    assert not lost.any()
    assert np.corrcoef(kept, exact)[0, 1] > 0.998
    assert kept.max() == pytest.approx(exact.max(), rel=0.02)


def test_sums_in_float16_do_not_spoil_it_either():
    """ONNX's own implementation rounds after every step, which no engine does."""
    model, image = build_chosen(EngineOptions(head="none", size_px=64)), frames(64)[0]
    feeds = {"image_nhwc_bgr": image, "wanted_class": np.array([-1])}
    rounded = ReferenceEvaluator(to_half(model)).run(["map"], feeds)[0]
    assert np.corrcoef(rounded.ravel(), run(model, image)["map"].ravel())[0, 1] > 0.99


def classifier_of(nodes, constants, tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(
        nodes,
        "g",
        [x],
        [y],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return build_graph(load_classifier(str(path)))


def test_local_response_normalization_stays_in_float32(tmp_path):
    """Its squares overflow: activations of 2,000 have a square of 4e6."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((8, 3, 3, 3)) * 400,
        "v": rng.standard_normal((4, 8, 32, 32)) * 0.01,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("LRN", ["r"], ["n"], size=5, alpha=1e-4, beta=0.75),
        helper.make_node("Conv", ["n", "v"], ["s"]),
        helper.make_node("Flatten", ["s"], ["y"]),
    ]
    model, image = classifier_of(nodes, constants, tmp_path), frames(32)[0]
    exact, found = run(model, image), run(to_half(model), image)
    assert np.isfinite(found["map"]).all()
    assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > 0.99


def test_a_weight_beyond_float16_is_named(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "heavy"], ["c"]),
        helper.make_node("Flatten", ["c"], ["y"]),
    ]
    model = classifier_of(nodes, {"heavy": np.full((4, 3, 32, 32), 1e5)}, tmp_path)
    with pytest.raises(
        ModelError, match=r"weight 'heavy' reaches 1e\+05, beyond float16: use fp32"
    ):
        to_half(model)


def test_a_graph_without_products_is_refused():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [x],
        [helper.make_tensor_value_info("y", 1, [1])],
    )
    with pytest.raises(ModelError, match="no convolution or matrix product"):
        to_half(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        )


@pytest.mark.parametrize("method", ["sensitivity", "heuristic"])
@pytest.mark.parametrize("half", [False, True])
def test_products_as_convolutions_give_the_same(method, half):
    model = build_chosen(EngineOptions(method=method))
    model = to_half(model) if half else model
    turned = products_as_convolutions(model)
    elem = types(turned)
    left = [
        n
        for n in turned.graph.node
        if n.op_type in ("Gemm", "MatMul") and elem[n.input[0]] == TensorProto.FLOAT
    ]
    assert not left
    for image in frames(128)[:1]:
        exact, found = run(model, image), run(turned, image)
        assert found["class_index"] == exact["class_index"]
        np.testing.assert_allclose(
            found["map"], exact["map"], rtol=1e-3, atol=1e-4 * exact["map"].max()
        )
        np.testing.assert_allclose(found["box_xyxy"], exact["box_xyxy"], atol=1e-3)


def scaled(half):
    """How many tensors are multiplied by the gradient's scale on their way into float16."""
    return sum(
        node.op_type == "Mul" and f"gradient_times_{GRADIENT_SCALE:g}" in node.input
        for node in half.graph.node
    )


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("compact", "sensitivity"),
        ("compact", "gestalt"),
        ("squeezenet", "sensitivity"),
        ("alexnet", "sensitivity"),
    ],
)
def test_the_gradient_of_every_objective_is_scaled(model, method):
    """Networks that end in a linear layer, and such that end in a convolution, and no class at
    all.
    """
    graph = build_chosen(EngineOptions(model, weights="random", method=method, head="none"))
    half = to_half(graph)
    starts = backward_starts(graph)
    assert len(starts) == 1
    if method == "gestalt":  # a constant, which is multiplied where it is rounded
        before, after = (
            numpy_helper.to_array(
                next(t for t in g.graph.initializer if t.name.startswith("gestalt_cotangent"))
            )
            for g in (graph, half)
        )
        np.testing.assert_allclose(after.astype(np.float32), before * GRADIENT_SCALE, rtol=1e-3)
    else:
        assert scaled(half) > 0
    back = [
        node for node in half.graph.node if f"gradient_times_{1 / GRADIENT_SCALE:g}" in node.input
    ]
    assert back


def test_a_small_gradient_of_a_linear_layer_does_not_underflow(tmp_path):
    """Of 3e-8, which float16 rounds to zero or to its least number."""
    rng = np.random.default_rng(3)
    constants = {
        "w": rng.standard_normal((8, 3, 3, 3)),
        "v": rng.standard_normal((8, 8, 3, 3)),
        "d": rng.uniform(1, 2, (4, 8)) * 3e-5,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["e"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["e"], ["t"]),
        helper.make_node("GlobalAveragePool", ["t"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "d"], ["y"], transB=1),
    ]
    model, image = classifier_of(nodes, constants, tmp_path), frames(32)[0]
    exact = run(model, image)["map"].ravel()
    feeds = {
        "image_nhwc_bgr": image,
        "wanted_class": np.array([-1]),
    }  # ONNX's own implementation rounds after every step
    halves = [ReferenceEvaluator(to_half(model, scale)) for scale in (1.0, GRADIENT_SCALE)]
    lost, kept = (half.run(["map"], feeds)[0].ravel() for half in halves)
    off = [float(np.median(np.abs(found - exact)) / np.median(exact)) for found in (lost, kept)]
    assert off[1] < 0.02 < 0.1 < off[0], off


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def foreign(request, tmp_path_factory):
    """A network of gates, of channels last, of tokens or of windows, back to the pixels."""
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export(request.param, path)
    return build_graph(load_classifier(str(path)))


def test_attention_and_normalizations_stay_in_half_precision(foreign):
    half = to_half(foreign)
    elem = types(half)
    for node in half.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            assert {elem[name] for name in node.input} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Softmax", "LayerNormalization", "Exp", "Pow"):
            assert elem[node.input[0]] == TensorProto.FLOAT, node.name
    for image in frames(SIDE):
        exact, found = run(foreign, image), run(half, image)
        assert found["class_index"] == exact["class_index"]
        np.testing.assert_allclose(found["score"], exact["score"], atol=2e-3)
        assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > 0.998
        assert found["map"].mean() == pytest.approx(exact["map"].mean(), rel=5e-3)


def test_squares_beyond_float16_are_taken_in_float32(tmp_path):
    """Of activations of thousands, which a normalization brings back to one."""
    constants = {
        "w": np.random.default_rng(6).standard_normal((8, 3, 4, 4)) * 40,
        "scale": np.ones(8),
        "v": np.random.default_rng(7).standard_normal((8, 8)),
        "d": np.random.default_rng(8).standard_normal((4, 8)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[4, 4]),
        helper.make_node("Transpose", ["c"], ["l"], perm=[0, 2, 3, 1]),
        helper.make_node("LayerNormalization", ["l", "scale"], ["n"], axis=-1),
        helper.make_node("MatMul", ["n", "v"], ["m"]),
        helper.make_node("Transpose", ["m"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("GlobalAveragePool", ["t"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "d"], ["y"], transB=1),
    ]
    model, image = classifier_of(nodes, constants, tmp_path), frames(32)[0]
    feeds = {"image_nhwc_bgr": image, "wanted_class": np.array([-1])}
    (found,) = ReferenceEvaluator(to_half(model)).run(["map"], feeds)
    exact = run(model, image)["map"]
    assert np.isfinite(found).all()
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("left", "right", "constant"),
    [
        ((5, 4), (2, 3, 4, 6), "left"),
        ((2, 3, 5, 4), (4, 6), "right"),
        ((2, 5, 4), (2, 4, 6), ""),
        ((2, 1, 5, 4), (3, 4, 6), ""),
    ],
)
def test_products_of_maps_and_of_what_is_computed_need_no_matrix_product(left, right, constant):
    order = np.random.default_rng(0)
    values = {"left": order.random(left, np.float32), "right": order.random(right, np.float32)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in values.items()
        if name != constant
    ]
    shape = np.matmul(values["left"], values["right"]).shape
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    kept = [numpy_helper.from_array(v, n) for n, v in values.items() if n == constant]
    node = helper.make_node("MatMul", ["left", "right"], ["y"])
    graph = helper.make_graph([node], "product", inputs, [output], kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    turned = products_as_convolutions(model)
    assert not any(node.op_type == "MatMul" for node in turned.graph.node)
    fed = {name: value for name, value in values.items() if name != constant}
    (found,) = ReferenceEvaluator(turned).run(None, fed)
    np.testing.assert_allclose(found, values["left"] @ values["right"], rtol=1e-5)
