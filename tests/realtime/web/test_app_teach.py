"""What the page's addresses say to a new user's mistakes: one line each."""

import json

import pytest

from engines.errors import InputError
from realtime.teaching.labels import Box
from realtime.teaching.teacher import Teacher
from realtime.web.server import PageServer
from tests.realtime.web.served import LOCAL, get, post, show

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")
BOX = [5.0, 5.0, 40.0, 30.0]
KEY = "cam-000003"


class Learner:
    """Stands in for learning, which has tests of its own."""

    def start(self, table, labels, even_if_worse):
        raise InputError("it is learning already: wait for it, or stop it")

    def state(self):
        return {"state": "idle"}

    def close(self):
        pass


@pytest.fixture
def teacher(tmp_path):
    return Teacher(tmp_path / "labels", Learner())


@pytest.fixture
def server(session, teacher):
    teacher.opened()
    show(session, 3)
    teacher.write(session.newest("cam").record, None)
    with PageServer(session, str, LOCAL, None, teacher.labels.folder, teacher) as found:
        assert post(found.url, "/teach/freeze", {"source": "cam"})[1]["key"] == KEY
        yield found


def saved(*boxes, key=KEY):
    return "/teach/save", {"key": key, "boxes": [{"name": n, "box": b} for n, b in boxes]}


MISTAKES = {
    "no name": (saved(("", BOX)), 400, "the box has no name yet: type what it is"),
    "a long name": (saved(("x" * 61, BOX)), 400, "a name has at most 60 letters"),
    "a click": (saved(("mug", [5.0, 5.0, 6.0, 6.0])), 400, "too small: drag from one corner"),
    "beside the picture": (saved(("mug", [90.0, 5.0, 99.0, 30.0])), 400, "too small"),
    "twice": (saved(("mug", BOX), ("mug", BOX)), 400, "'mug' has a box here already"),
    "not a number": (("/teach/save", {"key": KEY, "boxes": [{"name": "m", "box": [1, 2, 3]}]}), 422, "box"),
    "another frame": (saved(("mug", BOX), key="cam-9"), 400, "this frame is gone: freeze another"),
    "a path": (saved(("mug", BOX), key="../../etc/passwd"), 400, "this frame is gone"),
    "nothing to undo": (("/teach/undo", {}), 400, "there is nothing to undo"),
    "too few": (("/teach/learn", {}), 400, "draw 5 more boxes: it learns from 5 on"),
    "no such source": (("/teach/freeze", {"source": "no"}), 400, "there is no picture of no yet"),
    "more than there is": (("/teach/learn", {"now": True}), 422, "now"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_changes_nothing(server, teacher, mistake, monkeypatch):
    monkeypatch.setattr("realtime.teaching.teacher.FREEZE_S", 0.0)
    (path, body), status, words = MISTAKES[mistake]
    found, answer = post(server.url, path, body)
    assert found == status
    assert words in answer["error"]
    assert "\n" not in answer["error"]
    assert teacher.labels.all() == {}
    assert not list(teacher.labels.folder.glob("*"))


def test_learning_twice_and_a_folder_that_is_full(server, teacher):
    teacher.save(KEY, [Box("mug", (x, 1.0, x + 8.0, 9.0)) for x in (1.0, 10.0, 20.0, 30.0, 40.0)])
    assert post(server.url, "/teach/learn", {})[1]["error"].startswith("it is learning already")
    teacher.labels.table.unlink()
    teacher.labels.table.mkdir()
    status, answer = post(server.url, *saved(("mug", BOX)))
    assert (status, "labels.csv" in answer["error"]) == (400, True)


def test_pictures_of_frames_and_the_coco_file_come(server, teacher):
    teacher.save(KEY, [Box("mug", tuple(BOX))])
    for path in (f"/teach/frame.jpg?key={KEY}", f"/teach/thumb.jpg?key={KEY}"):
        reply, content = get(server.url, path)
        assert (reply.status, content[:2]) == (200, b"\xff\xd8")
    coco = json.loads(get(server.url, "/teach/coco.json")[1])
    assert coco["annotations"][0]["bbox"] == [5.0, 5.0, 35.0, 25.0]
    assert get(server.url, "/teach/frame.jpg?key=nothing")[0].status == 400
    assert json.loads(get(server.url, f"/teach/why?key={KEY}")[1])["explanation"] is None
    for query, status, words in (
        ("key=nothing", 400, "this frame is gone"),
        (f"key={KEY}&x0=nan&y0=1&x1=2&y1=3", 422, "x0"),
        (f"key={KEY}&x0=left", 422, "x0"),
    ):
        reply, content = get(server.url, f"/teach/why?{query}")
        error = json.loads(content)["error"]
        assert (reply.status, words in error, "\n" in error) == (status, True, False)
    assert json.loads(get(server.url, "/state")[1])["teaches"] == "asked"
