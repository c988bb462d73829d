"""What counts as an event: found in rows as a log holds them."""

import base64

import cv2
import numpy as np
import pytest

from realtime.events import PHOTOS, EventFinder, EventRules, summed_up, surest, thumbnail

RATE_FPS = 10


def row(frame, *objects, tracked=True, outcome="shown"):
    """A row of a log with the objects ``(number, name, confidence)``."""
    parts = [
        {
            "track_id": number,
            "label": name,
            "class_name": name,
            "confidence": confidence,
            "x0": 10.0,
            "y0": 20.0,
            "x1": 50.0,
            "y1": 60.0,
        }
        for number, name, confidence in objects
    ]
    common = {"source": "clip", "frame": frame, "pts_s": frame / RATE_FPS, "outcome": outcome}
    nothing = {"label": None, "class_name": "road", "x0": None, "confidence": 0.0}
    if tracked:
        return {**nothing, **common, "track_id": 0, "objects": parts}
    parts = [{key: each[key] for key in each if key != "track_id"} for each in parts]
    several = {"detections": parts} if len(parts) > 1 else {}
    return {**(parts[0] if parts else nothing), **common, **several}


def found(rows, rules=EventRules()):
    """The events of rows, and the changes in their order."""
    finder = EventFinder(rules)
    changes = [change for each in rows for change in finder.add(each)] + finder.end()
    return [event for what, event in changes if what == "began"], [
        (what, event.number) for what, event in changes
    ]


def test_an_object_that_comes_and_goes_is_one_event():
    seen = [row(k, (3, "dog (beagle)" if k % 3 else "dog", 0.6 + k / 100)) for k in range(5, 25)]
    events, changes = found([*map(row, range(5)), *seen, *map(row, range(25, 60))])
    assert changes == [("began", 1), ("ended", 1)]
    line = events[0].row()
    assert (line["name"], line["track_id"], line["frames"]) == ("dog", 3, 20)
    assert (line["begin_s"], line["end_s"]) == (0.5, 2.4)
    assert line["confidence"] == pytest.approx(0.84)


def test_what_is_gone_at_once_is_no_event_and_a_short_gap_does_not_end_one():
    flash = [row(0), row(1, (1, "cat", 0.9)), *map(row, range(2, 40))]
    assert found(flash) == ([], [])
    gap = [row(k, *([] if 10 <= k < 25 else [(1, "cat", 0.9)])) for k in range(40)]
    assert found(gap)[1] == [("began", 1), ("ended", 1)]
    longer = [row(k, *([] if 10 <= k < 35 else [(1, "cat", 0.9)])) for k in range(60)]
    assert found(longer)[1] == [("began", 1), ("ended", 1), ("began", 2), ("ended", 2)]


def test_objects_with_numbers_are_apart_and_without_them_names_are():
    both = [row(k, (1, "car", 0.9), (2, "car", 0.8)) for k in range(20)]
    assert [event.key for event in found(both)[0]] == [1, 2]
    frames = [row(k, (1, "car", 0.9), (2, "dog", 0.8), tracked=False) for k in range(20)]
    events, _ = found(frames)
    assert [event.key for event in events] == ["car", "dog"]
    assert all(event.row()["track_id"] is None for event in events)
    assert summed_up([event.row() for event in events + events]) == "car twice, dog twice"


def test_frames_that_failed_or_show_nothing_do_not_count():
    rows = [row(k, (1, "car", 0.9), outcome="failed" if k % 2 else "shown") for k in range(20)]
    assert found(rows)[0][0].frames == 10
    unsure = [row(k, (1, "car", 0.6)) for k in range(20)]
    assert found(unsure, EventRules(least_confidence=0.7)) == ([], [])
    assert len(found(unsure, EventRules(least_confidence=0.5))[0]) == 1


def test_frames_far_apart_do_not_end_an_event():
    rows = [row(k, (1, "car", 0.9)) for k in range(0, 400, 50)]
    assert found(rows)[1] == [("began", 1), ("ended", 1)]


def test_photos_give_one_event_for_each_name():
    rows = [row(50 * k, (1, "cat" if k % 3 else "dog", 0.9), tracked=False) for k in range(9)]
    events, _ = found(rows, PHOTOS)
    assert {event.name: event.frames for event in events} == {"dog": 3, "cat": 6}
    assert summed_up([event.row() for event in events], photos=True) == "cat in 6, dog in 3"


def test_the_best_frame_is_sure_and_large_and_gives_the_picture():
    finder = EventFinder()
    boxes = []
    for k in range(30):
        part = row(k, (1, "car", 0.9))
        part["objects"][0]["x1"] = 20.0 + 10 * (15 - abs(15 - k))
        for change, began in finder.add(
            part, lambda box: boxes.append(box) or f"picture {len(boxes)}"
        ):
            assert change == "began"
            event = began
    assert 12 <= event.best_frame <= 15
    assert event.picture == f"picture {len(boxes)}"
    assert event.box_xyxy_px == boxes[-1]


def test_only_the_surest_are_kept_in_their_order():
    rows = [row(k, (1, "car", 0.9), (2, "dog", 0.5), (3, "cat", 0.7)) for k in range(20)]
    assert [event.name for event in surest(found(rows)[0], 2)] == ["car", "cat"]


def test_a_thumbnail_shows_the_box_and_what_is_around_it():
    image = np.full((400, 600, 3), 30, np.uint8)
    image[100:300, 200:400] = (0, 0, 250)
    stored = np.frombuffer(base64.b64decode(thumbnail(image, (200, 100, 400, 300))), np.uint8)
    small = cv2.imdecode(stored, cv2.IMREAD_COLOR)
    assert small.shape == (160, 160, 3)
    assert small[80, 80, 2] > 200
    assert small[3, 3, 2] < 80
    assert thumbnail(image, (599.5, 399.5, 640, 480))  # hardly inside
