"""What dense heads say of their boxes: names and confidences, in files, graphs and words."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from engines.backends.openvino import OpenVinoEngine
from engines.build import CANDIDATES
from engines.confidence import ConfidenceModel
from engines.dense import METADATA, DenseHead, Level
from engines.dense_names import (
    CUES,
    BoxName,
    Labeler,
    Naming,
    append_classes,
    append_cues,
    append_logistic,
    append_names,
)
from engines.errors import InputError, ModelError
from engines.graph import FLOAT, INT64, Graph
from engines.head import load_head
from engines.localizer import Localizer
from engines.maps import MapSpec
from tests.engines.mock import MockEngine

RNG = np.random.default_rng(5)
NAMES = ("dog", "mug")
IMAGE = [np.zeros((64, 64, 3), np.uint8)]
TRUST = ConfidenceModel(
    CUES, (0.5,) * 7, (0.25,) * 7, tuple(RNG.normal(0, 0.1, 7 + 28).round(6).tolist()), -0.5
)


def noise(*shape):
    return RNG.normal(size=shape).astype(np.float16).astype(np.float32)


def naming(width: int) -> Naming:
    return Naming(NAMES, noise(3, width), noise(3), 0.6, np.array([-1, 0, 1]), 0.5, noise(3, width))


def head_with_names() -> DenseHead:
    level = Level("stage", False, noise(4), noise(4, 2), 3, 2, 3)
    width = 1 + 2 * 9 + 7 + 2
    plain = DenseHead(
        MapSpec(layer="stage", signal="layercam"),
        (level,),
        16,
        noise(15, 18),
        noise(15),
        noise(5, width),
        noise(5),
        (2.0, -1.0),
        8,
        "0" * 64,
        64,
        "letterbox",
    )
    return replace(
        plain, compared=300, same=0.7, whole=True, naming=naming(width), trust=TRUST, shown_from=0.4
    )


def test_names_and_confidence_come_back_from_a_file(tmp_path):
    path, head = tmp_path / "head.safetensors", head_with_names()
    head.save(path)
    found = load_head(path)
    assert isinstance(found, DenseHead)
    assert found.digest == head.digest
    assert found.naming is not None
    assert (found.naming.names, found.naming.shown_from) == (NAMES, 0.6)
    assert found.naming.finer.tolist() == [-1, 0, 1]
    np.testing.assert_array_equal(found.naming.means, head.naming.means)
    assert (found.trust, found.shown_from, found.whole) == (TRUST, 0.4, True)
    assert (found.compared, found.same) == (300, 0.7)


def test_a_head_without_names_is_written_as_before_there_were_any(tmp_path):
    path, head = tmp_path / "head.safetensors", head_with_names()
    level_only = head.box_weight[:, :-2]
    old = replace(
        head,
        compared=256,
        same=0.6,
        whole=False,
        naming=None,
        trust=None,
        shown_from=None,
        box_weight=level_only,
    )
    old.save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    described = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
    assert described["format"] == 1
    assert "naming" not in described
    assert load_head(path).digest == old.digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("naming", {"names": []}),
        ("naming", {"names": ["dog"], "shown_from": 0.5, "finer_from": 0.5, "finer": []}),
        ("naming", {"names": [7, 8], "shown_from": 0.5, "finer_from": 0.5, "finer": []}),
        ("naming", {"names": ["a", "b"], "shown_from": 2, "finer_from": 0.5, "finer": []}),
        ("naming", {"names": ["a", "b"], "shown_from": 0.5, "finer_from": 0.5, "finer": [5]}),
        ("naming", "dog"),
        ("trust", {"signs": list(CUES), "mean": [0.0]}),
        ("trust", 3),
        ("shown_from", "x"),
        ("shown_from", 2.0),
    ],
)
def test_damaged_names_are_refused_in_one_line(tmp_path, key, value):
    path = tmp_path / "head.safetensors"
    head_with_names().save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    described = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
    path.write_bytes(save(load(content), {METADATA: json.dumps({**described, key: value})}))
    with pytest.raises(ModelError, match="cannot read head") as error:
        load_head(path)
    assert "\n" not in str(error.value)


def test_the_graph_names_boxes_by_the_best_class_that_is_no_background():
    scores = noise(2, 5, 4)
    graph = Graph()
    rows = graph.input("scores", FLOAT, scores.shape)
    for tensor, name in zip(append_names(graph, rows), ("name", "sure", "evidence"), strict=True):
        graph.output(tensor, name)
    found = OpenVinoEngine(graph.model(), "fp32").infer({"scores": scores})
    best = scores[..., :3].argmax(axis=2)
    shares = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(found["name"][..., 0], best)
    sure = np.take_along_axis(shares, best[..., None], axis=2)
    np.testing.assert_allclose(found["sure"], sure, atol=1e-5)
    evidence = scores[..., :3].max(axis=2) - scores[..., 3]
    np.testing.assert_allclose(found["evidence"][..., 0], evidence, atol=1e-5)


def test_the_graph_computes_the_confidence_of_the_cues():
    given = {
        "sizes": RNG.uniform(0.05, 1, (1, 6, 2)).astype(np.float32),
        "expected": noise(1, 6, 1),
        "objectness": noise(1, 6, 1),
        "evidence": noise(1, 6, 1),
        "alike": RNG.integers(1, 4, (1, 6, 1)).astype(np.float32),
    }
    graph = Graph()
    cues = append_cues(graph, *(graph.input(k, FLOAT, v.shape) for k, v in given.items()))
    graph.output(append_logistic(graph, cues, TRUST), "sure")
    found = OpenVinoEngine(graph.model(), "fp32").infer(given)["sure"]
    logs = np.log(given["sizes"])
    rows = np.concatenate(
        [
            given["expected"],
            given["objectness"],
            logs.sum(axis=2, keepdims=True),
            np.abs(logs[..., :1] - logs[..., 1:]),
            given["evidence"],
            np.broadcast_to(given["expected"].max(), (1, 6, 1)),
            given["alike"],
        ],
        axis=2,
    )
    wanted = [TRUST(row) for row in rows[0].tolist()]
    np.testing.assert_allclose(found[0, :, 0], wanted, atol=1e-4)


def test_words_for_a_box_are_those_that_are_sure():
    labeler = Labeler(naming(3).described(), ("tabby", "Chihuahua", "coffee mug"))
    box = [0.0, 0.0, 1.0, 1.0, 0.9]

    def box_name(index, probability, name, sure):
        return labeler.name_of(np.array([*box, index, probability, name, sure]))

    assert box_name(1, 0.8, 0, 0.7) == BoxName("dog", "Chihuahua", 0.7)
    assert box_name(1, 0.3, 0, 0.7) == BoxName("dog", "", 0.7)  # the finer name is not sure
    assert box_name(0, 0.9, 0, 0.7) == BoxName("dog", "", 0.7)  # it is of another kind
    assert box_name(2, 0.9, 1, 0.5) == BoxName("object", "", 0.0)
    assert labeler.names == NAMES


def test_a_class_is_of_the_kind_that_a_name_is():
    labeler = Labeler(naming(3).described(), ("tabby", "Chihuahua", "coffee mug"))
    assert [labeler.kind_of(index) for index in (None, 0, 1, 2, 9)] == [None, None, 0, 1, None]


def test_the_box_with_the_name_of_the_wanted_class_comes_first():
    localizer = two_boxes()
    assert localizer.localize(IMAGE)[0].box_xyxy_px == pytest.approx((0, 0, 25.6, 25.6), abs=0.1)
    localizer.look_for(1)
    assert localizer.localize(IMAGE)[0].box_xyxy_px == pytest.approx((32, 32, 64, 64), abs=0.1)


def test_only_boxes_of_the_wanted_name_are_given():
    localizer = two_boxes()
    assert (localizer.names, len(localizer.class_names)) == (NAMES, 3)
    localizer.look_for(3)
    assert localizer.wanted_class == 3
    found = localizer.localize(IMAGE)[0]
    (only,) = found.detections
    assert found.box_xyxy_px == pytest.approx((32, 32, 64, 64), abs=0.1)
    assert (found.label, found.confidence, only.wanted_share) == ("dog", pytest.approx(0.6), 0.7)
    assert (found.class_index, found.class_name) == (1, "Chihuahua"), "the class is its own"
    localizer.look_for(4)
    assert localizer.localize(IMAGE)[0].label == "mug"
    localizer.look_for(None)
    assert len(localizer.localize(IMAGE)[0].detections) == 2
    with pytest.raises(InputError, match=r"outside 0\.\.4"):
        localizer.look_for(5)


def test_nothing_is_sure_where_no_box_has_the_wanted_name():
    """Also a box that is most probably of that name, but is called an object."""
    localizer = two_boxes(dog=0.55)
    localizer.look_for(3)
    found = localizer.localize(IMAGE)[0]
    assert found.nothing_sure
    assert found.detections == ()


def two_boxes(dog=0.7):
    """A localizer whose engine finds two boxes, of a mug and of a dog; the mug's is surer, and its
    class no less likely.
    """
    engine = MockEngine(64)
    resizing = {"kind": "letterbox", "crop_share": 1.0, "filling_bgr": [0, 0, 0]}
    described = {"naming": naming(3).described(), "resizing": resizing}
    names = ["tabby", "Chihuahua", "coffee mug"]
    engine.metadata = {"class_names": json.dumps(names), "sightline": json.dumps(described)}
    rows = np.zeros((1, 2, 9))
    rows[0, 0] = [0, 0, 0.4, 0.4, 0.9, 1, 0.02, 1, 0.8]
    rows[0, 1] = [0.5, 0.5, 1, 1, 0.6, 1, 0.02, 0, dog]
    rest = {"class_index": np.array([1]), "score": np.array([0.5])}
    made = {CANDIDATES: rows, **rest, "map": np.zeros((1, 8, 8), np.float32)}
    engine.run = lambda feeds: made
    localizer = Localizer(engine)
    localizer.objects = 2
    return localizer


@pytest.mark.parametrize("independent", [False, True])
def test_the_class_of_a_box_is_the_most_probable_or_the_wanted_one(independent):
    scores = RNG.normal(size=(2, 4, 6)).astype(np.float32) * 50  # exponentials would overflow
    wanted = np.array([-1, 3])
    graph = Graph()
    given = graph.input("scores", FLOAT, scores.shape)
    asked = graph.input("wanted", INT64, wanted.shape)
    for tensor, name in zip(
        append_classes(graph, given, asked, independent), ("class", "probability"), strict=True
    ):
        graph.output(tensor, name)
    found = OpenVinoEngine(graph.model(), "fp32").infer({"scores": scores, "wanted": wanted})
    chosen = np.stack([scores[0].argmax(axis=1), np.full(4, 3)])[..., None]
    np.testing.assert_array_equal(found["class"], chosen)
    exact = scores.astype(np.float64)
    shares = np.exp(exact - exact.max(axis=2, keepdims=True))
    shares = 1 / (1 + np.exp(-exact)) if independent else shares / shares.sum(axis=2, keepdims=True)
    expected = np.take_along_axis(shares, chosen, 2)
    np.testing.assert_allclose(found["probability"], expected, atol=1e-5)
