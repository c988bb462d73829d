"""Two logs of the same frames, and what differs."""

import json
from io import StringIO

import pytest
from rich.console import Console

from calib.evaluation.comparison import (
    CompareOptions,
    compare_logs,
    differences,
    read_log,
    summary_of,
    worst,
)
from engines.errors import InputError, OutputError
from tests.realtime.media import write_video

LEFT, NEAR_LEFT, RIGHT = (10, 10, 60, 60), (12, 10, 60, 60), (100, 10, 150, 60)


def line(frame, box=None, name="dog", confidence=0.9, **more):
    x0, y0, x1, y1 = box or (None,) * 4
    return {
        **{"source": "clip", "frame": frame, "pts_s": float(frame), "outcome": "shown"},
        **{"class_name": name, "label": name, "confidence": confidence},
        **{"x0": x0, "y0": y0, "x1": x1, "y1": y1},
        **more,
    }


def log(path, *lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def quiet():
    return Console(file=StringIO(), width=120)


def test_boxes_that_overlap_are_the_same_and_others_stand_alone(tmp_path):
    a = log(tmp_path / "a.jsonl", line(0, LEFT), line(1, LEFT), line(2), line(3, LEFT))
    b = log(tmp_path / "b.jsonl", line(0, NEAR_LEFT), line(1, RIGHT), line(2), line(3, LEFT, "cat"))
    found = differences(read_log(a), read_log(b))
    assert summary_of(found) == {
        "frames": 4,
        "same": 2,
        "mean_iou": pytest.approx((48 / 50 + 1) / 2),
        "renamed": 1,
        "only_a": 1,
        "only_b": 1,
        "frames_that_differ": 1,
    }
    assert [each.key[1] for each in worst(found, 9)] == [1, 3], "the others hardly differ"


def test_neighbours_of_a_bad_frame_are_not_shown_again(tmp_path):
    a = log(
        tmp_path / "a.jsonl",
        *(line(k, LEFT, confidence=0.5 + k / 100, pts_s=k / 8) for k in range(30)),
    )
    b = log(tmp_path / "b.jsonl", *(line(k) for k in range(30)))
    found = worst(differences(read_log(a), read_log(b)), 9)
    assert [each.key[1] for each in found] == [29, 21, 13, 5]


def test_several_objects_and_another_programs_boxes(tmp_path):
    objects = [line(0, LEFT, track_id=1), line(0, RIGHT, track_id=2)]
    a = log(tmp_path / "a.jsonl", line(0, LEFT, track_id=1, objects=objects))
    b = log(
        tmp_path / "b.jsonl",
        *(
            {"frame": 0, **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))}
            for box in (RIGHT, LEFT)
        ),
    )
    (found,) = differences(read_log(a), read_log(b))
    assert (len(found.same), found.only_a, found.only_b, found.renamed) == (2, (), (), [])


def test_frames_that_failed_do_not_count(tmp_path):
    a = log(tmp_path / "a.jsonl", line(0, LEFT), line(1, outcome="failed"))
    b = log(tmp_path / "b.jsonl", line(0, LEFT), line(1, LEFT))
    assert summary_of(differences(read_log(a), read_log(b)))["frames"] == 1


def test_the_page_shows_the_frames_and_replaces_only_such_a_page(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", 20)
    a = log(tmp_path / "a.jsonl", *(line(k, LEFT) for k in range(20)))
    b = log(tmp_path / "b.jsonl", *(line(k, RIGHT, source="other") for k in range(20)))
    out = tmp_path / "page.html"
    options = CompareOptions(str(clip), 2, out)
    console = quiet()
    summary = compare_logs(a, b, options, console)
    assert summary["frames_that_differ"] == 20
    assert "different sources: clip and other" in console.file.getvalue()
    page = out.read_text()
    assert page.count("data:image/jpeg") == 2
    compare_logs(a, b, options, console)
    out.write_text("<html>mine</html>")
    with pytest.raises(OutputError, match="another file"):
        compare_logs(a, b, options, console)
    with pytest.raises(OutputError):
        compare_logs(a, b, CompareOptions(out=a), console)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no frame"),
        ("{}\n", "line 1 is no row"),
        ("[1]\n", "line 1 is no row"),
        ('{"frame": 0, "x0": 1}\n', "line 1 is no row"),
        (json.dumps(line(0, LEFT)) + "\nnonsense\n", "line 2 is no row"),
    ],
)
def test_what_is_no_log_is_said_with_its_line(tmp_path, text, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_log(path)
    with pytest.raises(InputError, match="cannot read"):
        read_log(tmp_path / "missing.jsonl")


def test_logs_without_a_common_frame_are_refused(tmp_path):
    a = log(tmp_path / "a.jsonl", line(0, LEFT))
    b = log(tmp_path / "b.jsonl", line(7, LEFT))
    with pytest.raises(InputError, match="no frame in common"):
        differences(read_log(a), read_log(b))
