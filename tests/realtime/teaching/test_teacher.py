import time

import cv2
import numpy as np
import pytest

from engines.dense_names import BoxName
from engines.errors import InputError, ModelError
from engines.explain import Cue, Explanation, Rival
from engines.localizer import Detection, Localization
from realtime.frames import Frame, FrameRecord
from realtime.teaching.labels import Box
from realtime.teaching.teacher import MOST_HELD, Teacher, advice
from realtime.teaching.why import explained_in_words

MAP = np.zeros((4, 4), np.float32)
BOX = (10.0, 8.0, 40.0, 30.0)


def record(index, place_px=0, confidence=0.9, source="cam", detections=()):
    image = np.full((48, 64, 3), 40, np.uint8)
    image[10:30, place_px : place_px + 12] = 220
    name = BoxName("cat", "", 0.9)
    found = Localization(BOX, 0, "tabby", 0.5, MAP, detections, confidence, name)
    return FrameRecord(
        Frame(image, source, index, index / 30, time.monotonic_ns(), 0.1), found=found
    )


@pytest.fixture
def teacher(tmp_path):
    found = Teacher(tmp_path / "labels", None, "it is a test")
    found.opened()
    return found


def test_a_frame_is_held_as_it_came_with_drafts(teacher, monkeypatch):
    monkeypatch.setattr("realtime.teaching.teacher.FREEZE_S", 0.0)
    with pytest.raises(InputError, match="no picture of cam yet"):
        teacher.freeze("cam")
    detections = tuple(
        Detection(box, 0, "tabby", 0.5, sure, BoxName("cat", "", 0.9))
        for box, sure in ((BOX, 0.6), ((1.0, 2.0, 9.0, 9.0), 0.8))
    )
    teacher.write(record(7, detections=detections), None)
    held = teacher.freeze("cam")
    assert held.key == "cam-000007"
    assert [(each.name, each.confidence) for each in held.drafts] == [("cat", 0.8), ("cat", 0.6)]
    image = cv2.imdecode(np.frombuffer(held.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (48, 64, 3)
    assert teacher.boxes_of(held) is None
    small = cv2.imdecode(np.frombuffer(teacher.thumb(held.key), np.uint8), cv2.IMREAD_COLOR)
    assert small.shape[1] == 168


def test_why_a_frame_has_its_answer_where_nothing_explains(teacher):
    teacher.write(record(1, 0, 0.5), None)
    key = teacher.freeze("cam").key
    why = teacher.why(key)
    assert "The box 'cat' is right with a probability of 50 %." in why["words"]
    assert "The likeliest class of the picture is 'tabby' (50 %)." in why["words"]
    assert (why["nearest"], why["explanation"]) == ([], None)
    over = cv2.imdecode(np.frombuffer(teacher.map_over(key), np.uint8), cv2.IMREAD_COLOR)
    assert over.shape == (48, 64, 3)
    again = Teacher(teacher.labels.folder)
    teacher.save(key, [])
    with pytest.raises(InputError, match="no map of this frame"):
        again.map_over("cam-000001.jpg")


def test_the_nearest_labelled_frames_come_with_their_names(teacher):
    for index, place in ((2, 30), (3, 2), (4, 50), (5, 4), (6, 0)):
        teacher.write(record(index, place), None)
        key = teacher.freeze("cam").key
        if index < 6:
            teacher.save(key, [Box(f"mug {index}", BOX)])
    near = teacher.why(key)["nearest"]
    assert [each["file"] for each in near] == ["cam-000003.jpg", "cam-000005.jpg", "cam-000002.jpg"]
    assert near[0]["names"] == ["mug 3"]


def explanation(box=BOX, confidence=0.6):
    cues = (Cue("area", "its size", -4.0, -2.0, -0.9), Cue("alike", "how many agree", 6, 4, 0.5))
    names = (Rival("cat", 0.6), Rival("no object", 0.3))
    return Explanation(box, "cat", confidence, names, (), cues, 0.1, (320, 192), (30, 9), MAP)


def test_a_box_is_explained_by_what_explains(tmp_path):
    asked = []

    def explain(image_bgr, box_xyxy_px):
        asked.append((image_bgr.shape, box_xyxy_px))
        if box_xyxy_px == (0.0, 0.0, 1.0, 1.0):
            raise ModelError("there is no such thing")
        return explanation(box_xyxy_px or BOX)

    teacher = Teacher(tmp_path / "labels", explain=explain)
    teacher.opened()
    teacher.write(record(1, 0, 0.9), None)
    key = teacher.freeze("cam").key
    why = teacher.why(key, (11.0, 8.0, 40.0, 30.0))
    assert asked == [((48, 64, 3), (11.0, 8.0, 40.0, 30.0))]
    assert why["words"] == [
        "In this frame alone, the box 'cat' is right with a probability of 60 %.",
        "Followed over frames, it counts as 90 %.",
        "For it speaks how many agree (more than usual).",
        "Against it speaks its size (less than usual).",
        "It could be no object at all (30 %).",
        "The network sees it with 30 x 9 pixels only: go nearer, or start it with a larger input size.",
    ]
    assert why["explanation"]["cues"][0]["share"] == -0.9
    words = teacher.why(key, (0.0, 0.0, 1.0, 1.0))["words"]
    assert words[-1] == "It cannot be explained further: there is no such thing."
    teacher.save(key, [Box("mug", BOX)])
    again = Teacher(teacher.labels.folder, explain=explain)
    assert again.why("cam-000001.jpg")["explanation"]["label"] == "cat"
    assert again.map_over("cam-000001.jpg")[:2] == b"\xff\xd8"


def test_what_has_no_candidate_is_to_be_drawn():
    none = Explanation(None, "object", None, (), (), (), None, (320, 192), None, MAP)
    assert explained_in_words(none)[0].startswith("The head has no candidate there. Draw the right")


def test_nothing_is_kept_while_nobody_teaches(tmp_path):
    teacher = Teacher(tmp_path)
    teacher.write(record(1), None)
    assert not teacher.is_open
    assert teacher.state()["suggested"] == []


def test_what_was_shown_before_nobody_taught_is_not_frozen(teacher, monkeypatch):
    monkeypatch.setattr("realtime.teaching.teacher.FREEZE_S", 0.0)
    teacher.write(record(1), None)
    monkeypatch.setattr("realtime.teaching.teacher.OPEN_S", 0.0)
    teacher.opened()
    monkeypatch.setattr("realtime.teaching.teacher.OPEN_S", 8.0)
    with pytest.raises(InputError, match="no picture"):
        teacher.freeze("cam")


def test_labels_are_saved_found_again_and_undone(teacher, tmp_path):
    teacher.write(record(3), None)
    key = teacher.freeze("cam").key
    teacher.save(key, [Box("my mug", BOX)])
    teacher.save(key, [Box("my mug", BOX), Box("my cup", (1.0, 1.0, 9.0, 9.0))])
    state = teacher.state()
    assert (state["images"], state["boxes"], state["names"]) == (1, 2, {"my mug": 1, "my cup": 1})
    again = Teacher(tmp_path / "labels")
    (listed,) = again.state()["labelled"]
    held = again.look_at(listed["file"])
    assert [each.name for each in again.boxes_of(held)] == ["my mug", "my cup"]
    assert teacher.undo().key == key
    assert [each.name for each in teacher.boxes_of(teacher.held(key))] == ["my mug"]
    teacher.remove(key)
    assert teacher.boxes_of(teacher.held(key)) is None
    for _ in range(2):
        teacher.undo()
    with pytest.raises(InputError, match="nothing to undo"):
        teacher.undo()
    with pytest.raises(InputError, match="this frame is gone"):
        teacher.held("cam-999999")


def test_unsure_frames_and_others_than_those_labelled_are_suggested(teacher):
    frames = {1: (0, 0.97), 2: (1, 0.97), 3: (25, 0.5), 4: (50, 0.97)}
    for index, (place, sure) in frames.items():
        teacher.write(record(index, place, sure), None)
        teacher.suggest()
    assert teacher.suggest()[0].key == "cam-000003", "the unsure one"
    teacher.save("cam-000001", [])
    keys = [each.key for each in teacher.suggest()]
    assert "cam-000001" not in keys, "it is labelled"
    assert keys.index("cam-000004") < keys.index("cam-000002"), "it looks like the labelled one"
    assert keys[0] == "cam-000003"


def test_frames_that_nobody_chose_go_first(teacher):
    teacher.write(record(0), None)
    chosen = teacher.freeze("cam").key
    for index in range(1, MOST_HELD + 5):
        teacher.write(record(index, index % 50), None)
        teacher.suggest()
    assert teacher.held(chosen).key == chosen
    teacher.save(chosen, [Box("mug", BOX)])
    for index in range(100, 100 + MOST_HELD):
        teacher.write(record(index, 3), None)
        key = teacher.freeze("cam").key
        assert teacher.held(key).key == key, "it looks like others, and somebody chose it"
    assert [each.name for each in teacher.boxes_of(teacher.held(chosen))] == ["mug"]


def test_a_run_that_cannot_learn_says_why(teacher):
    for ask in (teacher.learn, teacher.stop, lambda: teacher.use(True), lambda: teacher.keep("a")):
        with pytest.raises(InputError, match="this run cannot learn: it is a test"):
            ask()


@pytest.mark.parametrize(
    ("names", "empty", "words"),
    [
        ({}, 0, "Freeze a frame"),
        ({"mug": 3}, 0, "2 more boxes, then it can learn"),
        ({"mug": 4}, 0, "1 more box, then"),
        ({"mug": 6}, 0, "12 boxes in different places are better"),
        ({"mug": 12}, 0, "nothing in them"),
        ({"mug": 12, "cup": 1}, 0, "'cup' has 1 box:"),
        ({"mug": 12}, 2, "It can learn now."),
    ],
)
def test_the_advice_says_what_to_do_next(names, empty, words):
    labels = {f"{name}{i}": (Box(name, BOX),) for name in names for i in range(names[name])}
    labels |= {f"empty{i}": () for i in range(empty)}
    assert words in advice(names, labels)
