"""A batch that is killed goes on, and what comes out is what comes out of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import ROOT, command
from tests.realtime.batch.clips import decoded, make_clip, packet_times, rows_of, table_of

TINY = ("--weights", "random", "--size", "32")


def begin(*arguments: object) -> subprocess.Popen:
    line = [sys.executable, "-m", "cli", "batch", *map(str, arguments), *TINY]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 0, stderr


def uninterrupted(*arguments: object) -> None:
    """The same in one go; nothing is killed, so that this process can do it."""
    result = command("batch", *arguments, *TINY)
    assert result.returncode == 0, result.stderr


def records(out: Path) -> int:
    return len(list((out / ".sightline").glob("*/0*.json")))


def assert_same(out: Path, whole: Path, names: list[str]) -> None:
    for name in names:
        assert rows_of(out / f"{name}.jsonl") == rows_of(whole / f"{name}.jsonl")
        assert table_of(out / f"{name}.parquet") == table_of(whole / f"{name}.parquet")
        assert (out / f"{name}.mp4").read_bytes() == (whole / f"{name}.mp4").read_bytes()
    left = [path for path in out.rglob("*") if path.name.endswith(".part") or path.name.startswith("0")]
    assert not left


def killed(arguments: list[object], out: Path, moments: int, draw: random.Random) -> int:
    """Kill a run so many times: at once, soon after it begins to work, or when it has done another segment or two."""
    kills = 0
    for _ in range(moments):
        done, more, process = records(out), draw.choice((0, 0, 1, 2)), begin(*arguments)
        while process.poll() is None and records(out) < done + more:
            time.sleep(0.01)
        if not more:
            time.sleep(draw.uniform(0, 3))
        time.sleep(draw.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    return kills


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", seconds=32, sound="aac")
    uninterrupted(clip, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    process = begin(clip, "--out", out)
    while process.poll() is None and records(out) < 2:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    before = records(out)
    finish(begin(clip, "--out", out))
    assert json.loads((out / "clip.summary.json").read_text())["segments_resumed"] == before >= 2
    assert_same(out, tmp_path / "whole", ["clip"])


@pytest.mark.long
def test_killed_at_ten_random_moments(tmp_path):
    first = make_clip(tmp_path / "first.mp4", seconds=62, rate="25", sound="aac")
    second = make_clip(tmp_path / "second.mkv", "-bf", "3", "-x264-params", "open-gop=1", seconds=44, rate="25")
    uninterrupted(first, second, "--out", tmp_path / "whole")
    out, draw = tmp_path / "out", random.Random(8)
    arguments = [first, second, "--out", out]
    assert killed(arguments, out, 10, draw) >= 5  # the last ones may come too late to kill anything
    finish(begin(*arguments))
    assert_same(out, tmp_path / "whole", ["first", "second"])
    for path, frames in ((out / "first.mp4", 1550), (out / "second.mp4", 1100)):
        assert decoded(path) == len(packet_times(path)[0]) == frames
    assert [row["frame"] for row in rows_of(out / "first.jsonl")] == list(range(1550))


@pytest.mark.long
def test_memory_does_not_grow_with_the_length(tmp_path):
    """Ten times as long: what grows is the index of an MP4, about a megabyte a minute of video with sound."""
    peaks_mb = []
    for name, seconds in (("short", 60), ("long", 600)):
        clip = make_clip(tmp_path / f"{name}.mp4", seconds=seconds, rate="25", sound="aac")
        process = begin(clip, "--out", tmp_path / "out")
        stderr = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.stderr.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, stderr
        peaks_mb.append(used.ru_maxrss / 1024)
    assert peaks_mb[1] - peaks_mb[0] < 60
