"""The dense head in PyTorch and in the graph: written apart, they find the same boxes."""

from dataclasses import replace

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_reference import TorchEngine, TorchStreamEngine
from engines.boxes import iou
from engines.build import CANDIDATES, build_graph
from engines.certificate import certify
from engines.choose import open_localizer
from engines.head import head_path, load_head
from engines.localizer import Localizer
from engines.networks.preprocessing import LETTERBOX, GivenInput
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from tests.virtual_camera import DemoCamera


@pytest.fixture(scope="module")
def head():
    return load_head(head_path("lite0_dense"))


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("lite0", None, 160, GivenInput(resize=LETTERBOX))


def images(count):
    camera = DemoCamera(300)
    return [camera.shoot(37 * number)[0] for number in range(count)]


def with_rounds(head, rounds):
    """The head with its box layer applied so many times."""
    if rounds == 1:
        return replace(head, first_weight=None, first_bias=None)
    return replace(head, first_weight=head.box_weight[:4], first_bias=head.box_bias[:4])


@pytest.mark.parametrize(("shape", "rounds"), [((160, 160), 2), ((96, 160), 1)])
def test_the_candidates_are_those_of_the_graph(classifier, head, shape, rounds):
    head = with_rounds(head, rounds)
    shaped = replace(classifier, other_shape=shape)
    graph = build_graph(shaped, head.spec, head, batch=2)
    engine = Localizer(OpenVinoEngine(graph, "fp32"))
    engine.look_for(7)
    feeds = [engine.prepare(image) for image in images(2)]
    found = engine.infer(feeds)
    reference = Localizer(TorchEngine(shaped, head=head, batch=2))
    reference.look_for(7)
    expected = reference.infer(feeds)
    for row, true in zip(found[CANDIDATES], expected[CANDIDATES], strict=True):
        assert row.shape == true.shape == (head.candidates, 9)
        overlaps = iou(row[:, None, :4], true[None, :, :4])
        same = overlaps.argmax(axis=1)
        close = overlaps.max(axis=1) > 0.98  # a box that ranks last here may be left out there
        assert close.mean() > 0.9
        np.testing.assert_allclose(row[close, 4], true[same[close], 4], atol=0.02)
        np.testing.assert_allclose(row[close, 6], true[same[close], 6], atol=0.02)
        assert (row[close, 5] == 7).all()
        assert (row[close, 7] == true[same[close], 7]).mean() > 0.9
        np.testing.assert_allclose(row[close, 8], true[same[close], 8], atol=0.03)
    assert found["map"].shape == expected["map"].shape
    np.testing.assert_allclose(found["map"], expected["map"], rtol=1e-2, atol=1e-4)


def test_engines_that_stream_give_the_same(classifier, head):
    image = images(1)
    plain = Localizer(TorchEngine(classifier, head=head))
    stream = Localizer(
        TorchStreamEngine(classifier, head=head, device="cpu", precision="fp32", slots=2)
    )
    feeds = [plain.prepare(image[0])]
    np.testing.assert_allclose(
        stream.infer(feeds)[CANDIDATES], plain.infer(feeds)[CANDIDATES], atol=1e-5
    )


def test_the_backend_opens_it_for_every_shape_and_certifies_the_other():
    choice = EngineOptions("lite0", size_px=160, precision="fp32", least_confidence=0.0)
    shot = images(5)
    wide = [image[: image.shape[1] // 2] for image in shot]
    with (
        open_localizer(replace(choice, backend="torch")) as reference,
        open_localizer(replace(choice, backend="openvino")) as engine,
    ):
        found = certify(reference, engine, [*shot, *wide])
    assert found.passed
    assert found.box_iou_p5 > 0.97
