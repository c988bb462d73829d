"""The command line as a user meets it: whole processes, their exit codes, their one line of error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.realtime.media import timestamps_s, write_images, write_video

ROOT = Path(__file__).parent.parent


def command(*arguments, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )  # fmt: skip


def refused(*arguments, **environment):
    """The one line that a user's mistake gives."""
    result = command(*arguments, **environment)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_demo_writes_video_log_plot_and_summary(tmp_path):
    result = command("demo", "--frames", 40, "--out", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "demo.jsonl", "demo.latency.png", "demo.mp4", "demo.summary.json",
    ]  # fmt: skip
    assert summary["frames"] == 40
    assert timestamps_s(tmp_path / "demo.mp4") == pytest.approx([i / 30 for i in range(40)], abs=1e-4)
    assert len((tmp_path / "demo.jsonl").read_text().splitlines()) == 40
    assert json.loads((tmp_path / "demo.summary.json").read_text())["frames"] == 40
    assert cv2.imread(str(tmp_path / "demo.latency.png")).shape[1] > 1000
    for stage in ("read", "prepare", "engine", "draw", "write"):
        assert summary["stages_ms"][stage]["p50"] > 0
    assert 0 <= summary["corloc"] <= 1


def test_a_budget_that_cannot_be_held_steps_down_and_says_so(tmp_path):
    options = ("--method", "heuristic", "--budget-ms", 0.1, "--frames", 400)
    result = command("demo", *options, "--out", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["steps"][0]["why"].endswith("over the budget of 0.1 ms")
    assert summary["steps"][-1]["to"] == summary["rung"]
    assert summary["over_budget"] in " ".join(result.stderr.split())
    rows = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(400))
    assert rows[0]["rung"] == summary["steps"][0]["from"]
    assert rows[-1]["rung"] == summary["rung"]


def test_batch_takes_videos_and_folders(tmp_path):
    video, folder = write_video(tmp_path / "clip.mp4"), write_images(tmp_path / "shots")
    result = command("batch", video, folder, "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert [s["frames"] for s in json.loads(result.stdout)] == [12, 5]
    assert timestamps_s(tmp_path / "out" / "clip.mp4") == pytest.approx(timestamps_s(video), abs=1e-4)
    assert len(timestamps_s(tmp_path / "out" / "shots.mp4")) == 5


def test_a_broken_file_is_told_the_rest_is_done_and_the_status_says_so(tmp_path):
    video, text = write_video(tmp_path / "clip.mp4"), tmp_path / "text.mp4"
    text.write_text("no video")
    result = command("batch", text, video, "--out", tmp_path / "out", "--json")
    assert result.returncode == 1
    assert "text.mp4: cannot open" in " ".join(result.stderr.split())
    bad, good = json.loads(result.stdout)
    assert (bad["frames"], good["frames"]) == (0, 12)
    assert command("batch", video, "--out", tmp_path / "out", "--start", "0:00.2", "--every", 2).returncode == 0
    assert len((tmp_path / "out" / "clip.jsonl").read_text().splitlines()) == 3


def test_sources_of_the_same_name_do_not_overwrite_each_other(tmp_path):
    first, second = (
        write_video(tmp_path / d / "clip.mp4", n) for d, n in (("a", 3), ("b", 4)) if (tmp_path / d).mkdir() is None
    )
    result = command("batch", first, second, "--out", tmp_path / "out", "--no-video", "--json")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out" / "clip.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "out" / "clip_2.jsonl").read_text().splitlines()) == 4


def test_stream_plays_a_file_at_its_own_pace_and_logs_every_frame(tmp_path):
    video = write_video(tmp_path / "clip.mp4", 25)
    start = time.monotonic()
    result = command("stream", video, "--no-window", "--log", tmp_path / "log.jsonl", "--record", tmp_path / "r.mp4", "--json")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start > 0.96
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(row["frame"] for row in rows) == list(range(25))
    summary = json.loads(result.stdout)
    assert summary["frames"] + summary["dropped"] == 25
    assert len(timestamps_s(tmp_path / "r.mp4")) == summary["frames"]


def test_ctrl_c_ends_with_130_and_playable_files(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "cli.py", "demo", "--frames", "100000", "--out", str(tmp_path)],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / ".demo.jsonl.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 20):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    rows = (tmp_path / "demo.jsonl").read_text().splitlines()
    assert len(rows) > 20
    assert abs(len(timestamps_s(tmp_path / "demo.mp4")) - len(rows)) <= 1
    assert json.loads((tmp_path / "demo.summary.json").read_text())["interrupted"] is True


def bad_onnx(path, operator):
    from onnx import TensorProto, helper, save

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    kernel = helper.make_tensor("w", TensorProto.FLOAT, [3, 3, 32, 32], np.zeros(3 * 3 * 32 * 32))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="first"),
        helper.make_node(operator, ["c"], ["e"], name="odd"),
        helper.make_node("Flatten", ["e"], ["y"], name="flat"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [kernel])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_missing_file(tmp_path):
    assert "no.mp4 does not exist" in refused("batch", tmp_path / "no.mp4", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["text", "truncated", "no frames"])
def test_a_broken_video_leaves_nothing_behind(tmp_path, kind):
    path = tmp_path / "in" / "bad.mp4"
    path.parent.mkdir()
    write_video(path, 0 if kind == "no frames" else 200)
    if kind == "text":
        path.write_text("no video")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    assert str(path) in refused("batch", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_one_pixel_image_is_refused_and_leaves_nothing_behind(tmp_path):
    cv2.imwrite(str(tmp_path / "dot.png"), np.full((1, 1, 3), 90, np.uint8))
    assert "1x1 pixels" in refused("batch", tmp_path / "dot.png", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_weights_of_the_wrong_shape(tmp_path):
    from safetensors.numpy import save_file

    from engines import vgg

    weights = vgg.random_weights((4, 4, 4, 4, 4), hidden=0)
    weights["features.5.weight"] = weights["features.5.weight"][:, :2].copy()
    save_file(weights, tmp_path / "bad.safetensors")
    line = refused("demo", "--weights", tmp_path / "bad.safetensors", "--out", tmp_path / "out")
    assert "'features.5.weight' has shape [4, 2, 3, 3]" in line
    assert "[any, 4, 3, 3]" in line.replace("'", "")


def test_an_unknown_operator_is_named(tmp_path):
    model = bad_onnx(tmp_path / "m.onnx", "Erf")
    line = refused("demo", "--model", model, "--out", tmp_path / "out")
    assert "operator Erf" in line
    assert "known operators" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet"], "unknown model 'resnet'"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors do not exist"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--backend", "tea"], "unknown backend 'tea'"),
        (["--precision", "int3"], "not int3"),
        (["--size", "100"], "not a multiple of 32"),
        (["--class", "unicorn"], "'unicorn' is unknown"),
        (["--class", "unicorn", "--budget-ms", "20"], "'unicorn' is unknown"),
        (["--class", "terrier"], "could be"),
        (["--head", "nowhere.safetensors"], "cannot read head"),
    ],
)
def test_mistakes_in_options(arguments, words, tmp_path):
    assert words in refused("demo", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused("demo", "--frames", 3, "--out", tmp_path / "file")


def test_offline_the_error_says_what_to_put_where(tmp_path):
    line = refused("demo", "--model", "vgg16", SIGHTLINE_CACHE=str(tmp_path), https_proxy="http://127.0.0.1:9")
    assert "vgg16-397923af.pth" in line
    assert str(tmp_path / "weights") in line
    assert not list((tmp_path / "weights").iterdir())


def test_offline_a_published_set_names_both_ways_out(tmp_path):
    out = tmp_path / "head.safetensors"
    line = refused("fit", "--dataset", "voc2007", "--out", out, SIGHTLINE_CACHE=str(tmp_path), http_proxy="http://127.0.0.1:9")
    assert "cannot download http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar" in line
    assert f"put it at {tmp_path / 'datasets' / 'VOCtrainval_06-Nov-2007.tar'}" in line
    assert not out.exists()


@pytest.fixture
def labelled_photo(tmp_path):
    write_images(tmp_path / "photos", 1)
    (tmp_path / "photos.csv").write_text("file,class,x0,y0,x1,y1\nshot 8.png,cat,4,30,28,54\n")
    return tmp_path / "photos.csv"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a label file or --dataset voc2007: neither is given"),
        (["DATA", "--dataset", "voc2007"], "both are given"),
        (["--dataset", "voc1912"], "unknown data set 'voc1912'"),
        (["DATA", "--classes", "dog"], "photos.csv has no class 'dog': it has cat"),
    ],
)
def test_mistakes_in_naming_a_data_set(labelled_photo, tmp_path, arguments, words):
    arguments = [str(labelled_photo) if a == "DATA" else a for a in arguments]
    assert words in refused("evaluate", *arguments)
    assert words in refused("fit", *arguments, "--out", tmp_path / "head.safetensors")


def test_a_box_beyond_its_image_names_file_image_box_and_size(labelled_photo):
    labelled_photo.write_text(labelled_photo.read_text().replace("28,54", "28,99"))
    line = refused("evaluate", labelled_photo)
    assert f"{labelled_photo}: image shot 8.png: box 4,30,28,99 of 'cat' reaches 3 px beyond the image of 128x96 px" in line


def test_evaluate_keeps_the_classes_asked_for(labelled_photo):
    labelled_photo.write_text(labelled_photo.read_text() + "shot 8.png,dog,0,0,9,9\n")
    result = command("evaluate", labelled_photo, "--classes", "cat", "--json")
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)["corloc_per_class"]) == ["cat"]
    line = refused("evaluate", labelled_photo, "--classes", "cat", "--single")
    assert "no image with exactly one object in this data set" in line, "the dog beside the cat counts"


def test_a_camera_that_is_not_there_is_one_line():
    result = command("stream", "97")
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "camera 97 cannot be opened" in line]
    assert len(result.stderr.splitlines()) == 2, result.stderr  # the engine's line, and the error


def test_without_arguments_help_shows_every_command():
    result = command("--help")
    for name in ("demo", "batch", "stream", "bench"):
        assert name in result.stdout


def test_the_built_file_gives_elsewhere_what_it_gives_here(tmp_path):
    """Our graph in ONNX Runtime, a batch of two."""
    import onnxruntime

    from engines.choose import Choice, open_localizer

    result = command("build", "--out", tmp_path / "deep" / "net.onnx", "--batch", 2)
    assert result.returncode == 0, result.stderr
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3)).astype(np.uint8)
    feeds = {"image_nhwc_bgr": images, "wanted_class": np.array([-1, 3])}
    session = onnxruntime.InferenceSession(tmp_path / "deep" / "net.onnx", providers=["CPUExecutionProvider"])
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    here = open_localizer(Choice(precision="fp32"))
    for place, wanted in enumerate((None, 3)):
        here.look_for(wanted)
        expected = here.localize([images[place]])[0]
        assert found["class_index"][place] == expected.class_index
        np.testing.assert_allclose(found["box_xyxy"][place] * 128, expected.box_xyxy_px, atol=0.1)


def test_a_class_by_name_is_looked_for(tmp_path):
    result = command("demo", "--frames", 2, "--class", "tabby", "--out", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert {row["class_name"] for row in rows} == {"tabby"}


def test_a_network_without_a_fitted_head_gets_training_free_boxes_and_is_told_so(labelled_photo):
    result = command("evaluate", labelled_photo, "--weights", "random", "--json")
    assert result.returncode == 0, result.stderr
    assert "no fitted head for this network yet ('fit' makes one)" in result.stderr
    assert "top 20 % of the pixels" in json.loads(result.stdout)["head"]
    asked_for = command("evaluate", labelled_photo, "--method", "heuristic", "--json")
    assert asked_for.returncode == 0, asked_for.stderr
    assert "no fitted head" not in asked_for.stderr


def test_a_shipped_head_by_name(labelled_photo):
    named = command("evaluate", labelled_photo, "--method", "gestalt", "--head", "compact_gestalt", "--json")
    default = command("evaluate", labelled_photo, "--method", "gestalt", "--json")
    assert named.returncode == default.returncode == 0, named.stderr
    assert json.loads(named.stdout)["mean_iou"] == json.loads(default.stdout)["mean_iou"]
    assert "--method heuristic reads the box without a fitted head" in refused(
        "evaluate", labelled_photo, "--method", "heuristic", "--head", "compact_gestalt"
    )


def test_fit_makes_a_head_per_class_that_evaluate_takes(tmp_path):
    write_images(tmp_path / "photos", 44)
    lines = ["file,class,x0,y0,x1,y1"]
    for place, path in enumerate(sorted((tmp_path / "photos").iterdir())):
        lines.append(f"{path.name},{'cat' if place % 2 else 'dog'},{4 + place},10,{40 + place},60")
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    head = tmp_path / "head.safetensors"
    fitted = command("fit", tmp_path / "photos.csv", "--out", head, "--per-class", "--json")
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["layers"] == ["any", "cat", "dog"]
    assert command("evaluate", tmp_path / "photos.csv", "--head", head).returncode == 0


def has_driver():
    from engines.base import EngineError
    from engines.cuda import probe_gpu

    try:
        return probe_gpu()
    except EngineError:
        return None


@pytest.mark.skipif(has_driver() is not None, reason="there is an NVIDIA GPU here")
def test_without_a_gpu_tensorrt_is_one_line_and_auto_says_why_it_is_openvino(tmp_path):
    line = refused("demo", "--frames", 2, "--out", tmp_path, "--backend", "tensorrt")
    assert line.startswith("error: no NVIDIA")
    assert line.endswith("; --backend openvino needs no GPU")
    assert "no NVIDIA" in refused("build", "--backend", "tensorrt")
    automatic = command("demo", "--frames", 2, "--out", tmp_path)
    assert automatic.returncode == 0, automatic.stderr
    assert "on openvino" in automatic.stderr.splitlines()[0]
    assert "; not TensorRT: no NVIDIA" in automatic.stderr.splitlines()[0]
    named = command("demo", "--frames", 2, "--out", tmp_path, "--backend", "openvino")
    assert "TensorRT" not in named.stderr


def test_build_proves_an_openvino_engine(tmp_path):
    result = command("build", "--backend", "openvino", "--precision", "fp32", "--out", tmp_path / "net.onnx",
                     SIGHTLINE_CACHE=str(tmp_path / "cache"))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "certificate passed" in result.stderr
    assert json.loads((tmp_path / "net.certificate.json").read_text())["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say where the ONNX file goes"),
        (["--for", "sm89", "--out", "x.onnx"], "add --backend tensorrt"),
        (["--backend", "tensorrt", "--precision", "bf16"], "TensorRT engines run in fp32, fp16, int8, not bf16"),
        (
            ["--backend", "tensorrt", "--for", "sm89", "--precision", "int8", "--weights", "random"],
            "no int8 calibration of these",
        ),
    ],
)
def test_builds_that_make_no_sense(arguments, words):
    pytest.importorskip("tensorrt_rtx")
    assert words in refused("build", *arguments)


def test_a_processor_with_fewer_instructions_runs_and_says_what_it_lost(tmp_path):
    """The cap on oneDNN's instruction set stands in for an older processor."""
    for cap, lost in (("AVX512_CORE", "no VNNI instructions here"), ("AVX2", "no VNNI instructions here")):
        out = tmp_path / cap
        result = command("demo", "--frames", 30, "--out", out, "--json", ONEDNN_MAX_CPU_ISA=cap)
        assert result.returncode == 0, result.stderr
        assert "int8" in result.stderr
        assert lost in result.stderr
        summary = json.loads(result.stdout)
        assert summary["frames"] == 30
        assert summary["corloc"] > 0.7
    assert "this processor does not compute in bf16: use --precision fp32 or int8" in refused(
        "demo", "--frames", 5, "--precision", "bf16", ONEDNN_MAX_CPU_ISA="AVX2"
    )
    result = command("demo", "--frames", 5, "--precision", "fp32", "--out", tmp_path / "fp32", ONEDNN_MAX_CPU_ISA="AVX2")
    assert "no bf16 instructions here" in result.stderr


def test_calibrate_then_int8(tmp_path):
    file = tmp_path / "mine.int8.json"
    result = command(
        "calibrate", "demo:64", "--limit", 32, "--size", 64, "--layer", "conv4_3", "--ranges", "mse", "--out", file, "--json"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["certificate"]["passed"]
    result = command(
        "demo", "--frames", 20, "--size", 64, "--layer", "conv4_3", "--precision", "int8", "--calibration", file, "--out", tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "on openvino int8" in result.stderr
    file.write_text("{}")
    assert "cannot read calibration" in refused("demo", "--precision", "int8", "--calibration", file)
    assert "no int8 calibration of these vgg16 weights" in refused(
        "demo", "--model", "vgg16", "--weights", "random", "--precision", "int8"
    )
    assert command("calibrate", "demo:64", "--limit", 15).returncode == 2


@pytest.mark.parametrize("method", ["dam", "beam"])
def test_methods_that_search_run_wherever_a_box_is_wanted(method, labelled_photo, tmp_path):
    """Every frame of a clip through batch; evaluate with its report; the log lists detections only where they are several."""
    clip = tmp_path / "clip.mp4"
    write_video(clip, 6)
    result = command("batch", clip, "--method", method, "--objects", 3, "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["frames"] == 6
    for row in map(json.loads, (tmp_path / "out" / "clip.jsonl").read_text().splitlines()):
        assert row["x0"] < row["x1"]
        several = row.get("detections", [])
        assert len(several) in (0, 2, 3)
        assert not several or [several[0][edge] for edge in ("x0", "y0", "x1", "y1")] == [
            row[e] for e in ("x0", "y0", "x1", "y1")
        ]
    result = command("evaluate", labelled_photo, "--method", method, "--report", tmp_path / "r.md", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["head"].startswith(f"{method}: ")
    assert sum(report["iou_histogram"]) == 1
    assert (tmp_path / "r_files" / "quality.png").exists()


def test_what_methods_that_search_cannot_do_is_said(labelled_photo, tmp_path):
    assert "without --head" in refused("evaluate", labelled_photo, "--method", "dam", "--head", "none")
    assert "not calibrated for int8" in refused("demo", "--method", "beam", "--precision", "int8", "--out", tmp_path)
    assert "on OpenVINO only" in refused("demo", "--method", "dam", "--backend", "torch", "--out", tmp_path)
    assert "takes several graphs" in refused("demo", "--method", "dam", "--budget-ms", 30, "--out", tmp_path)
    assert "takes several graphs" in refused("build", "--method", "dam", "--out", tmp_path / "m.onnx")
    assert "fit with sensitivity or gestalt" in refused(
        "fit", labelled_photo, "--method", "beam", "--out", tmp_path / "h.safetensors"
    )
    assert "finds the main object only" in refused("demo", "--objects", 2, "--out", tmp_path)
