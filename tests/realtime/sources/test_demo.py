"""The demo clip and its true boxes."""

import numpy as np
import pytest

from engines.errors import SourceError
from realtime.sources.demo import CLIP_FRAMES, Demo, open_demo, true_boxes


def test_it_goes_on_from_its_beginning_with_the_same_boxes():
    frames = list(Demo(CLIP_FRAMES + 2))
    assert [frame.index for frame in frames] == list(range(CLIP_FRAMES + 2))
    first, again = frames[0], frames[CLIP_FRAMES]
    assert np.array_equal(first.image_bgr, again.image_bgr)
    assert first.truth_xyxy_px == again.truth_xyxy_px is not None
    assert again.pts_s == pytest.approx(CLIP_FRAMES / 12.5)
    assert first.image_bgr.shape == (480, 854, 3)


def test_every_box_is_in_the_frame_and_some_frames_have_none():
    boxes = true_boxes()
    assert 60 < len(boxes) < CLIP_FRAMES
    for x0, y0, x1, y1 in boxes.values():
        assert 0 <= x0 < x1 <= 854
        assert 0 <= y0 < y1 <= 480


@pytest.mark.parametrize("spec", ["demo:0", "demo:-1", "demo:x"])
def test_a_number_of_frames_that_is_none(spec):
    with pytest.raises(SourceError, match="demo:FRAMES"):
        open_demo(spec)
