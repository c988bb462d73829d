"""The fast way of area resampling against OpenCV's."""

import cv2
import numpy as np
import pytest

from engines.resizing import shrunk
from realtime.sources.demo import DemoCamera


def noise(height, width):
    small = np.random.default_rng(3).integers(0, 256, (height // 3, width // 3, 3)).astype(np.uint8)
    return cv2.resize(small, (width, height))


SIZES = [(480, 854), (480, 640), (360, 640), (720, 1280), (1080, 1920), (333, 500), (256, 448)]


@pytest.mark.parametrize("size_px", [64, 96, 128, 160, 224])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_mean_is_opencvs_but_for_halves(size_px, height, width):
    image = noise(height, width)
    found, expected = (
        shrunk(image, size_px),
        cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA),
    )
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1
    exact = cv2.resize(image.astype(np.float64), (size_px, size_px), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(exact[found != expected] % 1, 0.5, atol=1e-4)


def test_the_demo_is_shrunk_exactly_as_opencv_does():
    image, _ = DemoCamera(9).shoot(4)
    np.testing.assert_array_equal(
        shrunk(image, 128), cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)
    )


def test_images_that_are_not_contiguous_are_taken():
    image = noise(480, 640)[:, ::-1]
    np.testing.assert_array_equal(shrunk(image, 128), shrunk(np.ascontiguousarray(image), 128))
