"""Clips that are made of photos: their boxes, and that their seed decides them."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.clips import CROWD_FRAMES, FRAMES, SIZE_PX, clips, crowds
from tests.realtime.tracking.scenes import texture


@pytest.fixture(scope="module")
def made():
    photo = texture(200, 220, 3, mean=200)
    objects = [Sample("o", lambda: photo, (Truth("cat", (20.0, 30.0, 180.0, 150.0)),))]
    return list(clips(objects, [texture(256, 300, 1, mean=60) // 3], 12, seed=3))


def test_clips_have_a_box_around_what_was_pasted(made):
    assert len(made) == 12
    for clip in made:
        assert len(clip.frames) == len(clip.boxes) == FRAMES
        assert all(frame.shape == (SIZE_PX[1], SIZE_PX[0], 3) for frame in clip.frames)
    shown = [clip for clip in made if clip.boxes[0] is not None]
    assert 0 < len(shown) <= 12
    for clip in shown:
        for frame, box in zip(clip.frames[::8], clip.boxes[::8], strict=True):
            bright = frame.mean(axis=2) > 130
            rows, columns = (
                np.flatnonzero(bright.sum(axis=1) > 3),
                np.flatnonzero(bright.sum(axis=0) > 3),
            )
            found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert found == pytest.approx(box, abs=max(6, 0.12 * (box[2] - box[0])))


def test_clips_are_drawn_by_their_seed():
    photo = texture(100, 100, 3)
    objects = [Sample("o", lambda: photo, (Truth("cat", (0.0, 0.0, 100.0, 100.0)),))]
    first, again, other = (next(clips(objects, [photo], 1, seed)) for seed in (1, 1, 2))
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
