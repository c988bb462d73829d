"""Tensors of ONNX files: of other floating-point types, and in files beside the model."""

import hashlib
import os

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import SightlineError
from engines.networks.registry import load_classifier
from tests.hostile import (
    DENSE,
    LFS,
    NODE,
    WEIGHT,
    answer,
    external,
    image,
    load,
    message_of,
    saved,
    scores,
    small_model,
    small_nodes,
    written,
)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_computed_as_float32(tmp_path, dtype):
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = {"w": WEIGHT.astype(dtype), "d": DENSE.astype(dtype)}
    unusual = small_model(tensors=tensors, inputs=[image(elem=elem)], outputs=[scores(elem=elem)])
    usual = small_model(tensors={name: value.astype(np.float32) for name, value in tensors.items()})
    found, expected = answer(saved(tmp_path, unusual)), answer(saved(tmp_path, usual, "usual.onnx"))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_casts_to_float16_within_a_network_are_float32(tmp_path):
    half = WEIGHT.astype(np.float16)
    nodes = [
        NODE("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16),
        NODE("Conv", ["x16", "w"], ["c16"]),
        NODE("Cast", ["c16"], ["c"], to=TensorProto.FLOAT),
        *small_nodes()[1:],
    ]
    found = answer(saved(tmp_path, small_model(nodes, {"w": half, "d": DENSE})))
    expected = answer(
        saved(
            tmp_path, small_model(tensors={"w": half.astype(np.float32), "d": DENSE}), "usual.onnx"
        )
    )
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-6)


# Weights beside the file


def with_weights_beside(tmp_path, location="w.bin", content=None, folder=None, **said):
    """A model in a folder, and the file that it names."""
    place = tmp_path / "models"
    place.mkdir(exist_ok=True)
    tensor = external(numpy_helper.from_array(WEIGHT, "w"), location=location, **said)
    path = saved(place, small_model(tensors={"w": tensor, "d": DENSE}))
    if content is not False:
        written(
            (folder or place) / location.split("/")[-1],
            WEIGHT.tobytes() if content is None else content,
        )
    return path


def test_weights_beside_the_model_are_read_from_its_folder_and_never_from_the_working_directory(
    tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    written(elsewhere / "w.bin", (WEIGHT * 9).tobytes())
    monkeypatch.chdir(elsewhere)
    path = with_weights_beside(tmp_path)
    expected = answer(saved(tmp_path, small_model(), "usual.onnx"))
    for name in (str(path), os.path.relpath(path)):
        np.testing.assert_array_equal(answer(name)["map"], expected["map"])
    (path.parent / "w.bin").unlink()
    assert "'w.bin', which is not there: put it into" in message_of(load, path)


def test_the_digest_holds_weights_beside_the_model(tmp_path):
    path = with_weights_beside(tmp_path)
    first = load_classifier(str(path)).digest
    assert load_classifier(str(path)).digest == first
    written(path.parent / "w.bin", (WEIGHT * 2).tobytes())
    assert load_classifier(str(path)).digest != first


def test_without_weights_beside_it_the_digest_is_that_of_the_file(tmp_path):
    path = saved(tmp_path, small_model())
    assert load_classifier(str(path)).digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "..\\w.bin"}, "outside the model's folder"),
        ({"location": ""}, "outside the model's folder"),
        ({"location": "."}, "outside the model's folder"),
        ({"location": "a\0b"}, "cannot be looked up"),
        ({"location": "x" * 5000}, "cannot be looked up|which is not there"),
        ({"content": b""}, "is empty"),
        ({"content": WEIGHT.tobytes()[:-4]}, "428 bytes, and its shape needs 432"),
        ({"content": WEIGHT.tobytes() + b"more"}, "436 bytes, and its shape needs 432"),
        ({"content": LFS.encode()}, "Git LFS pointer"),
        ({"offset": -1}, "not a number of bytes"),
        ({"offset": 2**58}, "0 bytes, and its shape needs 432"),
        ({"offset": "9" * 50}, "not a number of bytes"),
        ({"offset": 4, "length": 432}, r"lies at bytes 4 to 436 of w.bin, which has 432"),
        ({"length": 2**40}, "1,099,511,627,776 bytes, and its shape needs 432"),
        ({"length": "many"}, "not a number of bytes"),
        ({"content": np.full(108, np.nan, np.float32).tobytes()}, "not finite"),
    ],
)
def test_weights_beside_the_model_that_cannot_be_meant(tmp_path, said, words):
    written(tmp_path / "w.bin", WEIGHT.tobytes())
    said = {"location": "w.bin", **said}
    content = said.pop("content", None if said["location"] == "w.bin" else False)
    path = with_weights_beside(tmp_path, content=content, **said)
    with pytest.raises(SightlineError, match=words):
        load(path)
    message_of(load, path)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    written(tmp_path / "secret", WEIGHT.tobytes())
    path = with_weights_beside(tmp_path, content=False)
    (path.parent / "w.bin").symlink_to(tmp_path / "secret")
    assert "outside the model's folder" in message_of(load, path)


def test_a_model_that_is_a_link_finds_its_weights_where_it_truly_lies(tmp_path):
    path = with_weights_beside(tmp_path)
    (tmp_path / "link.onnx").symlink_to(path)
    assert load(tmp_path / "link.onnx")


def test_many_tensors_cannot_claim_one_file_over_and_over(tmp_path):
    tensors = {
        f"w{i}": external(
            numpy_helper.from_array(WEIGHT, f"w{i}"), location="w.bin", offset=0, length=432
        )
        for i in range(9)
    }
    written(tmp_path / "w.bin", WEIGHT.tobytes())
    path = saved(tmp_path, small_model(tensors={"w": WEIGHT, "d": DENSE, **tensors}))
    assert "need more bytes than" in message_of(load, path)
