"""The tracker: states, windows and numbers, with answers of a known engine."""

from collections import deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from engines.boxes import overlap
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.tracker import (
    FOLLOWING,
    LOST,
    PROPAGATE_UNSURE_FRAMES,
    SCALE,
    SEARCHING,
    WIDENED,
    Tracker,
)
from tests.realtime.tracking.scenes import SIZE_PX, answer, misled, scene

RATE = 25.0


def followed(images, say, under_way=1, confidence_model=None, **options):
    """(boxes, tracks): ``say`` answers (number, window)."""
    tracker, pending, found = (
        Tracker(*SIZE_PX, confidence_model or load_confidence_model(), **options),
        deque(),
        [],
    )
    for number, image in enumerate(images):
        if len(pending) == under_way:
            found.append(tracker.update(say(*pending.popleft())))
        pending.append((number, tracker.window(image, number / RATE)))
    found += [tracker.update(say(*each)) for each in pending]
    return [each.box_xyxy_px for each, _ in found], [track for _, track in found]


@pytest.mark.parametrize("under_way", [1, 3])
def test_a_moving_object_is_found_and_its_windows_close_in_on_it(under_way):
    images, truth = scene(30, pan=(2, 1))
    boxes, tracks = followed(
        images, lambda number, window: answer(truth[number], window), under_way
    )
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes[8:], truth[8:], strict=True))
    assert [track.state for track in tracks[:3]] == [SEARCHING] * 3
    assert {track.state for track in tracks[12:]} == {FOLLOWING}
    assert {track.track_id for track in tracks[12:]} == {1}
    windows = [track.window_xyxy_px for track in tracks]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in filter(None, windows)]
    assert areas[0] == SIZE_PX[0] * SIZE_PX[1]
    assert sorted(areas)[len(areas) // 2] < 0.5 * areas[0]
    assert areas[5:].count(areas[0]) >= 2  # now and then, the whole frame


@pytest.mark.parametrize("under_way", [1, 2])
def test_while_it_is_followed_every_other_frame_is_not_looked_at(under_way):
    images, truth = scene(40, pan=(2, 1))
    boxes, tracks = followed(
        images, lambda number, window: answer(truth[number], window), under_way
    )
    propagated = [track.window_xyxy_px is None for track in tracks]
    assert not any(propagated[:6])
    assert sum(propagated[12:]) >= 10
    assert not any(both == (True, True) for both in pairwise(propagated))
    for number in np.flatnonzero(propagated):
        assert overlap(boxes[number], truth[number]) > 0.5
        assert tracks[number].confidence == tracks[number - 1].confidence
        assert (tracks[number].state, tracks[number].window_xyxy_px) == (FOLLOWING, None)


def test_while_nothing_is_sure_the_first_frames_are_all_looked_at():
    images, _ = scene(40, speed=(0, 0))
    _, tracks = followed(
        images, misled, confidence_model=replace(load_confidence_model(), bias=-50.0)
    )
    looks = [track.window_xyxy_px is not None for track in tracks]
    assert {track.state for track in tracks} == {SEARCHING}
    assert all(looks[:PROPAGATE_UNSURE_FRAMES])
    assert 0.4 < np.mean(looks[PROPAGATE_UNSURE_FRAMES:]) < 0.7


def test_every_frame_is_looked_at_where_that_is_asked():
    images, truth = scene(30, pan=(2, 1))
    _, tracks = followed(
        images, lambda number, window: answer(truth[number], window), every_frame=True
    )
    assert all(track.window_xyxy_px for track in tracks)


def test_an_object_that_never_moves_keeps_the_box_that_the_engine_gives_it():
    images, truth = scene(30, speed=(0, 0))
    boxes, tracks = followed(images, lambda number, window: answer(truth[number], window))
    assert all(overlap(box, true) > 0.7 for box, true in zip(boxes[6:], truth[6:], strict=True))
    assert tracks[-1].state == FOLLOWING


@pytest.mark.parametrize(("reaches_by", "scale"), [(0, SCALE[WIDENED]), (-12, SCALE[FOLLOWING])])
def test_where_a_box_reaches_the_edge_of_its_window_the_next_one_is_larger(reaches_by, scale):
    images, truth = scene(16, speed=(0, 0))
    tracker = Tracker(*SIZE_PX, load_confidence_model(), truth[0], every_frame=True)
    for number, image in enumerate(images):
        window = tracker.window(image, number / RATE)
        last = number == 14
        said = (truth[0][0], truth[0][1], window[2] + reaches_by, truth[0][3]) if last else truth[0]
        found, track = tracker.update(answer(said, window))
        if last:
            height = found.box_xyxy_px[3] - found.box_xyxy_px[1]
    assert track.state == FOLLOWING
    assert window[3] - window[1] == pytest.approx(scale * height, abs=8)


def test_windows_are_whole_pixels_inside_the_frame():
    images, truth = scene(20, start=(180, 110), speed=(0, 0))
    _, tracks = followed(images, lambda number, window: answer(truth[number], window))
    for window in filter(None, (track.window_xyxy_px for track in tracks)):
        x0, y0, x1, y1 = window
        assert 0 <= x0 < x1 <= SIZE_PX[0]
        assert 0 <= y0 < y1 <= SIZE_PX[1]
        assert all(edge == int(edge) for edge in window)


def test_motion_alone_finds_what_the_engine_does_not_know():
    images, truth = scene(20, speed=(5, 2))
    boxes, _ = followed(images, misled, every_frame=True)
    assert (
        np.mean([overlap(box, true) > 0.5 for box, true in zip(boxes[8:], truth[8:], strict=True)])
        > 0.6
    )


@pytest.mark.parametrize(("black", "number_after"), [(10, 1), (60, 2)])
def test_after_a_blackout_it_is_found_again_under_its_number_if_that_was_short(black, number_after):
    images, truth = scene(45, start=(20, 50))
    images = images[:20] + [np.zeros_like(images[0])] * black + images[20:]
    truth = truth[:20] + [truth[19]] * black + truth[20:]
    boxes, tracks = followed(images, lambda number, window: answer(truth[number], window))
    assert {track.state for track in tracks[20 : 20 + black]} == {LOST}
    assert {track.confidence for track in tracks[20 : 20 + black]} == {0.0}
    assert {track.track_id for track in tracks[20 : 20 + black]} == {0}
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes[-20:], truth[-20:], strict=True))
    assert tracks[-1].track_id == number_after


def test_smoothed_boxes_jitter_less_than_raw_ones():
    images, truth = scene(40, speed=(2, 0))
    random = np.random.default_rng(0)

    def shaky(number, window):
        return answer(tuple(edge + random.normal(0, 6) for edge in truth[number]), window)

    boxes, tracks = followed(images, shaky)
    true = np.diff(truth[12:], axis=0)
    smoothed, raw = (
        np.abs(np.diff(each[12:], axis=0) - true).mean()
        for each in (boxes, [t.raw_xyxy_px for t in tracks])
    )
    assert smoothed < 0.7 * raw


@pytest.mark.parametrize("chosen", ["patch", "other"])
def test_what_the_user_draws_is_followed_though_something_else_moves_too(chosen):
    images, truth = scene(25, start=(20, 20), speed=(1, 0), second=(170, 100))
    if chosen == "other":
        truth = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(25)]
    boxes, tracks = followed(
        images, lambda number, window: answer(truth[number], window), selected_px=truth[0]
    )
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes, truth, strict=True))
    assert tracks[0].window_xyxy_px != (0, 0, *SIZE_PX)


def test_the_map_is_put_in_its_place_in_the_frame():
    images, truth = scene(20)
    tracker = Tracker(*SIZE_PX, load_confidence_model())
    for number, image in enumerate(images):
        found, _ = tracker.update(answer(truth[number], tracker.window(image, number / RATE)))
    height, width = found.map_hw.shape
    hot = np.argwhere(found.map_hw > 0.8).mean(axis=0) / [height, width] * [SIZE_PX[1], SIZE_PX[0]]
    x0, y0, x1, y1 = truth[-1]
    assert y0 < hot[0] < y1
    assert x0 < hot[1] < x1


def test_another_object_can_be_chosen_while_one_is_followed():
    images, truth = scene(40, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(40)]
    tracker, ids = Tracker(*SIZE_PX, load_confidence_model()), []
    for number, image in enumerate(images):
        if number == 20:
            tracker.choose(other[20])
        target = (truth if number < 20 else other)[number]
        found, track = tracker.update(answer(target, tracker.window(image, number / RATE)))
        ids.append(track.track_id)
        assert number < 8 or overlap(found.box_xyxy_px, target) > 0.5
    assert ids[19] == 1
    assert ids[-1] == 2
