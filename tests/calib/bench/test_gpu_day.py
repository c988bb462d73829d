"""The day a GPU is there, as far as it goes without one: the dry run, and the sessions on a
stand-in for the driver.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the script needs: pip install '.[torch]'")

from calib.bench import gpu_day  # noqa: E402
from calib.bench.gpu_day import SKIPPED, STAGES, Day, main, run_day  # noqa: E402
from calib.bench.gpu_stand_in import Driven, check_sessions  # noqa: E402
from engines.errors import EngineError  # noqa: E402
from engines.networks.registry import load_classifier  # noqa: E402
from engines.options import EngineOptions  # noqa: E402
from tests.engines.gpu import GPU, machine_with_gpu, memory_at, plan_of  # noqa: E402

BARE = """
import sys
for name in ("openvino", "av", "tensorrt", "tensorrt_rtx", "pycuda", "typer", "matplotlib"):
    sys.modules[name] = None
# What times a GPU, and what is tested on one, starts there as well.
import calib.bench.gpu, tests.conftest, tests.engines.test_gpu, tests.engines.test_torch_reference_gpu
from calib.bench.gpu_day import main
sys.exit(main(["--dry", "--out", sys.argv[1]]))
"""


def test_a_dry_run_needs_none_of_what_a_bare_machine_lacks(tmp_path):
    command = [sys.executable, "-c", BARE, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [*report] == [*STAGES]
    for name, stage in STAGES.items():
        assert report[name]["state"] == (SKIPPED if stage.dry else "ok")
        assert f"{name}: {report[name]['state']}. {stage.proves}" in run.stdout
    assert report["graphs"]["compact sensitivity"]["nodes"] > 50
    assert report["graphs"]["lite0 sensitivity"]["nodes"] > 300, "the usual network, dense head"
    page = (tmp_path / "gpu_day.md").read_text()
    assert "| graphs | ok |" in page
    assert "| lite0 sensitivity | nodes " in page
    assert report["torch is right"]["fp32 slots 2"]["same_class"] == 1


def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path, capsys):
    def fails(_):
        raise ValueError("no luck\nat all")

    stages = {
        "imports": replace(STAGES["imports"], run=fails),
        "graphs": STAGES["graphs"],
    }
    report = run_day(Day(dry=True), tmp_path, stages)
    assert report["imports"]["state"] == "FAILED ValueError: no luck"
    assert "Traceback" in report["imports"]["error"]
    assert report["graphs"]["state"] == "ok"
    assert "imports: FAILED ValueError: no luck." in capsys.readouterr().out


def test_another_file_is_not_replaced(tmp_path, capsys):
    (tmp_path / "gpu_day.json").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--dry", "--out", str(tmp_path)])
    assert "gpu_day.json" in capsys.readouterr().err
    assert (tmp_path / "gpu_day.json").read_text() == "mine"


def test_a_page_is_made_of_a_report_and_replaces_no_other_file(tmp_path, capsys):
    report = {"a | b": {"state": "ok", "s": 1.0, "proves": "It.", "ms": [0.25, 1.5], "x": {"y": 2}}}
    (tmp_path / "gpu_day.json").write_text(json.dumps(report))
    page = tmp_path / "results.md"
    assert main(["--out", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert "| a \\| b | ok | 1.0 | It. |" in text
    assert "| ms | 0.25 / 1.5 |\n| x | y 2 |" in text
    assert main(["--out", str(tmp_path), "--page", str(page)]) == 0
    page.write_text("mine")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--page", str(page)])
    assert page.read_text() == "mine"


def test_plans_are_built_run_and_timed_where_tensorrt_is(tmp_path, monkeypatch):
    """On the simulated driver, whose plans are graphs that OpenVINO runs; building is left out."""
    machine = machine_with_gpu(monkeypatch)
    monkeypatch.setattr(gpu_day, "probe_gpu", lambda: GPU)
    monkeypatch.setattr(gpu_day, "build_plan", lambda graph, build: plan_of(graph))
    monkeypatch.setattr(gpu_day, "typed_graph", lambda graph, *_: graph)
    monkeypatch.setattr(gpu_day, "BATCHES", (1,))
    monkeypatch.setattr(Day, "networks", lambda _: [("compact", EngineOptions("compact"))])
    stages = {"TensorRT": replace(STAGES["TensorRT"], dry=None)}
    found = run_day(Day(dry=True), tmp_path, stages)["TensorRT"]
    assert found["state"] == "ok", found
    assert found["compact fp16 batch 1"]["device"].endswith("CUDA graphs")
    assert found["compact fp32 batch 1"]["images_per_s"] > 0
    assert found["compact fp32 batch 1"]["correlation"] > 0.999
    assert found["compact int8 batch 1"]["correlation"] > 0.5, "as its calibration allows"
    assert found["compact fp16 batch 1"]["calls"] >= 12
    assert not any(machine.driver.alive.values())
    machine.library.capturable = False
    state = run_day(Day(dry=True), tmp_path, stages)["TensorRT"]["state"]
    assert state.startswith("FAILED EngineError: no CUDA graph")

    def missing(ahead=False):
        raise EngineError("TensorRT is not installed")

    monkeypatch.setattr(gpu_day.backend, "load_tensorrt", missing)
    state = run_day(Day(dry=True), tmp_path, stages)["TensorRT"]["state"]
    assert state == "skipped: TensorRT is not installed"


def test_the_sanitizer_is_asked_for_by_name(monkeypatch, capsys):
    monkeypatch.setattr(gpu_day.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        main(["--sanitize", "--dry"])
    assert "compute-sanitizer is not there" in capsys.readouterr().err


def driven_by(run_on):
    """The compact network, whose stand-in for a plan works on host memory."""
    return Driven.of(
        load_classifier("compact"),
        EngineOptions(),
        tensor_at=lambda address, spec: torch.from_numpy(
            memory_at(address, spec.dtype, spec.shape)
        ),
        run_on=run_on,
    )


def test_sessions_on_a_driver_that_is_not_there(monkeypatch):
    machine = machine_with_gpu(monkeypatch)
    driven = driven_by(lambda handle, work: machine.driver.execute(handle, (), (), work))
    found = check_sessions(driven, calls=6, timed_calls=2)
    assert len(found) == 12
    assert machine.libcuda.captured == 12
    assert not any(machine.driver.alive.values())


def test_a_plan_that_computes_nothing_is_noticed(monkeypatch):
    machine_with_gpu(monkeypatch)
    with pytest.raises(AssertionError):
        check_sessions(driven_by(lambda handle, work: None), calls=2, timed_calls=1)
