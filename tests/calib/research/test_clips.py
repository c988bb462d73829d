"""Films and clips that are made of photos: their boxes, and that their seed decides them."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.clips import CROWD_FRAMES, FILM_FRAMES, FILMS, SIZE_PX, crowds, films
from tests.realtime.tracking.scenes import texture

PLACES = ((60.0, 90.0, 130.0, 150.0), (190.0, 80.0, 250.0, 140.0))


def photos(places=PLACES[:1]):
    """A dark photo with bright objects."""
    photo = texture(256, 300, 1, mean=60) // 3
    for x0, y0, x1, y1 in np.array(places, int):
        photo[y0:y1, x0:x1] = 220
    truths = tuple(Truth("cat", place) for place in places)
    return [Sample("o", lambda: photo, truths)]


def bright_box(frame):
    bright = frame.mean(axis=2) > 130
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize("kind", [kind for kind in FILMS if kind != "several"])
def test_films_have_a_box_around_what_is_in_view(kind):
    nothing = np.full((100, 100, 3), 90, np.uint8)
    (film,) = films(photos(), [nothing], kind, 1, seed=3)
    assert len(film.frames) == len(film.boxes) == FILM_FRAMES
    for frame, there in zip(film.frames[::5], film.boxes[::5], strict=True):
        assert frame.shape == (SIZE_PX[1], SIZE_PX[0], 3)
        if kind != "hidden" and there:
            assert bright_box(frame) == pytest.approx(there[0], abs=10)
    empty = sum(not there for there in film.boxes)
    assert (empty == FILM_FRAMES // 3) if kind == "breaks" else (empty == 0 or kind == "hidden")
    areas = [(x1 - x0) * (y1 - y0) for there in film.boxes for x0, y0, x1, y1 in there.values()]
    if kind in ("nears", "recedes"):
        grown = areas[-1] / areas[0]
        assert max(grown, 1 / grown) > 2
        assert (grown > 1) == (kind == "nears")


def test_films_of_several_objects_keep_their_numbers():
    (film,) = films(photos(PLACES), [], "several", 1)
    for there in film.boxes:
        assert there.keys() == {0, 1}
        assert there[0][0] < there[1][0]


def test_films_are_drawn_by_their_seed():
    first, again, other = (next(films(photos(), [], "sways", 1, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, again.frames, strict=True))
    assert not np.array_equal(first.frames[0], other.frames[0])


def test_clips_of_several_objects_have_a_box_for_each():
    photo, dark = texture(200, 220, 3, mean=200), texture(256, 300, 1, mean=60) // 3
    objects = [Sample("o", lambda: photo, (Truth("cat", (20.0, 30.0, 180.0, 150.0)),))]
    (crowd,) = crowds(objects, [dark], 1, seed=2)
    assert len(crowd.frames) == len(crowd.boxes) == CROWD_FRAMES
    for frame, boxes in zip(crowd.frames[::20], crowd.boxes[::20], strict=True):
        assert len(boxes) == 2
        for x0, y0, x1, y1 in boxes:
            middle = frame[round((y0 + y1) / 2) - 4 :, round((x0 + x1) / 2) - 4 :][:8, :8]
            assert middle.mean() > 130
