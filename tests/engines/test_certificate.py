"""Certificates: good engines pass, and each way to be wrong in silence fails by name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.certificate import (
    Thresholds,
    certificate_path,
    certify,
    load_certificate,
    require,
    status,
)
from engines.choose import build_chosen, open_localizer
from engines.errors import EngineError, InputError
from engines.localizer import Localizer
from engines.options import EngineOptions
from engines.typed_graph import to_half
from tests.engines.mock import MockEngine
from tests.virtual_camera import DemoCamera

SIZE = 32
SUBJECT = {"graph": "g", "engine": "e"}


class Wrong(MockEngine):
    """A mock that spoils its outputs."""

    def __init__(self, spoil, batch=1):
        super().__init__(SIZE, batch)
        self._spoil = spoil

    def run(self, feeds):
        outputs = super().run(feeds)
        self._spoil(outputs)
        return outputs


def frames(count=10):
    """A bright square on its way over noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (count, SIZE, SIZE, 3)).astype(np.uint8)
    for i, image in enumerate(images):
        image[4 + i : 14 + i, 2 + 2 * i : 12 + 2 * i] = 200
    return list(images)


def certificate_of(spoil, **thresholds):
    limits = Thresholds(**thresholds)
    return certify(Localizer(MockEngine(SIZE)), Localizer(Wrong(spoil)), frames(), limits)


def test_an_equal_engine_passes_with_full_marks():
    found = certify(Localizer(MockEngine(SIZE)), Localizer(MockEngine(SIZE, batch=4)), frames())
    assert found.passed
    assert (found.box_iou_p5, found.class_agreement, found.frames) == (1, 1, 10)
    assert found.map_correlation_p5 == pytest.approx(1)
    assert found.map_change == found.reference_map_change > 0.01
    assert str(found).startswith(
        "certificate passed: box IoU 1.000 and map correlation 1.0000 (5th percentiles), class"
    )


def test_half_precision_of_the_shipped_network_passes():
    model, camera = build_chosen(EngineOptions()), DemoCamera(300)
    images = [camera.shoot(i * 37)[0] for i in range(8)]
    engines = [Localizer(OpenVinoEngine(m, "fp32")) for m in (model, to_half(model))]
    found = certify(*engines, images)
    assert found.passed
    assert found.map_correlation_p5 > 0.99
    assert found.box_iou_p5 > 0.97


def test_photos_of_several_shapes_are_compared():
    """Letterboxed, each has a map of another shape."""
    camera = DemoCamera(300)
    shots = [camera.shoot(i * 37)[0] for i in range(10)]
    photos = [shot[20 * i :, 30 * (9 - i) :] for i, shot in enumerate(shots)]
    with open_localizer("lite0", size_px=96, precision="fp32") as localizer:
        found = certify(localizer, localizer, photos)
    assert found.passed
    assert found.map_change == found.reference_map_change > 0.01


def zero(outputs):
    outputs["map"][:] = 0


def frozen(outputs):
    outputs["map"][:] = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)


def noisy(outputs):
    outputs["map"] += (
        np.random.default_rng(int(outputs["map"].sum()))
        .normal(0, 100, outputs["map"].shape)
        .astype(np.float32)
    )


def shifted(outputs):
    outputs["box_xyxy"] += 0.2


def renamed(outputs):
    outputs["class_index"] += 1


def not_finite(outputs):
    outputs["map"][0, 3, 3] = np.nan


@pytest.mark.parametrize(
    ("spoil", "failures"),
    [
        (zero, ["a map is zero everywhere"]),
        (not_finite, ["a map holds values that are not finite"]),
        (frozen, ["the map hardly changes with the image", "map correlation"]),
        (noisy, ["map correlation"]),
        (shifted, ["box IoU"]),
        (renamed, ["class agreement 0.000 is below 0.9"]),
    ],
)
def test_each_way_to_be_wrong_fails_by_name(spoil, failures):
    found = certificate_of(spoil)
    assert not found.passed
    assert len(found.failures) == len(failures)
    for said, expected in zip(found.failures, failures, strict=True):
        assert said.startswith(expected)
    assert "FAILED" in str(found)


def test_thresholds_decide():
    assert not certificate_of(shifted).passed
    assert certificate_of(shifted, box_iou_p5=0.0).passed


def test_an_engine_without_a_head_is_certified_on_its_maps():
    def headless(outputs):
        del outputs["box_xyxy"]

    found = certify(Localizer(Wrong(headless)), Localizer(Wrong(headless)), frames())
    assert found.passed
    assert found.box_iou_p5 is None


def test_too_few_or_equal_frames_prove_nothing():
    localizers = Localizer(MockEngine(SIZE)), Localizer(MockEngine(SIZE))
    with pytest.raises(
        InputError, match="1 different frames are too few to certify an engine: give at least 8"
    ):
        certify(*localizers, [frames()[0]] * 20)
    alike = [image.copy() for image in [frames()[0]] * 8]
    for i, image in enumerate(alike):
        image[0, i] += 1
    with pytest.raises(InputError, match="all alike, a frozen map would not show"):
        certify(*localizers, alike)


def test_maps_of_two_sizes_are_not_compared():
    with pytest.raises(EngineError, match="cannot be held against"):
        certify(Localizer(MockEngine(SIZE)), Localizer(MockEngine(16)), frames())


def test_a_certificate_is_read_as_it_was_written(tmp_path):
    path = certificate_path(tmp_path / "net.engine")
    assert path.name == "net.certificate.json"
    written = certificate_of(shifted).of(SUBJECT)
    written.save(path)
    assert load_certificate(path) == written
    assert json.loads(path.read_text())["passed"] is False


def test_only_a_fitting_certificate_that_passed_lets_an_engine_run(tmp_path):
    path, good = (
        tmp_path / "c.json",
        certify(Localizer(MockEngine(SIZE)), Localizer(MockEngine(SIZE)), frames()).of(SUBJECT),
    )
    assert status(path, SUBJECT) == "missing"
    with pytest.raises(
        EngineError, match="this engine has no certificate yet: run 'sightline build"
    ):
        require(path, SUBJECT, "fp16")
    good.save(path)
    assert status(path, SUBJECT) == "passed"
    require(path, SUBJECT, "fp16")
    for changed in ({**SUBJECT, "engine": "other"}, {**SUBJECT, "graph": "other"}, {"graph": "g"}):
        assert status(path, changed) == "stale"
        with pytest.raises(
            EngineError,
            match="stale certificate, of another graph or build: run 'sightline build --backend tensorrt --precision fp16 --rebuild'",
        ):
            require(path, changed, "fp16")
    replace(good, failures=("box IoU 0.100 is below 0.85",)).save(path)
    assert status(path, SUBJECT) == "failed"
    with pytest.raises(
        EngineError,
        match=r"failed its certificate \(box IoU 0\.100 is below 0\.85\): run 'sightline build --backend tensorrt --precision fp16 --rebuild'",
    ):
        require(path, SUBJECT, "fp16")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"passed": true}'])
def test_a_damaged_certificate_lets_nothing_run(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(EngineError, match="cannot read certificate"):
        require(path, SUBJECT, "fp16")


def test_a_verdict_cannot_be_edited_alone(tmp_path):
    path = tmp_path / "c.json"
    certificate_of(zero).of(SUBJECT).save(path)
    path.write_text(path.read_text().replace('"passed": false', '"passed": true'))
    with pytest.raises(EngineError, match="contradicts itself"):
        require(path, SUBJECT, "fp16")
