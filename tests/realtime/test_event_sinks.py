"""Who is told of events, with real servers: one that answers HTTP, and an MQTT broker. Both are away
for a while.
"""

import getpass
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from rich.console import Console

from engines.choose import open_localizer
from engines.errors import InputError
from engines.localizer import Localization
from engines.options import EngineOptions
from realtime import event_sinks
from realtime.event_sinks import EventSink, Notifier, Timeline, receiver_of
from realtime.events import EventRules
from realtime.frames import Frame, FrameRecord
from realtime.live import stream
from realtime.options import StreamOptions
from realtime.tracking.options import FollowOptions
from tests.realtime.cameras import free_port
from tests.realtime.media import timestamps_s, write_video
from tests.realtime.scripted import wait_until

MOSQUITTO = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")


class Hook:
    """A web server that keeps what is posted to it; it can be ended and begun again."""

    def __init__(self):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}/hook"
        self.got, self.answers = [], []

    def start(self):
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["Idempotency-Key"] == body["id"]
                answer = hook.answers.pop(0) if hook.answers else 200
                if answer == 200:
                    hook.got.append(body)
                self.send_response(answer)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    @property
    def numbers(self):
        return [each["number"] for each in self.got]


@pytest.fixture
def hook():
    found = Hook()
    found.start()
    yield found
    found.stop()


@pytest.fixture
def brisk(monkeypatch):
    """Short pauses."""
    monkeypatch.setattr(event_sinks, "FIRST_PAUSE_S", 0.05)


def message(number):
    return {"id": f"run-{number}", "number": number, "change": "began", "name": "a", "source": "b"}


@pytest.mark.usefixtures("brisk")
def test_nothing_is_lost_or_told_twice_while_the_receiver_is_away(hook):
    said = []
    notifier = Notifier(receiver_of(hook.address), "the hook", said.append)
    for number in range(3):
        notifier.send(message(number))
    wait_until(lambda: len(hook.got) == 3)
    hook.stop()
    for number in range(3, 6):
        notifier.send(message(number))  # returns at once
    wait_until(lambda: said)
    hook.start()
    wait_until(lambda: len(hook.got) == 6)
    notifier.close()
    assert hook.numbers == [0, 1, 2, 3, 4, 5]
    assert "does not take events" in said[0]
    assert said[1:] == ["the hook takes events again"]


@pytest.mark.usefixtures("brisk")
def test_an_answer_says_whether_to_try_again(hook):
    said = []
    hook.answers = [503, 200, 404, 200]
    notifier = Notifier(receiver_of(hook.address), "the hook", said.append)
    for number in range(3):
        notifier.send(message(number))
    wait_until(lambda: len(hook.got) == 2)
    notifier.close()
    assert hook.numbers == [0, 2]
    assert any("404" in line for line in said)


@pytest.mark.usefixtures("brisk")
def test_what_is_left_at_the_end_is_said(monkeypatch):
    monkeypatch.setattr(event_sinks, "GRACE_S", 0.2)
    said = []
    notifier = Notifier(receiver_of(f"http://127.0.0.1:{free_port()}"), "the hook", said.append)
    notifier.send(message(0))
    notifier.send(message(1))
    notifier.close()
    assert said[-1] == "the hook was not told of the last 2 changes"


@pytest.mark.usefixtures("brisk")
def test_too_many_make_the_oldest_give_way(monkeypatch):
    monkeypatch.setattr(event_sinks, "MOST_WAITING", 5)
    monkeypatch.setattr(event_sinks, "GRACE_S", 0.1)
    said = []
    notifier = Notifier(receiver_of(f"http://127.0.0.1:{free_port()}"), "the hook", said.append)
    for number in range(8):
        notifier.send(message(number))
    notifier.close()
    assert sum("an event is lost" in line for line in said) >= 3


def test_a_command_reads_the_event(tmp_path):
    written = tmp_path / "told.json"
    program = f"import os,sys; open({str(written)!r}, 'w').write(os.environ['SIGHTLINE_CHANGE'] + sys.stdin.read())"
    said = []
    notifier = Notifier(receiver_of(f'{sys.executable} -c "{program}"'), "it", said.append)
    notifier.send(message(7))
    wait_until(lambda: written.exists() and written.read_text().endswith("}"))
    notifier.close()
    assert written.read_text() == "began" + json.dumps(message(7))
    assert said == []


def test_a_command_that_fails_is_said_and_not_run_again(tmp_path):
    said = []
    for command, reason in (
        (f"{sys.executable} -c 'import nowhere'", "nowhere"),
        ("no-such-program", "no-such"),
    ):
        notifier = Notifier(receiver_of(command), "it", said.append)
        notifier.send(message(1))
        wait_until(lambda: said)
        notifier.close()
        assert reason in said.pop()
        assert said == []


@pytest.mark.parametrize(
    "text", ["", "ftp://host/path", "mqtt://host", "mqtt://host/a/#", "echo 'open"]
)
def test_what_cannot_be_told_is_refused(text):
    if text.startswith("mqtt"):
        pytest.importorskip("paho.mqtt")
    with pytest.raises(InputError):
        receiver_of(text)


class MqttBroker:
    """A real one, which keeps what it holds over a restart."""

    def __init__(self, folder):
        self.port = free_port()
        self._settings = folder / "mosquitto.conf"
        self._settings.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {folder}/\nuser {getpass.getuser()}\n"
        )
        folder.chmod(0o777)  # it gives its rights up

    def start(self):
        command = [MOSQUITTO, "-c", str(self._settings)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def stop(self):
        self._process.terminate()
        self._process.wait()


@pytest.mark.skipif(MOSQUITTO is None, reason="no MQTT broker here: apt-get install mosquitto")
@pytest.mark.usefixtures("brisk")
def test_a_broker_gets_every_event_once_over_a_restart(tmp_path, monkeypatch):
    mqtt = pytest.importorskip("paho.mqtt.client")
    from paho.mqtt.enums import CallbackAPIVersion

    monkeypatch.setattr(event_sinks, "REPLY_S", 0.5)
    broker = MqttBroker(tmp_path)
    broker.start()
    got, ready = [], threading.Event()
    reader = mqtt.Client(CallbackAPIVersion.VERSION2, "reader", clean_session=False)
    reader.on_connect = lambda client, *_: client.subscribe("home/door", qos=1)
    reader.on_subscribe = lambda *_: ready.set()
    reader.on_message = lambda _, __, each: got.append(json.loads(each.payload)["number"])
    reader.reconnect_delay_set(1, 1)
    reader.connect_async("127.0.0.1", broker.port)
    reader.loop_start()
    assert ready.wait(20)
    notifier = Notifier(receiver_of(f"mqtt://127.0.0.1:{broker.port}/home/door"), "it", print)
    try:
        notifier.send(message(0))
        wait_until(lambda: got == [0])
        broker.stop()
        notifier.send(message(1))
        notifier.send(message(2))
        time.sleep(0.3)
        broker.start()
        wait_until(lambda: len(got) >= 3)
        assert got == [0, 1, 2]
    finally:
        notifier.close()
        reader.loop_stop()
        broker.stop()


def test_a_live_run_writes_and_tells_its_events(tmp_path, hook):
    clip, file = write_video(tmp_path / "clip.mp4", 20), tmp_path / "events.jsonl"
    localizer = open_localizer(EngineOptions(model="compact"), streams=1)
    options = StreamOptions(
        window=False,
        policy="every",
        events=file,
        on_event=hook.address,
        event_seconds=0.0,
        event_clips=tmp_path / "clips",
    )
    all_boxes = FollowOptions(follow=False, min_score=0.0)
    summary = stream([str(clip)], localizer, Console(quiet=True), options, all_boxes)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == summary["event_count"] >= 1
    assert {(each["change"], each["event"]) for each in hook.got} == {
        (change, each["event"]) for each in lines for change in ("began", "ended")
    }
    assert all("jpeg" in each for each in hook.got if each["change"] == "began")
    assert lines[0]["begin_at"] <= lines[0]["end_at"]
    clips = [each["clip"] for each in lines]
    assert sorted(clips) == sorted(summary["files"]["clip"])
    assert sorted(clips) == sorted(map(str, (tmp_path / "clips").iterdir()))
    assert all(timestamps_s(clip) for clip in clips)
    localizer.close()


def test_a_timeline_has_the_last_events_with_the_frame_that_shows_each_best(monkeypatch):
    """A cat is there three times, each time larger in the middle, on a brighter frame."""
    monkeypatch.setattr(event_sinks, "MOST_SIGHTINGS", 2)
    timeline = Timeline()
    sink = EventSink({"cam": EventRules(ends_after_s=0.5)}, live=True, timeline=timeline)

    def go_on(first, count, sizes_px):
        for index in range(first, first + count):
            size_px = sizes_px[min(index - first, len(sizes_px) - 1)]
            box = (0.0, 0.0, float(size_px), float(size_px)) if size_px else None
            found = Localization(box, 0, "cat", 0.5, np.ones((4, 4), np.float32))
            image = np.full((100, 200, 3), size_px, np.uint8)
            record = FrameRecord(Frame(image, "cam", index, index / 10, 0, 0.0), found=found)
            sink.write(record, None)

    for number in range(3):
        go_on(100 * number, 12, (30, 60, 60, 90, 90, 60))
        assert timeline.rows("cam")[-1]["in_view"]
        part, whole = timeline.pictures("cam", number + 1)
        go_on(100 * number + 12, 20, (0,))
        assert not timeline.rows("cam")[-1]["in_view"]
        row = timeline.rows("cam")[-1]
        assert (row["event"], row["in_view"], row["best_frame"]) == (
            number + 1,
            False,
            100 * number + 3,
        )
        assert timeline.pictures("cam", number + 1) == (part, whole)
        image = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (100, 200, 3)
        assert abs(int(image[50, 150, 0]) - 90) < 4
    assert [each["event"] for each in timeline.rows("cam")] == [2, 3]
    assert timeline.pictures("cam", 1) is None
    assert timeline.rows("attic") == []
