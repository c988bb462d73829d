"""The bench: when it stops, what its peers compute, what it counts, and what it calls a regression."""

import json
import sys
from itertools import chain, cycle, repeat

import cv2
import numpy as np
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from calib import bench
from calib.bench_compare import changes, compare, load_bench
from calib.bench_loop import bench_end_to_end
from calib.bench_peers import PEERS, Task, forward_graph, peers
from calib.bench_plots import plot_bench
from calib.bench_report import print_bench
from calib.machine import Neighbours, large_convolution, large_product
from calib.roofline import Peaks, Work, count_work, multiply_adds, roofline_point, tensor_shapes
from calib.stability import Rule, mean, notch, spread, until_settled, window_values
from engines.backends.openvino import OpenVinoEngine
from engines.base import SightlineError, SourceError
from engines.build import WANTED_CLASS, build_graph
from engines.choose import Choice
from engines.classifiers import load_classifier
from engines.maps import MapSpec
from engines.preprocess import IMAGE
from tests.realtime.media import write_images
from tests.test_cli import command, refused

QUIET = Console(quiet=True)
TINY = Choice(weights="random", head="none", size_px=64)
RULE = Rule(4, "rounds", 0.05)


def ticking(step_s=1.0):
    """A clock that moves on by one step whenever it is looked at."""
    times = iter(range(10**6))
    return lambda: next(times) * step_s


# When it stops


def test_windows_are_successive_and_whole():
    assert window_values([1, 3, 5, 7, 9, 11, 100], 2) == [2, 6, 10]
    assert window_values([1, 2, 9, 1, 2, 9], 2, mean) == [1.5, 5, 5.5]
    assert window_values([1, 2, 3, 4, 5, 6, 7], 5) == [1.5, 3.5, 5.5], "too few samples make three shorter windows"
    assert window_values([4, 6], 5) == [4, 6]
    assert window_values([], 5) == []


def test_three_windows_that_agree_settle_and_nothing_else_does():
    level, low, high = [10.0] * 4, [9.7] * 4, [10.2] * 4
    assert RULE.settled({"a": level + low + high}), "0.5 of 10 is 5 %"
    assert not RULE.settled({"a": level + low + [10.3] * 4})
    assert not RULE.settled({"a": level + low + high[:3]}), "the third window is not whole"
    assert RULE.settled({"a": [50.0] * 4 + level + low + high}), "only the last three count"
    assert not RULE.settled({"a": level * 3, "b": level * 2 + [20.0] * 4}), "every series must have settled"
    assert not RULE.settled({})


def test_one_slow_call_in_a_window_does_not_unsettle_a_median_but_does_a_mean():
    samples = [10.0, 10, 10, 500] + [10.0] * 8
    assert RULE.settled({"a": samples})
    assert not RULE.settled({"a": samples}, {"a": mean})


def test_measuring_stops_when_settled_and_keeps_every_sample():
    drift = chain([30.0, 25, 20, 15], repeat(10.0))
    series, stable = until_settled(lambda: {"a": next(drift)}, RULE, 1000, ticking())
    assert stable
    assert series["a"] == [30, 25, 20, 15] + [10] * 12


def test_measuring_stops_when_the_time_is_up_and_says_so():
    noise = cycle([10.0, 10, 10, 10, 20, 20, 20, 20])
    series, stable = until_settled(lambda: {"a": next(noise)}, RULE, 30, ticking())
    assert not stable
    assert len(series["a"]) == 32, "the clock is looked at from the third round on"
    series, stable = until_settled(lambda: {"a": next(noise)}, RULE, 0, ticking())
    assert (len(series["a"]), stable) == (3, False), "three samples at least, for a spread"


def test_turns_give_everyone_a_call_in_every_round_and_warm_up_is_not_counted():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples_ms, stability = bench.take_turns(calls, 0.5, QUIET, "t")
    counted = order[3 * bench.WARM_UP_CALLS :]
    rounds = [counted[i : i + 3] for i in range(0, len(counted), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "not always behind the same neighbour"
    assert {len(values) for values in samples_ms.values()} == {len(rounds)}
    assert list(samples_ms) == ["a", "b", "c"]
    assert stability["time_limit_s"] == 0.5


# What peers compute


@pytest.fixture(scope="module")
def task():
    classifier = load_classifier("compact", "random", 64)
    image = cv2.GaussianBlur(np.random.default_rng(3).integers(0, 256, (64, 64, 3)).astype(np.uint8), (5, 5), 0)
    return Task(classifier, image[None], build_graph(classifier))


@pytest.fixture(scope="module")
def ours(task):
    """The compiled graph's fp32 outputs."""
    return OpenVinoEngine(task.graph, "fp32").infer({IMAGE: task.image_nhwc_bgr, WANTED_CLASS: np.array([-1])})


@pytest.mark.parametrize("name", ["torch eager forward + autograd", "Captum Saliency"])
def test_gradient_peers_return_our_map(task, ours, name):
    found = PEERS[name](task)()
    assert found.shape == (1, 64, 64)
    np.testing.assert_allclose(found, ours["map"], atol=1e-4 * ours["map"].max())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, in its compiler
def test_the_compiled_peer_returns_our_map(task, ours):
    found = PEERS["torch.compile forward + autograd"](task)()
    np.testing.assert_allclose(found, ours["map"], atol=1e-4 * ours["map"].max())


def test_grad_cam_is_ours_at_the_last_activations(task):
    """A mean over channels for their sum, stretched and scaled as the library does (it adds 1e-7 to the largest value)."""
    found = PEERS["pytorch-grad-cam GradCAM"](task)()
    graph = build_graph(task.classifier, MapSpec(layer="conv5_3", signal="gradcam"))
    small = OpenVinoEngine(graph, "fp32").infer({IMAGE: task.image_nhwc_bgr, WANTED_CLASS: np.array([-1])})["map"][0]
    expected = cv2.resize(small - small.min(), (64, 64))
    assert found.shape == (1, 64, 64)
    assert found.max() > found.min() + 0.5
    np.testing.assert_allclose(found[0] / found.max(), expected / expected.max(), atol=1e-3)


def test_torch_peers_run_squeezenet_too(task):
    squeezenet = Task(load_classifier("squeezenet", "random", 64), task.image_nhwc_bgr, task.graph)
    assert PEERS["pytorch-grad-cam GradCAM"](squeezenet)().shape == (1, 64, 64)
    saliency, gradient = (PEERS[name](squeezenet)() for name in ("Captum Saliency", "torch eager forward + autograd"))
    np.testing.assert_allclose(saliency, gradient, rtol=1e-5)
    assert gradient.max() > 0


def test_onnx_runtime_runs_our_graph_to_the_same_outputs(task, ours):
    found = PEERS["ONNX Runtime, our graph"](task)()
    for value, spec in zip(found, task.graph.graph.output, strict=True):
        np.testing.assert_allclose(value, ours[spec.name], rtol=1e-3, atol=1e-4 * np.abs(ours[spec.name]).max())


def test_forward_peers_return_the_same_scores(task):
    by_torch, (by_onnx,) = (PEERS[f"{name} forward only"](task)() for name in ("torch eager", "ONNX Runtime"))
    np.testing.assert_allclose(by_torch, by_onnx, rtol=1e-3, atol=1e-4 * np.abs(by_onnx).max())


def test_a_peer_that_cannot_run_is_a_row_that_says_why(task, monkeypatch):
    def broken(_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setitem(PEERS, "torch.compile forward + autograd", broken)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    found, missing = peers(task)
    assert missing["torch.compile forward + autograd"] == "InvalidCxxCompiler: No working C++ compiler found"
    assert missing["Captum Saliency"] == "captum is not installed: pip install 'sightline[bench]'"
    assert set(found) | set(missing) == set(PEERS)
    assert "ONNX Runtime forward only" in found


def test_a_network_from_a_file_has_no_torch_peers(task, tmp_path):
    from engines.graph import FLOAT, Graph

    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, 64, 64))
    graph.output(task.classifier.append(graph, x).scores, "scores")
    (tmp_path / "net.onnx").write_bytes(graph.model().SerializeToString())
    classifier = load_classifier(str(tmp_path / "net.onnx"))
    found, missing = peers(Task(classifier, task.image_nhwc_bgr, build_graph(classifier)))
    assert set(found) == {"ONNX Runtime, our graph", "ONNX Runtime forward only"}
    assert "the torch backend runs" in missing["Captum Saliency"]


# What it counts


def node_of(op, inputs, **attributes):
    return helper.make_node(op, inputs, ["y"], **attributes)


@pytest.mark.parametrize(
    ("node", "shapes", "expected"),
    [
        (node_of("Conv", ["x", "w"]), {"x": (1, 8, 10, 10), "w": (16, 8, 3, 3), "y": (1, 16, 8, 8)}, 16 * 64 * 8 * 9),
        (node_of("Conv", ["x", "w"], group=8), {"x": (2, 8, 5, 5), "w": (8, 1, 5, 5), "y": (2, 8, 1, 1)}, 2 * 8 * 25),
        (node_of("ConvTranspose", ["x", "w"]), {"x": (1, 8, 5, 5), "w": (8, 4, 2, 2), "y": (1, 4, 6, 6)}, 8 * 25 * 4 * 4),
        (node_of("Gemm", ["x", "w"], transB=1), {"x": (2, 30), "w": (7, 30), "y": (2, 7)}, 2 * 30 * 7),
        (node_of("Gemm", ["x", "w"], transA=1), {"x": (30, 2), "w": (30, 7), "y": (2, 7)}, 2 * 30 * 7),
        (node_of("MatMul", ["x", "w"]), {"x": (5, 4, 6), "w": (6, 3), "y": (5, 4, 3)}, 5 * 4 * 6 * 3),
        (node_of("Relu", ["x"]), {"x": (1, 8), "y": (1, 8)}, 0),
    ],
    ids=["conv", "grouped", "transposed", "gemm", "gemm of a transposed", "batched product", "relu"],
)
def test_multiply_adds_by_hand(node, shapes, expected):
    assert multiply_adds(node, shapes) == expected


def test_a_small_graph_by_hand():
    """3 x 3 convolution of 2 to 4 channels on 6 x 6 without padding, ReLU, product with 64 x 5."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]), helper.make_node("Gemm", ["f", "m"], ["y"]),
    ]  # fmt: skip
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, np.zeros(np.prod(dims)))
        for name, dims in (("w", (4, 2, 3, 3)), ("m", (64, 5)))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "small", [value("x", TensorProto.FLOAT, (1, 2, 6, 6))], [value("y", TensorProto.FLOAT, (1, 5))], weights
    )
    work = count_work(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert work.flop == 2 * (4 * 16 * 18 + 64 * 5)
    assert work.values == (72 + 72 + 64) + (64 + 320 + 5)


def test_vgg16_forward_is_15_47_giga_multiply_adds_and_its_gradient_as_much_again():
    classifier = load_classifier("vgg16", "random")
    forward = count_work(forward_graph(classifier)).flop / 2
    assert forward == pytest.approx(15.47e9, rel=1e-3)
    assert count_work(build_graph(classifier)).flop / 2 == pytest.approx(2 * forward, rel=0.01)


def test_every_shape_is_the_engine_s_own():
    classifier = load_classifier("squeezenet", "random", 99)
    graph = build_graph(classifier)
    shapes = tensor_shapes(graph)
    assert all(min(shapes[name]) > 0 for node in graph.graph.node for name in node.output if shapes[name])
    assert shapes["map"] == (1, 99, 99)


def test_the_roofline_is_the_longer_bound():
    peaks = Peaks({"fp32": 100.0, "bf16": 200.0}, 10.0)
    point = roofline_point(Work(flop=10**9, values=10**6), "fp32", peaks, 20.0)
    assert (point["compute_ms"], point["memory_ms"], point["roofline_ms"], point["bound"]) == (10, 0.4, 10, "compute")
    assert (point["gap"], point["flop_per_byte"], point["gflop_per_s"]) == (2, 250, 50)
    point = roofline_point(Work(flop=10**9, values=10**8), "bf16", peaks, 30.0)
    assert (point["compute_ms"], point["memory_ms"], point["roofline_ms"], point["bound"]) == (5, 20, 20, "memory")
    assert point["gap"] == 1.5


def test_the_better_of_two_measurements_of_the_peaks_counts():
    assert Peaks({"fp32": 1.0, "int8": 5.0}, 3.0).best(Peaks({"fp32": 2.0, "int8": 4.0}, 1.0)) == Peaks(
        {"fp32": 2.0, "int8": 5.0}, 3.0
    )


@pytest.mark.parametrize(("kernel", "flop"), [(large_convolution, 4 * 256**2 * 9 * 28**2), (large_product, 4 * 1024**3)])
def test_the_kernels_that_peaks_are_measured_on(kernel, flop):
    for precision in ("fp32", "int8"):
        assert count_work(kernel(precision)).flop == flop
    quantized = [node.op_type for node in kernel("int8").graph.node]
    assert quantized.count("QuantizeLinear") == 2
    assert quantized.count("DequantizeLinear") >= 3


def test_the_share_of_other_programs_is_a_share():
    share = Neighbours().share()
    assert share is None or 0 <= share <= 1


# Real runs


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A bench of a tiny network, with everything but the compiler; (result, pictures)."""
    others = {name: make for name, make in PEERS.items() if "compile" not in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.bench_peers.PEERS", others)
        patch.setattr("calib.machine.PEAK_S", 0.02)
        found, run = bench.bench("demo:20", [TINY], 0.2, QUIET, sizes_px=[32, 64], batches=[1, 2])
    folder = tmp_path_factory.mktemp("plots") / "deep"
    return found, plot_bench(found, run, folder)


def test_the_bench_reports_the_contract_s_fields(result):
    found, _ = result
    assert set(found) >= {"fps", "frames", "dropped", "latency_ms", "stages_ms", "verdict", "machine", "engine", "peers"}
    assert set(found["latency_ms"]) == {"p50", "p90", "p95", "p99", "p99_9", "max"}
    assert set(found["stages_ms"]["engine"]) >= {"p50", "p99"}
    assert found["verdict"] in {"source-limited", "engine-limited", "sink-limited"}
    assert found["warm_up_calls"] == 5
    assert json.loads(json.dumps(found)) == found


def test_ours_come_first_and_every_peer_has_a_row(result):
    (engine,) = result[0]["engines"]
    names = [row["name"] for row in engine["peers"]]
    assert names[0].startswith("Sightline")
    assert {"Sightline fp32, to pixels", *PEERS} - {"torch.compile forward + autograd"} <= set(names)
    assert not engine["not_available"]
    first = engine["peers"][0]
    assert first["ratio"] == 1
    for row in engine["peers"]:
        assert row["p50_ms"] == pytest.approx(np.median(row["samples_ms"]), abs=2e-3)
        assert row["ratio"] == pytest.approx(row["p50_ms"] / first["p50_ms"], abs=1e-3)
        assert len(row["samples_ms"]) == engine["calls"]
        assert len(row["windows_ms"]) == 3
    assert result[0]["peers"] == engine["peers"]


def test_what_has_not_settled_says_so(result):
    found, _ = result
    stability = found["engines"][0]["stability"]
    assert (stability["stable"], stability["windows"], stability["time_limit_s"]) == (False, 3, 0.2)
    console = Console(width=160)
    with console.capture() as captured:
        print_bench(found, console)
    text = captured.get()
    assert "NOT STABLE within 0.2 s" in text
    assert "5 warm-up calls not counted" in text
    assert "no outlier removed" in text


def test_what_a_user_gets_comes_first_and_the_way_to_the_pixels_is_a_row_too():
    rows = bench.variants(load_classifier("compact", None), Choice())
    assert next(iter(rows)) == "Sightline int8, to conv4_3"
    assert {"Sightline int8, to pixels", "Sightline fp32, to pixels"} < set(rows)
    shallow, deep = rows["Sightline int8, to conv4_3"], rows["Sightline int8, to pixels"]
    assert count_work(shallow.graph).flop < 0.7 * count_work(deep.graph).flop
    maps = [{o.name: o.shape for o in row.engine.outputs}["map"] for row in (shallow, deep)]
    assert maps == [(1, 16, 16), (1, 128, 128)]


def test_the_roofline_and_the_sweep_are_in_the_result(result):
    found, _ = result
    assert {point["name"] for point in found["roofline"]["points"]} == {
        row["name"] for row in found["peers"] if row["name"].startswith("Sightline")
    }
    assert found["roofline"]["gflop_per_s"]["fp32"] > 0
    cells = [(point["size_px"], point["batch"]) for point in found["sweep"]["points"]]
    assert cells == [(32, 1), (64, 1), (64, 2)]
    assert all(point["ms_per_image"] > 0 for point in found["sweep"]["points"])


def test_the_pictures_are_there(result):
    names = {path.name for path in result[1]}
    assert names == {"latency.png", "peers.png", "rounds.png", "roofline.png", "sweep.png"}
    assert all(min(cv2.imread(str(path)).shape[:2]) > 400 for path in result[1])


def test_a_source_that_ends_is_run_again_until_its_frames_settle_or_the_time_is_up(tmp_path):
    folder = write_images(tmp_path / "shots")
    whole, run = bench_end_to_end(TINY, str(folder), 0.5, QUIET)
    assert whole["passes"] > 1
    assert whole["frames"] == len(run.total_ms) > 5
    assert whole["fps"] == pytest.approx(1e3 / np.mean(whole["windows"]["ms_per_frame"]), rel=0.5)
    assert not whole["stability"]["stable"] or whole["frames"] % 100 == 0


# What it calls a regression


def saved(path, scale=1.0, windows=(0.99, 1.0, 1.01), **changed):
    """A result in which ours take ``scale`` as long, with a spread of ``windows``."""

    def row(name, ms):
        return {"name": name, "p50_ms": ms, "ratio": 1, "windows_ms": [ms * share for share in windows]}

    peers_rows = [row("Sightline bf16", 8.0 * scale), row("torch eager forward only", 9.0)]
    bench_of = {
        "fps": 100 / scale, "latency_ms": {"p50": 10 * scale}, "machine": "m", "engine": "e", "source": "s", "peers": peers_rows,
        "windows": {name: [10 * scale * share for share in windows] for name in ("ms_per_frame", "latency_ms")},
        "engines": [{"engine": "compact at 128 px", "peers": peers_rows}],
    }  # fmt: skip
    path.write_text(json.dumps({**bench_of, **changed}))
    return path


def test_spread_is_the_range_over_the_median():
    assert spread([9, 10, 12]) == pytest.approx(0.3)
    assert np.isnan(spread([3]))


def test_the_notch_of_a_box_plot_by_hand():
    """Quartiles of 8 9 10 11 12 13 14 15 16: 10 and 14, the median 12, root 9."""
    assert notch(range(8, 17)) == pytest.approx(1.57 * 4 / 3 / 12)
    assert notch([5, 5, 5]) == 0
    assert np.isnan(notch([3]))


@pytest.mark.parametrize(
    ("scale", "windows", "regressed"),
    [
        (1.1, (0.99, 1.0, 1.01), True),
        (1.1, (0.93, 1.0, 1.07), False),
        (1.029, (1.0, 1.0, 1.0), False),
        (0.5, (0.99, 1.0, 1.01), False),
    ],
    ids=["beyond noise", "within noise", "too small to matter", "faster"],
)
def test_a_regression_is_what_is_slower_beyond_the_runs_own_noise(tmp_path, scale, windows, regressed):
    before, after = saved(tmp_path / "a.json", 1.0, windows), saved(tmp_path / "b.json", scale, windows)
    found, differing = compare(before, after, across_machines=False)
    assert {change.regressed for change in found if change.judged} == {regressed}
    assert not differing
    assert not any(change.regressed for change in found if not change.judged)


def test_peers_that_got_slower_are_no_regression_of_ours(tmp_path):
    before, after = load_bench(saved(tmp_path / "a.json")), load_bench(saved(tmp_path / "b.json"))
    slower = after["engines"][0]["peers"][1]
    slower.update(p50_ms=20.0, windows_ms=[20.0] * 3)
    assert [change.verdict for change in changes(before, after) if not change.judged] == ["slower"]
    assert not any(change.regressed for change in changes(before, after))


def test_comparing_by_the_command_line(tmp_path):
    before, after = saved(tmp_path / "a.json"), saved(tmp_path / "b.json", 1.3)
    same = command("bench", "compare", before, before)
    assert (same.returncode, "nothing of ours is slower" in same.stderr) == (0, True)
    slower = command("bench", "compare", before, after, "--json")
    assert slower.returncode == 1, slower.stderr
    report = json.loads(slower.stdout)
    assert "compact at 128 px: Sightline bf16" in report["regressed"]
    assert report["rows"][0]["change"] == pytest.approx(0.3)
    elsewhere = saved(tmp_path / "c.json", 1.3, machine="another")
    assert "machine: m / another" in refused("bench", "compare", before, elsewhere)
    across = command("bench", "compare", before, elsewhere, "--across-machines")
    assert across.returncode == 1
    assert "not measured alike: machine: m / another" in across.stderr


def test_the_command_benches_and_its_result_can_be_compared(tmp_path):
    """Without a C++ compiler, which torch.compile needs: its row says so, and the others are there."""
    arguments = ("bench", "demo:20", "--models", "compact", "--weights", "random", "--size", 64, "--seconds", 0.2, "--json")
    result = command(*arguments, CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    others = {row["name"] for row in found["peers"] if not row["name"].startswith("Sightline")}
    assert others == {*PEERS} - {"torch.compile forward + autograd"}
    (missing,) = found["not_available"]
    assert "No working C++ compiler" in missing["why"]
    assert "torch.compile forward + autograd: not available: " in result.stderr
    (tmp_path / "a.json").write_text(result.stdout)
    assert command("bench", "compare", tmp_path / "a.json", tmp_path / "a.json").returncode == 0


def test_what_cannot_be_compared_or_run_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    good = saved(tmp_path / "a.json")
    assert "x.json is not a result of bench" in refused("bench", "compare", good, tmp_path / "x.json")
    assert "cannot read" in refused("bench", "compare", good, tmp_path / "none.json")
    assert "compare takes two results" in refused("bench", "compare", good)
    assert "bench runs one source" in refused("bench", "demo:3", "demo:4")
    assert "--sizes 96,x: write whole numbers" in refused("bench", "demo:3", "--sizes", "96,x")
    with pytest.raises(SourceError, match="incomplete"):
        changes({"latency_ms": {}, "peers": [{}]}, {"latency_ms": {}, "peers": []})
    with pytest.raises(SightlineError, match="--batches 0"):
        bench.whole_numbers("0", "--batches")


def test_weights_belong_to_the_networks_named():
    shipped, random = bench.choices("compact, vgg16", Choice())
    assert (shipped.weights, random.model, random.weights) == (None, "vgg16", "random")
    assert [c.weights for c in bench.choices("compact,vgg16", Choice(weights="v.pth"))] == [None, "v.pth"]
    assert [c.weights for c in bench.choices("compact", Choice(weights="mine.npz"))] == ["mine.npz"]
