"""The ways from an image to the square and back, and the fast way of area resampling against
OpenCV's.
"""

import cv2
import numpy as np
import pytest

from engines.networks.preprocessing import IMAGENET, Preprocessing
from engines.resizing import Resizing, frame_shape, shrunk
from tests.virtual_camera import DemoCamera


def noise(height, width):
    small = np.random.default_rng(3).integers(0, 256, (height // 3, width // 3, 3)).astype(np.uint8)
    return cv2.resize(small, (width, height))


SIZES = [(480, 854), (480, 640), (360, 640), (720, 1280), (1080, 1920), (333, 500), (256, 448)]


@pytest.mark.parametrize("size_px", [64, 96, 128, 160, 224])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_mean_is_opencvs_but_for_halves(size_px, height, width):
    image = noise(height, width)
    found, expected = (
        shrunk(image, (size_px, size_px)),
        cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA),
    )
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1
    exact = cv2.resize(image.astype(np.float64), (size_px, size_px), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(exact[found != expected] % 1, 0.5, atol=1e-4)


@pytest.mark.parametrize("shape", [(180, 320), (240, 320), (128, 96)], ids=str)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_means_of_shapes_that_are_no_squares_are_opencvs_too(shape, height, width):
    image = noise(height, width)
    expected = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk(image, shape).astype(int) - expected).max() <= 1


def test_the_demo_is_shrunk_exactly_as_opencv_does():
    image, _ = DemoCamera(9).shoot(4)
    np.testing.assert_array_equal(
        shrunk(image, (128, 128)), cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)
    )


def test_images_that_are_not_contiguous_are_taken():
    image = noise(480, 640)[:, ::-1]
    np.testing.assert_array_equal(
        shrunk(image, (128, 128)), shrunk(np.ascontiguousarray(image), (128, 128))
    )


GREY = (104, 116, 124)
WAYS = [
    Resizing(),
    Resizing("crop", 0.875, GREY),
    Resizing("crop", 1.0, GREY),
    Resizing("letterbox", filling_bgr=GREY),
]
SHAPES = [(240, 360), (360, 240), (300, 300), (97, 211), (30, 50), (400, 41)]


def ramps(height, width):
    """Blue is the place along x and green along y, each from 0 to 250."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.rint(250 * x)
    image[..., 1] = np.rint(250 * y[:, None])
    image[..., 2] = 255
    return image


INPUTS = [(way, (64, 64)) for way in WAYS]
INPUTS += [(WAYS[3], (48, 64)), (WAYS[3], (64, 40)), (WAYS[3], (32, 64))]


@pytest.mark.parametrize(("way", "shape"), INPUTS, ids=str)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_each_pixel_of_the_input_is_where_the_geometry_says(way, shape, height, width):
    square = way.prepared(ramps(height, width), shape)
    assert square.shape == (*shape, 3)
    shown = square[..., 2] == 255
    checked = 0
    for row, column in np.argwhere(shown)[:: 1 + shown.sum() // 300]:
        x = (column + 0.5) / shape[1]
        y = (row + 0.5) / shape[0]
        at = way.in_image((x - 1e-4, y - 1e-4, x + 1e-4, y + 1e-4), (width, height), shape)
        assert at is not None
        found = 250 * (at[0] + at[2]) / 2 / width, 250 * (at[1] + at[3]) / 2 / height
        pixel = (
            250 * 0.5 / np.array([width, height])
        )  # nothing is shown beyond the outermost centres
        np.testing.assert_allclose(found, square[row, column, :2], atol=1.5 + pixel.max())
        checked += 1
    assert checked > 20


@pytest.mark.parametrize(("way", "shape"), INPUTS[3:], ids=str)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_many_boxes_are_put_into_the_image_as_one_is(way, shape, height, width):
    corners = np.sort(np.random.default_rng(0).uniform(0, 1, (40, 2, 2)), axis=1)
    boxes = corners.reshape(40, 4)
    alone = [way.in_image(box, (width, height), shape) for box in boxes]
    places, edges = way.inside(boxes, (width, height), shape)
    assert places.tolist() == [place for place, box in enumerate(alone) if box is not None]
    np.testing.assert_allclose(edges, [box for box in alone if box is not None])


@pytest.mark.parametrize(("way", "shape"), INPUTS, ids=str)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_a_map_lies_over_what_it_is_of(way, shape, height, width):
    """The input's own brightness as a map must be the image's brightness, and 0 where the input
    does not show the image.
    """
    image = np.full((height, width, 3), 255, np.uint8)
    x0, y0, x1, y1 = width // 3, height // 4, width // 3 + width // 3, height // 4 + height // 3
    image[y0:y1, x0:x1] = 0
    square = way.prepared(image, shape).astype(np.float32)
    over = way.over_image(255 - square[..., 0], (width, height), shape)
    seen = way.seen(width, height, shape)
    truth = np.zeros((height, width), np.float32)
    truth[y0:y1, x0:x1] = 255
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    truth[:, (columns < seen[0]) | (columns > seen[2])] = 0
    truth[(rows < seen[1]) | (rows > seen[3])] = 0
    expected = cv2.resize(truth, over.shape[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(over - expected).mean() < 0.05 * 255
    centre = [
        np.average(np.arange(n) + 0.5, weights=over.sum(a)) / n
        for a, n in ((1, over.shape[0]), (0, over.shape[1]))
    ]
    true = [
        np.average(np.arange(n) + 0.5, weights=truth.sum(a)) / n
        for a, n in ((1, height), (0, width))
    ]
    np.testing.assert_allclose(centre, true, atol=0.02)


def test_a_maps_mass_stays_where_it_is():
    rng = np.random.default_rng(5)
    map_hw = rng.random((7, 7)).astype(np.float32)
    for way in WAYS[1:3]:
        over = way.over_image(map_hw, (300, 200), (64, 64))
        x0, y0, x1, y1 = way.seen(300, 200, (64, 64))
        share = (x1 - x0) * (y1 - y0) / (300 * 200)
        assert over.mean() == pytest.approx(map_hw.mean() * share, rel=1e-4)
    assert WAYS[0].over_image(map_hw, (300, 200), (64, 64)) is map_hw


def test_boxes_are_clipped_to_the_image_and_what_lies_in_the_filling_is_none():
    letterbox = WAYS[3]
    assert letterbox.seen(300, 150, (64, 64)) == pytest.approx((0, -75, 300, 225))
    assert letterbox.in_image((0, 0, 1, 1), (300, 150), (64, 64)) == (0, 0, 300, 150)
    assert letterbox.in_image((0.2, 0.0, 0.4, 0.2), (300, 150), (64, 64)) is None
    crop = WAYS[1]
    assert crop.seen(300, 160, (64, 64)) == (80, 10, 220, 150)
    assert crop.in_image((0, 0, 1, 1), (300, 160), (64, 64)) == (80, 10, 220, 150)


def test_the_filling_is_the_mean():
    square = Resizing.of(Preprocessing(resize="letterbox")).prepared(ramps(50, 100), (64, 64))
    assert (square[0] == IMAGENET.mean_bgr).all()
    assert (square[32, :, 2] == 255).all()


def test_what_is_stored_is_read_again():
    assert Resizing.stored(None) == Resizing()
    assert (
        Resizing.stored({"kind": "crop", "crop_share": 0.875, "filling_bgr": [104, 116, 124]})
        == WAYS[1]
    )


@pytest.mark.parametrize(
    ("size_px", "shape"),
    [
        ((1920, 1080), (192, 320)),
        ((640, 480), (256, 320)),
        ((480, 640), (320, 256)),
        ((720, 1280), (320, 192)),
        ((500, 500), (320, 320)),
        ((640, 630), (320, 320)),
        ((4000, 100), (128, 320)),
    ],
)
def test_the_shape_of_images_has_their_longer_side_and_little_filling(size_px, shape):
    assert frame_shape(*size_px, 320) == shape


def test_a_side_that_is_no_multiple_of_the_step_is_kept():
    assert frame_shape(300, 300, 224) == (224, 224)
    assert frame_shape(300, 290, 224) == (224, 224)
    assert frame_shape(300, 150, 224) == (128, 224)
    assert frame_shape(300, 150, 96) == (96, 96)


def test_what_is_prepared_for_a_shape_is_the_middle_of_the_square():
    letterbox = WAYS[3]
    photo = ramps(150, 320)
    square = letterbox.prepared(photo, (320, 320))
    part = letterbox.prepared(photo, (192, 320))
    np.testing.assert_array_equal(square[64:256], part)
    np.testing.assert_array_equal(letterbox.within(part, (320, 320)), square)
