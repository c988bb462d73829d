"""The command line where it chooses, builds and calibrates engines."""

import json

import numpy as np
import onnx
import pytest

from tests.command_line import command, process, refused
from tests.engines.networks.test_onnx_ends import RAW, SAME, written
from tests.processors import X86
from tests.realtime.media import write_images, write_video


def test_the_built_file_gives_elsewhere_what_it_gives_here(tmp_path):
    """Our graph in ONNX Runtime, a batch of two."""
    import onnxruntime

    from engines.choose import open_localizer
    from engines.options import EngineOptions

    result = command("build", "--out", tmp_path / "deep" / "net.onnx", "--batch", 2)
    assert result.returncode == 0, result.stderr
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3)).astype(np.uint8)
    feeds = {"image_nhwc_bgr": images, "wanted_class": np.array([-1, 3])}
    session = onnxruntime.InferenceSession(
        tmp_path / "deep" / "net.onnx", providers=["CPUExecutionProvider"]
    )
    found = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    here = open_localizer(EngineOptions(precision="fp32", least_confidence=0.0))
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


def test_a_name_of_boxes_is_looked_for(tmp_path):
    from engines.choose import open_localizer

    result = command(
        *("demo", "--model", "lite0", "--class", "Potted plant"),
        *("--frames", 2, "--out", tmp_path, "--json"),
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} <= {None, "potted plant"}
    with open_localizer("lite0", wanted_class="potted plant", backend="openvino") as localizer:
        place = localizer.names.index("potted plant")
        assert localizer.wanted_class == len(localizer.class_names) + place


def test_a_network_without_a_fitted_head_gets_training_free_boxes_and_is_told_so(labelled_photo):
    result = command("evaluate", labelled_photo, "--weights", "random", "--json")
    assert result.returncode == 0, result.stderr
    assert "no fitted head for this network yet ('fit' makes one)" in result.stderr
    assert "top 20 % of the pixels" in json.loads(result.stdout)["head"]
    asked_for = command("evaluate", labelled_photo, "--method", "heuristic", "--json")
    assert asked_for.returncode == 0, asked_for.stderr
    assert "no fitted head" not in asked_for.stderr


def test_a_shipped_head_by_name(labelled_photo):
    named = command(
        "evaluate", labelled_photo, "--method", "gestalt", "--head", "compact_gestalt", "--json"
    )
    default = command("evaluate", labelled_photo, "--method", "gestalt", "--json")
    assert named.returncode == default.returncode == 0, named.stderr
    assert json.loads(named.stdout)["mean_iou"] == json.loads(default.stdout)["mean_iou"]
    assert "method heuristic reads the box without a fitted head" in refused(
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
    from engines.backends.cuda import probe_gpu
    from engines.errors import EngineError

    try:
        return probe_gpu()
    except EngineError:
        return None


@pytest.mark.skipif(has_driver() is not None, reason="there is an NVIDIA GPU here")
def test_without_a_gpu_tensorrt_is_one_line_and_auto_says_why_it_is_openvino(tmp_path):
    line = refused("demo", "--frames", 2, "--out", tmp_path, "--backend", "tensorrt")
    assert line.startswith("error: no NVIDIA")
    assert line.endswith("; backend openvino needs no GPU (--backend)")
    assert "no NVIDIA" in refused("build", "--backend", "tensorrt")
    automatic = command("demo", "--frames", 2, "--out", tmp_path)
    assert automatic.returncode == 0, automatic.stderr
    assert "on openvino" in automatic.stderr.splitlines()[0]
    assert "; not TensorRT: no NVIDIA" in automatic.stderr.splitlines()[0]
    named = command("demo", "--frames", 2, "--out", tmp_path, "--backend", "openvino")
    assert "TensorRT" not in named.stderr


def test_build_proves_an_openvino_engine(tmp_path):
    result = command(
        "build",
        "--backend",
        "openvino",
        "--precision",
        "fp32",
        "--out",
        tmp_path / "net.onnx",
        SIGHTLINE_CACHE=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr
    assert "certificate passed" in result.stderr
    assert json.loads((tmp_path / "net.certificate.json").read_text())["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say where the ONNX file goes"),
        (["--for", "sm89", "--out", "x.onnx"], "use backend tensorrt"),
        (
            ["--backend", "tensorrt", "--precision", "bf16"],
            "TensorRT engines run in fp32, fp16, int8, not bf16",
        ),
        (
            [
                "--backend",
                "tensorrt",
                "--for",
                "sm89",
                "--precision",
                "int8",
                "--weights",
                "random",
            ],
            "no int8 calibration of these",
        ),
    ],
)
def test_builds_that_make_no_sense(arguments, words):
    pytest.importorskip("tensorrt_rtx")
    assert words in refused("build", *arguments)


@X86
def test_a_processor_with_fewer_instructions_runs_in_fp32_and_says_so_once(tmp_path):
    """The cap on oneDNN's instruction set stands in for an older processor."""
    asked = [
        (
            "AVX2",
            [],
            "fp32",
            "ONEDNN_MAX_CPU_ISA=AVX2 leaves no bf16 and VNNI instructions: runs in fp32",
        ),
        (
            "AVX2",
            ["--precision", "bf16"],
            "fp32",
            "ONEDNN_MAX_CPU_ISA=AVX2 leaves no bf16 instructions: runs in fp32",
        ),
        (
            "AVX512_CORE",
            ["--precision", "int8"],
            "int8",
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE leaves no VNNI instructions",
        ),
    ]
    for index, (cap, options, precision, lost) in enumerate(asked):
        out = tmp_path / str(index)
        result = process(
            "demo",
            "--frames",
            30,
            *options,
            "--out",
            out,
            "--json",
            ONEDNN_MAX_CPU_ISA=cap,
            DNNL_MAX_CPU_ISA="",
        )
        assert result.returncode == 0, result.stderr
        assert f"on openvino {precision}" in result.stderr
        assert result.stderr.count(lost) == 1
        summary = json.loads(result.stdout)
        assert summary["frames"] == 30
        rows = [json.loads(line) for line in (out / "demo.jsonl").read_text().splitlines()]
        assert all(0 < row["confidence"] < 1 for row in rows)


def test_calibrate_then_int8(tmp_path):
    file = tmp_path / "mine.int8.json"
    result = command(
        "calibrate",
        "demo:64",
        "--limit",
        32,
        "--size",
        64,
        "--layer",
        "conv4_3",
        "--ranges",
        "mse",
        "--out",
        file,
        "--json",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["certificate"]["passed"]
    result = command(
        "demo",
        "--frames",
        20,
        "--size",
        64,
        "--layer",
        "conv4_3",
        "--precision",
        "int8",
        "--calibration",
        file,
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "on openvino int8" in result.stderr
    file.write_text("{}")
    assert "cannot read calibration" in refused(
        "demo", "--precision", "int8", "--calibration", file
    )
    assert "no int8 calibration of these alexnet weights" in refused(
        "demo", "--model", "alexnet", "--weights", "random", "--precision", "int8"
    )
    assert command("calibrate", "demo:64", "--limit", 15).returncode == 2


@pytest.mark.parametrize("method", ["dam", "beam"])
def test_methods_that_search_run_wherever_a_box_is_wanted(method, labelled_photo, tmp_path):
    """Every frame of a clip through batch; evaluate with its report; the log lists detections only
    where they are several.
    """
    clip = tmp_path / "clip.mp4"
    write_video(clip, 6)
    result = command(
        *("batch", clip, "--method", method, "--objects", 3, "--no-follow"),
        *("--out", tmp_path / "out", "--json"),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["frames"] == 6
    for row in map(json.loads, (tmp_path / "out" / "clip.jsonl").read_text().splitlines()):
        assert row["x0"] < row["x1"]
        several = row.get("detections", [])
        assert len(several) in (0, 2, 3)
        assert not several or [several[0][edge] for edge in ("x0", "y0", "x1", "y1")] == [
            row[e] for e in ("x0", "y0", "x1", "y1")
        ]
    result = command(
        "evaluate", labelled_photo, "--method", method, "--report", tmp_path / "r.md", "--json"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["head"].startswith(f"{method}: ")
    assert sum(report["iou_histogram"]) == 1
    assert (tmp_path / "r_files" / "quality.png").exists()


def test_what_methods_that_search_cannot_do_is_said(labelled_photo, tmp_path):
    assert "without a head" in refused(
        "evaluate", labelled_photo, "--method", "dam", "--head", "none"
    )
    assert "not calibrated for int8" in refused(
        "demo", "--method", "beam", "--precision", "int8", "--out", tmp_path
    )
    assert "on OpenVINO only" in refused(
        "demo", "--method", "dam", "--backend", "torch", "--out", tmp_path
    )
    assert "takes several graphs" in refused(
        "demo", "--method", "dam", "--budget-ms", 30, "--out", tmp_path
    )
    assert "takes several graphs" in refused(
        "build", "--method", "dam", "--out", tmp_path / "m.onnx"
    )
    assert "fit with sensitivity or gestalt" in refused(
        "fit", labelled_photo, "--method", "beam", "--out", tmp_path / "h.safetensors"
    )
    assert "finds the main object only" in refused("demo", "--objects", 2, "--out", tmp_path)


def test_what_a_foreign_classifier_takes_is_said_on_the_command_line(tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "graph.onnx"
    written(path, SAME, RAW)
    line = ("build", "--model", path, "--head", "none", "--out", out)
    given = ("--mean", "0.5,0.4,0.3", "--std", "0.25", "--order", "bgr", "--resize", "letterbox")
    result = command(*line, *given)
    assert result.returncode == 0, result.stderr
    said = "BGR (as given), (pixel - (127.5, 102, 76.5)) / 63.75 (as given), letterboxed"
    assert said in " ".join(result.stderr.split())
    assert '"kind": "letterbox"' in onnx.load(out).metadata_props[0].value
    for wrong, words in (
        (("--mean", "0.5,0.4"), "give one number, or three with commas"),
        (("--mean", "0.5", "--std", "58"), "not of the same pixels.*(--mean, --std, --scale)"),
        (("--scale", "0"), "give a number over 0 such as 255, or 1/255"),
        (("--resize", "stretch"), "give squash, crop or letterbox"),
        (("--output", "z"), "has no output 'z'; it has 'out' of any shape (--output)"),
        (
            ("--model", "compact", "--order", "bgr"),
            "compact are known: order can be said.*(--order)",
        ),
    ):
        result = command(*line, *wrong)
        assert result.returncode == 2
        for each in words.split(".*"):
            assert each in " ".join(result.stderr.split())
