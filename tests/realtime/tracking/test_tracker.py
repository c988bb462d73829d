"""The tracker: boxes, states and numbers, with answers of a known engine."""

import json
from collections import deque

import numpy as np
import pytest

from engines.boxes import overlap
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.tracked import FOLLOWING, LOST, LOST_LOOKS, SEARCHING, UNSURE
from realtime.tracking.tracker import Tracker
from tests.realtime.tracking.scenes import SIZE_PX, answer, detections, scene, texture

RATE = 25.0
NEVER = (1e4, 1e4, 1e4 + 1, 1e4 + 1)


def tracker_of(**options):
    return Tracker(*SIZE_PX, load_confidence_model(), **options)


def followed(images, say, under_way=1, **options):
    """(boxes, tracks): ``say`` answers frame ``number``."""
    tracker, pending, found = tracker_of(**options), deque(), []
    for number, image in enumerate(images):
        if len(pending) == under_way:
            found.append(tracker.update(say(pending.popleft())))
        tracker.see(image, number / RATE)
        pending.append(number)
    found += [tracker.update(say(each)) for each in pending]
    return [each.box_xyxy_px for each, _ in found], [track for _, track in found]


@pytest.mark.parametrize("under_way", [1, 3])
def test_a_moving_object_is_followed_under_one_number(under_way):
    images, truth = scene(30, pan=(2, 1))
    boxes, tracks = followed(images, lambda number: answer(truth[number]), under_way)
    assert all(overlap(box, true) > 0.7 for box, true in zip(boxes, truth, strict=True))
    assert {track.state for track in tracks[5:]} == {FOLLOWING}
    assert {track.track_id for track in tracks[5:]} == {1}
    assert tracks[-1].confidence > 0.8


@pytest.mark.parametrize(("black", "number_after"), [(10, 1), (60, 2)])
def test_after_a_blackout_it_is_found_again_under_its_number_if_that_was_short(black, number_after):
    images, truth = scene(45, start=(20, 50))
    images = images[:20] + [np.zeros_like(images[0])] * black + images[20:]
    truth = truth[:20] + [NEVER] * black + truth[20:]
    boxes, tracks = followed(images, lambda number: answer(truth[number]))
    dark = tracks[20 : 20 + black]
    assert boxes[20 : 20 + black] == [None] * black
    assert {track.state for track in dark[:10]} == {LOST}
    assert {(track.confidence, track.track_id) for track in dark} == {(0.0, 0)}
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes[-24:], truth[-24:], strict=True))
    assert tracks[-1].track_id == number_after


def test_a_cut_ends_what_was_followed():
    images, truth = scene(15, start=(20, 20), speed=(1, 0))
    other = texture(SIZE_PX[1], SIZE_PX[0], 9)
    boxes, tracks = followed(
        [*images, *[other + np.uint8(n % 2) for n in range(20)]],
        lambda number: answer(truth[number] if number < 15 else NEVER),
    )
    assert tracks[14].state == FOLLOWING
    assert boxes[15:] == [None] * 20
    assert {track.state for track in tracks[15:]} == {SEARCHING}


def test_what_is_not_found_any_more_is_first_less_sure_and_then_lost():
    images, truth = scene(50, speed=(1, 0))
    boxes, tracks = followed(images, lambda number: answer(truth[number] if number < 20 else NEVER))
    states = [track.state for track in tracks]
    assert states[19] == FOLLOWING
    lost = states.index(LOST)
    assert LOST_LOOKS <= lost - 19 <= 2 * LOST_LOOKS
    assert set(states[20:lost]) <= {FOLLOWING, UNSURE}
    assert tracks[lost - 1].confidence < tracks[19].confidence
    assert overlap(boxes[lost - 1], truth[lost - 1]) > 0.5  # carried by the optical flow
    assert boxes[lost:] == [None] * (50 - lost)


def test_the_main_object_is_the_one_with_more_confidence_over_time():
    images, truth = scene(40, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(40)]

    def say(number):
        flash = 0.95 if number % 5 == 4 else 0.4
        return detections([truth[number], other[number]], [0.8, flash])

    boxes, tracks = followed(images, say)
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes, truth, strict=True))
    assert {track.track_id for track in tracks[5:]} == {tracks[-1].track_id}


def test_boxes_jitter_less_than_those_of_the_engine():
    images, truth = scene(40, speed=(2, 0))
    random = np.random.default_rng(0)

    def shaky(number):
        return answer(tuple(edge + random.normal(0, 3) for edge in truth[number]))

    boxes, tracks = followed(images, shaky)
    true = np.diff(truth[12:], axis=0)
    smooth, raw = (
        np.abs(np.diff(each[12:], axis=0) - true).mean()
        for each in (boxes, [t.raw_xyxy_px for t in tracks])
    )
    assert smooth < 0.5 * raw


@pytest.mark.parametrize("chosen", ["patch", "other"])
def test_what_the_user_selects_is_followed_though_something_else_is_surer(chosen):
    images, truth = scene(25, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(25)]
    mine, confidences = (truth, [0.5, 0.9]) if chosen == "patch" else (other, [0.9, 0.5])

    def say(number):
        return detections([truth[number], other[number]], confidences)

    boxes, tracks = followed(images, say, selected_px=mine[0])
    assert all(overlap(box, true) > 0.5 for box, true in zip(boxes, mine, strict=True))
    assert all(track.track_id for track in tracks)


def test_another_object_can_be_chosen_while_one_is_followed():
    images, truth = scene(40, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(40)]
    tracker, ids = tracker_of(), []
    for number, image in enumerate(images):
        if number == 20:
            tracker.choose(other[20])
        tracker.see(image, number / RATE)
        found, track = tracker.update(detections([truth[number], other[number]], [0.9, 0.5]))
        ids.append(track.track_id)
        target = (truth if number < 20 else other)[number]
        assert overlap(found.box_xyxy_px, target) > 0.5
    assert ids[19] != ids[20] == ids[-1]


def test_several_objects_keep_their_numbers():
    images, truth = scene(40, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(40)]
    tracker = tracker_of(most=2)
    for number, image in enumerate(images):
        tracker.see(image, number / RATE)
        tracker.update(detections([truth[number], other[number]], [0.8, 0.8]))
        if number == 5:
            first = {each.track.track_id: each.box_xyxy_px for each in tracker.objects}
    assert len(first) == 2
    last = {each.track.track_id: each.box_xyxy_px for each in tracker.objects}
    assert last.keys() == first.keys()
    for number, box in first.items():
        mine = truth if overlap(box, truth[5]) > 0.5 else other
        assert overlap(box, mine[5]) > 0.5
        assert overlap(last[number], mine[-1]) > 0.5


def test_a_frozen_camera_adds_nothing_to_what_is_known():
    images, truth = scene(10)
    images += [images[-1]] * 20
    _, tracks = followed(images, lambda number: answer(truth[min(number, 9)]))
    assert {(track.state, track.confidence) for track in tracks[9:]} == {
        (tracks[9].state, tracks[9].confidence)
    }


def test_a_tracker_goes_on_from_its_state_as_if_nothing_had_been():
    images, truth = scene(30, start=(20, 20), speed=(1, 0), second=(170, 100))
    other = [(170.0 - n, 100.0, 220.0 - n, 140.0) for n in range(30)]

    def run(tracker, numbers):
        found = []
        for number in numbers:
            tracker.see(images[number], number / RATE)
            answered = detections([truth[number], other[number]], [0.4, 0.3])
            found.append((tracker.update(answered)[1], tracker.objects))
        return found

    whole, first, second = (tracker_of(most=2) for _ in range(3))
    run(whole, range(15))
    run(first, range(15))
    second.restore(json.loads(json.dumps(first.json())))
    assert run(whole, range(15, 30)) == run(second, range(15, 30))
