"""Dense heads are fitted to scenes of which everything is known: coloured shapes on noise."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.helper import make_node
from rich.console import Console

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.evaluation.metrics import baselines
from calib.heads import dense, dense_scenes
from calib.heads.dense_layers import Layers
from calib.heads.dense_names import Names, Sureness
from calib.heads.linear import Normal
from engines.backends.openvino import OpenVinoEngine
from engines.boxes import iou
from engines.build import CANDIDATES, build_graph
from engines.dense import SMALLEST, DenseHead
from engines.errors import ModelError, SourceError
from engines.head import load_head
from engines.localizer import Localizer
from engines.networks.preprocessing import LETTERBOX, GivenInput
from engines.networks.registry import load_classifier

SIZE_PX = 160
QUIET = Console(quiet=True)


def scene(number: int, objects: int) -> Sample:
    """A picture of 200 x 120 pixels with so many orange boxes on grey noise."""
    rng = np.random.default_rng(number)
    image = rng.integers(90, 130, (120, 200, 3)).astype(np.uint8)
    truths = []
    for place in range(objects):
        width, height = rng.integers(30, 60, 2)
        x = int(rng.integers(0, 100 - width)) + 100 * place
        y = int(rng.integers(0, 120 - height))
        image[y : y + height, x : x + width] = (20, 110, 240)
        truths.append(Truth("thing", (x, y, x + width, y + height)))
    return Sample(f"{number}.png", lambda: image, tuple(truths))


SMALL = {
    "MOST_COMPONENTS": 12,
    "MOST_LAST_COMPONENTS": 12,
    "BOX_CHANNELS": 6,
    "BOX_LAST_CHANNELS": 6,
    "FINE_BINS": 5,
    "COARSE_BINS": 3,
}
"""A few components and bins: the arithmetic is the same, and takes no time."""


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(dense_scenes, name, value)
        yield


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("lite0", None, SIZE_PX, GivenInput(resize=LETTERBOX))


def fitted_on(classifier, samples, start=None):
    spec = dense.default_spec(classifier)
    return dense.fit_dense(samples, classifier, spec, QUIET, "shapes", start)


@pytest.fixture(scope="module")
def fitted(classifier, small):
    return fitted_on(classifier, [scene(i, 1 + i % 2) for i in range(40)])


def localizer(classifier, head: DenseHead, batch: int = 1) -> Localizer:
    """With one engine, of the classifier's shape."""
    graph = build_graph(classifier, head.spec, head, batch=batch)
    return Localizer(OpenVinoEngine(graph, "fp32"))


def test_a_head_that_is_fitted_saved_and_read_finds_every_object_of_new_scenes(
    classifier, fitted, tmp_path
):
    path = tmp_path / "head.safetensors"
    fitted.head.save(path)
    head = load_head(path)
    assert isinstance(head, DenseHead)
    assert head.digest == fitted.head.digest
    assert head.first_weight is not None
    assert head.card["objects"] == 60
    engine = localizer(classifier, head)
    constant = baselines(engine, None)
    assert constant is not None
    assert 0 < constant.mean_box[0] < 0.3  # the only box of an image is in its left half
    assert 0.2 < constant.mean_box[2] < 0.6
    engine.objects = 3
    right = []
    for number in range(100, 110):
        sample = scene(number, 1 + number % 2)
        found = engine.localize([sample.read()])[0]
        boxes = np.array([each.box_xyxy_px for each in found.detections])
        true = np.array([truth.box_xyxy_px for truth in sample.truths])
        right += (iou(true[:, None], boxes[None]).max(axis=1) > 0.5).tolist()
        assert found.box_xyxy_px == found.detections[0].box_xyxy_px
        assert found.confidence == found.detections[0].confidence
        assert len(found.detections) <= 3
    assert np.mean(right) > 0.8


@pytest.mark.parametrize(
    ("shape", "rounds"), [((160, 160), 2), ((96, 160), 2), ((160, 128), 2), ((96, 160), 1)]
)
def test_the_graph_computes_what_was_fitted(classifier, fitted, shape, rounds):
    head, classifier = fitted.head, replace(classifier, other_shape=shape)
    if rounds == 1:  # as heads were before
        head = replace(head, first_weight=None, first_bias=None)
    engine = localizer(classifier, head, batch=2)
    images = [engine.prepare(scene(number, 2).read()) for number in (200, 201)]
    found = engine.infer(images)[CANDIDATES]
    activations = dense_scenes.activations_of(classifier, head.levels)
    reader = dense_scenes.Reader.of(head, shape)
    names = Names.of(["thing"], head.naming)
    layers = Layers.of(head, names)
    sure = Sureness(names, head.trust, head.certainty, SIZE_PX, SMALLEST * head.stride_px)
    for row, image in zip(found, images, strict=True):
        maps = tuple(
            dense_scenes.components(values, level)
            for values, level in zip(activations(image), head.levels, strict=True)
        )
        answer = layers.answer(reader, dense_scenes.Scene(maps, np.zeros((0, 4))))
        overlaps = iou(row[:, None, :4] * np.tile(shape[::-1], 2), answer.boxes[None])
        assert (overlaps.max(axis=1) > 0.99).all()
        same = overlaps.argmax(axis=1)
        np.testing.assert_allclose(row[:, 4], sure(answer)[same], atol=5e-3)
        named = names.probabilities(answer.scores)[same, 0]
        assert (row[:, 7] == 0).all()
        np.testing.assert_allclose(row[:, 8], named, atol=5e-3)


def test_the_class_of_a_box_is_that_of_what_lies_in_it_unless_one_is_looked_for(classifier, fitted):
    engine = localizer(classifier, fitted.head)
    image = engine.prepare(scene(300, 1).read())
    free = engine.infer([image])[CANDIDATES][0]
    assert ((free[:, 6] > 0) & (free[:, 6] <= 1)).all()
    engine.look_for(7)
    wanted = engine.infer([image])[CANDIDATES][0]
    assert (wanted[:, 5] == 7).all()
    assert (wanted[:, 6] <= free[:, 6] + 1e-6).all()
    np.testing.assert_allclose(wanted[:, :5], free[:, :5], atol=1e-5)
    assert engine.localize([scene(300, 1).read()])[0].class_index == 7


def test_what_is_to_be_ignored_is_neither_object_nor_background(classifier, fitted, tmp_path):
    empty = np.zeros((0, 4))
    area = np.array([[0.0, 0, 50, 50]])
    scene_of = dense_scenes.Scene((), empty, ignored_px=area)
    boxes = np.array([[0.0, 0, 45, 50], [5, 5, 10, 10], [40, 40, 80, 80], [60, 60, 90, 90]])
    assert scene_of.is_known(boxes, np.zeros(4)).tolist() == [False, False, True, True]
    assert scene_of.is_known(boxes, np.ones(4)).all()
    plain = dense_scenes.Scene((), empty)
    assert scene_of.says_nothing
    assert not plain.says_nothing
    assert not replace(scene_of, boxes_px=area).says_nothing
    assert plain.is_known(boxes, np.zeros(4)).all()
    both = scene(700, 2)
    sample = replace(both, truths=both.truths[:1], ignored=both.truths[1:])
    levels = fitted.head.levels
    table = dense_scenes.SceneTable.of(
        {"": [sample]}, ("thing",), classifier, levels, tmp_path, QUIET
    )
    seen, mirrored = table.scenes(np.array([0]))
    assert len(seen.boxes_px) == len(seen.ignored_px) == 1
    edges = mirrored.ignored_px[0, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [SIZE_PX, 0, SIZE_PX, 0]
    np.testing.assert_allclose(edges, seen.ignored_px[0])


def test_few_boxes_leave_a_head_nearly_as_it_was(classifier, fitted):
    some = [scene(number, 1) for number in range(400, 406)]
    head = fitted_on(classifier, some, fitted.head).head
    assert head.digest != fitted.head.digest
    sample = scene(500, 1)
    boxes = [
        localizer(classifier, each).localize([sample.read()])[0].box_xyxy_px
        for each in (fitted.head, head)
    ]
    assert iou(*boxes) > 0.7


def test_a_class_of_ones_own_is_added_to_those_that_the_head_knows(classifier, fitted):
    def blue(number: int) -> Sample:
        orange = scene(number, 1)
        truth = replace(orange.truths[0], class_name="mug")
        return replace(orange, read=lambda: orange.read()[..., ::-1], truths=(truth,))

    head = fitted_on(classifier, [blue(number) for number in range(700, 712)], fitted.head).head
    assert head.naming is not None
    assert head.naming.names == ("thing", "mug")
    assert head.naming.means.shape == head.naming.weight.shape
    engine = localizer(classifier, head)
    names = [engine.localize([blue(number).read()])[0].box_name for number in range(712, 718)]
    assert sum(each is not None and each.label == "mug" for each in names) >= 4


def test_what_it_reaches_is_said_beside_the_head_it_started_from(classifier, fitted):
    some = [scene(number, number % 3) for number in range(600, 620)]
    found = fitted_on(classifier, some, fitted.head)
    assert found.before is not None
    assert found.held_out["images_with_one_object"] == 7
    assert found.held_out["images_with_several"] == 6
    assert found.held_out["images_without"] == 7
    words = dense.told(found)
    assert "7 images with one object, 6 with several, 7 with none" in words
    assert "before: " in words
    assert "after: " in words
    assert not found.is_worse
    assert found.head.card["before"] == found.before
    forecast = found.forecast
    assert forecast.boxes == sum(len(each.truths) for each in some)
    counts, ious = zip(*forecast.points, strict=True)
    assert counts == pytest.approx((0, 0.4 * forecast.boxes, 0.8 * forecast.boxes), abs=0.1)
    assert (ious[0], ious[2]) == (found.before["mean_iou"], found.held_out["mean_iou"])
    assert forecast.words in words
    assert found.head.card["forecast"]["points"] == forecast.points
    worse = replace(found, before={**found.held_out, "corloc": found.held_out["corloc"] + 0.02})
    assert worse.is_worse


def test_a_system_of_the_rows_has_the_same_solution():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(30, 60)), np.ones((30, 1))], axis=1).astype(np.float32)
    y, weights = rng.normal(size=(30, 2)), rng.uniform(0.5, 2, 30)
    start = rng.normal(size=(61, 2))
    few, many = Normal(3.0), Normal(3.0)
    few.add(x, y, weights)
    for _ in range(5):  # the same rows again and again, so that there are more than features
        many.add(x, y, weights)
    np.testing.assert_allclose(few.solve(0.1, start), many.solve(0.1, start), atol=2e-3)


def test_normal_equations_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(300, 5)), np.ones((300, 1))], axis=1).astype(np.float32)
    y, weights = rng.normal(size=(300, 2)), rng.uniform(0.1, 2, 300)
    normal = Normal()
    for part in range(0, 300, 50):
        normal.add(x[part : part + 50], y[part : part + 50], weights[part : part + 50])
    root = np.sqrt(weights)[:, None]
    oracle = np.linalg.lstsq(root * x, root * y)[0]
    np.testing.assert_allclose(normal.solve(0.0), oracle, atol=1e-4)
    start = rng.normal(size=(6, 2))
    held = normal.solve(1e6, start)
    np.testing.assert_allclose(held[:-1], start[:-1], atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([scene(0, 1)], "it has 1 boxes"),
        ([scene(number, 0) for number in range(20)], "it has 0 boxes"),
    ],
)
def test_too_few_boxes_are_refused(classifier, samples, said):
    with pytest.raises(SourceError, match=said):
        fitted_on(classifier, samples)


def test_networks_without_cells_that_fit_are_refused():
    odd = load_classifier("lite0", None, 100, GivenInput(resize=LETTERBOX))
    with pytest.raises(ModelError, match="no stage with cells of 8, 16, 32 px"):
        fitted_on(odd, [scene(number, 1) for number in range(10)])


def test_a_head_is_tied_to_its_network_and_its_input(classifier, fitted):
    other = load_classifier("lite0", None, SIZE_PX)
    with pytest.raises(ModelError, match="was fitted on another network"):
        build_graph(other, fitted.head.spec, fitted.head)


def strided(path: Path) -> Path:
    """A classifier of five convolutions with random weights, as an ONNX file for 160 px."""
    rng, widths = np.random.default_rng(0), (3, 16, 16, 24, 32, 48)
    values, nodes = dict[str, np.ndarray](), list[onnx.NodeProto]()
    for number, (fewer, more) in enumerate(pairwise(widths)):
        weight = rng.normal(size=(more, fewer, 3, 3)) * np.sqrt(2 / 9 / fewer)
        values[f"w{number}"] = weight.astype(np.float32)
        inputs = [f"x{number}", f"w{number}"]
        nodes.append(make_node("Conv", inputs, [f"c{number}"], strides=[2, 2], pads=[1] * 4))
        nodes.append(make_node("Relu", [f"c{number}"], [f"x{number + 1}"]))
    values["last"] = rng.normal(size=(10, widths[-1])).astype(np.float32)
    nodes.append(make_node("GlobalAveragePool", ["x5"], ["mean"]))
    nodes.append(make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(make_node("Gemm", ["flat", "last"], ["scores"], transB=1))
    ends = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)]
        for name, shape in (("x0", [1, 3, SIZE_PX, SIZE_PX]), ("scores", [1, 10]))
    ]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "strided", *ends, stored)
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def test_a_classifier_of_ones_own_gets_a_dense_head(small, tmp_path):
    given = GivenInput(mean=(0.5,) * 3, std=(0.25,) * 3, resize=LETTERBOX)
    foreign = load_classifier(str(strided(tmp_path / "mine.onnx")), given=given)
    assert len(dense_scenes.layers_read(foreign)) == 3
    fitted_on(foreign, [scene(i, 1) for i in range(30)]).head.save(tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors")
    assert isinstance(head, DenseHead)
    engine = localizer(foreign, head)
    samples = [scene(number, 1) for number in range(100, 108)]
    found = [engine.localize([sample.read()])[0] for sample in samples]
    assert {each.box_name.label for each in found if each.box_name} == {"thing"}
    pairs = zip(found, samples, strict=True)
    right = [iou(each.box_xyxy_px, sample.truths[0].box_xyxy_px) > 0.5 for each, sample in pairs]
    assert np.mean(right) > 0.8


def test_a_head_reads_inputs_of_other_sizes(classifier, fitted):
    sample = scene(300, 1)
    image = sample.read()
    for size_px in (128, 192):
        other = replace(classifier, size_px=size_px)
        found = localizer(other, fitted.head).localize([image])[0]
        assert iou(found.box_xyxy_px, sample.truths[0].box_xyxy_px) > 0.5
    odd = replace(classifier, size_px=200)
    with pytest.raises(ModelError, match="cells of 16 px needs an input of a multiple of it"):
        build_graph(odd, fitted.head.spec, fitted.head)
