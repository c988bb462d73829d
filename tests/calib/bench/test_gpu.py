"""The GPU's part of the bench, on a stand-in for GPU, pycuda and TensorRT's runtime
(``tests.engines.gpu``).
"""

import json

import pytest
from rich.console import Console

from calib.bench import gpu as bench_gpu
from calib.bench import run as bench
from calib.bench.compare import changes
from calib.bench.report import plot_bench, print_bench
from engines.backends import tensorrt_build
from engines.choose import build_chosen
from engines.errors import EngineError
from engines.options import EngineOptions
from tests.command_line import refused
from tests.engines.gpu import certify_plan, keep_plan, machine_with_gpu, plan_of

CHOICE = EngineOptions(
    weights="random", head="none", size_px=64, backend="tensorrt", precision="fp32"
)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """With engines for one image and for two."""
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    driver = machine_with_gpu(monkeypatch)
    monkeypatch.setattr(tensorrt_build, "build_plan", lambda graph, build: plan_of(graph))
    for batch in (1, 2):
        model = build_chosen(CHOICE, batch)
        certify_plan(model, keep_plan(model, driver))
    return driver


def test_calls_are_told_in_trtexec_s_words(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_gpu, "WARM_UP_S", 0.01)
    monkeypatch.setattr(bench_gpu, "TORCH_PEERS", bench_gpu.TORCH_PEERS[:1])
    found, run = bench.bench("demo:10", [CHOICE], 0.1, Console(quiet=True), batches=[2])
    assert json.loads(json.dumps(found)) == found
    (engine,) = found["engines"]
    assert (
        engine["engine"] == "compact at 64 px, NVIDIA L4 sm89, tensorrt_rtx 1.7.1.116, CUDA graphs"
    )
    assert [times["batch"] for times in engine["gpu"]] == [1, 2]
    for times in engine["gpu"]:
        for p in ("p50", "max"):
            assert min(times[name][p] for name in bench_gpu.WORDS) > 0
        assert times["latency_ms"]["p50"] >= times["compute_ms"]["p50"]
        assert times["images_per_s"] == pytest.approx(
            times["batch"] * times["throughput_per_s"], rel=0.01
        )
        assert times["calls"] >= 3
    assert [row["name"] for row in engine["peers"]] == [
        "Sightline tensorrt fp32",
        "TensorRT fp32 forward only",
    ]
    assert {row["name"] for row in engine["not_available"]} == {
        "torch eager fp32 forward + autograd",
        "torch eager fp16 forward + autograd",
    }
    assert "roofline" not in found
    console = Console(width=160)
    with console.capture() as captured:
        print_bench(found, console)
    for words in (*bench_gpu.WORDS.values(), "Throughput", "batch 2: p50", "clocks unknown"):
        assert words in captured.get()
    pictures = plot_bench(found, run, tmp_path / "plots")
    assert [path.name for path in pictures] == ["latency.png", "peers.png", "rounds.png", "gpu.png"]
    compared = {change.name for change in changes(found, found) if change.is_ours}
    assert (
        "compact at 64 px, NVIDIA L4 sm89, tensorrt_rtx 1.7.1.116, CUDA graphs: Sightline,"
        " batch 2, GPU Compute" in compared
    )


def test_every_slot_is_busy_while_throughput_is_measured(gpu):
    engine, most = bench_gpu.open_gpu(CHOICE), []
    collect = engine.collect

    def watched(ticket):
        most.append(engine.under_way)
        return collect(ticket)

    engine.collect = watched
    bench_gpu.time_calls(engine, bench_gpu.feed_of(engine), 0.05)
    timed = most[most.index(2) :]
    assert set(timed[:-1]) == {2}
    assert engine.under_way == 0
    engine.close()


def test_a_batch_that_was_not_built_says_what_to_do(gpu):
    with pytest.raises(EngineError, match="no TensorRT engine of this graph is built"):
        bench_gpu.open_gpu(CHOICE, batch=3)


def test_without_a_gpu_it_is_one_line():
    line = refused(
        "bench", "demo:5", "--backend", "torch", "--model", "compact", "--seconds", "0.1"
    )
    assert "backend torch is timed on GPUs, and this machine has none" in line
