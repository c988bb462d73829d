"""Files of dense heads, and the parts of their graph against slow definitions."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from engines.backends.openvino import OpenVinoEngine
from engines.boxes import distinct, iou
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.dense import (
    GEOMETRY,
    METADATA,
    SIZES,
    DenseHead,
    Level,
)
from engines.errors import ModelError
from engines.graph import FLOAT, Graph
from engines.head import dense_input, load_head, shipped_heads
from engines.maps import MapSpec
from engines.networks.network import Forward, pooled_linear
from engines.networks.preprocessing import LETTERBOX, GivenInput
from engines.networks.registry import load_classifier
from engines.resizing import cell_centres, cell_window, interpolation

RNG = np.random.default_rng(3)


def noise(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def small_head() -> DenseHead:
    level = Level("stage", False, noise(4), noise(4, 2).astype(np.float16) * 1.0, 3, 2, 3)
    return DenseHead(
        MapSpec(layer="stage", signal="layercam"),
        (level,),
        16,
        noise(5 * SIZES, 2 * 9),
        noise(5 * SIZES),
        noise(5, 1 + 2 * 9 + GEOMETRY),
        noise(5),
        (2.0, -1.0),
        8,
        "0" * 64,
        64,
        "letterbox",
        {"data": "noise"},
        first_weight=noise(4, 1 + 2 * 9 + GEOMETRY),
        first_bias=noise(4),
    )


@pytest.fixture
def stored(tmp_path):
    """(tensors, description) of a file."""
    path = tmp_path / "head.safetensors"
    small_head().save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return load(content), json.loads(header["__metadata__"][METADATA])


def test_a_file_says_what_input_its_head_was_fitted_with(tmp_path):
    path = tmp_path / "head.safetensors"
    small_head().save(path)
    assert dense_input(str(path)) == (64, "letterbox")
    assert dense_input(str(tmp_path / "nothing.safetensors")) is None
    assert dense_input("compact_gestalt") is None
    assert dense_input(str(tmp_path / "head")) == (64, "letterbox")
    assert dense_input("lite0_dense") == (320, "letterbox")
    assert dense_input(None) is None
    assert isinstance(load_head(path), DenseHead)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 4),
        ("levels", []),
        ("levels", [{"layer": "stage"}]),
        ("stride_px", 0),
        ("certainty", [1.0]),
        ("certainty", ["a", "b"]),
        ("candidates", 10_000),
        ("network", 5),
        ("size_px", 1e9),
        ("resize", None),
        ("card", []),
        ("spec", {"layer": 3}),
        ("spec", {"colour": "red"}),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(stored, tmp_path, key, value):
    tensors, described = stored
    path = tmp_path / "bad.safetensors"
    path.write_bytes(save(tensors, {METADATA: json.dumps({**described, key: value})}))
    with pytest.raises(ModelError, match="cannot read head") as error:
        load_head(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["cell_weight", "first_weight", "box_weight", "box_bias", "mean0", "basis0"]
)
@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_damaged_weights_are_refused_in_one_line(stored, tmp_path, name, damage):
    tensors, described = stored
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = np.concatenate([tensors[name], tensors[name]])
    else:
        tensors[name] = np.full_like(tensors[name], np.nan)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(save(tensors, {METADATA: json.dumps(described)}))
    with pytest.raises(ModelError, match="cannot read head") as error:
        load_head(path)
    assert "\n" not in str(error.value)


def test_interpolation_is_bilinear_between_the_middles_of_cells():
    values = np.array([0.0, 1.0, 4.0])
    found = interpolation(3, 6) @ values
    np.testing.assert_allclose(found, [0, 0.25, 0.75, 1.75, 3.25, 4], atol=1e-6)
    assert cell_centres(2, 2, 16).tolist() == [[8, 8], [24, 8], [8, 24], [24, 24]]
    assert cell_centres(1, 3, 16).tolist() == [[8, 8], [24, 8], [40, 8]]


def test_layers_that_do_not_fit_the_cells_are_refused():
    assert cell_window(40, 20, 2) == (2, 0)
    assert cell_window(20, 20, 3) == (1, 1)
    assert cell_window(10, 20, 1) == (1, 0)
    with pytest.raises(ModelError, match="40 cells does not fit 15"):
        cell_window(40, 15, 2)
    with pytest.raises(ModelError, match="has no middle"):
        cell_window(20, 20, 2)


def test_distinct_boxes_are_those_that_a_loop_keeps():
    boxes = np.sort(RNG.uniform(0, 100, (60, 2, 2)), axis=1).reshape(60, 4)
    scores = RNG.normal(size=60)
    kept = list[int]()
    for place in np.argsort(-scores):
        if all(iou(boxes[place], boxes[other]) <= 0.5 for other in kept):
            kept.append(int(place))
    assert distinct(boxes, scores).tolist() == kept
    assert distinct(np.zeros((0, 4)), []).tolist() == []


def test_the_class_layer_of_boxes_is_found_where_the_last_maps_are_averaged():
    lite = load_classifier("lite0", None, 64)
    graph, forward = lite.forward_graph()
    found = pooled_linear(graph, forward)
    assert found is not None
    assert graph.shape(found.weight) == (1280, 1000)
    assert graph.shape(found.mean) == (1, 1280)
    graph, forward = load_classifier("squeezenet", "random", 64).forward_graph()
    assert pooled_linear(graph, forward) is None  # its last convolution gives the scores


def test_the_largest_values_of_each_row():
    values = noise(2, 9)
    graph = Graph()
    rows = graph.input("rows", FLOAT, values.shape)
    for tensor, name in zip(graph.top(rows, 4), ("values", "places"), strict=True):
        graph.output(tensor, name)
    found = OpenVinoEngine(graph.model(), "fp32").infer({"rows": values})
    order = np.argsort(-values, axis=1)[:, :4]
    np.testing.assert_array_equal(found["places"], order)
    np.testing.assert_array_equal(found["values"], np.take_along_axis(values, order, 1))


def test_a_forward_without_such_a_layer_has_none():
    graph = Graph()
    scores = graph.input("scores", FLOAT, (1, 5))
    assert pooled_linear(graph, Forward(scores, scores)) is None


def test_the_class_of_an_image_is_the_same_with_a_dense_head_and_without():
    lite = load_classifier("lite0", None, 96, GivenInput(resize=LETTERBOX))
    head = shipped_heads(lite)["lite0_dense"]
    images = RNG.integers(0, 256, (2, 96, 96, 3)).astype(np.uint8)
    feed = {IMAGE: images, WANTED_CLASS: np.array([-1, 7])}
    with_head, without = (
        OpenVinoEngine(build_graph(lite, head.spec, each, batch=2), "fp32").infer(feed)
        for each in (head, None)
    )
    np.testing.assert_array_equal(with_head["class_index"], without["class_index"])
    for name in ("score", "logit", "map"):
        np.testing.assert_allclose(with_head[name], without[name], rtol=1e-3, atol=1e-5)
