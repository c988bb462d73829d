"""One localizer, and an engine for each shape of images."""

import json

import numpy as np
import pytest

from engines.choose import open_localizer
from engines.engine import Engine
from engines.errors import EngineError
from engines.localizer import MOST_SHAPES, Localizer
from engines.networks.network import Shape
from tests.engines.mock import MockEngine

SIDE_PX = 640


def photo(width: int, height: int) -> np.ndarray:
    """A white box from a quarter to a half of both sides, on black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[height // 4 : height // 2, width // 4 : width // 2] = 255
    return image


class Opener:
    """Opens mock engines, and keeps them."""

    def __init__(self, batch: int = 1, slots: int = 1, refused: tuple[Shape, ...] = ()) -> None:
        self.opened: list[tuple[Shape, MockEngine]] = []
        self._batch, self._slots, self._refused = batch, slots, refused

    def __call__(self, shape: Shape) -> Engine:
        if shape in self._refused:
            raise EngineError("there is no plan for it")
        engine = MockEngine(batch=self._batch, slots=self._slots, shape=shape)
        resizing = {"kind": "letterbox", "crop_share": 1.0, "filling_bgr": [0, 0, 0]}
        engine.metadata = {**engine.metadata, "sightline": json.dumps({"resizing": resizing})}
        self.opened.append((shape, engine))
        return engine

    @property
    def shapes(self) -> list[Shape]:
        return [shape for shape, _ in self.opened]


def localizer(opener: Opener) -> Localizer:
    return Localizer(opener((SIDE_PX, SIDE_PX)), opener)


def check(found, image):
    height, width = image.shape[:2]
    expected = width / 4, height / 4, width / 2, height / 2
    np.testing.assert_allclose(found.box_xyxy_px, expected, atol=2 * max(width, height) / SIDE_PX)


SIZES = [(1280, 720), (640, 480), (480, 640), (600, 600), (1280, 720)]


def test_each_shape_is_opened_once_and_boxes_are_those_of_the_image():
    opener = Opener()
    with localizer(opener) as engine:
        for size in SIZES:
            image = photo(*size)
            check(engine.localize([image])[0], image)
    assert opener.shapes == [(640, 640), (384, 640), (512, 640), (640, 512)]
    assert [each.calls for _, each in opener.opened] == [1, 2, 1, 1]


def test_what_is_expected_is_open_before_the_first_image():
    opener = Opener()
    engine = localizer(opener)
    engine.expect(1280, 720)
    assert opener.shapes == [(640, 640), (384, 640)]
    engine.localize([photo(1280, 720)])
    assert len(opener.opened) == 2
    engine.expect(0, 0)


def test_images_of_several_shapes_share_a_call_that_holds_them_all():
    opener = Opener(batch=3)
    engine = localizer(opener)
    wide, photos = photo(1280, 720), [photo(1280, 720), photo(640, 480)]
    for image, found in zip(photos, engine.localize(photos), strict=True):
        check(found, image)
    assert [each.calls for _, each in opener.opened] == [0, 0, 1]
    mixed = [wide, photo(480, 640), wide, wide]
    for image, found in zip(mixed, engine.localize(mixed), strict=True):
        check(found, image)
    assert dict(opener.opened)[640, 640].calls == 1
    assert dict(opener.opened)[384, 640].calls == 1


def test_tickets_of_several_shapes_are_collected_in_their_order():
    engine = localizer(Opener(slots=3))
    images = [photo(*size) for size in SIZES[:3]]
    tickets = [engine.submit([engine.prepare(image)]) for image in images]
    for ticket, image in zip(tickets, images, strict=True):
        check(engine.read(engine.collect(ticket), 0, image.shape[1], image.shape[0]), image)


def test_engines_that_were_not_used_for_long_are_closed_but_not_the_first_or_one_that_works():
    opener = Opener(slots=2)
    engine = localizer(opener)
    wide = [photo(1000, 100 + 97 * step) for step in range(10)]
    busy = engine.submit([engine.prepare(wide[0])])
    for image in (*wide[2:], *(each.transpose(1, 0, 2) for each in wide[2:])):
        engine.localize([image])
    open_ones = []
    for shape, each in opener.opened:
        try:
            each.infer({})
        except EngineError as error:
            if "closed" in str(error):
                continue
            open_ones.append(shape)
        except Exception:
            open_ones.append(shape)
    assert len(opener.opened) > MOST_SHAPES
    assert len(open_ones) == MOST_SHAPES
    assert (640, 640) in open_ones
    check(engine.read(engine.collect(busy), 0, 1000, 100), wide[0])
    engine.localize([wide[5]])


def test_where_a_shape_cannot_be_had_the_square_is_used():
    opener = Opener(refused=((384, 640),))
    engine = localizer(opener)
    for image in (photo(1280, 720), photo(640, 480), photo(1280, 720)):
        check(engine.localize([image])[0], image)
    assert opener.shapes == [(640, 640), (512, 640)]


def test_without_an_opener_all_images_take_the_one_shape():
    opener = Opener()
    engine = Localizer(opener((384, 640)))
    for size in SIZES:
        image = photo(*size)
        found = engine.localize([image])[0].box_xyxy_px
        expected = np.array([size[0] / 4, size[1] / 4, size[0] / 2, size[1] / 2])
        np.testing.assert_allclose(found, expected, atol=2 * max(size) / 384)
    assert len(opener.opened) == 1


@pytest.mark.parametrize("first_px", [None, (320, 180)])
def test_a_dense_head_takes_the_shape_of_the_images_that_come(first_px):
    with open_localizer("lite0", head="lite0_dense", precision="fp32", first_px=first_px) as engine:
        shape = engine.engine.inputs[0].shape
        assert shape == ((1, 320, 320, 3) if first_px is None else (1, 192, 320, 3))
        rng = np.random.default_rng(2)
        image = rng.integers(0, 255, (180, 320, 3)).astype(np.uint8)
        assert engine.localize([image])[0].map_hw.shape[1] > 0
        assert engine.prepare(image).shape == (192, 320, 3)
