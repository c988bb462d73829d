"""What comes with a classifier's file: metadata, config.json, preprocessor_config.json, labels."""

import json
from pathlib import Path

import pytest

from engines.errors import ModelError
from engines.networks.sidecars import class_names_of, read_labels, sidecars_of, stated_by_file

LEVELS = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TIMM = {
    "architecture": "resnet50",
    "num_classes": 2,
    "label_names": ["n1", "n2"],
    "label_descriptions": {"n1": "cat", "n2": "dog"},
    "pretrained_cfg": {
        "input_size": [3, 288, 288],
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}
VIT = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


def said(folder, metadata=None, **files):
    """What is said of a file; ``files`` are the ones beside it, by their first word."""
    names = {"config": "config.json", "processor": "preprocessor_config.json"}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / names[name]).write_text(text)
    return stated_by_file(folder / "m.onnx", metadata or {})


def test_timm_says_numbers_of_0_to_1(tmp_path):
    nothing, found = said(tmp_path, config=TIMM)
    assert (nothing.mean, nothing.order, nothing.names) == (None, None, ())
    assert (found.mean, found.std) == LEVELS
    assert (found.origin, found.order, found.side_px) == ("config.json", "rgb", 288)
    assert (found.resize, found.crop_share, found.names) == ("crop", 0.95, ("cat", "dog"))


def test_timm_of_before_has_it_all_at_the_top(tmp_path):
    flat = {"architecture": "vgg16", **TIMM["pretrained_cfg"], "crop_mode": "squash"}
    *_, found = said(tmp_path, config=flat)
    assert ((found.mean, found.std), found.resize, found.names) == (LEVELS, "squash", ())


@pytest.mark.parametrize(
    ("processor", "numbers", "rest"),
    [
        (VIT, ((127.5,) * 3, (127.5,) * 3), ("rgb", 224, "squash", None)),
        (
            {  # ResNet of before: no do_rescale, sizes as numbers
                "do_normalize": True,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
                "crop_pct": 0.875,
                "size": 224,
            },
            LEVELS,
            ("rgb", 224, "squash", None),
        ),
        (
            {**VIT, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224},
            ((127.5,) * 3, (127.5,) * 3),
            ("rgb", 224, "crop", 0.875),
        ),
        (
            {**VIT, "size": {"shortest_edge": 224}, "crop_pct": 0.875},
            ((127.5,) * 3, (127.5,) * 3),
            ("rgb", 224, "crop", 0.875),
        ),
        ({**VIT, "do_normalize": False}, ((0.0,) * 3, (255.0,) * 3), ("rgb", 224, "squash", None)),
        (
            {**VIT, "do_rescale": False, "image_mean": [104, 117, 123], "image_std": [1, 1, 1]},
            ((104.0, 117.0, 123.0), (1.0,) * 3),
            ("rgb", 224, "squash", None),
        ),
        (
            {**VIT, "do_normalize": False, "do_flip_channel_order": True},
            ((0.0,) * 3, (255.0,) * 3),
            ("bgr", 224, "squash", None),
        ),
        (
            {  # which divides twice: by the root of the deviation each time
                **VIT,
                "image_processor_type": "EfficientNetImageProcessor",
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.47853944, 0.4732864, 0.47434163],
            },
            LEVELS,
            ("rgb", 224, "squash", None),
        ),
        (
            {**VIT, "do_normalize": False, "rescale_offset": True, "rescale_factor": 1 / 127.5},
            ((127.5,) * 3, (127.5,) * 3),
            ("rgb", 224, "squash", None),
        ),
    ],
)
def test_hugging_faces_processors(tmp_path, processor, numbers, rest):
    *_, found = said(tmp_path, processor=processor)
    assert found.mean == pytest.approx(numbers[0], rel=1e-4)
    assert found.std == pytest.approx(numbers[1], rel=1e-4)
    assert (found.order, found.side_px, found.resize, found.crop_share) == rest


def test_the_processor_goes_before_the_configuration(tmp_path):
    config = {"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}}
    places = [each.origin for each in said(tmp_path, config=config, processor=VIT)]
    assert places == ["its metadata", "preprocessor_config.json", "config.json"]
    *_, found = said(tmp_path, config=config)
    assert (found.names, found.mean) == (("cat", "dog"), None)


def test_the_folder_above_is_read_where_hugging_face_keeps_the_file_in_onnx(tmp_path, monkeypatch):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    assert sidecars_of(tmp_path / "onnx" / "model.onnx") == [tmp_path / "config.json"]
    assert sidecars_of(tmp_path / "onnx" / "deeper" / "model.onnx") == []
    monkeypatch.chdir(tmp_path / "onnx")
    assert [each.resolve() for each in sidecars_of(Path("model.onnx"))] == [
        (tmp_path / "config.json").resolve()
    ]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"task": "classify", "names": "['a']", "imgsz": "[64, 64]"}, ((0,) * 3, (255,) * 3, 64)),
        ({"mean": "[0.485, 0.456, 0.406]", "std": "0.229, 0.224, 0.225"}, (*LEVELS, None)),
        ({"Image.NominalPixelRange": "NominalRange_0_255"}, ((0,) * 3, (1,) * 3, None)),
        ({"Image.NominalPixelRange": "Normalized_1_1"}, ((127.5,) * 3, (127.5,) * 3, None)),
        ({"author": "somebody"}, (None, None, None)),
    ],
)
def test_metadata(tmp_path, metadata, expected):
    (found,) = said(tmp_path, metadata)
    assert (found.mean, found.std, found.side_px) == expected


def test_onnx_own_key_for_the_order(tmp_path):
    assert said(tmp_path, {"Image.BitmapPixelFormat": "Bgr8"})[0].order == "bgr"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config": "{"}, r"config.json, which says what m.onnx takes.*not JSON.*mend it"),
        ({"config": "[]"}, "not a JSON object"),
        ({"config": {"pretrained_cfg": {"mean": [0.5, 0.5]}}}, "mean is not three numbers"),
        ({"config": {"pretrained_cfg": {"mean": ["a", 1, 2]}}}, "mean is not three numbers"),
        ({"config": {"pretrained_cfg": {"std": [0, 0.2, 0.2]}}}, "deviation must be more than 0"),
        ({"config": {"pretrained_cfg": {"crop_pct": 3}}}, "crop_pct is 3"),
        ({"config": {"architecture": "x", "label_names": "cat"}}, "label_names are no list"),
        ({"processor": {"image_mean": None, "image_std": {}}}, "image_std is not three numbers"),
        ({"processor": {"size": 224, "rescale_factor": "x"}}, "could not convert"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, files, words):
    with pytest.raises(ModelError, match=words) as error:
        said(tmp_path, **files)
    assert "\n" not in str(error.value)


def test_a_file_of_something_else_says_nothing(tmp_path):
    _, processor, config = said(tmp_path, config={"a": 1}, processor={"tokenizer": "x"})
    assert (processor.mean, config.mean, config.names) == (None, None, ())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n", ("cat", "dog")),
        ("\ufeffcat\r\n\r\nGreat Dane, a dog\r\n", ("cat", "Great Dane, a dog")),
        ('["cat", "dog"]', ("cat", "dog")),
        ('{"1": "dog", "0": "cat"}', ("cat", "dog")),
        ('{"0": ["n02123045", "cat"], "1": ["n02084071", "dog"]}', ("cat", "dog")),
        ('{"cat": 0, "dog": 1}', ("cat", "dog")),
        ('{"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}}', ("cat", "dog")),
        (json.dumps(TIMM), ("cat", "dog")),
        ("crane\ncrane\n", ("crane", "crane (1)")),
    ],
)
def test_labels_of_any_writing(tmp_path, text, names):
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    assert read_labels(path) == names


@pytest.mark.parametrize("text", ["", '{"0": "cat", "2": "dog"}', "[1, 2]", "{}", "[", "\x00\xff"])
def test_labels_that_are_none(tmp_path, text):
    path = tmp_path / "labels"
    path.write_bytes(text.encode("latin-1"))
    if text == "\x00\xff":
        path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ModelError, match=r"labels .*(hold no names|cannot be used|is empty)"):
        read_labels(path)


def test_no_file_of_labels(tmp_path):
    with pytest.raises(ModelError, match="labels"):
        read_labels(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"names": "{0: 'a', 1: 'b'}"}, ("a", "b")),
        ({"names": json.dumps({"1": "b", "0": "a"})}, ("a", "b")),
        ({"classes": '["a", "b"]'}, ("a", "b")),
        ({"labels": "a\nb\n"}, ("a", "b")),
        ({"labels": "a, b"}, ("a", "b")),
        ({"names": "{0: 'a', 2: 'b'}"}, ()),
        ({"names": "['a', 'a']"}, ("a", "a (1)")),
        ({"names": "__import__('os')"}, ("__import__('os')",)),
        ({"author": "a"}, ()),
    ],
)
def test_names_in_metadata_of_any_writing(metadata, names):
    assert class_names_of(metadata) == names
