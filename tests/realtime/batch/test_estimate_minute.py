"""A minute of real clips, measured, and what is said of it."""

import json

import pytest
from typer.testing import CliRunner

import cli
from engines.choose import open_localizer
from engines.errors import SourceError
from engines.options import EngineOptions
from realtime.batch.estimate import MINUTE_S, measure, plot_saturation
from realtime.batch.options import Settings
from realtime.batch.plan import make_plan
from tests.realtime.batch.clips import make_clip
from tests.realtime.batch.test_estimate import MINUTE

SMALL = ["--weights", "random", "--size", "32"]


def test_only_a_minute_of_long_sources_is_worked_on(tmp_path):
    clips = [
        make_plan(
            str(make_clip(tmp_path / f"{name}.mp4", seconds=seconds, rate="2", size="64x48")),
            "",
            Settings().window,
        )
        for name, seconds in (("long", 200), ("short", 12))
    ]
    localizer = open_localizer(EngineOptions(weights="random", size_px=32), streams=0)
    found = measure(clips, localizer, Settings(video=False))
    assert 2 * 30 <= found.frames <= 2 * (MINUTE_S + 12)
    assert found.rate_fps == pytest.approx(2)
    assert found.encode_fps == float("inf")
    assert all(
        rate > 0 for rate in (found.decode_fps, found.engine_fps, found.whole_fps, found.merge_fps)
    )
    assert found.file_frames == (400 + 24) / 2
    measured_in = sum(path.stat().st_size for path in tmp_path.glob("*.mp4")) / 212
    assert found.in_bytes_s == pytest.approx(measured_in, rel=0.5)


def test_the_command_says_hours_machines_and_storage(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", seconds=4, rate="10", size="96x64")
    result = CliRunner().invoke(
        cli.all_commands(), ["batch", str(clip), "--plan", "--json", "--cameras", "10", *SMALL]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["measured"]["frames"] == 40
    assert found["estimate"]["video_h"] == 240  # a day of each
    assert found["estimate"]["machines"] >= 1
    assert found["estimate"]["hours"] <= 24.001  # keeps up with them
    assert "hours of video" in result.stderr
    assert not (tmp_path / "out").exists()


def test_there_must_be_a_file(monkeypatch):
    with pytest.raises(SourceError, match="name one"):
        CliRunner().invoke(
            cli.all_commands(), ["batch", "demo:10", "--plan"], catch_exceptions=False
        )


def test_saturation_is_drawn(tmp_path):
    plot_saturation(MINUTE, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
