"""What can be seen and what can be changed, without a browser."""

import json
from contextlib import ExitStack
from dataclasses import fields
from itertools import product

import av
import numpy as np
import pytest

from engines.localizer import Localization
from realtime.annotate import Look
from realtime.file_sinks import Recorder
from realtime.frames import Frame, FrameRecord, Track, Tracked
from realtime.session import Session
from realtime.tracking.options import Following, FollowOptions
from realtime.web.server import MetricsSink, PageServer
from tests.realtime.media import picture
from tests.realtime.web.served import LOCAL, get, post, show

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")


def test_state_tells_of_every_source(session):
    show(session, 0)
    with PageServer(session, lambda: "an engine", LOCAL) as server:
        state = json.loads(get(server.url, "/state")[1])
    assert state["title"] == "an engine"
    assert [source["name"] for source in state["sources"]] == ["cam", "door"]
    assert state["sources"][0]["frames"] == 1
    assert state["sources"][0]["stages_ms"]["engine"]["p50"] == 3.0
    assert state["settings"] == {
        "wanted_class": None,
        "min_score": None,
        "box": True,
        "heat_map": "inset",
        "alpha": 0.5,
        "smoothing": 0.0,
    }
    assert (state["recording"], state["recordings"]) == (False, [])


def test_every_field_of_the_look_is_shown_and_can_be_changed(session):
    """Also one that is added: the page's addresses take them from ``Look``."""
    look = {"box": False, "heat_map": "over", "alpha": 0.25, "smoothing": 1.0}
    assert list(look) == [each.name for each in fields(Look)]
    with PageServer(session, str, LOCAL) as server:
        for name, value in look.items():
            status, answer = post(server.url, "/settings", {name: value})
            assert (status, answer["settings"][name]) == (200, value)
            assert post(server.url, "/settings", {name: "no such value"})[0] == 422
    assert {name: getattr(session.settings, name) for name in look} == look


def test_names_of_boxes_and_classes_can_be_looked_for(session):
    """Names come first; one that is a class, too, is given once."""
    session.names = ("mug", "dog")
    with PageServer(session, str, LOCAL) as server:
        assert json.loads(get(server.url, "/classes")[1]) == ["mug", "dog", "cat"]
        for wanted, index in (("mug", 2), ("dog", 3), ("cat", 0)):
            status, answer = post(server.url, "/settings", {"wanted_class": wanted})
            assert (status, answer["settings"]["wanted_class"]) == (200, wanted)
            assert session.settings.class_index == index
        status, answer = post(server.url, "/settings", {"wanted_class": "mog"})
        assert (status, "near are mug, dog" in answer["error"]) == (400, True)
        status, answer = post(server.url, "/settings", {"wanted_class": ""})
        assert (status, answer["settings"]["wanted_class"]) == (200, None)


def test_a_click_says_what_is_followed_where_anything_is(session):
    with PageServer(session, str, LOCAL) as server:
        assert json.loads(get(server.url, "/state")[1])["follows"] is False
        status, answer = post(server.url, "/settings", {"point": [0.5, 0.5]})
        assert (status, "follow" in answer["error"]) == (400, True)
        session.following = Following(FollowOptions(follow=True))
        assert post(server.url, "/settings", {"point": [0.5, 0.25], "source": "door"})[0] == 200
        assert post(server.url, "/settings", {"point": [0.5, 1.5]})[0] in (400, 422)
        assert post(server.url, "/settings", {"point": [0.5, 0.5], "source": "attic"})[0] == 400
        assert json.loads(get(server.url, "/state")[1])["follows"] is True
    image = np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)
    nothing = Localization(None, 0, "thing", 0.1, np.ones((4, 4), np.float32))
    for name, followed in (("cam", False), ("door", True)):
        tracker = session.following.view(Frame(image, name, 0, 0.0, 0, 0.0)).tracker
        found, _ = tracker.update(nothing)
        assert (found.box_xyxy_px == (70, 10, 130, 40)) is followed


def test_the_page_is_told_of_each_object_that_is_followed(session):
    box = (1.0, 2.0, 30.0, 40.0)
    each = Tracked(box, 0, "cat", 0.5, Track("following", 0.9, 7, box))
    with PageServer(session, str, LOCAL) as server:
        show(session, 0)
        assert [
            source["objects"] for source in json.loads(get(server.url, "/state")[1])["sources"]
        ] == [[], []]
        show(session, 1, objects=(each,))
        notify = json.loads(get(server.url, "/state")[1])["sources"][0]["objects"]
    assert notify == [each.row()]
    assert (notify[0]["track_id"], notify[0]["confidence"], notify[0]["x1"]) == (7, 0.9, 30.0)


def test_recordings_within_a_second_are_files_of_their_own(session, tmp_path, monkeypatch):
    monkeypatch.setattr("realtime.web.app.time.strftime", lambda _: "sightline-now")
    for there in (
        "sightline-now.mp4",
        "sightline-now_3_cam.mp4",
    ):  # of this run, and one camera's of an earlier one
        (tmp_path / there).touch()
    with PageServer(session, str, LOCAL, recordings=tmp_path) as server:
        names = []
        for _ in range(3):
            assert post(server.url, "/recording", {"on": True})[1]["recording"] is True
            names.append(session.settings.page_recording.path.name)
            assert post(server.url, "/recording", {"on": False})[1]["recording"] is False
    assert names == ["sightline-now_2.mp4", "sightline-now_4.mp4", "sightline-now_5.mp4"]


def test_what_is_recorded_has_the_name_that_is_told_and_a_link(session, tmp_path):
    """Of the chosen camera alone; what the run was told to record goes on."""
    folder, own = tmp_path / "page", tmp_path / "own.mp4"
    names = [each.name for each in session.connections]
    session.change(record=own)
    with PageServer(session, str, LOCAL, recordings=folder) as server, ExitStack() as stack:
        recorders = [
            stack.enter_context(Recorder(wanted, names, pytest.fail, begun=session.recording_begun))
            for wanted in (
                lambda: session.settings.recording,
                lambda: session.settings.page_recording,
            )
        ]

        def go_on(frames):
            for index, source, recorder in product(frames, names, recorders):
                frame = Frame(picture(index), source, index, index / 25, 0, 0.0)
                recorder.write(FrameRecord(frame), frame.image_bgr)

        assert post(server.url, "/recording", {"on": True, "source": "attic"})[0] == 400
        post(server.url, "/recording", {"on": True, "source": "door"})
        go_on(range(5))
        under_way = json.loads(get(server.url, "/state")[1])["recordings"]
        assert all(each["on"] for each in under_way)
        post(server.url, "/recording", {"on": False})
        go_on(range(5, 8))
        files = json.loads(get(server.url, "/state")[1])["recordings"]
        (path,) = folder.iterdir()
        link = f"recordings/{path.name}"
        assert files[-1] == {"name": path.name, "source": "door", "on": False, "link": link}
        assert [each["on"] for each in files] == [True, True, False]
        assert path.name.endswith("_door.mp4")
        assert get(server.url, f"/{link}")[1] == path.read_bytes()
        reply, part = get(server.url, f"/{link}", {"Range": "bytes=4-7"})
        assert (reply.status, part) == (206, b"ftyp")
        assert get(server.url, "/recordings/own_cam.mp4")[0].status == 404
    assert {each.name for each in tmp_path.glob("own*")} == {"own_cam.mp4", "own_door.mp4"}
    for file, count in ((path, 5), (tmp_path / "own_door.mp4", 8)):
        with av.open(str(file)) as video:
            assert sum(1 for _ in video.decode(video=0)) == count


def test_a_source_without_pictures_is_waited_for_and_then_told(session):
    with PageServer(session, str, LOCAL) as server:
        assert get(server.url, "/frame.jpg?source=door&wait_s=0.2")[0].status == 204


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/settings", {"alpha": 2}),
        ("/settings", {"heat_map": "loud"}),
        ("/settings", {"record": "/etc/passwd"}),
        ("/settings", {"wanted_class": "no such thing"}),
        ("/recording", {"on": "../x"}),
        ("/recording", {"path": "x.mp4"}),
    ],
)
def test_impossible_wishes_are_refused(session, path, body):
    before = session.settings
    with PageServer(session, str, LOCAL) as server:
        status, answer = post(server.url, path, body)
    assert status in (400, 422)
    assert "Traceback" not in str(answer)
    assert session.settings == before


def test_unknown_sources_are_named(session):
    with PageServer(session, str, LOCAL) as server:
        reply, content = get(server.url, "/frame.jpg?source=nowhere")
    assert reply.status == 400
    assert json.loads(content)["error"] == "there is no source 'nowhere': there is cam, door"


def test_a_defect_is_counted_in_the_metrics_and_told_once(session):
    pytest.importorskip("prometheus_client")
    told = []
    run = Session(session.connections, session.live_run, session.class_names, notify=told.append)

    def title():
        raise KeyError("no such engine")

    with MetricsSink(0, run) as metrics, PageServer(run, title, LOCAL) as server:
        address = f"http://127.0.0.1:{metrics.port}"
        assert b"sightline_page_errors_total 0.0" in get(address, "/metrics")[1]
        for _ in range(2):
            assert get(server.url, "/state")[0].status == 500
        assert get(server.url, "/frame.jpg?source=nowhere")[0].status == 400
        assert b"sightline_page_errors_total 2.0" in get(address, "/metrics")[1]
    assert len(told) == 1
    assert "KeyError" in told[0]
    assert "defect of Sightline" in told[0]
