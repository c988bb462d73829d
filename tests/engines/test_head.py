"""Head features in the graph against slow definitions; heads as files; heads tied to their
network.
"""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from engines.backends.openvino import OpenVinoEngine, best_precision
from engines.backends.torch_reference import TorchEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph, stamped
from engines.errors import ModelError
from engines.graph import FLOAT, INT64, Graph
from engines.head import Head, append_box, load_head
from engines.localizer import Localizer
from engines.maps import Feature, MapSpec, append_features, area_matrix
from engines.networks.registry import load_classifier
from tests.engines.test_confidence import CERTAIN

RNG = np.random.default_rng(8)
MAPS = RNG.random((2, 15, 12)).astype(np.float32) ** 4


def features_of(features, maps):
    graph = Graph()
    x = graph.input("map", FLOAT, maps.shape)
    graph.output(append_features(graph, {("gradient", "m"): x}, features), "y")
    return OpenVinoEngine(graph.model(), "fp32").infer({"map": maps})["y"]


def slow_grid(image, size, power):
    """Sample each cell at 60 x 60 points: no shared arithmetic with area_matrix."""
    scaled = image.astype(np.float64) ** power
    scaled = scaled / scaled.mean()
    fine = np.kron(scaled, np.ones((60, 60)))
    rows = np.array_split(fine, size, axis=0)
    return np.array(
        [[cell.mean() for cell in np.array_split(row, size, axis=1)] for row in rows]
    ).ravel()


def slow_quantiles(image, count, power):
    """Walk along the axis until the mass reaches the level."""
    found = []
    for axis in (0, 1):
        mass = (image.astype(np.float64) ** power).sum(axis=axis)
        mass = mass / mass.sum()
        for i in range(count):
            level, below = (i + 0.5) / count, 0.0
            for place, bin_mass in enumerate(mass):
                if below + bin_mass >= level:
                    found.append((place + (level - below) / bin_mass) / len(mass))
                    break
                below += bin_mass
    return np.array(found)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_grid(size, power):
    found = features_of([Feature("grid", "m", size, power)], MAPS)
    for image, row in zip(MAPS, found, strict=True):
        np.testing.assert_allclose(row, slow_grid(image, size, power), rtol=2e-4)


def test_the_grid_of_full_size_is_the_papers_whole_map():
    square = MAPS[:, :12]
    found = features_of([Feature("grid", "m", 12)], square)
    np.testing.assert_allclose(
        found, (square / square.mean(axis=(1, 2), keepdims=True)).reshape(2, -1), rtol=1e-5
    )


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_quantiles(count, power):
    found = features_of([Feature("quantiles", "m", count, power)], MAPS)
    for image, row in zip(MAPS, found, strict=True):
        np.testing.assert_allclose(row, slow_quantiles(image, count, power), atol=2e-5)


def test_features_do_not_care_how_bright_the_map_is_and_survive_an_empty_one():
    wanted = [Feature("quantiles", "m", 5), Feature("grid", "m", 4, 0.5)]
    np.testing.assert_allclose(
        features_of(wanted, MAPS), features_of(wanted, MAPS * 1e-6), rtol=1e-3
    )
    assert np.isfinite(features_of(wanted, np.zeros_like(MAPS))).all()


def test_area_matrix_rows_average():
    np.testing.assert_allclose(
        area_matrix(5, 2), [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]], rtol=1e-6
    )


def head_for(classifier, features, spec=None):
    width = sum(feature.width for feature in features)
    weight = RNG.standard_normal((1, 4, width)).astype(np.float32) * 0.02
    bias = np.array([[0.2, 0.3, 0.7, 0.8]], np.float32)
    return Head(
        spec or MapSpec(),
        tuple(features),
        weight,
        bias,
        classifier.digest,
        classifier.size_px,
        {"data": "made up"},
    )


MANY = (
    Feature("quantiles", "pixels", 7),
    Feature("quantiles", "conv3_3", 5, 2.0),
    Feature("grid", "conv4_3", 5, 0.5),
    Feature("grid", "conv5_3", 4, 1.0, "activation"),
    Feature("quantiles", "conv5_3", 3, 1.0, "activation"),
    Feature("grid", "conv5_3", 2, 1.0, "gradcam"),
    Feature("quantiles", "conv4_3", 3, 0.5, "layercam"),
)


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param(
            "bf16", marks=pytest.mark.skipif(best_precision() != "bf16", reason="no bf16")
        ),
    ],
)
def test_the_box_of_the_graph_is_the_references(photos, precision):
    classifier = load_classifier("compact", "random", 64)
    head = head_for(classifier, MANY)
    engine, reference = (
        OpenVinoEngine(build_graph(classifier, head=head), precision),
        TorchEngine(classifier, head=head),
    )
    for photo in photos[:4]:
        feed = {IMAGE: cv2.resize(photo, (64, 64))[None], WANTED_CLASS: np.array([5])}
        tolerance = 1e-4 if precision == "fp32" else 0.03
        np.testing.assert_allclose(
            engine.infer(feed)["box_xyxy"], reference.infer(feed)["box_xyxy"], atol=tolerance
        )


def test_boxes_lie_inside_the_image_with_corners_in_order():
    classifier = load_classifier("compact", "random", 64)
    head = replace(
        head_for(classifier, MANY[:1]), bias=np.array([[1.5, 0.9, -0.5, 0.1]], np.float32)
    )
    head = replace(head, weight=np.zeros_like(head.weight))
    feed = {IMAGE: np.zeros((1, 64, 64, 3), np.uint8), WANTED_CLASS: np.array([-1])}
    found = OpenVinoEngine(build_graph(classifier, head=head), "fp32").infer(feed)["box_xyxy"]
    np.testing.assert_allclose(found, [[0, 0.1, 1, 0.9]], atol=1e-6)
    graph = Graph()
    x, classes = graph.input("f", FLOAT, (3, head.weight.shape[2])), graph.input("c", INT64, (3,))
    assert graph.shape(append_box(graph, x, classes, head)) == (3, 4)


def test_the_networks_class_decides_which_layer_reads_the_box():
    classifier = load_classifier("compact", "random", 64)
    one = head_for(classifier, MANY[:1])
    biases = np.array([[0.1] * 4, [0.4] * 4, [0.8] * 4], np.float32)
    routes = np.zeros(1000, np.int64)
    routes[5], routes[9] = 1, 2
    head = replace(
        one, weight=np.zeros((3, *one.weight.shape[1:]), np.float32), bias=biases, routes=routes
    )
    engine, reference = (
        OpenVinoEngine(build_graph(classifier, head=head), "fp32"),
        TorchEngine(classifier, head=head),
    )
    for wanted, expected in ((5, 0.4), (9, 0.8), (6, 0.1)):
        feed = {IMAGE: np.zeros((1, 64, 64, 3), np.uint8), WANTED_CLASS: np.array([wanted])}
        np.testing.assert_allclose(engine.infer(feed)["box_xyxy"], [[expected] * 4], atol=1e-6)
        np.testing.assert_allclose(reference.infer(feed)["box_xyxy"], [[expected] * 4], atol=1e-6)


def test_routes_must_lead_somewhere(tmp_path):
    head = head_for(load_classifier("compact", "random", 64), MANY[:1])
    replace(head, routes=np.full(1000, 3)).save(tmp_path / "h.safetensors")
    with pytest.raises(ModelError, match="damaged"):
        load_head(tmp_path / "h.safetensors")


def test_a_head_survives_its_file(tmp_path):
    classifier = load_classifier("compact", "random", 64)
    head = replace(head_for(classifier, MANY), confidence_model=CERTAIN)
    head.save(tmp_path / "deep" / "head.safetensors")
    found = load_head(tmp_path / "deep" / "head.safetensors")
    assert (
        found.digest == head.digest == replace(head, confidence_model=None).digest
    )  # how sure boxes are decides none
    assert found.confidence_model == CERTAIN
    assert found.card == head.card
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["head.safetensors"]


def test_a_head_is_tied_to_network_size_and_map():
    classifier = load_classifier("compact", "random", 64)
    head = head_for(classifier, MANY[:1])
    build_graph(classifier, head=head)
    with pytest.raises(ModelError, match="fitted on another network"):
        build_graph(classifier, head=replace(head, network="0" * 64))
    with pytest.raises(ModelError, match="fitted at 64 px, not 96"):
        build_graph(load_classifier("compact", "random", 96), head=head)
    with pytest.raises(ModelError, match="reads the map"):
        build_graph(classifier, MapSpec(objective="gestalt"), head=head)


def test_heads_from_before_there_was_trust_still_load(tmp_path):
    path = tmp_path / "h.safetensors"
    head_for(load_classifier("compact", "random", 64), MANY[:1]).save(path)
    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["sightline_head"])
        tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "routes")}
    del description["trust"]
    save_file(tensors, path, {"sightline_head": json.dumps(description)})
    assert load_head(path).confidence_model is None
    save_file(
        tensors, path, {"sightline_head": json.dumps({**description, "trust": {"signs": "logit"}})}
    )
    assert load_head(path).confidence_model is None
    save_file(
        tensors,
        path,
        {
            "sightline_head": json.dumps(
                {**description, "trust": {**CERTAIN.stored(), "weight": [1]}}
            )
        },
    )
    with pytest.raises(ModelError, match="cannot read head"):
        load_head(path)


def test_the_graph_gives_the_class_score_before_the_softmax_as_the_reference_does(photos):
    classifier = load_classifier("compact", "random", 64)
    head = replace(head_for(classifier, MANY[:1]), confidence_model=CERTAIN)
    engine, reference = (
        OpenVinoEngine(build_graph(classifier, head=head, expose=["scores"]), "fp32"),
        TorchEngine(classifier, head=head),
    )
    feed = {IMAGE: cv2.resize(photos[0], (64, 64))[None], WANTED_CLASS: np.array([7])}
    found = engine.infer(feed)
    assert found["logit"][0] == found["scores_out"][0, 7]
    np.testing.assert_allclose(found["logit"], reference.infer(feed)["logit"], rtol=1e-4, atol=1e-5)
    one, other = (
        Localizer(each).localize([photos[0]])[0].confidence for each in (engine, reference)
    )
    assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_damaged_head_files(tmp_path, content):
    (tmp_path / "h.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot read head"):
        load_head(tmp_path / "h.safetensors")


def test_the_graph_is_stamped():
    classifier = load_classifier("compact", "random", 64)
    head = head_for(classifier, MANY[:1])
    metadata = {p.key: p.value for p in build_graph(classifier, head=head).metadata_props}
    description = stamped(metadata)
    assert description["network"] == classifier.digest
    assert description["head"] == head.digest
    assert description["spec"]["objective"] == "class"
    with pytest.raises(ModelError, match="not built by Sightline"):
        stamped({})


def test_unknown_layers_and_objectives_are_named():
    classifier = load_classifier("compact", "random", 64)
    with pytest.raises(ModelError, match="no layer 'conv9_9': choose one of conv1_1"):
        build_graph(classifier, MapSpec(layer="conv9_9"))
    with pytest.raises(ModelError, match="unknown objective 'joy'"):
        MapSpec(objective="joy")
