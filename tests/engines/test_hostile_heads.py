"""Heads, calibrations and certificates that nobody's command wrote: each loads, or is refused in
one true line.
"""

import contextlib
import copy
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from engines.certificate import load_certificate
from engines.dense import DenseHead
from engines.errors import SightlineError
from engines.head import load_head, shipped_head_names, shipped_head_path
from engines.int8 import load_quantization
from engines.networks.weights import ASSETS
from tests.command_line import refused
from tests.hostile import calibration, head_bytes, head_parts, message_of, with_header, written

DEEP = "[" * 100_000 + "]" * 100_000
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
DELETE = object()


def changed(value, *path, to):
    """A copy of nested JSON with one value replaced, or taken out."""
    result = copy.deepcopy(value)
    place = result
    for key in path[:-1]:
        place = place[key]
    if to is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return result


def head(*path, to):
    tensors, description = head_parts()
    return head_bytes(tensors, changed(description, *path, to=to))


def head_of(**arrays):
    tensors, description = head_parts()
    return head_bytes(
        {k: v for k, v in {**tensors, **arrays}.items() if v is not None}, description
    )


def spoiled(name, value, dtype=np.float32):
    tensors, _ = head_parts()
    array = tensors[name].astype(dtype)
    array.flat[1] = value
    return head_of(**{name: array})


SOUND_HEAD = head_bytes(*head_parts())
HEADS = {
    "empty": (lambda: b"", "is empty"),
    "one byte": (lambda: b"x", "cannot read head"),
    "text": (lambda: "a head", "cannot read head"),
    "git lfs pointer": (lambda: LFS, "Git LFS pointer"),
    "web page": (lambda: "<html>404</html>", "a web page"),
    "a pickle": (lambda: b"\x80\x04\x95" + bytes(60), "cannot read head"),
    "cut off": (lambda: SOUND_HEAD[:-8], "cannot read head"),
    "cut in the header": (lambda: SOUND_HEAD[:90], "cannot read head"),
    "more behind it": (lambda: SOUND_HEAD + b"more", "cannot read head"),
    "a header of 2^63 bytes": (lambda: with_header(b"{}", length=2**63), "cannot read head"),
    "a header longer than the file": (lambda: with_header(b"{}", length=4096), "cannot read head"),
    "a header of nothing": (lambda: with_header(b""), "cannot read head"),
    "a header that is no JSON": (lambda: with_header(b"{weight: 1}    "), "cannot read head"),
    "a deep header": (
        lambda: with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "cannot read head",
    ),
    "offsets beyond the file": (
        lambda: with_header(
            b'{"weight":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(8)
        ),
        "cannot read head",
    ),
    "a shape of 2^120": (
        lambda: with_header(
            b'{"weight":{"dtype":"F32","shape":[1152921504606846976,1152921504606846976],"data_offsets":[0,8]}}',
            bytes(8),
        ),
        "cannot read head",
    ),
    "another's safetensors": (
        lambda: save({"weight": np.ones((2, 2), np.float32)}),
        "another kind of file",
    ),
    "a description that is no JSON": (lambda: head_bytes(head_parts()[0], "{oops"), "is not JSON"),
    "a deep description": (lambda: head_bytes(head_parts()[0], DEEP), "nested too deeply"),
    "a description that is a list": (
        lambda: head_bytes(head_parts()[0], "[1]"),
        "not a JSON object",
    ),
    "a description with NaN": (lambda: head_bytes(head_parts()[0], '{"spec": NaN}'), "NaN"),
    "NaN in its weight": (
        lambda: spoiled("weight", np.nan),
        "its weight holds values that are not finite",
    ),
    "infinity in its weight": (
        lambda: spoiled("weight", -np.inf),
        "its weight holds values that are not finite",
    ),
    "NaN in its bias": (
        lambda: spoiled("bias", np.nan),
        "its bias holds values that are not finite",
    ),
    "a weight of float64": (lambda: spoiled("weight", 1, np.float64), "its weight holds float64"),
    "a weight of integers": (lambda: spoiled("weight", 1, np.int32), "its weight holds int32"),
    "routes of floats": (
        lambda: head_of(routes=np.zeros(2, np.float32)),
        "its routes holds float32",
    ),
    "no weight": (lambda: head_of(weight=None), "has no 'weight'"),
    "no routes": (lambda: head_of(routes=None), "has no 'routes'"),
    "a weight of one axis": (
        lambda: head_of(weight=np.ones(24, np.float32)),
        "do not fit its features",
    ),
    "a weight for other features": (
        lambda: head_of(weight=np.ones((1, 4, 7), np.float32)),
        "do not fit its features",
    ),
    "a bias of one axis": (
        lambda: head_of(bias=np.array([1], np.float32)),
        "do not fit its features",
    ),
    "no layers": (
        lambda: head_of(weight=np.ones((0, 4, 6), np.float32), bias=np.ones((0, 4), np.float32)),
        "do not fit",
    ),
    "routes to nowhere": (lambda: head_of(routes=np.array([0, 3])), "routes lead to layers"),
    "routes below zero": (lambda: head_of(routes=np.array([0, -1])), "routes lead to layers"),
    "no features": (lambda: head("features", to=[]), "do not fit its features"),
    "features of text": (lambda: head("features", to="many"), "cannot read head"),
    "an unknown feature": (lambda: head("features", 0, "kind", to="fourier"), "'fourier'"),
    "an unknown signal": (lambda: head("features", 0, "signal", to="noise"), "'noise'"),
    "a feature of 2^40 cells": (lambda: head("features", 0, "size", to=2**40), "a feature's size"),
    "a feature of no cells": (lambda: head("features", 0, "size", to=0), "a feature's size"),
    "a feature's size in words": (
        lambda: head("features", 0, "size", to="3"),
        "a feature's size is not a whole number",
    ),
    "a power below zero": (lambda: head("features", 0, "power", to=-1.0), "a feature's power"),
    "a layer that is a number": (
        lambda: head("features", 0, "layer", to=4),
        "a feature's layer is not text",
    ),
    "a feature with more": (lambda: head("features", 0, "more", to=1), "more"),
    "an unknown objective": (
        lambda: head("spec", "objective", to="beauty"),
        "unknown objective 'beauty'",
    ),
    "a map that is a list": (lambda: head("spec", to=[1]), "cannot read head"),
    "no network": (lambda: head("network", to=DELETE), "has no 'network'"),
    "a network that is a number": (lambda: head("network", to=5), "its network is not text"),
    "a network that is no digest": (lambda: head("network", to="compact"), "no sha256"),
    "a side of zero": (lambda: head("size_px", to=0), "its size_px"),
    "a side of 2^40": (lambda: head("size_px", to=2**40), "its size_px"),
    "a card that is text": (lambda: head("card", to="x"), "its card"),
    "a constant box of three": (
        lambda: head("card", "constant_boxes", "mean_box", to=[0, 0, 1]),
        "four edges",
    ),
    "a constant box of words": (
        lambda: head("card", "constant_boxes", "mean_box", to=["a"] * 4),
        "is not a number",
    ),
    "a confidence model without a scale": (
        lambda: head("trust", "scale", to=[0.0] * 8),
        "a scale of its confidence model is 0",
    ),
    "a confidence model below zero": (
        lambda: head("trust", "scale", to=[-1.0] * 8),
        "a scale of its confidence model is -1",
    ),
    "a confidence model of words": (
        lambda: head("trust", "weight", to=["a"] * 8),
        "a weight of its confidence model is not a number",
    ),
    "a confidence model of few": (
        lambda: head("trust", "mean", to=[0.0]),
        "not as many weights as cues",
    ),
    "a confidence model of 1e300": (
        lambda: head("trust", "bias", to=1e300),
        "the bias of its confidence model",
    ),
    "a confidence model that is a list": (lambda: head("trust", to=[1, 2]), "cannot read head"),
    "a confidence model with 1e400": (
        lambda: head_bytes(head_parts()[0], '{"spec": 1e400}'),
        "beyond every float",
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_bad_head_is_one_line(tmp_path, kind):
    make, words = HEADS[kind]
    path = written(tmp_path / "head.safetensors", make())
    assert words in message_of(load_head, path)


def test_sound_heads_load(tmp_path):
    assert load_head(written(tmp_path / "head.safetensors", SOUND_HEAD)).size_px == 64
    for name in shipped_head_names():
        head = load_head(shipped_head_path(name))
        assert isinstance(head, DenseHead) or head.confidence_model is not None


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for load in (load_head, load_quantization, load_certificate):
        assert "is a folder" in message_of(load, tmp_path)
        assert "not a regular file" in message_of(load, tmp_path / "pipe")
        assert "cannot read" in message_of(load, tmp_path / "absent")


def ranges(**changes):
    return changed(calibration(), "ranges", to=changes)


CALIBRATIONS = {
    "empty": ("", "is empty"),
    "garbage": (b"\x00\xff\xfe", "cannot read calibration"),
    "text": ("a calibration", "is not JSON"),
    "cut off": (json.dumps(calibration())[:-9], "is not JSON"),
    "git lfs pointer": (LFS, "Git LFS pointer"),
    "web page": ("<!doctype html>", "a web page"),
    "deep": (DEEP, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "a list": ("[1, 2]", "not a JSON object"),
    "a number": ("7", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "NaN": ('{"sightline_int8": 1, "ranges": {"a": NaN}}', "NaN"),
    "infinity": ('{"sightline_int8": 1, "ranges": {"a": -Infinity}}', "Infinity"),
    "1e400": ('{"sightline_int8": 1, "ranges": {"a": 1e400}}', "beyond every float"),
    "digits without end": ('{"sightline_int8": ' + "9" * 100_000 + "}", "cannot read calibration"),
    "another's JSON": ('{"hello": 1}', "is no calibration"),
    "another version": (changed(calibration(), "sightline_int8", to=2), "another version"),
    "a version in words": (changed(calibration(), "sightline_int8", to="1"), "another version"),
    "no ranges": (changed(calibration(), "ranges", to=DELETE), "ranges"),
    "a range of zero": (ranges(a=0.0), "the range of tensor 'a' is 0.0"),
    "all ranges zero": (ranges(a=0, b=0), "the range of tensor 'a' is 0"),
    "a range below zero": (ranges(a=-3.5), "the range of tensor 'a' is -3.5"),
    "a range of 1e39": (ranges(a=1e39), "the range of tensor 'a' is 1e+39"),
    "a range of 1e-300": (ranges(a=1e-300), "the range of tensor 'a' is 1e-300"),
    "a range of 10^400": (ranges(a=10**400), "cannot read calibration"),
    "a range in words": (ranges(a="3.5"), "the range of tensor 'a' is not a number: '3.5'"),
    "a range that is true": (ranges(a=True), "the range of tensor 'a' is not a number: True"),
    "a range that is null": (ranges(a=None), "the range of tensor 'a' is not a number: None"),
    "a range that is a list": (ranges(a=[1.0]), "the range of tensor 'a' is not a number"),
    "ranges that are a list": (
        changed(calibration(), "ranges", to=[1.0]),
        "cannot read calibration",
    ),
    "ranges that are text": (changed(calibration(), "ranges", to="all"), "cannot read calibration"),
    "kept that is a number": (changed(calibration(), "kept", to=3), "cannot read calibration"),
    "kept of numbers": (changed(calibration(), "kept", to=[3]), "a layer that is kept is not text"),
    "no network": (changed(calibration(), "network", to=DELETE), "network"),
    "a network that is a number": (
        changed(calibration(), "network", to=5),
        "its network is not text",
    ),
    "a side in words": (
        changed(calibration(), "size_px", to="64"),
        "its size_px is not a whole number",
    ),
    "a side of zero": (changed(calibration(), "size_px", to=0), "its size_px is 0"),
    "an objective that is a list": (
        changed(calibration(), "objective", to=[]),
        "its objective is not text",
    ),
    "a layer that is null": (changed(calibration(), "layer", to=None), "its layer is not text"),
    "a card that is text": (changed(calibration(), "card", to="x"), "its card"),
    "more than there is": (changed(calibration(), "extra", to=1), "extra"),
    "a name with a line break": (ranges(**{"a\nb": 0}), r"'a\nb'"),
    "not UTF-8": (b'{"sightline_int8": "\xff"}', "cannot read calibration"),
}


def as_text(made):
    return made if isinstance(made, bytes | str) else json.dumps(made)


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_a_bad_calibration_is_one_line(tmp_path, kind):
    made, words = CALIBRATIONS[kind]
    path = written(tmp_path / "c.json", as_text(made))
    assert words in message_of(load_quantization, path)


def test_sound_calibrations_load(tmp_path):
    assert (
        load_quantization(written(tmp_path / "c.json", json.dumps(calibration()))).ranges["conv1_1"]
        == 3.5
    )
    found = [load_quantization(path) for path in ASSETS.glob("*.int8.json")]
    assert len(found) == 3


def certificate():
    limits = {
        "box_iou_p5": 0.85,
        "map_correlation_p5": 0.9,
        "class_agreement": 0.9,
        "change_ratio": 0.5,
    }
    return {
        "passed": True,
        "subject": {"graph": "1"},
        "reference": "a",
        "candidate": "b",
        "frames": 16,
        "box_iou_p5": 0.9,
        "map_correlation_p5": 0.95,
        "class_agreement": 1.0,
        "map_change": 0.1,
        "reference_map_change": 0.1,
        "thresholds": limits,
        "failures": [],
    }


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("", "is empty"),
        (DEEP, "nested too deeply"),
        ("[]", "not a JSON object"),
        ('{"passed": NaN}', "NaN"),
        (changed(certificate(), "passed", to=DELETE), "has no 'passed'"),
        (changed(certificate(), "passed", to="yes"), "contradicts itself"),
        (changed(certificate(), "passed", to=False), "contradicts itself"),
        (changed(certificate(), "failures", to=["the map is zero"]), "contradicts itself"),
        (changed(certificate(), "failures", to=[3]), "a failure is not text"),
        (changed(certificate(), "frames", to=-3), "its frames is -3"),
        (changed(certificate(), "frames", to=1), "its frames is 1"),
        (
            changed(certificate(), "map_correlation_p5", to="0.95"),
            "its map_correlation_p5 is not a number",
        ),
        (
            changed(certificate(), "map_correlation_p5", to=0.2),
            "contradicts itself: its map_correlation_p5 of 0.2 is below",
        ),
        (changed(certificate(), "class_agreement", to=7), "its class_agreement is 7"),
        (changed(certificate(), "thresholds", to={}), ""),
        (changed(certificate(), "thresholds", "box_iou_p5", to=-9), "its box_iou_p5 is -9"),
        (changed(certificate(), "thresholds", "wishes", to=0.5), "wishes"),
        (changed(certificate(), "subject", to="all"), "cannot read certificate"),
        (changed(certificate(), "candidate", to=None), "its candidate is not text"),
        (changed(certificate(), "more", to=1), "more"),
    ],
)
def test_a_bad_certificate_is_one_line(tmp_path, made, words):
    path = written(tmp_path / "c.json", as_text(made))
    if words:
        assert words in message_of(load_certificate, path)
    else:
        assert load_certificate(path).passed


def test_from_the_command_line(tmp_path):
    path = written(tmp_path / "head.safetensors", spoiled("weight", np.nan))
    assert "not finite" in refused("demo", "--head", path, "--frames", "2", "--out", tmp_path / "o")
    path = written(tmp_path / "c.json", json.dumps(ranges(conv1_1=0)))
    line = refused(
        "demo",
        "--precision",
        "int8",
        "--calibration",
        path,
        "--frames",
        "2",
        "--out",
        tmp_path / "o",
    )
    assert "the range of tensor 'conv1_1' is 0" in line
    path = written(tmp_path / "c.json", json.dumps(calibration()))
    line = refused(
        "demo",
        "--precision",
        "int8",
        "--calibration",
        path,
        "--frames",
        "2",
        "--out",
        tmp_path / "o",
    )
    assert "of another network, size or objective" in line
    path = written(tmp_path / "head.safetensors", SOUND_HEAD)
    assert "fitted on another network" in refused(
        "demo", "--head", path, "--frames", "2", "--out", tmp_path / "o"
    )
    assert "is a folder" in refused(
        "demo", "--head", tmp_path, "--frames", "2", "--out", tmp_path / "o"
    )


CALIBRATION = json.dumps(calibration()).encode()


def damaged(content, changes, cut):
    result = bytearray(content)
    for place, value in changes:
        result[place % len(content)] = value
    return bytes(result[: len(content) - cut])


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(CHANGES, st.integers(0, 40))
def test_changed_bytes_load_or_are_one_line(tmp_path_factory, changes, cut):
    folder = tmp_path_factory.getbasetemp()
    for load, content in (
        (load_head, SOUND_HEAD),
        (load_quantization, CALIBRATION),
        (load_certificate, CERTIFICATE),
    ):
        path = written(folder / "changed", damaged(content, changes, cut))
        with contextlib.suppress(SightlineError):
            load(path)


CERTIFICATE = json.dumps(certificate()).encode()
