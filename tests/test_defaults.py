"""What each command does with the default network, where its options are left out."""

import json

import onnx

from tests.command_line import command, process, refused
from tests.realtime.media import write_images

LITE0 = ("--model", "lite0")


def test_without_options_the_default_network_sees_whole_frames(tmp_path):
    result = process("demo", "--frames", 3, "--out", tmp_path, SIGHTLINE_MODEL="")
    assert result.returncode == 0, result.stderr
    assert "lite0 at 320 px" in result.stderr.splitlines()[0]
    rows = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["confidence"] > 0.5 for row in rows)


def test_fit_makes_a_dense_head_unless_another_kind_is_asked_for(labelled_photo, tmp_path):
    words = ("fit", labelled_photo, *LITE0, "--out", tmp_path / "mine")
    assert "it has 1 boxes, a dense head needs at least" in refused(*words)
    assert "1 images have exactly one box" in refused(*words, "--kind", "linear")
    assert "1 images have exactly one box" in refused(*words, "--method", "gestalt")
    assert "1 images have exactly one box" in refused(*words, "--layer", "block4")
    line = refused(*words, "--per-class")
    assert "ask for a linear one (--kind, --per-class)" in line.replace("--curve, ", "")
    small = ("fit", labelled_photo, "--model", "compact", "--out", tmp_path / "mine")
    assert "1 images have exactly one box" in refused(*small)


def test_several_objects_are_found_without_further_options(tmp_path):
    folder = write_images(tmp_path / "photos", 2)
    words = ("batch", folder, *LITE0, "--size", 192, "--objects", 3, "--no-video", "--min-score", 0)
    result = command(*words, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "finds the main object only" in refused(
        "batch", folder, "--model", "compact", "--objects", 3, "--out", tmp_path / "other"
    )


def test_the_built_graph_gives_many_boxes(tmp_path):
    result = command("build", *LITE0, "--size", 192, "--out", tmp_path / "net.onnx")
    assert result.returncode == 0, result.stderr
    outputs = {each.name for each in onnx.load(tmp_path / "net.onnx").graph.output}
    assert {"candidates", "map", "class_index"} <= outputs
