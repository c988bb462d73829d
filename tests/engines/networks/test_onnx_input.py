"""What a foreign classifier is given: options, metadata, files beside it, its graph, assumptions, in
this order. The class and its probability are ONNX Runtime's on the input that is meant.
"""

import json

import numpy as np
import pytest
from onnx import TensorProto

from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.choose import open_localizer
from engines.errors import InputError, ModelError
from engines.head import Head
from engines.localizer import Localizer
from engines.maps import PIXELS, Feature, MapSpec
from engines.networks.preprocessing import IDENTITY, IMAGENET, UNIT, GivenInput, Preprocessing
from engines.networks.registry import load_classifier
from tests.engines.networks.test_onnx_ends import (
    CLASSES,
    MEAN,
    PER_CHANNEL,
    PHOTO,
    RAW,
    SAME,
    SIDE,
    STD,
    node,
    probabilities,
    softmax,
    written,
)

RGB = PHOTO[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32)
BGR = np.ascontiguousarray(RGB[:, ::-1])
NORMAL = [node("Sub", "x", "mean", "d"), node("Div", "d", "std", "n")]
TIMM = {"architecture": "net", "pretrained_cfg": {"mean": MEAN.tolist(), "std": STD.tolist()}}
UNUSUAL = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3], "crop_pct": 0.9}


def levels(*values):
    return np.float32(values).reshape(3, 1, 1)


CAFFE_MEAN = levels(103.939, 116.779, 123.68)


def loaded(path, **given):
    return load_classifier(path, given=GivenInput(**given))


def line_of(classifier):
    """What is said of the input, and all other notes."""
    first, *others = classifier.network.notes
    return first, "; ".join(others)


def check(classifier, path, fed):
    """The answer is ONNX Runtime's for what the file is fed."""
    expected = softmax(probabilities(path, np.float32(fed))[0])
    with Localizer(OpenVinoEngine(build_graph(classifier), "fp32")) as localizer:
        found = localizer.localize([PHOTO])[0]
    assert found.class_index == expected.argmax()
    assert found.score == pytest.approx(expected.max(), abs=1e-3)


def beside(folder, **files):
    names = {"config": "config.json", "processor": "preprocessor_config.json"}
    for name, content in files.items():
        (folder / names[name]).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("given", "fed"),
    [
        ({"mean": (0.5,) * 3, "std": (0.25,) * 3}, (RGB / 255 - 0.5) / 0.25),
        ({"mean": (103.939, 116.779, 123.68), "order": "bgr"}, BGR - CAFFE_MEAN),
        ({"mean": (1.0,) * 3, "scale": 127.5}, RGB / 127.5 - 1),
        ({"scale": 1 / 255}, RGB / 255),
        ({"scale": 1.0}, RGB),
    ],
)
def test_what_a_user_says_is_done(tmp_path, given, fed):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    classifier = loaded(path, **given)
    check(classifier, path, fed)
    assert f"{classifier.preprocessing.formula} (as given)" in line_of(classifier)[0]


def test_the_line_says_each_part_and_where_it_comes_from(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    beside(tmp_path, config={"architecture": "net", "pretrained_cfg": UNUSUAL})
    line, others = line_of(loaded(path, order="bgr"))
    assert line == (
        "m.onnx: its input: 32 px (its graph), channels first (its graph), BGR (as given), (pixel -"
        " (76.5, 51, 25.5)) / (76.5, 102, 127.5) (config.json), squashed to a square (the default;"
        " trained on the middle square of 0.9 of the shorter side, says config.json)"
    )
    assert others == "m.onnx: nothing names its 5 outputs: they are taken as scores of classes"


def test_files_beside_it_go_before_its_graph_and_options_before_those(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW, metadata={"mean": "0.3", "std": "0.5"})
    beside(tmp_path, config=TIMM, processor={"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert loaded(path).preprocessing.mean == (76.5, 76.5, 76.5)
    assert loaded(path, mean=(104.0, 117.0, 123.0)).preprocessing.mean == (104.0, 117.0, 123.0)
    path = written(tmp_path / "m.onnx", SAME, RAW)
    assert loaded(path).preprocessing.mean == (127.5, 127.5, 127.5)
    (tmp_path / "preprocessor_config.json").unlink()
    assert loaded(path).preprocessing == IMAGENET


@pytest.mark.parametrize("divides", [False, True])
def test_what_the_graph_does_already_is_not_done_twice(tmp_path, divides):
    head = [node("Div", "x", "byte", "u"), node("Sub", "u", "mean", "d"), NORMAL[1]]
    constants = {**PER_CHANNEL, "byte": np.float32(255)}
    path = written(tmp_path / "m.onnx", head if divides else NORMAL, RAW, constants=constants)
    beside(tmp_path, config=TIMM)
    for given in ({}, {"mean": tuple(MEAN), "std": tuple(STD)}):
        classifier = loaded(path, **given)
        assert classifier.preprocessing == (IDENTITY if divides else UNIT)
        assert "which is not done twice" in line_of(classifier)[0]
    check(classifier, path, RGB if divides else RGB / 255)


def test_a_file_that_contradicts_the_graph_is_not_believed_and_that_is_said(tmp_path):
    path = written(tmp_path / "m.onnx", NORMAL, RAW, constants=PER_CHANNEL)
    beside(tmp_path, config={"architecture": "net", "pretrained_cfg": UNUSUAL})
    classifier = loaded(path)
    assert classifier.preprocessing == UNIT
    assert "config.json says (pixel - (25.5, 51, 76.5))" in line_of(classifier)[1]
    assert "nothing is done twice" in line_of(classifier)[1]
    given = loaded(path, mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))
    assert given.preprocessing.mean == (25.5, 25.5, 25.5)
    assert "begins with Sub, Div, too" in line_of(given)[1]
    assert loaded(path, scale=1.0).preprocessing == IDENTITY


def test_a_file_that_only_says_the_range_goes_with_a_normalization_in_the_graph(tmp_path):
    path = written(tmp_path / "m.onnx", NORMAL, RAW, constants=PER_CHANNEL)
    beside(tmp_path, processor={"do_normalize": False, "do_rescale": True, "size": SIDE})
    assert loaded(path).preprocessing == UNIT
    check(loaded(path), path, RGB / 255)


@pytest.mark.parametrize("kind", ["normalises", "adapts"])
def test_batch_normalization_at_the_image(tmp_path, kind):
    """As a normalization of pixels, and as the first layer of a network that gets normalised ones."""
    ones = np.ones(3, np.float32)
    mean, std = (np.float32(v) for v in IMAGENET_LEVELS)
    if kind == "adapts":
        mean, std = 0.1 * ones, ones
    constants = {"gain": ones, "bias": 0 * ones, "m": mean, "v": np.square(std)}
    head = [node("BatchNormalization", "x", "gain", "bias", "m", "v", "n")]
    path = written(tmp_path / "m.onnx", head, RAW, constants=constants)
    beside(tmp_path, config=TIMM)
    assert loaded(path).preprocessing == (IDENTITY if kind == "normalises" else IMAGENET)


IMAGENET_LEVELS = IMAGENET.mean, IMAGENET.std


@pytest.mark.parametrize("turned", [None, "Gather", "Slice"])
def test_the_order_is_read_off_the_mean_in_the_graph(tmp_path, turned):
    constants = {"mean": CAFFE_MEAN}
    head = [node("Sub", "t", "mean", "n")]
    if turned == "Gather":
        constants["order"] = np.array([2, 1, 0])
        head = [node("Gather", "x", "order", "t", axis=1), *head]
    elif turned == "Slice":
        ends = {"start": [2], "end": [-(2**31)], "axis": [1], "step": [-1]}
        constants |= {name: np.array(value) for name, value in ends.items()}
        head = [node("Slice", "x", "start", "end", "axis", "step", "t"), *head]
    else:
        head = [node("Identity", "x", "t"), *head]
    path = written(tmp_path / "m.onnx", head, RAW, constants=constants)
    classifier = loaded(path)
    expected = "rgb" if turned else "bgr"
    assert classifier.preprocessing == Preprocessing(expected, IDENTITY.mean, IDENTITY.std)
    assert f"{expected.upper()} (by the mean in it)" in line_of(classifier)[0]
    check(classifier, path, RGB if turned else BGR)


def test_bytes_take_no_numbers(tmp_path):
    head = [node("Cast", "x", "n", to=1)]
    path = written(tmp_path / "m.onnx", head, RAW, kind=TensorProto.UINT8)
    assert loaded(path, order="bgr").preprocessing == Preprocessing("bgr", *NOTHING)
    with pytest.raises(InputError, match="takes uint8 pixels") as error:
        loaded(path, scale=255.0)
    assert error.value.options == ("mean", "std", "scale")


NOTHING = IDENTITY.mean, IDENTITY.std


def test_ultralytics_detector_is_named_as_what_it_is(tmp_path):
    metadata = {"task": "detect", "names": "{0: 'a', 1: 'b', 2: 'c', 3: 'd', 4: 'e'}"}
    path = written(tmp_path / "m.onnx", SAME, RAW, metadata=metadata)
    with pytest.raises(
        ModelError, match="made for 'detect', its metadata say, and not to classify"
    ):
        loaded(path)


def test_a_named_output_is_taken_and_is_part_of_the_digest(tmp_path):
    scores, vector = ("out", TensorProto.FLOAT, [1, CLASSES]), ("f", TensorProto.FLOAT, [1, 8])
    path = written(tmp_path / "m.onnx", SAME, RAW, outputs=[scores, vector])
    with pytest.raises(ModelError, match="cannot be told: name it") as error:
        loaded(path)
    assert error.value.options == ("output",)
    first, second = loaded(path, output="out"), loaded(path, output="f")
    assert first.digest != second.digest
    check(first, path, (RGB - levels(*IMAGENET.mean)) / levels(*IMAGENET.std))
    with pytest.raises(ModelError, match=r"no output 'z'; it has 'out' 1x5, 'f' 1x8"):
        loaded(path, output="z")


def test_what_is_usual_keeps_its_digest_however_it_is_said(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    before = loaded(path).digest
    usual = {"mean": tuple(MEAN), "std": tuple(STD), "order": "rgb", "resize": "squash"}
    assert loaded(path, **usual, output="out").digest == before
    others = [{"order": "bgr"}, {"scale": 255.0}, {"resize": "crop"}, {"resize": "letterbox"}]
    digests = {loaded(path, **other).digest for other in others}
    assert len(digests | {before}) == 5
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    assert loaded(path, labels=str(labels)).digest == before


def test_names_come_from_the_user_or_the_file_beside_it(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    beside(tmp_path, config={"id2label": {str(i): f"name {i}" for i in range(CLASSES)}})
    assert loaded(path).class_names == tuple(f"name {i}" for i in range(CLASSES))
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    assert loaded(path, labels=str(labels)).class_names == ("a", "b", "c", "d", "e")
    labels.write_text("a\nb\n")
    with pytest.raises(ModelError, match=r"scores 5 classes, and .*labels.txt names 2") as error:
        loaded(path, labels=str(labels))
    assert error.value.options == ("labels",)
    beside(tmp_path, config={"id2label": {"0": "a", "1": "b"}})
    with pytest.raises(ModelError, match=r"scores 5 classes, and config.json names 2"):
        loaded(path)


def test_one_logit_with_one_name_is_that_and_its_opposite(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW, weight="one", metadata={"names": "['cat']"})
    assert loaded(path).class_names == ("not cat", "cat")


def test_a_known_network_takes_resize_and_labels_only(tmp_path):
    plain = load_classifier("compact")
    letterboxed = load_classifier("compact", given=GivenInput(resize="letterbox"))
    assert letterboxed.preprocessing.resize == "letterbox"
    assert letterboxed.digest != plain.digest
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"name {i}" for i in range(1000)))
    assert load_classifier("compact", given=GivenInput(labels=str(labels))).digest == plain.digest
    with pytest.raises(
        ModelError, match="input and output of compact are known: std, order"
    ) as error:
        load_classifier("compact", given=GivenInput(std=(1.0,) * 3, order="bgr"))
    assert error.value.options == ("std", "order")


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
def test_the_localizer_shows_the_network_that_square(tmp_path, resize):
    """A wide picture; the score is ONNX Runtime's of the square, the map lies over the picture."""
    path = written(tmp_path / "m.onnx", SAME, RAW)
    wide = np.concatenate([255 - PHOTO, PHOTO, 255 - PHOTO], axis=1)
    classifier = loaded(path, resize=resize, scale=255.0)
    with Localizer(OpenVinoEngine(build_graph(classifier), "fp32")) as localizer:
        found, prepared = localizer.localize([wide])[0], localizer.prepare(wide)
    fed = prepared[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
    assert found.score == pytest.approx(softmax(probabilities(path, fed)[0]).max(), abs=1e-3)
    if resize == "crop":  # of 0.875 of the height: the middle 28 of 96 pixels
        columns = np.flatnonzero(found.map_hw.max(axis=0)) / found.map_hw.shape[1]
        assert 34 / 96 - 0.02 < columns.min() < columns.max() < 62 / 96 + 0.02
    else:
        assert found.map_hw.shape == (11, 32)  # a third of the square's rows
        assert (prepared[0] == 0).all()  # its mean is black: pixel / 255


def test_a_head_of_another_input_is_refused_in_words(tmp_path):
    path = written(tmp_path / "m.onnx", SAME, RAW)
    fitted, now = loaded(path, scale=255.0), loaded(path, resize="letterbox")
    feature = Feature("quantiles", PIXELS, 3)
    numbers = np.zeros((1, 4, feature.width), np.float32), np.zeros((1, 4), np.float32)
    card = {"input": json.loads(json.dumps(fitted.preprocessing.stored()))}
    head = Head(MapSpec(), (feature,), *numbers, fitted.digest, SIDE, card)
    build_graph(fitted, head.spec, head)
    words = (
        r"another network than these 'm.onnx' weights, or on another input: it was RGB, pixel / 255,"
        r" squashed to a square, and now is RGB, \(pixel - \(123.675, 116.28, 103.53\)\) / .*"
        r"letterboxed: the whole image.*; fit one for it"
    )
    with pytest.raises(ModelError, match=words) as error:
        build_graph(now, head.spec, head)
    assert {"head", "mean", "resize"} <= set(error.value.options)


@pytest.mark.parametrize("method", ["dam", "beam", "layercam"])
def test_boxes_of_every_method_come_back_to_the_image(tmp_path, method):
    """Of a wide picture with a crop: what is found lies in the middle square, and the map beside it
    is 0.
    """
    path = written(tmp_path / "m.onnx", SAME, RAW)
    wide = np.concatenate([255 - PHOTO, PHOTO, 255 - PHOTO], axis=1)
    options = {"method": method, "resize": "crop", "precision": "fp32", "backend": "openvino"}
    with open_localizer(path, **options) as localizer:
        found = localizer.localize([wide])[0]
    boxes = [each.box_xyxy_px for each in found.detections] or [found.box_xyxy_px]
    for x0, y0, x1, y1 in boxes:
        assert 34 <= x0 < x1 <= 62
        assert 2 <= y0 < y1 <= 30
    columns = np.flatnonzero(found.map_hw.max(axis=0)) / found.map_hw.shape[1]
    assert 34 / 96 - 0.03 < columns.min() < columns.max() < 62 / 96 + 0.03
