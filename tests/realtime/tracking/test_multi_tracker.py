"""Several trackers that take turns, with answers of a known engine, which sees what the window
shows.
"""

from collections import deque

import numpy as np
import pytest

from engines.boxes import overlap
from engines.localizer import Detection, Localization
from realtime.tracking.confidence import load_confidence_model
from realtime.tracking.multi_tracker import MultiTracker
from realtime.tracking.tracker import HELD
from tests.realtime.tracking.scenes import SIZE_PX, answer, scene

RATE = 25.0
FRAMES = 44


def two(frames=FRAMES, start=(20, 20), speed=(2, 0)):
    """Two patches that move apart: the images, and both boxes in each."""
    images, first = scene(frames, start=start, speed=speed, pan=(0, 0), second=(180, 105))
    return images, [(box, (180.0 - n, 105.0, 230.0 - n, 145.0)) for n, box in enumerate(first)]


def seen(boxes, window, score=0.6):
    """What an engine that finds one object says of a window: the one that it shows most of; on the
    whole frame, the first.
    """

    def inside(box):
        width, height = (min(box[i + 2], window[i + 2]) - max(box[i], window[i]) for i in (0, 1))
        return max(width, 0) * max(height, 0)

    return answer(max(boxes, key=inside), window, score)


def followed(images, truth, most=2, under_way=1, say=seen, **options):
    """Of each frame: the objects, the main answer, its track; and the number of engine calls."""
    several = MultiTracker(*SIZE_PX, load_confidence_model(), most, **options)
    pending, objects, mains, tracks = deque(), [], [], []
    calls = 0

    def update():
        main, track = several.update(pending.popleft())
        objects.append(several.objects)
        mains.append(main)
        tracks.append(track)

    for number, image in enumerate(images):
        if len(pending) == under_way:
            update()
        window = several.window(image, number / RATE)
        calls += window is not None
        pending.append(None if window is None else say(truth[number], window))
    while pending:
        update()
    return objects, mains, tracks, calls


def number_at(objects, box):
    """The number of the object that is followed there; None where none is."""
    return next(
        (each.track.track_id for each in objects if overlap(each.box_xyxy_px, box) > 0.5), None
    )


@pytest.mark.parametrize("under_way", [1, 2])
def test_two_that_move_are_both_followed_by_one_look_a_frame_and_keep_their_numbers(under_way):
    images, truth = two()
    objects, _, tracks, calls = followed(images, truth, under_way=under_way)
    assert calls <= len(images)
    late = range(FRAMES - 16, FRAMES)
    numbers = {tuple(number_at(objects[n], box) for box in truth[n]) for n in late}
    assert len(numbers) == 1, "each keeps its number"
    assert sorted(*numbers) == [1, 2]
    for n in late:
        assert sum(each.track.window_xyxy_px is not None for each in objects[n]) <= 1, (
            "one was looked for, the rest propagated"
        )
    looked = [each.track.track_id for n in late for each in objects[n] if each.track.window_xyxy_px]
    assert abs(looked.count(1) - looked.count(2)) <= 2, "in turns"
    assert all(track.window_xyxy_px for track in tracks), "what the engine saw, whomever it was for"


def test_the_main_object_is_the_first_and_its_answer_the_frames():
    images, truth = two()
    objects, mains, tracks, _ = followed(images, truth)
    assert mains[-1].box_xyxy_px == objects[-1][0].box_xyxy_px
    assert tracks[-1].track_id == objects[-1][0].track.track_id == 1
    assert {each.track.state for each in objects[-1]} <= set(HELD)


def test_a_lone_object_stays_one():
    images, first = scene(FRAMES, pan=(1, 0))
    objects, _, _, _ = followed(images, [(box,) for box in first], most=3)
    assert all(
        number_at(each, box) == 1 for each, box in zip(objects[-20:], first[-20:], strict=True)
    )
    assert {len(each) for each in objects[-20:]} == {1}


def test_what_is_selected_is_the_main_object_and_the_other_joins_it():
    images, truth = two()
    objects, mains, _, _ = followed(images, truth, selected_px=truth[0][1])
    assert all(overlap(mains[n].box_xyxy_px, truth[n][1]) > 0.5 for n in range(4, FRAMES))
    assert number_at(objects[-1], truth[-1][1]) == 1
    assert number_at(objects[-1], truth[-1][0]) == 2


def test_a_click_on_a_followed_object_makes_it_the_main_one():
    images, truth = two(FRAMES + 4)
    several = MultiTracker(*SIZE_PX, load_confidence_model(), 2)
    for number, image in enumerate(images):
        if number == FRAMES:
            before = {each.track.track_id for each in several.objects}
            several.choose(truth[number][1])
        main, track = several.update(seen(truth[number], several.window(image, number / RATE)))
    assert overlap(main.box_xyxy_px, truth[-1][1]) > 0.5
    assert {each.track.track_id for each in several.objects} == before == {1, 2}
    assert track.track_id == several.objects[0].track.track_id


def test_after_a_short_blackout_both_are_back_under_their_numbers():
    images, truth = two()
    images, truth = images + [np.zeros_like(images[0])] * 8, truth + [truth[-1]] * 8
    again, where = two(24, start=(100, 20), speed=(-2, 0))
    objects, _, _, _ = followed(images + again, truth + where)
    assert {number_at(objects[FRAMES - 1], box) for box in truth[FRAMES - 1]} == {1, 2}
    assert not objects[FRAMES + 4], "nothing is followed in the dark"
    assert {number_at(objects[-1], box) for box in where[-1]} == {1, 2}


def test_detections_of_a_method_that_finds_several_are_handed_over():
    """Nothing moves: only the detections tell that there is another."""
    images, first = scene(30, start=(20, 20), speed=(0, 0), second=(180, 105))
    still = [images[0]] * 30
    boxes = (first[0], (180.0, 105.0, 230.0, 145.0))

    def several_found(truth, window):
        one = [seen((box,), window) for box in truth]
        shown = [each for each in one if each.box_xyxy_px[2] - each.box_xyxy_px[0] > 20]
        found = tuple(Detection(each.box_xyxy_px, 3, "patch", 0.6) for each in shown)
        total = np.max([each.map_hw for each in one], axis=0)
        return (
            Localization(found[0].box_xyxy_px, 3, "patch", 0.6, total, found) if found else one[0]
        )

    objects, _, _, _ = followed(still, [boxes] * 30, say=several_found)
    assert {number_at(objects[-1], box) for box in boxes} == {1, 2}


def test_who_is_shown_nothing_but_anothers_object_gives_up():
    """The second patch goes out like a light; from then on every answer is the first one's box,
    wherever was looked.
    """
    images, truth = two()
    alone, first = scene(50, start=(20 + 2 * FRAMES, 20), speed=(0, 0))
    several, shown = MultiTracker(*SIZE_PX, load_confidence_model(), 2), []
    for number, image in enumerate(images + alone):
        window = several.window(image, number / RATE)
        lit = number < FRAMES
        several.update(seen(truth[number], window) if lit else answer(first[0], window))
        shown.append(several.objects)
    assert [len(shown[FRAMES - 1]), len(shown[-1])] == [2, 1]
    assert number_at(shown[-1], first[0]) == number_at(shown[FRAMES - 1], truth[FRAMES - 1][0])
