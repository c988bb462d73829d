"""The bench as a whole: what it reports of real runs."""

import json
import os
from array import array

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.bench import run as bench
from calib.bench.machine import TASKS, ThreadTimes, count_work
from calib.bench.report import check_plots, plot_bench, print_bench
from calib.bench.turns import PEERS, Timed, bench_end_to_end, peers, verdict
from engines.errors import OutputError
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from realtime.statistics import Run
from tests.realtime.media import write_images

QUIET = Console(quiet=True)
TINY = EngineOptions(weights="random", head="none", size_px=64)


def ticking(step_s=1.0):
    """A clock that moves on by one step whenever it is looked at."""
    times = iter(range(10**6))
    return lambda: next(times) * step_s


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


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A bench of a tiny network, with everything but the compiler; (result, pictures)."""
    others = {name: make for name, make in PEERS.items() if "compile" not in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.bench.turns.PEERS", others)
        patch.setattr("calib.bench.run.PEERS", others)
        patch.setattr("calib.bench.machine.PEAK_S", 0.02)
        patch.setattr("calib.bench.run.peers", lambda task, names, _: peers(task, names))
        found, run = bench.bench(
            "demo:20", [TINY], 0.2, QUIET, sizes_px=[32, 64], batches=[1, 2], all_rows=True
        )
    folder = tmp_path_factory.mktemp("plots") / "deep"
    return found, plot_bench(found, run, folder)


def test_pictures_may_be_renewed_and_those_of_others_may_not(result, tmp_path):
    _, pictures = result
    folder = pictures[0].parent
    check_plots(folder, ["demo:20"])
    with pytest.raises(OutputError, match="is a folder that is read"):
        check_plots(folder, [str(folder)])
    with pytest.raises(OutputError, match="is a file: name a folder"):
        check_plots(pictures[0], [])
    (tmp_path / "sweep.png").write_bytes((folder / "peers.png").read_bytes())
    with pytest.raises(OutputError, match=r"sweep\.png: another file has that name"):
        check_plots(tmp_path, [])


def test_the_bench_reports_the_contract_s_fields(result):
    found, _ = result
    assert set(found) >= {
        "fps",
        "frames",
        "dropped",
        "latency_ms",
        "stages_ms",
        "verdict",
        "machine",
        "engine",
        "peers",
    }
    assert set(found["latency_ms"]) == {"p50", "p90", "p95", "p99", "p99_9", "max"}
    assert set(found["stages_ms"]["engine"]) >= {"p50", "p99"}
    assert found["verdict"] in {
        f"{side}-limited" for side in ("source", "engine", "prepare", "drawing", "sink", "loop")
    }
    assert found["warm_up_calls"] == 5
    assert json.loads(json.dumps(found)) == found


def test_ours_come_first_and_every_peer_has_a_row(result):
    (engine,) = result[0]["engines"]
    names = [row["name"] for row in engine["peers"]]
    assert names[0].startswith("Sightline")
    assert {"Sightline fp32, to pixels", *PEERS} - {"torch.compile forward + autograd"} <= set(
        names
    )
    assert not engine["not_available"]
    first = engine["peers"][0]
    assert first["ratio"] == 1
    for row in engine["peers"]:
        assert row["p50_ms"] == pytest.approx(np.median(row["samples_ms"]), abs=2e-3)
        ratios = np.array(row["samples_ms"]) / first["samples_ms"]
        assert row["ratio"] == pytest.approx(np.median(ratios), rel=1e-2)
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert len(row["samples_ms"]) == engine["calls"]
        assert len(row["windows_ms"]) >= 3
    assert result[0]["peers"] == engine["peers"]


def test_what_has_not_settled_says_so(result):
    found, _ = result
    stability = found["engines"][0]["stability"]
    assert stability["stable"] is False
    assert stability["rule"].startswith("95 % sure of each figure to 2.5 %")
    console = Console(width=160)
    with console.capture() as captured:
        print_bench(found, console)
    text = captured.get()
    assert "NOT SETTLED within 0 s" in text
    assert "with nothing else running, at most" in text
    assert "5 warm-up calls not counted" in text
    assert "no outlier removed" in text


def test_what_a_user_gets_comes_first_and_the_way_to_the_pixels_is_a_row_too():
    rows, refused = bench.variants(load_classifier("compact", None), EngineOptions())
    assert not refused
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
    assert not whole["stability"]["stable"] or whole["frames"] % 25 == 0
    assert (
        sum(whole["processor_share"].values()) == pytest.approx(1, abs=0.01) or not TASKS.is_dir()
    )
    each = whole["processor_ms_per_frame"]
    assert 0 < each["low"] <= each["p50"] <= each["high"]


def test_where_the_processors_are_busy_the_stage_that_takes_most_of_them_limits():
    """A decoder that takes most of both is waited for no longer than the engine is."""
    shares = {"read": 0.6, "engine": 0.3, "prepare": 0.1}
    waited = {"verdict": "engine-limited", "processor_share": shares}
    cores = os.cpu_count()

    def timed(busy):
        spent = array("d", [10.0 * cores * busy] * 20)
        return Timed(Run(), array("d", [10.0] * 20), spent, ThreadTimes(str))

    assert verdict(waited, timed(0.95), 0.0) == "source-limited"
    assert verdict(waited, timed(0.3), 0.7) == "source-limited"
    assert verdict(waited, timed(0.3), None) == "engine-limited"
    assert verdict({**waited, "processor_share": {}}, timed(0.95), 0.0) == "engine-limited"
