"""What a live run leaves behind and offers while it runs: recordings, logs, timelines, figures,
pictures.
"""

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from engines.boxes import iou
from engines.errors import OutputError
from engines.localizer import Localizer
from realtime.capture import Connection
from realtime.file_sinks import LOGS_KEPT, JsonlSink, Recorder, Recording
from realtime.frames import Frame, FrameRecord
from realtime.live import stream
from realtime.options import StreamOptions
from realtime.session import Session
from realtime.sinks import has_display
from realtime.sources.demo import true_boxes
from realtime.statistics import Histogram, LiveRun
from realtime.web.server import MetricsSink
from tests.command_line import refused
from tests.engines.mock import MockEngine
from tests.realtime.media import picture, timestamps_s, write_video

ROOT = Path(__file__).parent.parent.parent
QUIET = Console(quiet=True)


@pytest.fixture
def localizer():
    return Localizer(MockEngine(32))


def running(folder, *more):
    """The program on an endless source, recording, when it has run for some seconds."""
    log = folder / "log.jsonl"
    command = [
        "stream",
        "demo:100000",
        "--no-window",
        "--model",
        "compact",
        "--weights",
        "random",
        "--size",
        "64",
        "--log",
        log,
        "--record",
        folder / "r.mp4",
        "--trace",
        folder / "trace.json",
        *more,
    ]
    process = subprocess.Popen(
        [sys.executable, "cli.py", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"shown"') > 90):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def rows_of(log):
    """Whole lines: a killed run may have cut off the last."""
    return [
        json.loads(line)
        for line in log.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def events_of(trace):
    """As Chrome and Perfetto read it: the closing bracket is optional."""
    lines = [
        line.rstrip(",\n")
        for line in trace.read_text().splitlines(keepends=True)[1:]
        if line.endswith(",\n")
    ]
    return [json.loads(line) for line in lines]


def test_a_run_that_is_killed_leaves_all_but_the_last_second(tmp_path):
    process = running(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shown = [row for row in rows_of(tmp_path / "log.jsonl") if row["outcome"] == "shown"]
    times_s = timestamps_s(tmp_path / "r.mp4")
    assert times_s[-1] >= shown[-1]["pts_s"] - 1.0
    assert times_s == pytest.approx([row["pts_s"] for row in shown[: len(times_s)]], abs=1e-3), (
        "the source's own times"
    )
    assert len(events_of(tmp_path / "trace.json")) > 6 * (len(shown) - 5), (
        "six stages of every frame but the last"
    )
    if shutil.which("ffprobe"):
        found = subprocess.run(
            [
                "ffprobe",
                "-v",
                "error",
                "-count_frames",
                "-select_streams",
                "v",
                "-show_entries",
                "stream=nb_read_frames",
                "-of",
                "csv=p=0",
                str(tmp_path / "r.mp4"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stderr == ""
        assert int(found.stdout.strip().strip(",")) == len(times_s)


def test_ctrl_c_ends_a_run_in_order_with_the_page_open_and_names_its_files(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = running(tmp_path, "--json", "--events", tmp_path / "e.jsonl", "--web", port)
    with (
        urllib.request.urlopen(f"http://127.0.0.1:{port}/live.mjpg", timeout=30) as pictures,
        socket.create_connection(("127.0.0.1", port)) as waiting,
    ):
        assert pictures.read(1000)
        waiting.sendall(b"GET /frame.jpg?after=999999 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    written = [line.split()[-1] for line in errors.splitlines() if str(tmp_path) in line]
    assert {Path(each).name for each in written} >= {"r.mp4", "log.jsonl", "trace.json", "e.jsonl"}
    assert all(Path(each).is_file() for each in written)
    summary, rows = json.loads(output), rows_of(tmp_path / "log.jsonl")
    assert summary["interrupted"] is True
    assert (
        summary["frames"] + summary["dropped"] + summary["failed"]
        == summary["captured"]["demo"]
        == len(rows)
    )
    assert len(timestamps_s(tmp_path / "r.mp4")) == summary["frames"]


def test_a_timeline_holds_every_stage_of_every_frame(localizer, tmp_path):
    videos = [str(write_video(tmp_path / f"{name}.mp4", 12)) for name in "ab"]
    summary = stream(
        videos,
        localizer,
        QUIET,
        StreamOptions(window=False, trace=tmp_path / "t.json", record=tmp_path / "r.mp4"),
    )
    events = events_of(tmp_path / "t.json")
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(processes.values()) == ["a", "b"]
    for process, name in processes.items():
        source = summary["sources"][name]
        stages = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        for stage in ("read", "wait", "prepare", "engine", "draw", "write"):
            assert sum(e["cat"] == stage for e in stages) == source["frames"]
        for index in {e["args"]["frame"] for e in stages}:
            of = {e["cat"]: e for e in stages if e["args"]["frame"] == index}
            ordered = [
                of[stage] for stage in ("read", "wait", "prepare", "engine", "draw", "write")
            ]
            assert all(a["ts"] + a["dur"] <= b["ts"] + 5 for a, b in pairwise(ordered)), (
                "one after the other, in microseconds"
            )
        assert sum(e["ph"] == "i" for e in events if e["pid"] == process) == source["dropped"]
        assert (tmp_path / f"r_{name}.mp4").exists()


def get(address):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read()


def test_figures_and_a_picture_over_http(localizer, tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 100))
    live_run = LiveRun(["clip"])
    session = Session(
        [Connection("clip", video, "live", reconnects=2)], live_run, localizer.class_names
    )
    with MetricsSink(0, session) as sink, session:
        address = f"http://127.0.0.1:{sink.port}"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}/nothing")
        threading.Timer(0.3, lambda: session.write(record(0), picture(0))).start()
        image = cv2.imdecode(
            np.frombuffer(get(f"{address}/snapshot.jpg"), np.uint8), cv2.IMREAD_COLOR_BGR
        )
        assert np.abs(image.astype(int) - picture(0)).mean() < 4
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(f"{address}/snapshot.jpg?source=other")
        for index in range(3):
            sink.write(record(index, stages_ms={"engine": 7.0}, total_ms=30.0), None)
        sink.write(record(3, outcome="dropped", cause="a newer frame was waiting"), None)
        text = get(f"{address}/metrics").decode()
        with pytest.raises(OutputError, match="choose another port, such as 8001"):
            MetricsSink(sink.port, session)
    assert 'sightline_frames_total{cause="",outcome="shown",source="clip"} 3.0' in text
    assert (
        'sightline_frames_total{cause="a newer frame was waiting",outcome="dropped",source="clip"} 1.0'
        in text
    )
    assert 'sightline_stage_seconds_bucket{le="0.005",source="clip",stage="engine"} 0.0' in text
    assert 'sightline_stage_seconds_bucket{le="0.01",source="clip",stage="engine"} 3.0' in text
    assert 'sightline_age_seconds_count{source="clip"} 3.0' in text
    assert 'sightline_reconnects_total{source="clip"} 2.0' in text
    assert 'sightline_up{source="clip"} 1.0' in text


def record(index, **fields):
    return FrameRecord(
        Frame(picture(index), "clip", index, index / 25, time.monotonic_ns(), 1.0), **fields
    )


def test_a_log_begins_anew_at_its_size_and_keeps_the_last_few(tmp_path):
    with JsonlSink(tmp_path / "log.jsonl", live=True, max_mb=0.01) as log:
        for index in range(400):
            log.write(record(index), None)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "log.1.jsonl",
        "log.2.jsonl",
        "log.3.jsonl",
        "log.4.jsonl",
        "log.5.jsonl",
        "log.jsonl",
    ]
    assert len(files) == LOGS_KEPT + 1
    ordered = [tmp_path / f"log.{n}.jsonl" for n in range(LOGS_KEPT, 0, -1)] + [
        tmp_path / "log.jsonl"
    ]
    frames = [row["frame"] for path in ordered for row in rows_of(path)]
    assert frames == list(range(frames[0], 400)), "none lost in between"
    assert frames[0] > 0
    assert max(path.stat().st_size for path in ordered) <= 10_000


def test_a_log_goes_on_where_an_earlier_run_ended(tmp_path):
    path = tmp_path / "log.jsonl"
    for first in (0, 2):
        with JsonlSink(path, live=True) as log:
            for index in (first, first + 1):
                log.write(record(index), None)
    assert [row["frame"] for row in rows_of(path)] == [0, 1, 2, 3]
    whole = path.read_bytes()
    path.write_bytes(cut := whole[:-20])
    with JsonlSink(path, live=True) as log:
        log.write(record(9), None)
    assert path.read_bytes().startswith(cut + b"\n")
    assert json.loads(path.read_text().splitlines()[-1])["frame"] == 9
    path.write_bytes(whole)
    with JsonlSink(path, live=True, max_mb=len(whole) * 1.2e-6) as log:
        log.write(record(4), None)
        log.write(record(5), None)
    assert [
        row["frame"] for name in ("log.1.jsonl", "log.jsonl") for row in rows_of(tmp_path / name)
    ] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", [b"a film", b"[1]", b'{"mine": 1}'])
def test_a_file_that_is_no_log_is_left_alone(content, tmp_path):
    for name, max_mb in (("mine.txt", None), ("log.3.txt", 1)):
        (tmp_path / name).write_bytes(content)
        path = tmp_path / ("mine.txt" if max_mb is None else "log.txt")
        assert f"{tmp_path / name} is no log of Sightline's" in refused(
            "stream",
            "demo:5",
            "--no-window",
            "--log",
            path,
            *(["--log-max-mb", max_mb] if max_mb else []),
        )
        assert (tmp_path / name).read_bytes() == content


def test_recordings_and_timelines_are_new_files(localizer, tmp_path):
    videos = [write_video(tmp_path / f"{name}.mp4", 4) for name in "ab"]
    content, console = videos[0].read_bytes(), Console(file=io.StringIO(), width=300)
    options = StreamOptions(
        window=False,
        policy="every",
        record=videos[0],
        log=tmp_path / "l.jsonl",
        trace=tmp_path / "t.json",
    )
    for _ in range(2):
        stream([str(videos[0])], localizer, console, options)
    stream(list(map(str, videos)), localizer, console, options)
    assert videos[0].read_bytes() == content
    for name in ("a_2", "a_3", "a_a", "a_b"):
        assert len(timestamps_s(tmp_path / f"{name}.mp4")) == 4
    assert [row["frame"] for row in rows_of(tmp_path / "l.jsonl")[:8]] == [0, 1, 2, 3] * 2
    assert len(rows_of(tmp_path / "l.jsonl")) == 16
    assert {path.name for path in tmp_path.glob("t*.json")} == {"t.json", "t_2.json", "t_3.json"}
    assert (
        f"there is a file {videos[0]} already: {tmp_path / 'a_2.mp4'} is written"
        in console.file.getvalue()
    )
    assert "is no log" in refused("stream", videos[1], "--no-window", "--log", videos[1])


def test_recordings_begin_and_end_while_the_run_goes_on(tmp_path):
    wanted = None
    with Recorder(lambda: wanted, ["clip"], lambda *_: None) as recorder:
        for index in range(40):
            wanted = (
                Recording(tmp_path / "first.mp4")
                if 5 <= index < 15
                else Recording(tmp_path / "second.mp4")
                if 20 <= index < 30
                else None
            )
            assert recorder.needs_picture or wanted is None
            recorder.write(record(index), picture(index))
    for name in ("first", "second"):
        assert timestamps_s(tmp_path / f"{name}.mp4") == pytest.approx(
            [i / 25 for i in range(10)], abs=1e-4
        )


def test_a_histogram_is_true_to_one_percent_and_its_maximum_exact():
    values = np.random.default_rng(0).lognormal(2, 1, 20_000)
    found = Histogram()
    for value in values:
        found.add(float(value))
    for name, percent in {"p50": 50, "p90": 90, "p99": 99, "p99_9": 99.9}.items():
        assert found.percentiles()[name] == pytest.approx(np.percentile(values, percent), rel=0.012)
    assert found.percentiles()["max"] == pytest.approx(values.max(), abs=1e-3)
    assert Histogram().percentiles() == {}


@pytest.mark.parametrize("display", ["", ":987", "no.such.host.invalid:0", "nonsense"])
def test_without_a_display_that_answers_no_window_is_opened(
    monkeypatch, display, localizer, tmp_path
):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not has_display()
    assert stream([str(write_video(tmp_path / "clip.mp4", 3))], localizer, QUIET)["frames"] >= 1


def test_where_the_truth_is_known_a_run_says_how_true_it_was(localizer, tmp_path):
    summary = stream(
        ["demo:15"],
        localizer,
        QUIET,
        StreamOptions(window=False, policy="every", log=tmp_path / "log.jsonl"),
    )
    boxes = [
        [row[edge] for edge in ("x0", "y0", "x1", "y1")] for row in rows_of(tmp_path / "log.jsonl")
    ]
    truths = true_boxes()
    ious = [iou(box, truths[index]) for index, box in enumerate(boxes)]
    assert len(ious) == 15
    assert summary["mean_iou"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert summary["corloc"] == pytest.approx(np.mean(np.greater(ious, 0.5)), abs=1e-3)
