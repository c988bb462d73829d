"""Drawing by a look, and the calm of drawn boxes; what was found is never touched."""

import json
import math
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest

from engines.dense_names import BoxName
from engines.errors import InputError
from engines.localizer import Detection, Localization, Localizer
from realtime.annotate import (
    LIGHT_BGR,
    NOTHING,
    NOWHERE,
    OBJECTS_BGR,
    PREDICTED_BGR,
    SHADE_BGR,
    TRUTH_BGR,
    Annotator,
    Look,
    draw,
    free_place,
    heat_picture,
    ink_on,
    inset_places,
    label,
    luminance,
    outlines_of,
)
from realtime.capture import every_frame
from realtime.file_sinks import JsonlSink
from realtime.frames import Frame, Track, Tracked
from realtime.pipeline import Live, run_frames
from realtime.session import Settings
from realtime.smoothing import BoxSmoother, OneEuro
from realtime.sources.images import Images
from realtime.statistics import Run as RunTimes
from tests.engines.mock import MockEngine
from tests.realtime.media import picture

SPOT = np.zeros((32, 32), np.float32)
SPOT[8:16, 8:16] = 1


def found(box=(40.0, 40.0, 200.0, 180.0), map_hw=SPOT):
    return Localization(box, 3, "cat", 0.75, map_hw)


def frame(index=0, pts_s=0.0, source="cam", size=(240, 320), segment=0):
    image = np.full((*size, 3), 128, np.uint8)
    return Frame(image, source, index, pts_s, time.monotonic_ns(), 0.0, segment=segment)


def has_colour(picture, bgr):
    return bool((picture == np.array(bgr, np.uint8)).all(axis=2).any())


def test_the_box_and_the_heat_map_can_be_left_out():
    image = frame().image_bgr
    assert (draw(image, found(), look=Look(box=False, heat_map="off")) == image).all()
    only_box = draw(image, found(), look=Look(heat_map="off"))
    assert has_colour(only_box, PREDICTED_BGR)
    assert (only_box[190:, 230:] == 128).all()
    only_inset = draw(image, found(), look=Look(box=False))
    assert not has_colour(only_inset, PREDICTED_BGR)
    assert (only_inset[:150] == 128).all()
    assert (only_inset[190:, 230:] != 128).any()


def test_the_label_says_what_it_is_and_how_sure_the_box_is():
    sure = replace(found(), confidence=0.814, box_name=BoxName("cat", "tabby", 0.9))
    assert label(sure) == "cat (tabby) 81 %"
    assert label(replace(sure, confidence=0.55, unsure=True)) == "cat (tabby) 55 %, unsure"
    assert label(replace(sure, box_name=BoxName("object", "", 0.0))) == "object 81 %"


def test_where_nothing_tells_how_sure_a_box_is_the_label_gives_the_score_of_the_class():
    assert label(found()) == "cat, score 0.75"
    assert label(replace(found(), score=0.0)) == "cat"


def test_a_frame_without_a_sure_box_says_so_in_words(monkeypatch):
    words = []
    monkeypatch.setattr(cv2, "putText", lambda _canvas, text, *_: words.append(text))
    image, look = frame().image_bgr, Look(heat_map="off")
    drawn = draw(image, replace(found(), confidence=0.314).sure(0.5), look=look)
    assert words == [NOTHING] == ["nothing sure in view"]
    assert not has_colour(drawn, PREDICTED_BGR)
    draw(image, found(None), look=look)
    assert words[1:] == ["cat, score 0.75"], "without a head there is no box to be sure of"
    draw(image, replace(found(None), confidence=0.1), look=look, objects=[tracked(1, None)])
    assert words[2:] == [NOTHING]


def test_an_unsure_box_is_dashed_and_a_sure_one_is_not():
    image, look = frame().image_bgr, Look(heat_map="off")
    sure = draw(
        image, replace(found(), confidence=0.9, box_name=BoxName("cat", "", 0.9)), look=look
    )
    unsure = draw(
        image,
        replace(found(), confidence=0.6, box_name=BoxName("cat", "", 0.9), unsure=True),
        look=look,
    )
    share = [(each[60:170, 41] == PREDICTED_BGR).all(axis=1).mean() for each in (sure, unsure)]
    assert share[0] == 1
    assert 0.3 < share[1] < 0.8
    assert (unsure[178, 198] == PREDICTED_BGR).all(), "a corner has dashes"


def test_the_inset_leaves_the_box_free_and_stays_where_it_went():
    annotator, map_hw = Annotator(), SPOT
    low = found((200.0, 150.0, 318.0, 238.0), map_hw)

    def inset_at(picture, corner):
        return bool((picture[corner] == LIGHT_BGR).all())

    lower_right = (237, 313)
    first = annotator.paint(frame(0, segment=1), found(), "", Look())
    assert inset_at(first, lower_right)
    second = annotator.paint(frame(1, segment=1), low, "", Look())
    assert not inset_at(second, lower_right)
    third = annotator.paint(frame(2, segment=1), found(), "", Look())
    assert not inset_at(third, lower_right), "it does not jump back and forth"
    assert inset_at(annotator.paint(frame(3, segment=2), found(), "", Look()), lower_right), (
        "a segment's pictures do not depend on the segments before it"
    )


@pytest.mark.parametrize(
    "boxes",
    [
        [(0.0, 0.0, 640.0, 480.0)],
        [(20.0, 10.0, 630.0, 470.0)],
        [(300.0, 200.0, 640.0, 480.0)],
        [(5.0, 5.0, 300.0, 470.0), (330.0, 240.0, 639.0, 470.0)],
        [(0.0, 0.0, 640.0, 250.0), (0.0, 230.0, 640.0, 480.0)],
    ],
)
def test_the_inset_covers_no_object_and_is_smaller_or_gone_where_there_is_no_room(boxes):
    status = "cam 12   9.1 ms"
    places = inset_places(heat_picture(found(), 480, 640, Look()), (640, 480), status)
    place = free_place(places, boxes, 0)
    canvas = np.zeros((480, 640), np.uint8)
    for x0, y0, x1, y1 in boxes:
        middle, axes = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0 - 8, y1 - y0 - 8)
        cv2.ellipse(canvas, (middle, axes, 0.0), 1, cv2.FILLED)
    assert (place == NOWHERE) is (len(boxes) == 2 and boxes[0][0] == 0)
    if place != NOWHERE:
        left, top, right, bottom = map(int, places[place])
        assert not canvas[top:bottom, left:right].any()


def test_an_inset_that_grew_small_grows_again_and_does_not_change_for_little():
    places = inset_places(heat_picture(found(), 480, 640, Look()), (640, 480), "")
    small = free_place(places, [(0.0, 0.0, 640.0, 480.0)], 0)
    assert small >= 8, "the smallest size"
    assert free_place(places, [(2.0, 2.0, 636.0, 478.0)], small) == small
    assert free_place(places, [(2.0, 2.0, 300.0, 300.0)], small) == 0
    assert free_place(places, [(0.0, 0.0, 480.0, 380.0)], 0) == 0


def test_a_label_leaves_other_objects_free_and_so_does_the_line_of_nothing():
    image = np.full((480, 640, 3), 128, np.uint8)
    one = Detection((200.0, 200.0, 400.0, 300.0), 3, "cat", 0.7, 0.9, BoxName("cat", "", 0.9))
    above = replace(one, box_xyxy_px=(150.0, 100.0, 450.0, 195.0))
    answer = Localization(
        one.box_xyxy_px, 3, "cat", 0.7, SPOT, (one, above), 0.9, box_name=BoxName("cat", "", 0.9)
    )
    drawn = draw(image, answer, look=Look(heat_map="off"))
    inside = drawn[112:184, 165:435]
    assert (inside == 128).all(), "the label of the lower box is below it"
    nothing = Localization(None, 3, "cat", 0.7, SPOT)
    upper_left = draw(image, nothing, place=3)
    whole_inset = draw(image, nothing, place=3, look=Look(box=False))
    left, top, right, bottom = map(
        int, inset_places(heat_picture(nothing, 480, 640, Look()), (640, 480), "")[3]
    )
    area = np.s_[top:bottom, left:right]
    assert (upper_left[area] == whole_inset[area]).all()


def test_labels_do_not_lie_on_each_other():
    image, look = np.full((480, 640, 3), 128, np.uint8), Look(heat_map="off")
    one = Detection((100.0, 100.0, 300.0, 300.0), 3, "cat", 0.7, 0.9, BoxName("cat", "", 0.9))
    other = replace(one, box_xyxy_px=(104.0, 102.0, 330.0, 310.0), box_name=BoxName("dog", "", 0.9))
    answer = Localization(
        one.box_xyxy_px, 3, "cat", 0.7, SPOT, (one, other), 0.9, box_name=BoxName("cat", "", 0.9)
    )
    outlines = outlines_of(answer, ())
    assert [each.text for each in outlines] == ["dog 90 %", "cat 90 %"]
    drawn = draw(image, answer, look=look)
    count, _, stats, _ = cv2.connectedComponentsWithStats(
        (drawn == PREDICTED_BGR).all(axis=2).astype(np.uint8)
    )
    plates = [row for row in stats[1:count] if row[4] > 300 and row[3] < 40]
    assert len(plates) <= 2


def test_text_has_contrast_on_every_plate_and_colours_differ_in_lightness():
    for colour in (*OBJECTS_BGR, PREDICTED_BGR, TRUTH_BGR, SHADE_BGR):
        one, other = sorted((luminance(colour), luminance(ink_on(colour))))
        assert (other + 0.05) / (one + 0.05) >= 4.5, "WCAG 2.2, level AA"
    assert abs(luminance(PREDICTED_BGR) - luminance(TRUTH_BGR)) > 0.1


@pytest.mark.parametrize("size", [(240, 320), (1080, 1920)])
def test_a_heat_map_over_the_frame_shines_where_the_map_is_and_alpha_mixes(size):
    image = frame(size=size).image_bgr
    over = (
        draw(image, found(), look=Look(box=False, heat_map="over", alpha=0.5))
        .astype(int)
        .sum(axis=2)
    )
    y, x = np.unravel_index(over.argmax(), over.shape)
    assert size[0] / 4 <= y <= size[0] / 2
    assert size[1] / 4 <= x <= size[1] / 2
    assert (draw(image, found(), look=Look(box=False, heat_map="over", alpha=0.0)) == image).all()
    more = (
        draw(image, found(), look=Look(box=False, heat_map="over", alpha=1.0))
        .astype(int)
        .sum(axis=2)
    )
    assert more[0, -1] < over[0, -1] < image[0, -1].astype(int).sum(), (
        "colder places get darker with alpha"
    )


def test_a_heat_map_drawn_every_third_frame_stays_between_and_changes_at_once_with_the_look():
    annotator, calm, look = Annotator(), np.roll(SPOT, 12), Look(box=False)
    pictures = [
        annotator.paint(frame(i), found(map_hw=SPOT if i == 0 else calm), "", look, 3)
        for i in range(4)
    ]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[0] != pictures[3]).any()
    assert (annotator.paint(frame(4), found(), "", Look(box=False, heat_map="off"), 3) == 128).all()


def test_sources_are_calmed_apart_and_what_was_found_stays_as_it_is():
    annotator, look = Annotator(), Look(heat_map="off", smoothing=1.0)
    annotator.paint(frame(0, 0.0), found(), "", look)
    moved = found((60.0, 40.0, 220.0, 180.0))
    drawn = annotator.paint(frame(1, 0.04), moved, "", look)
    assert moved.box_xyxy_px == (60.0, 40.0, 220.0, 180.0)
    elsewhere = annotator.paint(frame(1, 0.04, "other"), moved, "", look)
    assert (drawn != elsewhere).any()
    assert (elsewhere == draw(frame().image_bgr, moved, look=Look(heat_map="off"))).all()


def tracked(number, box):
    return Tracked(box, 3, "cat", 0.75, Track("following", 0.9, number, box))


def test_several_objects_have_their_own_colours_and_one_that_is_not_sure_is_not_drawn():
    image, look = frame().image_bgr, Look(heat_map="off")
    objects = [
        tracked(1, (20.0, 60.0, 90.0, 120.0)),
        tracked(2, (150.0, 60.0, 220.0, 120.0)),
        tracked(3, None),
    ]
    drawn = draw(image, found(), look=look, objects=objects)
    assert [has_colour(drawn, colour) for colour in OBJECTS_BGR[:4]] == [True, True, False, False]
    assert (drawn[90, 20] == OBJECTS_BGR[0]).all()
    assert (drawn[90, 150] == OBJECTS_BGR[1]).all()
    assert (drawn[40, 100] == 128).all(), "and what was found is one of them, not drawn again"
    again = draw(
        image, found(), look=look, objects=[tracked(len(OBJECTS_BGR) + 2, objects[1].box_xyxy_px)]
    )
    assert (again[90, 150] == OBJECTS_BGR[1]).all()
    assert (
        draw(image, found(), look=Look(box=False, heat_map="off"), objects=objects) == image
    ).all()


def test_each_of_several_objects_is_calmed_apart():
    annotator, look = Annotator(), Look(heat_map="off", smoothing=1.0)
    one, other = (20.0, 60.0, 90.0, 120.0), (150.0, 60.0, 220.0, 120.0)
    annotator.paint(frame(0, 0.0), found(), "", look, objects=[tracked(1, one), tracked(2, other)])
    swapped = [tracked(2, other), tracked(1, one)]
    drawn = annotator.paint(frame(1, 0.04), found(), "", look, objects=swapped)
    assert (
        drawn == draw(frame().image_bgr, found(), look=Look(heat_map="off"), objects=swapped)
    ).all()


def literal_one_euro(values, times_s, min_cutoff, beta, d_cutoff=1.0):
    """Algorithm 1 of Casiez, Roussel & Vogel 2012, as printed: scalars, a loop."""

    def alpha(period, cutoff):
        tau = 1.0 / (2 * math.pi * cutoff)
        return 1.0 / (1.0 + tau / period)

    filtered = [values[0]]
    derivative, last = 0.0, values[0]
    for i in range(1, len(values)):
        period = times_s[i] - times_s[i - 1]
        slope = (values[i] - last) / period
        a = alpha(period, d_cutoff)
        derivative = a * slope + (1 - a) * derivative
        a = alpha(period, min_cutoff + beta * abs(derivative))
        last = a * values[i] + (1 - a) * last
        filtered.append(last)
    return filtered


def test_the_filter_is_the_papers():
    rng = np.random.default_rng(0)
    values, times_s = np.cumsum(rng.normal(size=50)), np.cumsum(rng.uniform(0.01, 0.1, 50))
    one_euro = OneEuro(0.7, 0.3)
    ours = [float(one_euro(np.array([v]), t)[0]) for v, t in zip(values, times_s, strict=True)]
    assert ours == pytest.approx(literal_one_euro(values, times_s, 0.7, 0.3))


def test_jitter_is_calmed_more_with_strength_and_a_fast_box_is_followed():
    rng = np.random.default_rng(1)
    boxes = [tuple(np.array([40.0, 40.0, 200.0, 180.0]) + rng.normal(0, 4, 4)) for _ in range(120)]

    def jitter(strength):
        smoother = BoxSmoother()
        drawn = [
            smoother.smoothed(found(b), i / 30, 320, 240, strength).box_xyxy_px
            for i, b in enumerate(boxes)
        ]
        return float(np.std(np.diff(np.array(drawn)[30:], axis=0)))

    assert jitter(0.0) > 1.5 * jitter(0.3) > 1.5 * jitter(1.0)
    smoother, moving = BoxSmoother(), [(3.0 * i, 40.0, 3.0 * i + 160, 180.0) for i in range(50)]
    last = [
        smoother.smoothed(found(b), i / 30, 320, 240, 0.5).box_xyxy_px for i, b in enumerate(moving)
    ][-1]
    assert abs(last[0] - moving[-1][0]) < 10, (
        "a box crossing the frame in 3.5 s lags less than 3 % of it"
    )


@pytest.mark.parametrize(
    ("second", "pts_s", "size"),
    [
        ((250.0, 10.0, 310.0, 60.0), 0.04, (320, 240)),
        ((50.0, 40.0, 210.0, 180.0), 5.0, (320, 240)),
        ((50.0, 40.0, 210.0, 180.0), 0.0, (320, 240)),
        ((50.0, 40.0, 210.0, 180.0), 0.04, (640, 480)),
    ],
)
def test_it_begins_anew_for_another_object_after_a_pause_when_time_goes_back_and_for_another_size(
    second, pts_s, size
):
    smoother = BoxSmoother()
    smoother.smoothed(found(), 0.0, 320, 240, 1.0)
    assert smoother.smoothed(found(second), pts_s, *size, 1.0).box_xyxy_px == pytest.approx(second)


def test_no_box_stays_none():
    assert BoxSmoother().smoothed(found(None), 0.0, 320, 240, 1.0).box_xyxy_px is None


def test_the_log_of_a_calmed_run_holds_the_raw_boxes(tmp_path):
    def boxes(smoothing):
        settings, pictures = Settings(heat_map="off", smoothing=smoothing), Kept()
        with JsonlSink(tmp_path / "log.jsonl") as log, Images("clip", shots(12)) as source:
            live = Live(lambda: settings, lambda: False)
            for _ in run_frames(
                every_frame(source),
                Localizer(MockEngine(96)),
                [log, pictures],
                RunTimes(),
                live=live,
            ):
                pass
        rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        return [[row[edge] for edge in ("x0", "y0", "x1", "y1")] for row in rows], pictures.kept

    raw, plain = boxes(0.0)
    same, calm = boxes(1.0)
    assert raw == same
    assert any((a != b).any() for a, b in zip(plain, calm, strict=True)), (
        "and yet the drawn ones differ"
    )


class Kept:
    needs_picture = True

    def __init__(self):
        self.kept = []

    def write(self, record, picture):
        self.kept.append(picture)


def shots(count):
    return [
        (f"{i}.png", lambda i=i: cv2.imencode(".png", picture(i))[1].tobytes())
        for i in range(count)
    ]


def test_a_long_line_and_the_heat_map_make_room_for_each_other():
    image = np.full((240, 320, 3), 128, np.uint8)
    short, long = "cam 1", "cam 1   2.8 ms   following 1 0.75   and more"
    plain = draw(image, found(), status=short, look=Look(box=False))
    lifted = draw(image, found(), status=long, look=Look(box=False))
    alone = draw(image, found(), look=Look(box=False))
    assert (plain[:, 200:] == alone[:, 200:]).all(), "a short line leaves it where it is"
    rows = [
        np.flatnonzero((picture[:, 316] == LIGHT_BGR).all(axis=1)) for picture in (alone, lifted)
    ]
    assert 0 < rows[0][0] - rows[1][0] < 40, "the white frame stands higher"
    assert len(rows[0]) == len(rows[1]), "and is whole"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heat_map": "loud"}, "the heat map is one of inset, over, off, not 'loud'"),
        ({"alpha": 1.5}, "alpha goes from 0 to 1, not 1.5"),
        ({"smoothing": math.nan}, "smoothing goes from 0 to 1, not nan"),
    ],
)
def test_a_look_checks_its_fields(changes, said):
    with pytest.raises(InputError, match=said):
        Look(**changes)
