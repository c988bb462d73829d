"""What every backend does alike: inputs checked, outputs owned by the caller, closing."""

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_reference import TorchEngine
from engines.boxes import iou
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.choose import class_index
from engines.engine import TensorSpec
from engines.errors import EngineError, InputError, ModelError
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from tests.engines.mock import MockEngine

SIZE = 64


def engines():
    classifier = load_classifier("compact", "random", SIZE)
    return {
        "openvino": lambda: OpenVinoEngine(build_graph(classifier), "fp32"),
        "torch": lambda: TorchEngine(classifier),
        "mock": lambda: MockEngine(SIZE),
    }


@pytest.fixture(params=["openvino", "torch", "mock"])
def engine(request):
    return engines()[request.param]()


def good():
    image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3)).astype(np.uint8)
    return {IMAGE: image, WANTED_CLASS: np.array([-1])}


def test_outputs_are_as_specified_and_stay_the_callers(engine):
    first = engine.infer(good())
    assert {s.name: (s.dtype, s.shape) for s in engine.outputs} == {
        k: (v.dtype, v.shape) for k, v in first.items()
    }
    kept = first["map"].copy()
    engine.infer({**good(), IMAGE: np.zeros((1, SIZE, SIZE, 3), np.uint8)})
    np.testing.assert_array_equal(first["map"], kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {IMAGE: np.zeros((1, SIZE, SIZE, 3), np.float32)},
            r"input 'image_nhwc_bgr': got float32\[1, 64, 64, 3\], expected uint8\[1, 64, 64, 3\]; convert",
        ),
        (
            {IMAGE: np.zeros((1, 8, 8, 3), np.uint8)},
            r"got uint8\[1, 8, 8, 3\], expected uint8\[1, 64, 64, 3\]; resize it",
        ),
        (
            {"extra": np.zeros(1)},
            "unknown input 'extra': this engine takes image_nhwc_bgr, wanted_class",
        ),
        ({WANTED_CLASS: None}, r"input 'wanted_class' is missing: pass an array int64\[1\]"),
    ],
)
def test_wrong_feeds_name_tensor_what_came_what_was_expected_and_what_to_do(engine, change, words):
    feeds = {k: v for k, v in {**good(), **change}.items() if v is not None}
    with pytest.raises(InputError, match=words):
        engine.infer(feeds)


def test_an_image_that_is_not_contiguous_is_taken(engine):
    feeds = good()
    expected = engine.infer({**feeds, IMAGE: np.ascontiguousarray(feeds[IMAGE][:, :, ::-1])})
    np.testing.assert_array_equal(
        engine.infer({**feeds, IMAGE: feeds[IMAGE][:, :, ::-1]})["map"], expected["map"]
    )


def test_calls_under_way_give_what_single_ones_give(engine):
    """Every slot taken, then collected in order; feeds that differ, so that a swap would show."""
    feeds = [
        {
            **good(),
            IMAGE: np.random.default_rng(seed)
            .integers(0, 256, (1, SIZE, SIZE, 3))
            .astype(np.uint8),
        }
        for seed in range(3)
    ]
    expected = [engine.infer(feed)["map"] for feed in feeds]
    under_way = [engine.submit(feed) for feed in feeds[: engine.slots]]
    found = [engine.collect(ticket)["map"] for ticket in under_way]
    np.testing.assert_array_equal(found, expected[: engine.slots])


@pytest.mark.parametrize(
    "make", [engines()["openvino"], lambda: MockEngine(SIZE, slots=2)], ids=["openvino", "mock"]
)
def test_more_calls_than_slots_are_refused_and_hurt_nothing(make):
    engine = make()
    under_way = [engine.submit(good()) for _ in range(engine.slots)]
    with pytest.raises(EngineError, match=r"2 calls are under way.*collect one first"):
        engine.submit(good())
    first = engine.collect(under_way.pop(0))
    np.testing.assert_array_equal(engine.collect(under_way.pop())["map"], first["map"])
    np.testing.assert_array_equal(engine.infer(good())["map"], first["map"])


def test_an_openvino_call_is_collected_once_and_closing_waits_for_it():
    engine = engines()["openvino"]()
    ticket = engine.submit(good())
    engine.collect(ticket)
    with pytest.raises(EngineError, match="collected before"):
        engine.collect(ticket)
    ticket = engine.submit(good())
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.collect(ticket)


def test_streams_change_the_pace_and_nothing_else():
    graph = build_graph(load_classifier("compact", "random", SIZE))
    one, two = (
        OpenVinoEngine(graph, "fp32", threads=2),
        OpenVinoEngine(graph, "fp32", threads=2, streams=2),
    )
    assert (one.slots, two.slots) == (2, 3)
    first, second = (engine.infer(good())["map"] for engine in (one, two))
    assert np.linalg.norm(first - second) < 2e-2 * np.linalg.norm(first), (
        "sums may be taken in another order, no more"
    )


def test_closing_twice_is_fine(engine):
    engine.close()
    engine.close()


def test_a_closed_openvino_engine_says_so():
    engine = engines()["openvino"]()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.infer(good())


def test_a_specs_words():
    assert str(TensorSpec("x", np.dtype(np.uint8), (1, 2))) == "uint8[1, 2]"


@pytest.mark.parametrize("shape", [(480, 640), (8, 8), (9, 500), (64, 64)])
def test_the_localizer_takes_any_image_and_answers_in_its_pixels(shape):
    localizer = Localizer(MockEngine(SIZE))
    image = np.zeros((*shape, 3), np.uint8)
    image[shape[0] // 2 :, shape[1] // 2 :] = 255
    box = localizer.localize([image])[0].box_xyxy_px
    assert box[2:] == (shape[1], shape[0])
    assert box[0] == pytest.approx(shape[1] // 2, abs=max(1, shape[1] / SIZE))


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_the_localizer_refuses_what_is_no_bgr_image(image):
    with pytest.raises(InputError, match="an image is a NumPy array, uint8"):
        Localizer(MockEngine(SIZE)).localize([image])


@pytest.mark.parametrize("shape", [(1, 1), (7, 300)])
def test_the_localizer_refuses_images_in_which_nothing_can_be_found(shape):
    with pytest.raises(InputError, match=f"the image is {shape[1]}x{shape[0]} pixels: at least 8"):
        Localizer(MockEngine(SIZE)).localize([np.zeros((*shape, 3), np.uint8)])


def test_more_images_than_a_batch():
    localizer = Localizer(MockEngine(SIZE, batch=2))
    images = [np.full((10, 10, 3), 50 * i, np.uint8) for i in range(5)]
    assert [round(found.score * 255) for found in localizer.localize(images)] == [
        0,
        50,
        100,
        150,
        200,
    ]
    assert localizer.engine.calls == 3


def test_looking_for_a_class():
    localizer = Localizer(MockEngine(SIZE))
    image = np.zeros((9, 9, 3), np.uint8)
    localizer.look_for(1)
    assert localizer.localize([image])[0].class_name == "other"
    localizer.look_for(None)
    assert localizer.localize([image])[0].class_name == "thing"
    with pytest.raises(InputError, match=r"outside 0\.\.1"):
        localizer.look_for(2)


def test_class_names_are_found_by_index_name_or_part():
    names = ("tabby", "tiger cat", "tiger")
    assert class_index("1", names) == 1
    assert class_index("Tiger", names) == 2
    assert class_index("tab", names) == 0
    with pytest.raises(ModelError, match="could be tiger cat, tiger"):
        class_index("tig", names)
    with pytest.raises(ModelError, match="unknown"):
        class_index("dog", names)


def test_names_of_boxes_go_before_classes_of_the_same_spelling():
    classes, names = ("mug", "tiger cat", "beagle"), ("cat", "Mug", "dining table")
    assert class_index("mug", classes, names) == 4
    assert class_index("0", classes, names) == 0
    assert class_index("Beagle", classes, names) == 2
    assert class_index("cat", classes, names) == 3
    assert class_index("table", classes, names) == 5
    with pytest.raises(ModelError, match="could be dining table, tiger cat: write one"):
        class_index("i", ("mug", "tiger cat"), names)
    with pytest.raises(ModelError, match="unknown to this network: near are beagle: write one"):
        class_index("beegle", classes, names)
    with pytest.raises(ModelError, match="near are dining table"):
        class_index("dinning table", classes, names)
    with pytest.raises(ModelError, match="'5' is unknown"):
        class_index("5", classes, names)


def test_imagenets_class_names_are_all_different():
    from engines.networks.registry import imagenet_classes

    classes = imagenet_classes()
    assert len({name for _, name in classes}) == len({wnid for wnid, _ in classes}) == 1000
    assert list(classes) == sorted(classes)


def test_iou_by_hand():
    assert iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(
        50 / 150
    )  # intersection 50, union 150
    assert iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    assert iou([1, 1, 1, 5], [1, 1, 1, 5]) == 0
    np.testing.assert_allclose(iou([0, 0, 2, 2], [[0, 0, 2, 2], [0, 0, 2, 1]]), [1, 0.5])
