"""The search over crops: its geometry by hand, its choice of objects against trying all, its whole
way by a slow repetition.
"""

from itertools import combinations

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.boxes import iou, shared
from engines.choose import open_localizer
from engines.errors import ModelError
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from engines.resizing import resized
from engines.search.crops import (
    BATCH,
    CropScorer,
    CropsEngine,
    CropSettings,
    Read,
    apart,
    crop_cues,
    cropped,
    first_crops,
    load_crop_scorer,
    readers_of_crops,
    widened,
)


@pytest.fixture(scope="module")
def compact():
    return load_classifier("compact")


@pytest.fixture(scope="module")
def readers(compact):
    return readers_of_crops(compact, EngineOptions(method="beam", objects=2))


@pytest.fixture(scope="module")
def engine(compact, readers):
    return CropsEngine(
        compact, *readers, CropSettings(beam=2), lambda graph: OpenVinoEngine(graph, "fp32")
    )


def test_first_crops_lie_inside_and_cover_each_place_in_several_sizes():
    crops = first_crops()
    assert crops.shape == (36, 4)
    assert len(np.unique(crops.round(6), axis=0)) == 36
    assert crops.min() == 0
    assert crops.max() == pytest.approx(1)
    assert (crops[:, 2:] - crops[:, :2]).min() == pytest.approx(0.4)
    for x, y in np.random.default_rng(0).random((50, 2)):
        inside = (crops[:, 0] <= x) & (x <= crops[:, 2]) & (crops[:, 1] <= y) & (y <= crops[:, 3])
        assert len(np.unique((crops[:, 2] - crops[:, 0])[inside].round(3))) >= 3


def test_a_box_with_its_margin_stays_inside_the_image_and_is_never_tiny():
    found = widened(
        np.array([[0.2, 0.4, 0.4, 0.8], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]]), 0.25
    )
    np.testing.assert_allclose(found[0], [0.15, 0.3, 0.45, 0.9])
    np.testing.assert_allclose(found[1], [0.0, 0.375, 0.625, 1.0])
    np.testing.assert_allclose(found[2], [0.455, 0.455, 0.545, 0.545])


def test_pixels_of_a_crop():
    image = np.arange(20 * 40 * 3, dtype=np.uint32).reshape(20, 40, 3).astype(np.uint8)
    np.testing.assert_array_equal(
        cropped(image, np.array([0.25, 0.5, 0.75, 1.0])), image[10:20, 10:30]
    )
    assert cropped(image, np.array([1.0, 1.0, 1.0, 1.0])).shape == (8, 8, 3)


def test_a_judge_is_told_where_the_box_was_cut_off():
    """Crop 0 is the left half: its box touches its right edge, where the image goes on, and its
    left one, where it does not.
    """
    inner = np.array([[0.0, 0.2, 1.0, 0.8], [0.1, 0.1, 0.5, 0.99]])
    read = Read(
        inner,
        inner,
        np.array([1, 2]),
        np.array([0.5, 0.1], np.float32),
        np.zeros((2, 3), np.float32),
    )
    found = crop_cues(np.array([[0.0, 0.0, 0.5, 1.0], [0.3, 0.3, 0.9, 0.9]]), read)
    np.testing.assert_allclose(found[0], [*inner[0], np.log(0.5), 0.5, 1.0, 0, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], [*inner[1], np.log(0.1), 0.6, 0.6, 0, 0, 0, 1], atol=1e-6)


def test_the_two_objects_are_the_best_pair_of_all_that_are_apart():
    rng, settings = np.random.default_rng(3), CropSettings(least=0.0)
    for _ in range(20):
        corners = np.sort(rng.random((12, 2, 2)), axis=1)
        boxes, chances = corners.reshape(12, 4), rng.random(12)
        allowed = [
            (chances[i] + chances[j], {i, j})
            for i, j in combinations(range(12), 2)
            if iou(boxes[i], boxes[j]) < 0.3 and shared(boxes[i], boxes[j]) < 0.4
        ]
        found = apart(boxes, chances, settings)
        assert set(found) == max(allowed, key=lambda pair: pair[0])[1]
        assert chances[found[0]] >= chances[found[1]]


def test_one_box_of_two_objects_loses_to_theirs_and_unlikely_ones_are_left_out():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.45, 1], [0.5, 0, 1, 1], [0.5, 0, 0.6, 0.1]])
    chances = np.array([0.9, 0.7, 0.6, 0.05])
    assert apart(boxes, chances, CropSettings()) == [1, 2]
    assert apart(boxes, chances, CropSettings(objects=1)) == [0]
    assert apart(boxes, chances, CropSettings(objects=5)) == [1, 2]
    assert apart(boxes, chances, CropSettings(least=0.65)) == [0]


def test_the_search_does_what_it_says_step_by_step(engine, readers, compact, photos):
    """Every crop through an engine of its own, one at a time; the best two of them once more; the
    best pair of all boxes.
    """
    head, crop_scorer = readers
    from engines.build import IMAGE, WANTED_CLASS, build_graph

    single = OpenVinoEngine(build_graph(compact, head.spec, head, features=head.features), "fp32")
    square = resized(photos[0], 2 * compact.size_px)
    crops, boxes, chances = first_crops(), [], []
    for _ in range(2):
        now = []
        for crop in crops:
            out = single.infer(
                {IMAGE: resized(cropped(square, crop), 128)[None], WANTED_CLASS: np.array([-1])}
            )
            inner, size = out["box_xyxy"].astype(np.float64), np.tile(crop[2:] - crop[:2], 2)
            boxes.append(np.tile(crop[:2], 2) + inner[0] * size)
            read = Read(inner, inner, out["class_index"], out["score"], out["features"])
            now.append(float(crop_scorer.chances(read.features, crop_cues(crop[None], read))[0]))
        chances += now
        crops = widened(
            np.array(boxes[-len(crops) :])[np.argsort(-np.array(now), kind="stable")[:2]], 0.15
        )
    expected = np.array(boxes)[apart(np.array(boxes), np.array(chances), CropSettings())]
    before = engine.calls
    found = Localizer(engine).localize([photos[0]])[0]
    assert engine.calls - before == 1 + 36 // BATCH + 1
    size = np.tile(photos[0].shape[1::-1], 2)
    np.testing.assert_allclose(
        np.array([d.box_xyxy_px for d in found.detections]) / size, expected, atol=1e-3
    )
    assert found.box_xyxy_px == found.detections[0].box_xyxy_px


def test_a_named_class_is_looked_for_in_every_crop(engine, photos):
    localizer = Localizer(engine)
    localizer.look_for(339)
    assert {each.class_index for each in localizer.localize([photos[1]])[0].detections} == {339}


def test_several_objects_are_searched_for_in_crops_where_there_is_a_judge(compact):
    wanted = {
        EngineOptions(method="beam", objects=2): "crops: ",
        EngineOptions(method="beam"): "beam: ",
        EngineOptions(method="beam", objects=2, head="none"): "beam: ",
        EngineOptions(method="beam", objects=2, layer="conv5_2"): "beam: ",
        EngineOptions(method="dam", objects=2): "dam: ",
        EngineOptions("compact", "random", method="beam", objects=2): "beam: ",
    }
    for choice, reader in wanted.items():
        assert open_localizer(choice).box_reader.startswith(reader), choice


def test_a_judge_comes_back_from_its_file_and_is_tied_to_its_head(tmp_path, compact, readers):
    head, crop_scorer = readers
    file = tmp_path / "judge.safetensors"
    crop_scorer.save(file)
    again = load_crop_scorer(file)
    np.testing.assert_array_equal(again.weight, crop_scorer.weight)
    assert (again.bias, again.network, again.head) == (
        crop_scorer.bias,
        crop_scorer.network,
        crop_scorer.head,
    )
    other = CropScorer(crop_scorer.weight, crop_scorer.bias, crop_scorer.network, "another head")
    with pytest.raises(ModelError, match="another network or head"):
        CropsEngine(
            compact, head, other, CropSettings(), lambda graph: OpenVinoEngine(graph, "fp32")
        )
    file.write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot read"):
        load_crop_scorer(file)
    with pytest.raises(ModelError, match="at least one candidate"):
        CropSettings(levels=0)
