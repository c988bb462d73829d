"""The training of Bency's layers of adaptation against slow definitions of its steps."""

import json
import math

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.papers.adaptation import (
    PUBLISHED,
    Schedule,
    changed,
    copies_of,
    cross_entropy,
    held_out,
    schedule_of,
    softmax,
    trained,
)
from engines.choose import open_localizer
from engines.networks import vgg
from tests.command_line import command, refused
from tests.oracles import numeric_gradient
from tests.realtime.media import picture

QUIET = Console(quiet=True)


def slow_loss(scores, labels):
    """Equation 1, class by class, in the mean over images."""
    total = 0.0
    for z, p in zip(scores, labels, strict=True):
        weights = [math.exp(each - max(z)) for each in z]
        for weight, p_k in zip(weights, p, strict=True):
            q = weight / sum(weights)
            total -= (p_k * math.log(q) + (1 - p_k) * math.log(1 - q)) / len(z) / len(scores)
    return total


def test_the_loss_and_its_gradient_are_the_oracles():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 4))
    labels = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1.0]])
    loss, gradient = cross_entropy(scores, labels)
    assert loss == pytest.approx(slow_loss(scores, labels), rel=1e-12)
    expected = numeric_gradient(lambda z: np.array(slow_loss(z, labels)), scores, np.array(1.0))
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_two_classes_of_an_image_share_the_softmax():
    """The loss is least where both have a half: the softmax cannot give each of them 1."""
    labels = np.array([[1.0, 1.0, 0.0]])
    even = cross_entropy(np.array([[9.0, 9.0, 0.0]]), labels)[0]
    assert even < cross_entropy(np.array([[9.0, 8.0, 0.0]]), labels)[0]
    np.testing.assert_allclose(softmax(np.array([[2.0, 2.0]], np.float32)), [[0.5, 0.5]])


def slow_training(inputs, labels, schedule):
    """Gradient descent with momentum and decay, in float64, by differences of the slow loss."""
    rng = np.random.default_rng(0)
    shapes = ((schedule.hidden, inputs.shape[1]), (labels.shape[1], schedule.hidden))
    fa, fb = (
        (rng.standard_normal(shape, np.float32) * np.float32(deviation)).astype(np.float64)
        for shape, deviation in zip(shapes, (0.005, 0.01), strict=True)
    )
    values = [fa, np.zeros(len(fa)), fb, np.zeros(len(fb))]
    moved = [np.zeros(value.shape) for value in values]
    order = []
    for number in range(schedule.batches):
        if len(order) < schedule.batch:
            order += rng.permutation(len(inputs)).tolist()
        rows, order = order[: schedule.batch], order[schedule.batch :]
        gradients = []
        for place, value in enumerate(values):

            def loss(changed_value, place=place, rows=rows):
                a, a_bias, b, b_bias = [*values[:place], changed_value, *values[place + 1 :]]
                hidden = np.maximum(inputs[rows] @ a.T + a_bias, 0)
                return np.array(slow_loss(hidden @ b.T + b_bias, labels[rows]))

            gradients.append(numeric_gradient(loss, value, np.array(1.0)))
        rate = schedule.rate * 0.1 ** (number // schedule.drop_every)
        for place, gradient in enumerate(gradients):
            pulled = gradient + (schedule.decay * values[place] if place % 2 == 0 else 0)
            moved[place] = schedule.momentum * moved[place] - rate * pulled
            values[place] = values[place] + moved[place]
    return values


def test_training_is_the_oracles():
    rng = np.random.default_rng(1)
    inputs, labels = rng.random((9, 5)) * 20, (rng.random((9, 3)) < 0.4).astype(float)
    schedule = Schedule(4, batches=7, batch=4, rate=0.5, drop_every=3)
    found = trained(inputs.astype(np.float32), labels, schedule, QUIET)
    expected = slow_training(inputs, labels, schedule)
    for ours, slow in zip(
        (found.fa, found.fa_bias, found.fb, found.fb_bias), expected, strict=True
    ):
        np.testing.assert_allclose(ours, slow, rtol=1e-3, atol=1e-6)
    hidden = np.maximum(inputs @ expected[0].T + expected[1], 0)
    np.testing.assert_allclose(
        found.probabilities(inputs.astype(np.float32)),
        softmax(hidden @ expected[2].T + expected[3]),
        rtol=1e-3,
    )


def test_the_schedule_is_section_4_1s():
    assert (PUBLISHED.batch, PUBLISHED.batches) == (50, 400_000)
    assert PUBLISHED.rate_at(19_999) == 0.001
    assert PUBLISHED.rate_at(20_000) == pytest.approx(0.0001)
    assert PUBLISHED.rate_at(60_000) == pytest.approx(1e-6)
    short = schedule_of(8, 300, 1)
    assert (short.rate_at(99), short.rate_at(100)) == (0.001, pytest.approx(0.0001))
    assert schedule_of(2048, 400_000, 8) == PUBLISHED


def test_images_of_rare_classes_give_more_samples():
    labels = np.array([[1, 0, 0]] * 12 + [[0, 1, 0]] * 4 + [[1, 0, 1]] + [[0, 0, 0]])
    assert copies_of(labels, 20).tolist() == [1] * 12 + [3] * 4 + [13, 1]
    assert copies_of(labels, 2).tolist() == [1] * 12 + [2] * 4 + [2, 1]
    assert held_out(25).nonzero()[0].tolist() == [9, 19]


def test_a_copy_is_turned_by_at_most_30_degrees_and_noisy():
    """A bright bar keeps about its direction; the noise is white and of the deviation that is
    said.
    """
    flat = np.full((64, 64, 3), 128, np.uint8)
    noise = changed(lambda: flat, 3, 1).astype(float) - 128
    assert noise.std() == pytest.approx(10, rel=0.05)
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.05
    bar = flat.copy()
    bar[30:34, 8:56] = 255
    angles = []
    for number in range(12):
        image = changed(lambda: bar, 0, number)
        rows, columns = np.nonzero(image[..., 0] > 200)
        angles.append(math.degrees(math.atan(np.polyfit(columns, rows, 1)[0])))
    assert max(np.abs(angles)) < 32
    assert np.ptp(angles) > 20
    np.testing.assert_array_equal(changed(lambda: bar, 0, 5), changed(lambda: bar, 0, 5))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """20 photos of two kinds of bright things."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = ["file,class,x0,y0,x1,y1"]
    for index in range(20):
        cv2.imwrite(str(folder / f"{index}.png"), np.roll(picture(index), 5 * index, axis=1))
        rows.append(f"{index}.png,{'cat' if index % 3 else 'dog'},4,30,28,54")
    (folder / "trainval.csv").write_text("\n".join(rows))
    return folder


def test_finetune_as_published_gives_weights_that_beam_search_takes(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    convolutions = {
        name: value
        for name, value in vgg.random_weights((4, 4, 8, 8, 8), hidden=0).items()
        if name.startswith("features")
    }
    bare, made = tmp_path / "bare.npz", tmp_path / "made.safetensors"
    np.savez(bare, **convolutions)
    data = scenes / "trainval.csv"
    chosen = ("--model", "vgg16", "--weights", bare, "--size", "64", "--out", made)
    small = ("--hidden", "6", "--batches", "5", "--copies", "2")
    done = command("finetune", data, *chosen, "--as-published", *small, "--json")
    assert json.loads(done.stdout)["classes"] == ["cat", "dog"]
    localizer = open_localizer(
        "vgg16", weights=str(made), method="beam", as_published=True, size_px=64
    )
    assert localizer.class_names == ("cat", "dog")
    found = localizer.localize([picture(1)])[0]
    assert found.class_name in ("cat", "dog")
    localizer.close()
    as_layer = open_localizer(
        "vgg16",
        weights=str(bare),
        class_layer=str(made),
        method="beam",
        as_published=True,
        size_px=64,
    )
    assert as_layer.localize([picture(1)])[0].score == pytest.approx(found.score, rel=1e-3)
    as_layer.close()
    told = refused("finetune", data, "--out", tmp_path / "x.safetensors", "--as-published")
    assert "layers of adaptation stand behind vgg16" in told
