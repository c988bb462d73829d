"""The public API: what docs/api.md shows runs, what is exported is what it names, and nothing heavy
is loaded for it.
"""

import importlib
import itertools
import json
import re
import subprocess
import sys
import threading
from contextlib import closing
from itertools import islice

import cv2
import numpy as np
import pytest

import engines
import realtime
from engines import EngineError, EngineOptions, InputError, ModelError, SourceError, open_localizer
from realtime import localize
from realtime.sources import web_camera
from tests.command_line import ROOT, command
from tests.realtime.media import picture, write_images, write_video
from tests.realtime.sources.test_web_camera import JPEGS, head, serving

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PHOTO = ROOT / "realtime" / "assets" / "chelsea.jpg"
SMALL = EngineOptions(weights="random", size_px=64, backend="openvino", precision="fp32")


@pytest.fixture
def threads_end():
    """Every thread of the test has ended with it."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)  # a reader may be in the middle of a call
        assert not thread.is_alive(), thread.name


@pytest.fixture(scope="module")
def localizer():
    with open_localizer(SMALL) as opened:
        yield opened


def test_the_page_s_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("photo.jpg", cv2.imread(str(PHOTO)))
    write_video(tmp_path / "video.mp4", 8)
    _imports, photo, video, camera = (compile(block, "docs/api.md", "exec") for block in BLOCKS)
    exec(photo, {})
    assert re.search(r"cat|tabby", capsys.readouterr().out)
    exec(video, {})
    rows = [json.loads(line) for line in (tmp_path / "video.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(8))
    assert all({"x0", "state", "objects", "track_id"} <= row.keys() for row in rows)
    assert cv2.imread("newest.jpg").shape == (96, 128, 3)
    assert "closing" in camera.co_names


@pytest.mark.parametrize("package", [engines, realtime], ids=lambda each: each.__name__)
def test_exactly_what_the_page_names_is_exported(package):
    named = re.findall(rf"^\| `(\w+)` \| `{package.__name__}` \|", PAGE, re.MULTILINE)
    assert sorted(named) == package.__all__
    for name in package.__all__:
        assert getattr(package, name).__doc__
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        _ = package.anything


def test_what_type_checkers_are_told_is_what_there_is(tmp_path):
    """Each name is imported under TYPE_CHECKING from the module that it comes from at run time."""
    for package in (engines, realtime):
        source = (ROOT / package.__name__ / "__init__.py").read_text(encoding="utf-8")
        notify = source.split("if TYPE_CHECKING:\n")[1].split("\n__all__")[0]
        names = {}
        exec("\n".join(line[4:] for line in notify.splitlines()), names)
        assert {name: getattr(package, name) for name in package.__all__} == {
            name: names[name] for name in package.__all__
        }


def test_importing_loads_no_library_and_using_it_neither_torch_nor_the_command_line(tmp_path):
    code = (
        "import sys\n"
        "import engines, realtime\n"
        "assert not {'numpy', 'cv2', 'openvino', 'onnx', 'av'} & set(sys.modules)\n"
        "from realtime import localize\n"
        "assert 'openvino' not in sys.modules\n"
        "results = list(localize('demo:2', follow=True, min_score=0.0, backend='openvino'))\n"
        "assert len(results) == 2 and results[0].boxes\n"
        "assert 'openvino' in sys.modules and sys.modules['openvino_telemetry'] is None\n"
        "assert not {'torch', 'typer', 'fastapi', 'ray', 'matplotlib', 'cli', 'calib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=120)


def untimed(row):
    return {key: value for key, value in row.items() if not key.endswith(("_ms", "_ns"))}


@pytest.mark.parametrize("follow", [False, None], ids=["whole frames", "followed"])
def test_rows_are_those_of_the_log_of_batch(tmp_path, follow):
    video = write_video(tmp_path / "clip.mp4", 12)
    options = ("--weights", "random", "--size", 64, "--backend", "openvino", "--precision", "fp32")
    assert (
        command(
            *("batch", video, "--out", tmp_path / "out", *options, "--every", 2),
            *(() if follow is None else ("--no-follow",)),
        ).returncode
        == 0
    )
    logged = [
        json.loads(line) for line in (tmp_path / "out" / "clip.jsonl").read_text().splitlines()
    ]
    rows = [
        json.loads(json.dumps(each.to_dict()))
        for each in localize(video, SMALL, every=2, follow=follow)
    ]
    drawing = {"draw_ms", "write_ms"}
    assert [untimed(row) for row in rows] == [untimed(row) for row in logged]
    assert logged[0].keys() - rows[0].keys() <= drawing


@pytest.mark.usefixtures("threads_end")
def test_a_result_says_what_its_row_says(localizer):
    results = list(localize("demo:3", localizer))
    assert [result.frame for result in results] == [0, 1, 2]
    for result in results:
        row, (box,) = result.to_dict(), result.boxes
        assert [row[key] for key in ("x0", "y0", "x1", "y1")] == pytest.approx(
            box.xyxy_px, abs=1e-3
        )
        assert (row["class_name"], row["source"], row["frame"]) == (
            box.class_name,
            result.source,
            result.frame,
        )
        assert (result.class_name, result.state, box.track_id, result.error) == (
            box.class_name,
            None,
            None,
            "",
        )
        assert result.map_hw.ndim == 2
        before = result.image_bgr.copy()
        for heat_map in ("inset", "over", "off"):
            drawn = result.draw(heat_map=heat_map)
            assert drawn.shape == before.shape
            assert not np.array_equal(drawn, before)
        assert np.array_equal(result.image_bgr, before)
        shown = result._repr_html_()
        assert shown.startswith('<img alt="')
        assert 'src="data:image/jpeg;base64,' in shown
    with pytest.raises(InputError, match="inset, over, off"):
        results[0].draw(heat_map="none")
    with pytest.raises(InputError, match="alpha"):
        results[0].draw(alpha=2)


@pytest.mark.usefixtures("threads_end")
def test_objects_that_are_followed_have_numbers():
    with closing(localize("demo:", backend="openvino", follow=True)) as frames:
        results = list(islice(frames, 24))
    assert "following" in {result.state for result in results}
    held = [result for result in results if result.state == "following"]
    assert all(box.track_id == 1 for result in held for box in result.boxes)
    with closing(localize("demo:", backend="openvino", follow=True, objects=2)) as frames:
        several = list(islice(frames, 12))
    assert any(result.boxes for result in several)
    assert all(
        box.confidence is not None and box.track_id >= 1
        for result in several
        for box in result.boxes
    )


def test_several_objects_of_one_frame():
    (result,) = localize(PHOTO, method="dam", objects=3, backend="openvino")
    assert 1 <= len(result.boxes) <= 3
    scores = [box.score for box in result.boxes]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.usefixtures("threads_end")
def test_a_damaged_image_is_a_result_with_an_error(tmp_path, localizer):
    folder = write_images(tmp_path / "photos", 3)
    damaged = sorted(folder.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:60])
    results = list(localize(folder, localizer, follow=True))
    assert sorted(bool(result.error) for result in results) == [False, False, True]
    (bad,) = (result for result in results if result.error)
    assert damaged.name in bad.error
    assert (bad.boxes, bad.image_bgr.size, bad.map_hw.size, bad.draw().size) == ((), 0, 0, 0)
    assert damaged.name in bad._repr_html_()
    assert bad.to_dict()["outcome"] == "failed"


@pytest.mark.usefixtures("threads_end")
def test_a_video_that_is_cut_off_ends_with_an_error(tmp_path, localizer):
    whole = write_video(tmp_path / "whole.mkv", 150)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    results = []
    with pytest.raises(SourceError, match=r"cut\.mkv"):
        results.extend(localize(cut, localizer))  # what came before the error is kept
    assert results


@pytest.mark.usefixtures("threads_end")
def test_a_live_source_gives_its_newest_frames_until_it_is_closed(localizer, monkeypatch):
    monkeypatch.setattr(web_camera, "POLL_S", 0.02)
    answers = itertools.cycle(JPEGS)

    def answer(handler):
        head(handler, "image/jpeg")
        handler.wfile.write(next(answers))

    notify = []
    with (
        serving(answer) as address,
        closing(localize(address, localizer, notify=notify.append)) as results,
    ):
        found = list(islice(results, 3))
    assert [result.frame for result in found] == sorted({result.frame for result in found})
    assert all(result.image_bgr.shape == (96, 128, 3) and not result.error for result in found)
    assert any("asked again" in line for line in notify)
    assert localizer.localize([picture(0)])  # it is open still


@pytest.mark.usefixtures("threads_end")
def test_closing_early_frees_what_was_opened(tmp_path, monkeypatch):
    opened = []

    def noted(*arguments, **options):
        opened.append(open_localizer(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(importlib.import_module("realtime.api"), "open_localizer", noted)
    for source in ("demo:", write_video(tmp_path / "clip.mp4", 60)):
        results = localize(source, SMALL)
        next(results)
        results.close()
        with pytest.raises(EngineError, match="closed"):
            opened[-1].localize([picture(0)])


def test_an_open_localizer_is_left_as_it_was():
    with open_localizer(backend="openvino", least_confidence=0.25) as localizer:
        assert not any(result.boxes for result in localize("demo:2", localizer, min_score=1.0))
        assert all(result.boxes for result in localize("demo:2", localizer, min_score=0.0))
        list(localize("demo:2", localizer, follow=True, select="tiger cat"))
        assert (localizer.least_confidence, localizer.wanted_class) == (0.25, None)
    with open_localizer(backend="openvino") as localizer:
        assert localizer.limits is not None
        assert localizer.least_confidence == localizer.limits.shown_from
        list(localize("demo:2", localizer, min_score=0.0))
        assert localizer.asked_confidence is None


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((3.5,), {}, InputError, "source"),
        ((True,), {}, InputError, "source"),
        ((np.zeros((8, 8, 3), np.uint8),), {}, InputError, "ndarray"),
        (("demo:2", 7), {}, InputError, "model"),
        (("demo:2",), {"every": 0}, InputError, "every"),
        (("demo:2",), {"every": 1.5}, InputError, "every"),
        (("demo:2",), {"objects": 0}, InputError, "objects"),
        (("demo:2",), {"min_score": float("nan")}, InputError, "min_score"),
        (("demo:2",), {"wieghts": "random"}, TypeError, "wieghts"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, options, error, said):
    with pytest.raises(error, match=said):
        localize(*arguments, **options)


def test_an_open_localizer_takes_no_options(localizer):
    with pytest.raises(InputError, match="size_px"):
        localize("demo:2", localizer, size_px=64)
    with pytest.raises(InputError, match="objects"):
        localize("demo:2", localizer, objects=2)


@pytest.mark.usefixtures("threads_end")
@pytest.mark.parametrize(
    ("source", "options", "error"),
    [
        ("no such file.mp4", {}, SourceError),
        ("demo:none", {}, SourceError),
        ("demo:2", {"model": "no such model"}, ModelError),
        ("demo:2", {"wanted_class": "no such class"}, ModelError),
        ("demo:2", {"backend": "no such backend"}, EngineError),
    ],
)
def test_what_cannot_be_opened_raises_when_a_result_is_asked_for(source, options, error):
    results = localize(source, **options)
    with pytest.raises(error, match=r"no|none"):
        next(results)


def test_options_go_before_those_of_the_object():
    with open_localizer(SMALL, size_px=96) as localizer:
        assert localizer.size_px == 96
    with pytest.raises(TypeError, match="no option 'sise'"):
        open_localizer(sise=96)
    with pytest.raises(EngineError, match="closed"):
        localizer.localize([picture(0)])
