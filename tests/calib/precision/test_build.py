"""``build``: what is written, what is certified, which options contradict each other."""

import io
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from rich.console import Console

from calib.precision.build import (
    BuildOptions,
    build_chosen_engine,
    check_options,
    frames_of,
    parsed_frame_size,
)
from engines.backends.openvino import OpenVinoEngine
from engines.certificate import (
    certificate_path,
    load_certificate,
    openvino_key,
    openvino_subject,
    refuse_failed,
)
from engines.choose import build_chosen, open_localizer
from engines.engine import TensorSpec
from engines.errors import EngineError, InputError, ModelError, OutputError, SourceError
from engines.options import EngineOptions
from tests.realtime.media import write_images, write_video


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))


def quiet():
    return Console(file=io.StringIO(), width=300)


def test_an_openvino_build_writes_onnx_and_certificate(tmp_path):
    model, console = build_chosen(EngineOptions()), quiet()
    found = build_chosen_engine(
        model, BuildOptions(tmp_path / "net.onnx", "openvino", "fp32"), console
    )
    assert found.passed
    assert found.map_correlation_p5 == pytest.approx(1)
    assert onnx.load(tmp_path / "net.onnx").SerializeToString() == model.SerializeToString()
    assert json.loads((tmp_path / "net.certificate.json").read_text())["passed"] is True
    assert load_certificate(tmp_path / "net.certificate.json") == found
    assert "certificate passed" in console.file.getvalue()


def test_another_reference_can_be_named_and_a_failure_is_one_line_and_kept(tmp_path):
    """As for int8, whose reference is the graph without scales; here one with other weights."""
    other = build_chosen(EngineOptions(weights="random", layer="conv4_3"))
    choice = BuildOptions(tmp_path / "net.onnx", "openvino", "fp32")
    with pytest.raises(EngineError, match=r"failed its certificate \(.* is below 0\.") as caught:
        build_chosen_engine(other, choice, quiet(), reference=build_chosen(EngineOptions()))
    assert "\n" not in str(caught.value)
    assert not load_certificate(tmp_path / "net.certificate.json").passed
    with pytest.raises(EngineError, match=r"OpenVINO in fp32 failed its certificate .*: use fp32"):
        open_localizer(
            EngineOptions(weights="random", layer="conv4_3", backend="openvino", precision="fp32")
        )
    open_localizer(EngineOptions(backend="openvino", precision="fp32"))  # the other graph may run


def test_an_openvino_engine_without_certificate_may_run_and_a_failed_one_not(tmp_path):
    model = build_chosen(EngineOptions(size_px=64, weights="random"))
    engine = OpenVinoEngine(model, "fp32")
    refuse_failed(model, engine)
    good = build_chosen_engine(
        model, BuildOptions(tmp_path / "a.onnx", "openvino", "fp32"), quiet()
    )
    refuse_failed(model, engine)
    key = openvino_key(model, engine)
    replace(good, failures=("box IoU 0.2 is below 0.85",)).of(openvino_subject(key)).save(
        certificate_path(key.path)
    )
    with pytest.raises(EngineError, match=r"box IoU 0\.2 is below 0\.85"):
        refuse_failed(model, engine)


@pytest.mark.parametrize(
    ("choice", "kind", "words"),
    [
        (BuildOptions(), OutputError, "say where the ONNX file goes: FILE.onnx"),
        (
            BuildOptions(backend="torch"),
            EngineError,
            "makes engines of openvino or tensorrt, not of 'torch'",
        ),
        (
            BuildOptions("net.onnx", precision="bf16"),
            EngineError,
            "a precision and the frames to certify on are about an engine",
        ),
        (
            BuildOptions("net.onnx", on="clip.mp4"),
            EngineError,
            "a precision and the frames to certify on are about an engine",
        ),
        (BuildOptions("net.onnx", target="sm89"), EngineError, "use backend tensorrt"),
        (BuildOptions("net.onnx", "openvino", rebuild=True), EngineError, "use backend tensorrt"),
        (
            BuildOptions(backend="tensorrt", precision="bf16"),
            EngineError,
            "TensorRT engines run in fp32, fp16, int8, not bf16",
        ),
    ],
)
def test_options_that_contradict_each_other(choice, kind, words):
    with pytest.raises(kind, match=words):
        check_options(choice)


def test_an_engine_file_has_its_own_ending(tmp_path):
    with pytest.raises(OutputError, match=r"the name must end in \.engine"):
        check_options(BuildOptions(tmp_path / "net.onnx", "tensorrt"))


def test_frames_are_spread_over_the_source(tmp_path):
    everything = frames_of("demo:300")
    assert 16 <= len(everything) <= 33
    assert len({frame.tobytes() for frame in everything}) == len(everything)
    assert len(frames_of(str(write_video(tmp_path / "clip.mp4", 12)))) == 12
    assert len(frames_of(str(write_images(tmp_path / "shots", 5)))) == 5
    np.testing.assert_array_equal(frames_of("demo:300")[3], everything[3])
    with pytest.raises(SourceError):
        frames_of(str(tmp_path / "no.mp4"))


def test_a_graph_with_a_dense_head_is_built_for_frames_of_a_size():
    model = build_chosen(EngineOptions("lite0"), 2, (1280, 720))
    assert TensorSpec.of(model.graph.input[0]).shape == (2, 192, 320, 3)
    assert parsed_frame_size("16:9") == (16, 9)
    assert parsed_frame_size(" 720X1280") == (720, 1280)
    for text in ("", "wide", "0x9", "16x9x3", "1280"):
        with pytest.raises(InputError, match="no size of frames: write WIDTHxHEIGHT"):
            parsed_frame_size(text)
    for choice in (EngineOptions("compact"), EngineOptions("lite0", resize="squash")):
        with pytest.raises(ModelError, match=r"leave their size out|another input"):
            build_chosen(choice, frames_px=(16, 9))
