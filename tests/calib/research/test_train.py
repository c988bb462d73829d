"""Training: a run that was stopped, batch norm folded, what the teacher teaches."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from calib.research import train as module
from calib.research.train import (
    UNKNOWN,
    Examples,
    Lessons,
    Recipe,
    batches,
    folded_weights,
    kept,
    losses_of,
    optimise,
    taught_crops,
)
from engines.backends.torch_networks import Vgg16
from engines.errors import ModelError
from engines.networks.registry import load_classifier

QUIET = Console(quiet=True)
CHANNELS = (4, 4, 4, 4, 4)


def made_examples(count, side_px, labels, seed):
    rng = np.random.default_rng(seed)
    attention = tuple(rng.random((count, side, side)).astype(np.float16) for side in (4, 2))
    lessons = Lessons(rng.standard_normal((count, 10)).astype(np.float16), attention)
    return Examples(
        rng.integers(0, 256, (count, side_px, side_px, 3)).astype(np.uint8),
        np.array(labels),
        lessons,
    )


def tiny_task():
    labels = np.random.default_rng(0).choice([2, 5, 7], 40)
    sets = [made_examples(40, 16, labels, 1), made_examples(20, 32, [UNKNOWN] * 20, 2)]
    return sets, Recipe("distil", 32, 4, (8, 4), 0.05, channels=CHANNELS)


def new_network():
    torch.manual_seed(1)
    return Vgg16(CHANNELS, 10, hidden=0, batch_norm=True)


def test_a_stopped_training_goes_on_exactly_as_it_would_have(tmp_path, monkeypatch):
    sets, recipe = tiny_task()
    straight = new_network()
    optimise(straight, recipe, sets, tmp_path / "a.pt", QUIET)

    monkeypatch.setattr(module, "SAVED_EVERY", 2)
    stopped, whole = new_network(), module.losses_of

    def dies_at_the_third(network, batch, classes, recipe):
        if (tmp_path / "b.pt").exists():
            raise KeyboardInterrupt
        return whole(network, batch, classes, recipe)

    monkeypatch.setattr(module, "losses_of", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        optimise(stopped, recipe, sets, tmp_path / "b.pt", QUIET)
    monkeypatch.setattr(module, "losses_of", whole)
    resumed = new_network()
    optimise(resumed, recipe, sets, tmp_path / "b.pt", QUIET)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    sets, recipe = tiny_task()
    optimise(new_network(), recipe, sets, tmp_path / "a.pt", QUIET)
    with pytest.raises(ModelError, match="another recipe"):
        optimise(new_network(), replace(recipe, peak_rate=0.2), sets, tmp_path / "a.pt", QUIET)


def test_what_goes_wrong_while_batches_are_made_is_raised(tmp_path):
    sets, recipe = tiny_task()
    with pytest.raises(ValueError, match="zip"):
        optimise(new_network(), recipe, sets[:1], tmp_path / "a.pt", QUIET)


def test_labelled_images_may_ignore_the_teachers_scores():
    sets, recipe = tiny_task()
    network, classes = new_network(), torch.tensor([2, 5, 7])
    images, labels, lessons = next(batches(recipe, sets, 0))
    changed = lessons.scores.copy()
    changed[labels != UNKNOWN] += np.arange(10, dtype=np.float16)
    other = (images, labels, replace(lessons, scores=changed))
    for listens, same in ((True, False), (False, True)):
        notify = replace(recipe, scores_of_labelled=listens)
        found = [
            losses_of(network, batch, classes, notify)[1].item()
            for batch in ((images, labels, lessons), other)
        ]
        assert (abs(found[0] - found[1]) < 1e-6) == same


def test_labels_alone_train_too(tmp_path):
    sets, recipe = tiny_task()
    labelled, network = replace(sets[0], lessons=None), new_network()
    labelled.images[:] = (labelled.images // 4) + 24 * labelled.labels[:, None, None, None].astype(
        np.uint8
    )  # by brightness
    recipe = replace(recipe, stage="classify", steps=30, batch=(16,), label_smoothing=0.0)
    first = losses_of(
        network, next(batches(recipe, [labelled], 0)), torch.tensor([2, 5, 7]), recipe
    )
    optimise(network, recipe, [labelled], tmp_path / "a.pt", QUIET)
    last = losses_of(network, next(batches(recipe, [labelled], 0)), torch.tensor([2, 5, 7]), recipe)
    assert last[0] < first[0] - 0.1
    assert last[1] == last[2] == 0


def test_an_epoch_shows_every_image_once():
    sets, recipe = tiny_task()
    marked = replace(sets[0], labels=np.arange(40), lessons=None)
    seen = np.concatenate(
        [labels for _, labels, _ in batches(replace(recipe, steps=5, batch=(8,)), [marked], 0)]
    )
    assert sorted(seen) == list(range(40))


def test_a_mirrored_image_has_mirrored_attention():
    """The picture's bright column and its attention are on the same side, whichever way it is
    turned.
    """
    image = np.zeros((4, 32, 32, 3), np.uint8)
    image[:, :, :8] = 200
    attention = tuple(np.zeros((4, side, side), np.float16) for side in (4, 2))
    for each in attention:
        each[:, :, 0] = 1
    examples = Examples(
        image, np.full(4, UNKNOWN), Lessons(np.zeros((4, 10), np.float16), attention)
    )
    turned = set()
    for images, _, lessons in batches(Recipe("distil", 32, 12, (4,), 0.1), [examples], 0):
        for picture, wide, narrow in zip(images, *lessons.attention, strict=True):
            left = picture[:, :8].mean() > picture[:, -8:].mean()
            assert (wide[:, 0].sum() > wide[:, -1].sum()) == left
            assert (narrow[:, 0].sum() > narrow[:, -1].sum()) == left
            turned.add(bool(left))
    assert turned == {True, False}


def test_attention_that_agrees_costs_nothing():
    sets, recipe = tiny_task()
    torch.manual_seed(1)
    network = Vgg16((16, 16, 16, 16, 16), 10, hidden=0, batch_norm=True)
    images, labels, lessons = next(batches(recipe, sets, 0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, layers = network.activations(module.normalised(images))
    own = tuple(layers[k].float().square().mean(1).numpy() for k in module.ATTENTIVE_LAYERS)
    agreed = Lessons(lessons.scores, own)
    classes = torch.tensor([2, 5, 7])
    assert losses_of(network, (images, labels, agreed), classes, recipe)[2].item() == pytest.approx(
        0, abs=1e-4
    )
    assert losses_of(network, (images, labels, lessons), classes, recipe)[2].item() > 0.05


def test_folding_batch_norm_changes_nothing_but_the_names(tmp_path):
    sets, recipe = tiny_task()
    network = new_network()
    optimise(network, recipe, sets, tmp_path / "a.pt", QUIET)
    plain = Vgg16(CHANNELS, 10, hidden=0)
    plain.load_state_dict(
        {
            name: torch.from_numpy(v.astype(np.float32))
            for name, v in folded_weights(network).items()
        }
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(x), network.eval()(x), atol=5e-3, rtol=1e-2)


def picture(seed):
    rng = np.random.default_rng(seed)
    return cv2.resize(
        rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC
    )


def test_lessons_are_deterministic_kept_and_the_first_crop_is_the_whole_photo(tmp_path):
    teacher = load_classifier("squeezenet", "random")
    photos = [picture(i) for i in range(3)]
    first, again = (
        taught_crops(photos, teacher, 2, 32, (4, 2), QUIET, labels=np.array([7, 8, 9]))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.lessons.scores, again.lessons.scores)
    assert first.images.shape == (6, 32, 32, 3)
    assert first.labels.tolist() == [7, 7, 8, 8, 9, 9]
    assert [each.shape for each in first.lessons.attention] == [(6, 4, 4), (6, 2, 2)]
    np.testing.assert_array_equal(
        first.images[2], cv2.resize(photos[1], (32, 32), interpolation=cv2.INTER_AREA)
    )
    small = [
        np.ascontiguousarray(photo[:32, :32]) for photo in photos
    ]  # as large as they are kept: not resampled at all
    np.testing.assert_array_equal(
        taught_crops(small, teacher, 1, 32, (4, 2), QUIET).images, np.stack(small)
    )

    kept(tmp_path / "lessons.npz", lambda: first)
    stored = kept(tmp_path / "lessons.npz", lambda: pytest.fail("it was stored"))
    np.testing.assert_array_equal(stored.lessons.attention[0], first.lessons.attention[0])
    np.testing.assert_array_equal(stored.images, first.images)
