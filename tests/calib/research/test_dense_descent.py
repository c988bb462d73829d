"""Layers of a dense head are trained further on scenes of which everything is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.heads import dense, dense_scenes
from calib.heads.dense_scenes import MAIN
from calib.research import dense_descent
from calib.research.command_line import run
from calib.research.dense import BLURRED, LEFT_OUT, of_part
from calib.research.dense_descent import Descent, Images, curvatures, descended
from calib.research.dense_losses import RECIPES, giou, loss_of
from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_dense import TorchDenseHead
from engines.backends.torch_reference import TorchEngine
from engines.boxes import iou
from engines.build import CANDIDATES, build_graph
from engines.dense import DenseHead
from engines.head import load_head
from engines.localizer import Localizer
from engines.networks.preprocessing import LETTERBOX, GivenInput
from engines.networks.registry import load_classifier

SIZE_PX = 160
QUIET = Console(quiet=True)
PROCESSOR = torch.device("cpu")
SMALL = {
    "MOST_COMPONENTS": 12,
    "MOST_LAST_COMPONENTS": 12,
    "BOX_CHANNELS": 6,
    "BOX_LAST_CHANNELS": 6,
    "FINE_BINS": 3,
    "COARSE_BINS": 3,
}
"""A few components and bins: the arithmetic is the same, and takes no time."""


def scene(number: int) -> Sample:
    """An orange box on grey noise; every fifth scene has one to be ignored, too."""
    rng = np.random.default_rng(number)
    image = rng.integers(90, 130, (120, 200, 3)).astype(np.uint8)
    truths = []
    for place in range(1 + (number % 5 == 0)):
        width, height = rng.integers(30, 60, 2)
        x, y = int(rng.integers(0, 40)) + 100 * place, int(rng.integers(0, 60))
        image[y : y + height, x : x + width] = (20, 110, 240)
        truths.append(Truth("thing", (x, y, x + float(width), y + float(height))))
    return Sample(f"{number}.png", image.copy, tuple(truths[:1]), ignored=tuple(truths[1:]))


def nothing(number: int) -> Sample:
    image = np.random.default_rng(number).integers(90, 130, (120, 200, 3)).astype(np.uint8)
    return Sample(f"nothing {number}.png", image.copy, ())


IMAGES = {
    MAIN: [scene(number) for number in range(10)],
    "empty": [nothing(number) for number in range(2)],
}


@pytest.fixture(scope="module")
def network():
    return load_classifier("lite0", None, SIZE_PX, GivenInput(resize=LETTERBOX))


@pytest.fixture(scope="module")
def head(network):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(dense_scenes, name, value)
        spec = dense.default_spec(network)
        return dense.fit_dense(IMAGES[MAIN], network, spec, QUIET, "shapes").head


@pytest.fixture(scope="module")
def images(head, network):
    reader = TorchDenseHead(head, network.shape, PROCESSOR)
    return Images(IMAGES, head, network, reader, PROCESSOR, QUIET)


@pytest.mark.parametrize("recipe", ["all_top", "boxes"])
def test_the_loss_falls_in_a_few_steps(head, network, images, recipe):
    how = replace(RECIPES[recipe], rate=0.02)
    reader = TorchDenseHead(head, network.shape, PROCESSOR)
    descent = Descent(reader, how, curvatures(reader, images, 12, 1, how.penalty))
    before = {name: layer[0].clone() for name, layer in reader.layers.items()}
    batch = images.draw(12)
    lots = images.lots_of(batch)
    losses = [float(descent.step(batch, lots, 0.5)) for _ in range(4)]
    losses.append(float(loss_of(reader, batch, how, lots)))
    assert losses[-1] < losses[0]
    moved = {name for name, old in before.items() if not torch.equal(old, reader.layers[name][0])}
    assert moved == set(how.trained)


def test_the_head_that_is_saved_reads_the_same_boxes_everywhere(head, network, tmp_path):
    one, other = (
        descended(head, IMAGES, network, RECIPES["all_top"], QUIET, 1.0, 6, 1) for _ in range(2)
    )
    assert one.digest == other.digest != head.digest
    assert one.naming is not None
    assert one.naming.means.shape == one.naming.weight.shape
    path = tmp_path / "head.safetensors"
    one.save(path)
    saved = load_head(path)
    assert saved.digest == one.digest
    feeds = [Localizer(TorchEngine(network, head=saved)).prepare(scene(50).read())]
    graph = build_graph(network, saved.spec, saved)
    found, expected = (
        Localizer(engine).infer(feeds)[CANDIDATES][0]
        for engine in (OpenVinoEngine(graph, "fp32"), TorchEngine(network, head=saved))
    )
    overlaps = iou(found[:, None, :4], expected[None, :, :4])
    close, same = overlaps.max(axis=1) > 0.98, overlaps.argmax(axis=1)
    assert close.mean() > 0.9  # a box that ranks last here may be left out there
    np.testing.assert_allclose(found[close, 4], expected[same[close], 4], atol=0.02)


def images_of(data, part="all"):
    if part != LEFT_OUT:
        return dict(IMAGES)
    return {MAIN: [scene(number) for number in range(20, 26)], "empty": [nothing(20)], BLURRED: []}


def test_the_command_writes_a_head_with_a_confidence_of_photos_left_out(
    head, tmp_path, monkeypatch
):
    monkeypatch.setattr(dense_descent, "training_images", images_of)
    start, out = tmp_path / "start.safetensors", tmp_path / "out.safetensors"
    head.save(start)
    words = ["--head", str(start), "--data", str(tmp_path), "--out", str(out), "--epochs", "0.5"]
    words += ["--batch", "6", "--curves", "1"]
    run(dense_descent.main, words)
    plain = load_head(out)
    assert isinstance(plain, DenseHead)
    assert plain.trust == head.trust
    assert plain.digest != head.digest
    assert plain.card["held_out"] == head.card["held_out"]
    assert plain.card["descent"] == {"recipe": "all_top", "epochs": 0.5, "batch": 6}
    run(dense_descent.main, [*words, "--trial", str(start)])
    found = load_head(out)
    assert isinstance(found, DenseHead)
    assert found.trust != head.trust
    assert found.card["held_out"]["images_with_one_object"] == 6
    np.testing.assert_array_equal(found.box_weight, plain.box_weight)


def test_what_cannot_be_trained_is_said(head, tmp_path):
    one_round = tmp_path / "one_round.safetensors"
    replace(head, first_weight=None, first_bias=None).save(one_round)
    words = ["--head", str(one_round), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no dense head with two rounds"):
        run(dense_descent.main, words)
    with pytest.raises(SystemExit, match="take one of all_top, all"):
        run(dense_descent.main, [*words, "--recipe", "none"])


def test_changed_images_keep_their_objects(images):
    """Where an image is only mirrored, so are its boxes; zoomed, they stay inside."""
    for _ in range(3):
        batch = images.draw(12)
        assert batch.maps[0].shape[0] == len(batch.boxes) == 12
        assert (batch.boxes >= 0).all()
        assert (batch.boxes <= SIZE_PX).all()
        assert ((batch.classes == 0) == batch.valid).all()
        assert 4 <= int(batch.valid.sum()) <= 10


def test_the_giou_of_boxes_that_are_apart_is_negative():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    others = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [30, 0, 40, 10]])
    np.testing.assert_allclose(giou(boxes, others).numpy(), [1, 0.5, -0.5], atol=1e-6)


def test_photos_of_one_group_are_left_out_together():
    photos = [replace(scene(number), sequence=f"{number // 3}") for number in range(60)]
    lists = [photos[:30], photos[30:]]
    left_out, fitted = of_part(lists, True), of_part(lists, False)
    groups = [{each.group for some in part for each in some} for part in (left_out, fitted)]
    assert not groups[0] & groups[1]
    assert len(groups[0]) == 4
    assert len(groups[0] | groups[1]) == 20
