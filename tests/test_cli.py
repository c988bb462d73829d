"""The command line as a user meets it: exit codes, what is written, one line of error; each kind of
end as a whole process too.
"""

import json
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from tests.command_line import ROOT, command, process, refused
from tests.realtime.media import timestamps_s, write_images, write_video


def test_demo_writes_video_log_plot_and_summary(tmp_path):
    result = process("demo", "--frames", 40, "--out", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == [
        "demo.events.jsonl",
        "demo.jsonl",
        "demo.latency.png",
        "demo.mp4",
        "demo.summary.json",
    ]
    assert summary["frames"] == 40
    assert timestamps_s(tmp_path / "demo.mp4") == pytest.approx(
        [i / 12.5 for i in range(40)], abs=1e-4
    )
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
    assert timestamps_s(tmp_path / "out" / "clip.mp4") == pytest.approx(
        timestamps_s(video), abs=1e-4
    )
    assert len(timestamps_s(tmp_path / "out" / "shots.mp4")) == 5


def test_min_score_leaves_out_boxes_that_are_less_sure(tmp_path):
    shots, out = write_images(tmp_path / "shots"), tmp_path / "out"
    for least, boxes in ((0.0, 5), (0.999, 0)):
        result = command("batch", shots, "--out", out, "--no-video", "--min-score", least)
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in (out / "shots.jsonl").read_text().splitlines()]
        assert len(rows) == 5
        assert sum(row["x0"] is not None for row in rows) == boxes
        assert all(0 < row["confidence"] < 1 for row in rows)
        summary = json.loads((out / "shots.summary.json").read_text())
        assert (summary["localized"], summary["nothing_sure"]) == (boxes, 5 - boxes)
        assert summary["shown_from"] == least
        page = (out / "shots.report.html").read_text(encoding="utf-8")
        assert ("nothing sure in view in <strong>5</strong>" in page) == (boxes == 0)
        assert f"under {100 * least:.0f} % are not shown" in page
        assert ("nothing sure in view in 5" in result.stderr) == (boxes == 0)
    assert "--min-score" in refused("batch", shots, "--method", "heuristic", "--min-score", 0.5)


def test_a_broken_file_is_told_the_rest_is_done_and_the_status_says_so(tmp_path):
    video, text = write_video(tmp_path / "clip.mp4"), tmp_path / "text.mp4"
    text.write_text("no video")
    result = process("batch", text, video, "--out", tmp_path / "out", "--json")
    assert result.returncode == 1
    assert "text.mp4: cannot open" in " ".join(result.stderr.split())
    bad, good = json.loads(result.stdout)
    assert (bad["frames"], good["frames"]) == (0, 12)
    assert (
        command(
            "batch", video, "--out", tmp_path / "out", "--start", "0:00.2", "--every", 2
        ).returncode
        == 0
    )
    assert len((tmp_path / "out" / "clip.jsonl").read_text().splitlines()) == 3


def test_sources_of_the_same_name_do_not_overwrite_each_other(tmp_path):
    first, second = (
        write_video(tmp_path / d / "clip.mp4", n)
        for d, n in (("a", 3), ("b", 4))
        if (tmp_path / d).mkdir() is None
    )
    result = command("batch", first, second, "--out", tmp_path / "out", "--no-video", "--json")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out" / "clip.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "out" / "clip_2.jsonl").read_text().splitlines()) == 4


def test_stream_plays_a_file_at_its_own_pace_and_logs_every_frame(tmp_path):
    video = write_video(tmp_path / "clip.mp4", 25)
    start = time.monotonic()
    result = process(
        "stream",
        video,
        "--no-window",
        "--log",
        tmp_path / "log.jsonl",
        "--record",
        tmp_path / "r.mp4",
        "--json",
    )
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
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / ".demo.jsonl.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        log.exists() and len(log.read_text().splitlines()) > 20
    ):
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
    assert "no.mp4 does not exist" in refused(
        "batch", tmp_path / "no.mp4", "--out", tmp_path / "out", run=process
    )
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

    from engines.networks import vgg

    weights = vgg.random_weights((4, 4, 4, 4, 4), hidden=0)
    weights["features.5.weight"] = weights["features.5.weight"][:, :2].copy()
    save_file(weights, tmp_path / "bad.safetensors")
    line = refused("demo", "--weights", tmp_path / "bad.safetensors", "--out", tmp_path / "out")
    assert "'features.5.weight' has shape [4, 2, 3, 3]" in line
    assert "[any, 4, 3, 3]" in line.replace("'", "")


def test_an_unknown_operator_is_named(tmp_path):
    model = bad_onnx(tmp_path / "m.onnx", "Round")
    line = refused("demo", "--model", model, "--out", tmp_path / "out")
    assert "operator Round" in line
    assert "no gradient rule" in line


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
        (["--class", "dgo"], "near are dingo, dugong: write one of them"),
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
    line = refused(
        "demo", "--model", "vgg16", SIGHTLINE_CACHE=str(tmp_path), https_proxy="http://127.0.0.1:9"
    )
    assert "vgg16-397923af.pth" in line
    assert str(tmp_path / "weights") in line
    assert not list((tmp_path / "weights").iterdir())


def test_offline_a_published_set_names_both_ways_out(tmp_path):
    out = tmp_path / "head.safetensors"
    line = refused(
        "fit",
        "--dataset",
        "voc2007",
        "--out",
        out,
        SIGHTLINE_CACHE=str(tmp_path),
        https_proxy="http://127.0.0.1:9",
    )
    assert (
        "cannot download https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar"
        in line
    )
    assert f"put it at {tmp_path / 'datasets' / 'VOCtrainval_06-Nov-2007.tar'}" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a label file or a data set, voc2007: neither is given (--dataset)"),
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
    labelled_photo.write_text(labelled_photo.read_text().replace("28,54", "28,300"))
    line = refused("evaluate", labelled_photo)
    assert (
        f"{labelled_photo}: image shot 8.png: box 4,30,28,300 of 'cat' reaches 204 px beyond the image of 128x96 px"
        in line
    )


def test_a_box_that_reaches_slightly_beyond_its_image_is_cut_and_that_is_said(labelled_photo):
    labelled_photo.write_text(labelled_photo.read_text().replace("28,54", "28,99"))
    result = command("evaluate", labelled_photo)
    assert result.returncode == 0, result.stderr
    assert (
        f"boxes that reach slightly beyond their image are cut to it ({labelled_photo}: image shot 8.png)"
        in result.stderr
    )


def test_evaluate_keeps_the_classes_asked_for(labelled_photo):
    labelled_photo.write_text(labelled_photo.read_text() + "shot 8.png,dog,0,0,9,9\n")
    result = command("evaluate", labelled_photo, "--classes", "cat", "--json")
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)["corloc_per_class"]) == ["cat"]
    line = refused("evaluate", labelled_photo, "--classes", "cat", "--single")
    assert "no image with exactly one object in this data set" in line, (
        "the dog beside the cat counts"
    )


def test_a_camera_that_is_not_there_is_one_line():
    result = process("stream", "97")
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "camera 97 cannot be opened" in line]
    assert len(result.stderr.splitlines()) == 2, result.stderr  # the engine's line, and the error


def test_without_arguments_help_shows_every_command():
    result = process("--help")
    for name in ("demo", "batch", "stream", "bench"):
        assert name in result.stdout


def test_a_defect_is_one_line_and_its_traceback_is_had_on_request(monkeypatch):
    def broken(*_, **__):
        raise KeyError("a defect\nof two lines")

    monkeypatch.setattr("cli.all_commands", lambda _: broken)
    result = command("doctor", SIGHTLINE_TRACEBACK="")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "this is a defect of Sightline" in result.stderr
    assert "KeyError" in result.stderr
    with pytest.raises(KeyError):
        command("doctor")


def test_words_that_fit_no_command_are_one_line_without_control_characters():
    for words, said in {
        ("batch", "--size", "3", "x.mp4"): "Invalid value for '--size'",
        ("batch", "--x\x1b[31m"): "No such option: --x\\x1b[31m",
        ("nonsense",): "No such command 'nonsense'",
    }.items():
        result = command(*words)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert said in result.stderr
