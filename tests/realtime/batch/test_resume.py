"""A batch that is killed goes on, and what comes out is what comes out of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engines.errors import OutputError
from engines.localizer import Localizer
from realtime.batch.encode import run_segments
from realtime.batch.job import Job
from realtime.batch.options import Settings, settings_digest
from realtime.batch.plan import digest_of, make_plan
from realtime.batch.run import process_all
from realtime.written import MANIFEST
from tests.command_line import ROOT, command
from tests.engines.mock import MockEngine
from tests.realtime.batch.clips import decoded, make_clip, packet_times, rows_of, table_of

HEAT = Settings(heat_video=True)
TINY = ("--weights", "random", "--size", "32")


def begin(*arguments: object) -> subprocess.Popen:
    line = [sys.executable, "-m", "cli", "batch", *map(str, arguments), *TINY]
    return subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


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
    left = [
        path for path in out.rglob("*") if path.name.endswith(".part") or path.name.startswith("0")
    ]
    assert not left


def killed(arguments: list[object], out: Path, moments: int, draw: random.Random) -> int:
    """Kill a run so many times: at once, soon after it begins to work, or when it has done another
    segment or two.
    """
    kills = 0
    for _ in range(moments):
        done = records(out)
        more = draw.choice((0, 0, 1, 2))
        process = begin(*arguments)
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


def died_at(clip: Path, others: list[Path], out: Path) -> str:
    """What a run says that is killed, as for want of memory, when it decodes that source."""
    line = f"""
import os, signal
from realtime.batch import segment
open_video = segment.open_video
def opened(spec):
    if spec == {str(clip)!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return open_video(spec)
segment.open_video = opened
from tests.command_line import command
command("batch", *{[str(clip), *map(str, others)]!r}, "--no-video", "--out", {str(out)!r}, *{TINY})
"""
    found = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == -signal.SIGKILL, found.stderr
    return found.stdout + found.stderr


def test_a_source_that_runs_die_of_is_left_to_the_end(tmp_path):
    deadly = make_clip(tmp_path / "deadly.mp4", seconds=2, size="32x24")
    others = [
        make_clip(tmp_path / f"{name}.mp4", seconds=2 + place, size="32x24")
        for place, name in enumerate("ab")
    ]
    out = tmp_path / "out"
    for _ in range(2):
        died_at(deadly, others, out)
        assert not list(out.glob("*.summary.json"))
    died_at(deadly, others, out)
    assert sorted(path.name for path in out.glob("*.parquet")) == ["a.parquet", "b.parquet"]
    overview = json.loads((out / "summary.json").read_text())
    assert [summary["source"] for summary in overview] == list(map(str, others))
    result = command("batch", deadly, *others, "--no-video", "--out", out, *TINY)
    assert result.returncode == 0, result.stderr
    assert "deadly.mp4: the last 3 runs ended while they worked on it" in result.stderr
    summaries = json.loads((out / "summary.json").read_text())
    assert [summary["frames"] for summary in summaries] == [20, 20, 30]
    assert [summary.get("skipped", False) for summary in summaries] == [False, True, True]
    assert not list(out.glob(".sightline/*/begun.json"))


DAMAGES = {
    "zeros": lambda content: bytes(len(content)),
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "garbage": lambda content: random.Random(1).randbytes(len(content)),
}


def test_whatever_was_damaged_is_done_again(tmp_path):
    """As after a power failure: each file of the state folder in turn, in every way; then pieces
    that changed places.
    """
    localizer = Localizer(MockEngine(32))
    clip = make_clip(tmp_path / "clip.mp4", seconds=22, size="32x24")
    process_all([str(clip)], tmp_path / "whole", localizer, Console(quiet=True), HEAT)
    digests = digest_of(str(clip)), settings_digest(HEAT, localizer)
    job = Job(tmp_path / "out", "clip", *digests, str(clip))
    job.begin(make_plan(str(clip), digests[0]))
    list(run_segments(job.clip, job.clip.segments, localizer, HEAT, job.folder))
    files = sorted(path for path in job.folder.iterdir() if path.name != MANIFEST)
    assert len(files) == 4 * len(job.clip.segments) == 12
    assert not job.todo()
    for path in files:
        content = path.read_bytes()
        for damage in DAMAGES.values():
            path.write_bytes(damage(content))
            assert [f"{segment.index:05d}" for segment in job.todo()] == [
                path.name.partition(".")[0]
            ]
        path.unlink()
        assert len(job.todo()) == 1
        path.write_bytes(content)
    for ending in ("jsonl", "mp4", "heat.mp4", "json"):
        first, second = (job.folder / f"0000{number}.{ending}" for number in (0, 1))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        assert [segment.index for segment in job.todo()] == [0, 1]
        with pytest.raises(OutputError, match="was changed or damaged"):
            job.records()
    (summary,) = process_all([str(clip)], tmp_path / "out", localizer, Console(quiet=True), HEAT)
    assert summary["segments_resumed"] == 1
    assert_same(tmp_path / "out", tmp_path / "whole", ["clip"])


SECRET = "sftp://me:hunter2@disk/clip.mp4"


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (SECRET, "path"),
        ("sftp://me:other@disk/clip.mp4", "path"),
        ("sftp://you:hunter2@disk/clip.mp4", "other"),
        ("sftp://me:hunter2@disk/films/clip.mp4", "other"),
    ],
)
def test_a_source_is_known_by_its_address_and_its_secret_is_not_kept(tmp_path, where, found):
    clip = make_clip(tmp_path / "clip.mp4", seconds=2, size="32x24")
    plan = replace(make_plan(str(clip), "content"), spec=SECRET)
    job = Job(tmp_path, "clip", "content", "settings", SECRET)
    job.begin(plan)
    assert "hunter2" not in (job.folder / MANIFEST).read_text()
    assert job.reloaded().found == "same"
    assert job.reloaded().clip == plan
    assert Job(tmp_path, "clip", "other content", "settings", where).found == found


def test_a_manifest_with_the_address_as_typed_is_known(tmp_path):
    job = Job(tmp_path, "clip", "content", "settings", "/films/clip.mp4")
    job.begin(make_plan(str(make_clip(tmp_path / "clip.mp4", seconds=2, size="32x24")), "content"))
    manifest = json.loads((job.folder / MANIFEST).read_text())
    assert manifest["path"] == "/films/clip.mp4"
    (job.folder / MANIFEST).write_text(json.dumps({**manifest, "path": SECRET}))
    assert Job(tmp_path, "clip", "other content", "settings", SECRET).found == "path"


@pytest.mark.parametrize(
    "damage", [*DAMAGES.values(), lambda content: b'{"source": [], "results": 3, "clip": {}}']
)
def test_a_damaged_manifest_begins_anew(damage, tmp_path):
    localizer, clip = (
        Localizer(MockEngine(32)),
        make_clip(tmp_path / "clip.mp4", seconds=2, size="32x24"),
    )
    job = Job(
        tmp_path / "out", "clip", digest_of(str(clip)), settings_digest(HEAT, localizer), str(clip)
    )
    job.begin(make_plan(str(clip), job.source_digest))
    (job.folder / MANIFEST).write_bytes(damage((job.folder / MANIFEST).read_bytes()))
    (summary,) = process_all([str(clip)], tmp_path / "out", localizer, Console(quiet=True), HEAT)
    assert (summary["frames"], summary["files"]["log"]) == (
        20,
        str(tmp_path / "out" / "clip.jsonl"),
    )


def test_content_is_on_the_disk_before_its_name_and_pieces_before_their_record(
    tmp_path, monkeypatch
):
    steps: list[tuple[str, str]] = []

    def kept(handle: int) -> None:
        steps.append(("fsync", Path(f"/proc/self/fd/{handle}").resolve().name))

    def renamed(source: Path, target: Path) -> None:
        steps.append(("rename", Path(target).name))
        Path(source).rename(target)

    monkeypatch.setattr("engines.files.os.fsync", kept)
    monkeypatch.setattr("engines.files.os.replace", renamed)
    localizer, clip = (
        Localizer(MockEngine(32)),
        make_clip(tmp_path / "clip.mp4", seconds=2, size="32x24"),
    )
    process_all([str(clip)], tmp_path / "out", localizer, Console(quiet=True))
    renames = [name for step, name in steps if step == "rename"]
    assert renames.index("00000.jsonl") < renames.index("00000.json") < renames.index("clip.mp4")
    assert renames.index("00000.mp4") < renames.index("00000.json")
    assert renames.index("clip.mp4") < len(renames) - 1 - renames[::-1].index(MANIFEST), (
        "at last: all is there"
    )
    for place, (step, name) in enumerate(steps):
        if step == "rename":
            folder = "clip" if name.startswith("0") or name == MANIFEST else "out"
            assert steps[place - 1] == ("fsync", f".{name}.part")
            assert steps[place + 1] == ("fsync", folder)


@pytest.mark.long
def test_killed_at_twenty_random_moments(tmp_path):
    first = make_clip(tmp_path / "first.mp4", seconds=62, rate="25", sound="aac")
    second = make_clip(
        tmp_path / "second.mkv", "-bf", "3", "-x264-params", "open-gop=1", seconds=44, rate="25"
    )
    uninterrupted(first, second, "--out", tmp_path / "whole")
    out, draw = tmp_path / "out", random.Random(8)
    arguments = [first, second, "--out", out]
    # On a fast machine all segments are done before the last moments come.
    assert killed(arguments, out, 20, draw) >= 3
    finish(begin(*arguments))
    assert_same(out, tmp_path / "whole", ["first", "second"])
    for path, frames in ((out / "first.mp4", 1550), (out / "second.mp4", 1100)):
        assert decoded(path) == len(packet_times(path)[0]) == frames
    assert [row["frame"] for row in rows_of(out / "first.jsonl")] == list(range(1550))


@pytest.mark.long
def test_memory_does_not_grow_with_the_length(tmp_path):
    """Ten times as long: what grows is the index of an MP4, about a megabyte a minute of video with
    sound.
    """
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
