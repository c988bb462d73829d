"""The command that explains a frame, on a photo and a film."""

import json

import pytest

from realtime.documents import ASSETS
from realtime.teaching.labels import Box, LabelFolder
from tests.command_line import command, refused

PHOTO, FILM = ASSETS / "chelsea.jpg", ASSETS / "demo.mp4"


def test_a_photo_is_explained_shown_and_labelled(tmp_path):
    labels, page = tmp_path / "mine", tmp_path / "why.html"
    into = ["--labels-dir", labels]
    result = command("why", PHOTO, "--out", page, "--add-as", "our cat", "--json", *into)
    found = json.loads(result.stdout)
    assert "is right with a probability of" in result.stderr
    assert "Egyptian cat" in result.stderr
    assert found["nearest"] == []
    assert found["cues"][0]["words"] in page.read_text()
    assert page.read_text().count("data:image/jpeg;base64,") == 2
    box = tuple(round(edge, 1) for edge in found["box_xyxy_px"])
    assert LabelFolder(labels).all() == {"chelsea.jpg": (Box("our cat", box),)}
    again = command("why", PHOTO, "--nothing-here", *into)
    assert "nearest labels: chelsea.jpg (our cat)" in again.stderr
    assert LabelFolder(labels).all() == {"chelsea.jpg": ()}, "the same image has new labels"


def test_a_frame_of_a_film_is_found_by_its_time(tmp_path):
    into = ["--labels-dir", tmp_path]
    box = ["--box", "10,20,110,140"]
    result = command("why", FILM, "--at", "1.52", *box, "--add-as", "car", "--json", *into)
    assert json.loads(result.stdout)["at_s"] == 1.52
    assert LabelFolder(tmp_path).all() == {
        "demo-1.520s.jpg": (Box("car", (10.0, 20.0, 110.0, 140.0)),)
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--box", "1,2"), "'1,2' is no box X0,Y0,X1,Y1"),
        (("--box", "5,5,1,1"), "is no box"),
        (("--add-as", "a", "--nothing-here"), "ask for one of the two (--add-as, --nothing-here)"),
        (("--at", "9"), "is over before the start"),
        (("--out", "why.txt"), ".html"),
        (("--labels-dir", PHOTO), "labels go into a folder"),
        (("--method", "beam"), "nothing tells how sure they are"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("why", PHOTO, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_camera_has_no_frame_at_a_time(tmp_path):
    assert "only files and folders" in refused("why", "demo:5", "--at", "1")
    assert "is named, but not their file" in refused("label", "--only", "x")
    assert "name what to label" in refused("label")
