"""Hours, machines and storage from a measured minute: every figure worked out by hand."""

import math

import pytest

from realtime.batch.estimate import Minute, estimate, throughput

MINUTE = Minute(
    rate_fps=25,
    decode_fps=500,
    engine_fps=250,
    encode_fps=400,
    whole_fps=200,
    merge_fps=8000,
    file_s=0.5,
    file_frames=4000,
    in_bytes_s=125_000,
    out_bytes_s=250_000,
)


def test_one_machine():
    found = estimate(MINUTE, 1000)
    assert found.frames == 90_000_000  # 1000 h x 3600 s x 25
    assert found.machine_h == found.hours == 125  # 90e6 / 200 / 3600
    assert (found.machines, found.fps, found.limit, found.realtime) == (1, 200, "engine", 8)
    assert found.in_tb == pytest.approx(0.45)  # 3.6e6 s x 125 kB
    assert found.out_tb == pytest.approx(0.9)
    assert found.network_gbit == pytest.approx(
        0.04
    )  # 8 s of video a second x (125 + 2 x 250) kB x 8 bits


def test_as_many_machines_as_the_time_asks_for():
    assert estimate(MINUTE, 1000, within_h=24).machines == 6  # 125 / 24 = 5.2
    assert estimate(MINUTE, 1000, within_h=125).machines == 1
    assert estimate(MINUTE, 1000, machines=5, within_h=1).machines == 5
    assert estimate(MINUTE, 1000, machines=5).hours == 25


def test_what_saturates():
    # 10 Gbit/s are 1.25e9 B/s; a second of video moves 125 + 2 x 250 kB: 2,000 s of video a second,
    # 50,000 frames
    assert throughput(MINUTE, 1000, drivers=100) == (pytest.approx(50_000), "network")
    # one process merges a file of 4,000 frames in 0.5 + 0.5 s
    assert MINUTE.merged_fps == pytest.approx(4000)
    assert throughput(MINUTE, 19) == (3800, "engine")
    assert throughput(MINUTE, 30) == (pytest.approx(4000), "merge")
    found = estimate(MINUTE, 1000, machines=100)
    assert (found.network_machines, found.merge_machines, found.drivers) == (
        250,
        20,
        5,
    )  # 100 x 200 / 4000
    assert (found.fps, found.limit) == (20_000, "engine")


def test_without_a_video_the_encoder_limits_nothing():
    fast = Minute(**{**MINUTE.__dict__, "encode_fps": math.inf, "decode_fps": 100})
    assert fast.limit == "decode"
