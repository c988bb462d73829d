"""The follower: states, windows and numbers, with answers of a known engine."""

from collections import deque

import numpy as np
import pytest

from engines.boxes import overlap
from realtime.follow.follower import FOLLOWING, LOST, SEARCHING, Follower
from realtime.follow.trust import load_trust
from tests.realtime.follow.scenes import SIZE_PX, answer, misled, scene

RATE = 25.0


def followed(images, say, under_way=1, **options):
    """(boxes, tracks): ``say`` answers (number, window)."""
    follower, pending, found = Follower(*SIZE_PX, load_trust(), **options), deque(), []
    for number, image in enumerate(images):
        if len(pending) == under_way:
            found.append(follower.update(say(*pending.popleft())))
        pending.append((number, follower.window(image, number / RATE)))
    found += [follower.update(say(*each)) for each in pending]
    return [each.box_xyxy_px for each, _ in found], [track for _, track in found]


@pytest.mark.parametrize("under_way", [1, 3])
def test_a_moving_object_is_found_and_its_windows_close_in_on_it(under_way):
    images, truth = scene(30, pan=(2, 1))
    boxes, tracks = followed(images, lambda number, window: answer(truth[number], window), under_way)
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes[8:], truth[8:], strict=True))
    assert [track.state for track in tracks[:3]] == [SEARCHING] * 3
    assert {track.state for track in tracks[12:]} == {FOLLOWING}
    assert {track.track_id for track in tracks[12:]} == {1}
    areas = [(t.window_xyxy_px[2] - t.window_xyxy_px[0]) * (t.window_xyxy_px[3] - t.window_xyxy_px[1]) for t in tracks]
    assert areas[0] == SIZE_PX[0] * SIZE_PX[1]
    assert sorted(areas)[len(areas) // 2] < 0.5 * areas[0]
    assert sum(area == areas[0] for area in areas[12:]) >= 2  # now and then, the whole frame


def test_an_object_that_never_moves_keeps_the_box_that_the_engine_gives_it():
    images, truth = scene(30, speed=(0, 0))
    boxes, tracks = followed(images, lambda number, window: answer(truth[number], window))
    assert all(overlap(box, true) > 0.7 for box, true in zip(boxes[6:], truth[6:], strict=True))
    assert tracks[-1].state == FOLLOWING


def test_windows_are_whole_pixels_inside_the_frame():
    images, truth = scene(20, start=(180, 110), speed=(0, 0))
    _, tracks = followed(images, lambda number, window: answer(truth[number], window))
    for track in tracks:
        x0, y0, x1, y1 = track.window_xyxy_px
        assert 0 <= x0 < x1 <= SIZE_PX[0]
        assert 0 <= y0 < y1 <= SIZE_PX[1]
        assert all(edge == int(edge) for edge in track.window_xyxy_px)


def test_motion_alone_finds_what_the_engine_does_not_know():
    images, truth = scene(20, speed=(5, 2))
    boxes, _ = followed(images, misled)
    assert np.mean([overlap(box, true) > 0.5 for box, true in zip(boxes[8:], truth[8:], strict=True)]) > 0.6


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


def test_calm_boxes_jitter_less_than_what_they_are_made_of():
    images, truth = scene(40, speed=(2, 0))
    random = np.random.default_rng(0)

    def shaky(number, window):
        return answer(tuple(edge + random.normal(0, 6) for edge in truth[number]), window)

    boxes, tracks = followed(images, shaky)
    true = np.diff(truth[12:], axis=0)
    calm, raw = (np.abs(np.diff(each[12:], axis=0) - true).mean() for each in (boxes, [t.raw_xyxy_px for t in tracks]))
    assert calm < 0.7 * raw


@pytest.mark.parametrize("chosen", ["patch", "other"])
def test_what_the_user_draws_is_followed_though_something_else_moves_too(chosen):
    images, truth = scene(25, start=(20, 20), speed=(1, 0), second=(170, 100))
    if chosen == "other":
        truth = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(25)]
    boxes, tracks = followed(images, lambda number, window: answer(truth[number], window), selected_px=truth[0])
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes, truth, strict=True))
    assert tracks[0].window_xyxy_px != (0, 0, *SIZE_PX)


def test_the_map_is_put_in_its_place_in_the_frame():
    images, truth = scene(20)
    follower = Follower(*SIZE_PX, load_trust())
    for number, image in enumerate(images):
        found, track = follower.update(answer(truth[number], follower.window(image, number / RATE)))
    height, width = found.map_hw.shape
    hot = np.argwhere(found.map_hw > 0.8).mean(axis=0) / [height, width] * [SIZE_PX[1], SIZE_PX[0]]
    x0, y0, x1, y1 = truth[-1]
    assert y0 < hot[0] < y1
    assert x0 < hot[1] < x1
    assert track.row()["window"] == [round(edge) for edge in track.window_xyxy_px]


def test_another_object_can_be_chosen_while_one_is_followed():
    images, truth = scene(40, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(40)]
    follower, ids = Follower(*SIZE_PX, load_trust()), []
    for number, image in enumerate(images):
        if number == 20:
            follower.choose(other[20])
        target = (truth if number < 20 else other)[number]
        found, track = follower.update(answer(target, follower.window(image, number / RATE)))
        ids.append(track.track_id)
        assert number < 8 or overlap(found.box_xyxy_px, target) > 0.5
    assert ids[19] == 1
    assert ids[-1] == 2
