"""The doctor tells what is here, gives a fix for each problem, and is ended by nothing."""

import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engines.networks.registry import NETWORKS
from engines.networks.weights import ASSETS
from realtime import doctor as checks
from realtime.doctor import CHECKS, Finding, as_json, examine, is_fit, print_findings
from realtime.sources import video as cameras

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def findings():
    return examine()


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_this_machine_runs_and_every_problem_has_a_fix(findings):
    found = by_name(findings)
    assert is_fit(findings)
    assert "Egyptian cat" in found["shipped network"].found
    assert "h264" in found["decoders"].found
    assert "libx264" in found["encoders"].found
    assert {
        "Python",
        "processor",
        "OpenVINO",
        "display",
        "CUDA driver",
        "TensorRT",
        "pycuda",
        "PyTorch",
        "page",
        "cache",
    } <= set(found)
    for finding in findings:
        assert finding.state in ("ok", "absent", "problem")
        assert finding.state != "problem" or finding.fix, finding


@pytest.mark.parametrize(
    ("system", "machine", "words", "state"),
    [
        ("Linux", "x86_64", "Linux x86_64: tested", "ok"),
        ("Linux", "aarch64", "untested; wheels of every package exist, for glibc 2.35", "absent"),
        ("Windows", "AMD64", "untested", "absent"),
        ("Darwin", "x86_64", "not supported; OpenVINO has no wheel", "absent"),
        ("Linux", "riscv64", "untested; nothing is known of it", "absent"),
    ],
)
def test_the_platform_is_told_and_whether_it_is_tested(monkeypatch, system, machine, words, state):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    found = by_name(examine([checks.python]))["platform"]
    assert words in found.found
    assert found.state == state


def test_the_page_on_platforms_says_the_same():
    text = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    for (system, machine), (support, _) in checks.PLATFORMS.items():
        (line,) = [line for line in text.splitlines() if f"`{system}` `{machine}`" in line]
        assert f"| {support} |" in line


def test_json_and_terminal_say_the_same(findings):
    notify = json.loads(as_json(findings))
    assert notify["ok"] is True
    assert [row["name"] for row in notify["findings"]] == [finding.name for finding in findings]
    console = Console(record=True, width=400, file=io.StringIO())
    print_findings([Finding("x[red]", "problem", "is [odd]", "mend it")], console)
    assert "x[red]: is [odd]" in console.export_text()


def test_a_check_that_fails_is_a_finding_and_ends_nothing():
    def broken():
        """Lens: is it clean."""
        yield Finding("first", "ok", "fine")
        raise OSError(5, "Input/output error")

    def after():
        yield Finding("last", "ok", "fine")

    found = examine([broken, after])
    assert [finding.name for finding in found] == ["first", "Lens", "last"]
    assert "Input/output error" in found[1].found
    assert found[1].fix


def test_a_missing_package_is_named_and_not_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = examine(CHECKS)
    assert by_name(found)["openvino"].fix.endswith("install --force-reinstall openvino")
    assert not is_fit(found)
    assert "Python" in by_name(found)


def test_weights_that_cannot_be_read_are_not_fit(monkeypatch, tmp_path):
    (tmp_path / "compact.safetensors").write_bytes(
        ASSETS.joinpath("compact.safetensors").read_bytes()[:1000]
    )
    damaged = replace(NETWORKS["compact"], shipped=str(tmp_path / "compact.safetensors"))
    monkeypatch.setitem(NETWORKS, "compact", damaged)
    network = by_name(examine([checks.network]))["shipped network"]
    assert network.state == "problem"
    assert network.needed


def test_a_cap_on_the_instruction_set_and_a_cache_that_cannot_be_written_are_told(
    monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "file" / "cache"))
    found = by_name(examine([checks.processor, checks.cache]))
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in found["instruction cap"].found
    assert "SIGHTLINE_CACHE" in found["cache"].fix


def test_cameras_are_listed_by_number_and_one_that_cannot_be_opened_is_told(tmp_path):
    for name in ("video10", "video2", "videoX", "null"):
        (tmp_path / name).touch()
    assert cameras.listed_cameras(tmp_path) in ([2, 10], None)
    assert cameras.probe(77).problem


def test_a_camera_that_hangs_is_left_behind():
    assert "does not answer" in cameras.probe(0, timeout_s=0.001).problem


def test_it_answers_where_sightline_itself_does_not_start(tmp_path):
    code = "import sys; sys.modules['cv2'] = None; import runpy; runpy.run_module('realtime.doctor', run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "opencv-python" in ended.stdout
    assert "cache" in ended.stdout


def test_an_old_driver_and_the_engines_that_are_built_are_told(monkeypatch, tmp_path):
    from engines.backends import cuda
    from engines.certificate import engines_dir

    gpu = cuda.Gpu("NVIDIA L4", (8, 9), 12080)
    monkeypatch.setattr(cuda, "probe_gpu", lambda: gpu)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.7.1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    engines_dir().mkdir(parents=True)
    (engines_dir() / "lite0-tensorrt-fp16.engine").write_bytes(b"")
    found = by_name(checks.nvidia())
    assert "needs driver 580 or newer" in found["driver for TensorRT"].found
    assert found["pycuda"].found == "pycuda 1.7.1, cuda.bindings 1.7.1"
    assert found["lite0-tensorrt-fp16"].found == "not certified"
    assert "--rebuild" in found["lite0-tensorrt-fp16"].fix
