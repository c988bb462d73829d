"""The profile of a bench: every node is counted once, in its part, with its FLOP."""

import json

import cv2
import pytest
from rich.console import Console

from calib.bench.machine import Peaks, count_work
from calib.bench.profile import PARTS, bench_profile, bound_ms, plot_profile, print_profile
from engines.choose import build_chosen
from engines.errors import EngineError
from engines.options import EngineOptions

TINY = EngineOptions(weights="random", head="none", size_px=64, precision="fp32", threads=1)


@pytest.fixture(scope="module")
def profile():
    return bench_profile(TINY, 0.1, Console(quiet=True))


def test_parts_and_operators_add_up_to_the_whole(profile):
    for key in ("parts", "operators"):
        assert sum(row["ms"] for row in profile[key]) == pytest.approx(
            profile["nodes_ms"], abs=0.01
        )
        assert sum(row["share"] for row in profile[key]) == pytest.approx(1, abs=0.01)
    assert [row["part"] for row in profile["parts"]] == list(PARTS)
    assert {row["part"] for row in profile["operators"]} == set(PARTS)


def test_flop_are_those_of_the_graph_and_as_many_backward_as_forward(profile):
    flop = {row["part"]: row["flop"] for row in profile["parts"]}
    assert sum(flop.values()) == count_work(build_chosen(TINY)).flop
    assert flop["backward"] == pytest.approx(flop["forward"], rel=0.15)
    assert flop["map and head"] == 0


def test_the_costliest_nodes_come_first(profile):
    times_ms = [row["ms"] for row in profile["nodes"]]
    assert times_ms == sorted(times_ms, reverse=True)
    assert len(times_ms) == 15
    assert all(row["part"] in PARTS for row in profile["nodes"])


def test_the_whole_is_set_beside_the_forward_pass(profile):
    assert profile["ratio"] == pytest.approx(profile["whole_ms"] / profile["forward_ms"], rel=0.02)
    assert profile["layer"] == "pixels"


def test_it_is_shown_and_is_json(profile, capsys):
    console = Console(width=200)
    print_profile(json.loads(json.dumps(profile)), console)
    shown = capsys.readouterr().out
    assert "x the forward pass alone" in shown
    assert "Convolution" in shown
    assert "backward" in shown


def test_each_operator_stands_beside_what_one_core_could_do_at_best(profile, tmp_path):
    assert profile["bound_ms"] == pytest.approx(
        sum(row["bound_ms"] for row in profile["operators"]), abs=0.01
    )
    products = [row for row in profile["operators"] if row["flop"]]
    assert all(row["bytes"] > 0 for row in products)
    plot_profile(profile, tmp_path / "profile.png")
    assert min(cv2.imread(str(tmp_path / "profile.png")).shape[:2]) > 200


def test_the_bound_is_the_longer_of_computing_and_moving():
    peaks = Peaks({"fp32": 100.0, "bf16": 200.0}, 10.0, 50.0)
    assert bound_ms(2 * 10**8, 10**6, "bf16", peaks) == pytest.approx(1.0)
    assert bound_ms(2 * 10**8, 10**6, "f32", peaks) == pytest.approx(2.0)
    assert bound_ms(10**6, 10**8, "f32", peaks) == pytest.approx(2.0)


def test_another_backend_is_refused():
    with pytest.raises(EngineError, match="on OpenVINO only"):
        bench_profile(EngineOptions(backend="torch"), 0.1, Console(quiet=True))
