"""A kind of source that is added from outside works wherever a SOURCE is named."""

import json

import numpy as np
import pytest

from engines.errors import InputError, SourceError
from realtime import localize
from realtime.frames import Frame
from realtime.sources import spec
from realtime.sources.spec import SourceKind, examples, kind_of, name_of, open_source
from realtime.sources.video import Source
from tests.command_line import command


class Toy(Source):
    """So many gray frames, ten a second: ``toy:3``."""

    rate_fps = 10.0

    def __init__(self, text, _options):
        count = text.removeprefix("toy:")
        if not count.isdecimal():
            raise SourceError(f"'{text}': write toy:FRAMES")
        self.frames = int(count)

    def __iter__(self):
        for index in range(self.frames):
            image = np.full((48, 64, 3), 100 + index, np.uint8)
            yield Frame(image, self.name, index, index / self.rate_fps, index, 0.1)


TOY = SourceKind("toy", "toy:3", lambda text: text.startswith("toy:"), Toy, lambda _: "toy")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(spec, "KINDS", list(spec.KINDS))
    spec.register_source(TOY)


@pytest.mark.usefixtures("toy")
def test_localize_takes_it():
    results = list(localize("toy:3", backend="openvino"))
    assert [(each.frame, each.source) for each in results] == [(0, "toy"), (1, "toy"), (2, "toy")]


@pytest.mark.usefixtures("toy")
def test_stream_and_batch_take_it(tmp_path):
    log = tmp_path / "log.jsonl"
    streamed = command("stream", "toy:3", "--no-window", "--policy", "every", "--log", log)
    assert streamed.returncode == 0, streamed.stderr
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["frame"]) for row in rows] == [("toy", 0), ("toy", 1), ("toy", 2)]
    done = command("batch", "toy:2", "--out", tmp_path / "out", "--no-video", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 2
    assert (tmp_path / "out" / "toy.jsonl").is_file()


@pytest.mark.usefixtures("toy")
def test_its_errors_are_told_and_its_example_is_among_the_others():
    with pytest.raises(SourceError, match="write toy:FRAMES"):
        open_source("toy:many")
    assert examples().startswith("toy:3, 0, demo:")
    with pytest.raises(InputError, match="a kind of source called 'toy' already"):
        spec.register_source(TOY)


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("0", "camera", "camera0"),
        ("demo:9", "demo", "demo"),
        ("rtsp://me:secret@door/live", "stream", "live"),
        ("https://host/clip.mp4", "web address", "clip"),
        ("http://me:secret@host", "web address", "host"),
        ("-", "pipe", "stdin"),
        ("photos/*.jpg", "glob", None),
        ("missing.mp4", "video file", "missing"),
        ("missing.jpg", "video file", "missing"),
        ("nul\0l", "video file", None),
        ("²", "video file", None),
    ],
)
def test_a_source_is_known_by_its_text(text, kind, name):
    assert kind_of(text).name == kind
    assert name is None or name_of(text) == name


def test_files_and_folders_are_known_by_what_they_are(tmp_path):
    for name in ("a.zip", "a.jpg", "a.gif", "a.mp4", "a[1].jpg"):
        (tmp_path / name).touch()
    kinds = {path.name: kind_of(str(path)).name for path in tmp_path.iterdir()}
    assert kinds == {
        "a.zip": "archive",
        "a.jpg": "image file",
        "a.gif": "video file",
        "a.mp4": "video file",
        "a[1].jpg": "image file",
    }
    assert kind_of(str(tmp_path)).name == "folder"
