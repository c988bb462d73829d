"""Tracking in the frame loop, and its options."""

import json

import numpy as np
import pytest

from engines.errors import InputError
from engines.localizer import Localizer
from engines.options import EngineOptions
from realtime.capture import every_frame
from realtime.file_sinks import JsonlSink
from realtime.frames import Frame
from realtime.pipeline import run_frames
from realtime.sources.spec import open_source
from realtime.statistics import Run
from realtime.tracking.options import Following, FollowOptions, opened
from tests.engines.mock import MockEngine
from tests.realtime.media import SQUARE_PX, write_video


def logged(path, options, slots=1):
    engine = Localizer(MockEngine(96, slots=slots))
    with (
        open_source(str(write_video(path / "clip.mp4", 24))) as source,
        JsonlSink(path / "log.jsonl") as log,
    ):
        for record in run_frames(
            every_frame(source), engine, [log], Run(), following=opened(options, engine)
        ):
            assert record.outcome == "shown"
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("slots", [1, 3])
def test_each_row_says_where_it_is_and_how_sure_that_is(slots, tmp_path):
    rows = logged(tmp_path, FollowOptions(follow=True), slots)
    assert [row["frame"] for row in rows] == list(range(24))
    for row in rows[10:]:
        left = 4 + 3 * row["frame"]
        assert (row["x0"], row["y0"], row["x1"], row["y1"]) == pytest.approx(
            (left, 30, left + SQUARE_PX, 54), abs=6
        )
        assert 0 <= row["confidence"] <= 1
        assert len(row["raw"]) == 4
    assert {row["state"] for row in rows} <= {"searching", "following", "unsure", "lost"}


def test_it_abstains_where_it_is_not_sure_enough(tmp_path):
    rows = logged(tmp_path, FollowOptions(follow=True, min_score=1.0))
    assert all(row["x0"] is None and row["outcome"] == "shown" for row in rows)


def test_without_follow_rows_are_as_they_were(tmp_path):
    assert not {"state", "confidence", "track_id", "raw"} & set(
        logged(tmp_path, FollowOptions(False))[0]
    )
    engine = Localizer(MockEngine(96))
    assert opened(FollowOptions(False), engine) is None
    assert isinstance(opened(FollowOptions(follow=True), engine), Following)


def test_what_can_be_selected():
    assert FollowOptions(True, select="10, 20,30,40").box_in(100, 100) == (10, 20, 30, 40)
    assert FollowOptions(True, select="50,50").box_in(100, 200) == (35, 20, 65, 80)
    assert FollowOptions(True, select="95,50").box_in(100, 100) == (80, 35, 100, 65)
    assert FollowOptions(True).box_in(100, 100) is None
    named = FollowOptions(True, select="tabby, tabby cat")
    assert named.box_in(100, 100) is None
    assert named.beside(EngineOptions())[1].wanted_class == "tabby, tabby cat"
    assert FollowOptions(True, select="1,2").beside(EngineOptions())[1].wanted_class is None


@pytest.mark.parametrize("select", ["1,2,3", "30,20,10,40", "1,2,3,4,5"])
def test_a_place_that_is_none_is_refused(select):
    with pytest.raises(InputError, match="select"):
        FollowOptions(True, select=select)


@pytest.mark.parametrize("select", ["200,50", "120,10,180,40"])
def test_a_place_outside_the_frame_is_refused(select):
    with pytest.raises(InputError, match="outside"):
        FollowOptions(True, select=select).box_in(100, 100)


def test_what_is_selected_needs_follow():
    with pytest.raises(InputError, match="follow"):
        FollowOptions(False, select="cat")


def test_of_several_objects_each_has_its_entry_in_every_row(tmp_path):
    rows = logged(tmp_path, FollowOptions(follow=True, objects=2))
    assert all("objects" in row for row in rows)
    last = rows[-1]["objects"]
    assert [each["track_id"] for each in last] == [1]
    assert {*last[0]} == {
        *("class_id", "class_name", "score", "label", "sure", "x0", "y0", "x1", "y1"),
        *("state", "confidence", "track_id", "raw"),
    }
    assert [last[0][edge] for edge in ("x0", "y0", "x1", "y1")] == [
        rows[-1][edge] for edge in ("x0", "y0", "x1", "y1")
    ]
    assert "objects" not in logged(tmp_path, FollowOptions(follow=True))[-1]


def test_of_several_objects_those_that_are_not_sure_have_no_box(tmp_path):
    rows = logged(tmp_path, FollowOptions(follow=True, objects=2, min_score=1.0))
    assert all(row["x0"] is None for row in rows)
    assert all(each["x0"] is None for row in rows for each in row["objects"])
    assert any(row["objects"] for row in rows)


def test_the_engine_is_asked_for_several_objects_only_by_methods_that_find_several():
    follow = FollowOptions(True)
    notify, choice = follow.beside(EngineOptions(objects=3))
    assert (notify.objects, choice.objects) == (3, 1)
    notify, choice = follow.beside(EngineOptions(method="beam", objects=3))
    assert (notify.objects, choice.objects) == (3, 3)
    assert FollowOptions(False).beside(EngineOptions(objects=3)) == (
        FollowOptions(False),
        EngineOptions(objects=3),
    )


def test_without_boxes_nothing_can_be_followed():
    with pytest.raises(InputError, match="head none"):
        FollowOptions(True).beside(EngineOptions(head="none"))
    assert FollowOptions(True).beside(EngineOptions(method="beam", head="none"))[1].head == "none"


def test_without_follow_the_head_says_what_is_sure_enough():
    def least(options):
        return options.beside(EngineOptions())[1].least_confidence

    assert least(FollowOptions(min_score=0.5)) == 0.5
    assert least(FollowOptions()) is None, "the head's own limit"
    assert least(FollowOptions(True, min_score=0.5)) == 0.0
    assert least(FollowOptions(True)) == 0.0, "a tracker needs every box"


def test_films_are_followed_and_photos_are_not_unless_that_is_said():
    assert FollowOptions().for_source(photos=False).follow is True
    assert FollowOptions().for_source(photos=True).follow is False
    for said in (True, False):
        assert {FollowOptions(said).for_source(photos).follow for photos in (True, False)} == {said}
    with pytest.raises(InputError, match="follow"):
        FollowOptions(select="cat").for_source(photos=True)
    assert FollowOptions().beside(EngineOptions(head="none"))[0].follow is False
    following, choice = FollowOptions(select="cat").beside(EngineOptions(objects=3))
    assert (following.objects, choice.objects, choice.wanted_class) == (3, 3, "cat")


def test_photos_beside_films_are_not_followed_unless_that_is_asked_for():
    asked, unasked = FollowOptions(follow=True), FollowOptions().for_source(photos=False)
    assert unasked.follow
    image = np.zeros((96, 128, 3), np.uint8)
    for options, followed in ((asked, True), (unasked, False)):
        following = opened(options, Localizer(MockEngine(96)), photos={"photo"})
        frames = [Frame(image, name, 0, 0.0, 0, 0.0) for name in ("photo", "film")]
        assert [following.view(frame).tracker is not None for frame in frames] == [followed, True]
