"""Fine-tuning against a slow definition of its loss, and as a user meets it: weights whose classes
have names.
"""

import json
import math

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.heads.finetune import finetune, fit_sigmoid, image_ap, last_inputs, save_finetuned
from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_networks import torch_network
from engines.build import build_graph
from engines.choose import open_localizer
from engines.errors import ModelError, SourceError
from engines.head import head_path, load_head
from engines.localizer import Localizer
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import load_classifier
from engines.options import EngineOptions

QUIET = Console(quiet=True)


def slow_loss(weight, bias, inputs, labels, strength):
    """Image by image, class by class; the penalty is on weights of inputs of unit variance."""
    total = 0.0
    for x, y in zip(inputs, labels, strict=True):
        for k in range(len(bias)):
            z = sum(w * v for w, v in zip(weight[k], x, strict=True)) + bias[k]
            total += (max(z, 0) + math.log1p(math.exp(-abs(z))) - y[k] * z) / len(inputs)
    spread = [float(np.std(column)) for column in inputs.T]
    return total + strength / 2 * sum(
        (w * s) ** 2 for row in weight for w, s in zip(row, spread, strict=True)
    )


def test_no_step_lowers_the_loss():
    """The minimum of a convex function: whichever number is moved, either way, the slow loss
    rises.
    """
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 3)) * [1, 5, 0.2] + [0, 3, 1]
    labels = (rng.random((40, 2)) < 0.5).astype(float)
    weight, bias = fit_sigmoid(inputs, labels, 0.01)
    least = slow_loss(weight, bias, inputs, labels, 0.01)
    for place in np.ndindex(2, 3):
        for step in (-1e-2, 1e-2):
            moved = weight.copy()
            moved[place] += step
            assert slow_loss(moved, bias, inputs, labels, 0.01) > least
    for k in range(2):
        for step in (-1e-2, 1e-2):
            assert slow_loss(weight, bias + step * np.eye(2)[k], inputs, labels, 0.01) > least


def test_average_precision_over_images_by_hand():
    """Ranked 2, 0, 1: of the two that have it the first is right at once, the second at a precision
    of 2/3.
    """
    scores, labels = np.array([[0.5], [0.1], [0.9]]), np.array([[0.0], [1.0], [1.0]])
    assert image_ap(scores, labels, ["a"]) == {"a": pytest.approx((1 + 2 / 3) / 2)}
    assert image_ap(scores, np.zeros((3, 1)), ["a"]) == {}


@pytest.fixture
def painted(tmp_path):
    """Thirty pictures: red, blue, or half of each, on noise; one has both classes."""
    rng = np.random.default_rng(1)
    rows = ["file,class,x0,y0,x1,y1"]
    for i in range(30):
        image = rng.integers(0, 90, (64, 64, 3), np.uint8)
        if i % 3 != 1:
            image[:, :32, 2] += 150
            rows.append(f"{i}.png,red,0,0,32,64")
        if i % 3 != 0:
            image[:, 32:, 0] += 150
            rows.append(f"{i}.png,blue,32,0,64,64")
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    (tmp_path / "d.csv").write_text("\n".join(rows) + "\n")
    return load_dataset(tmp_path / "d.csv")


def test_the_weights_find_the_classes_by_name(painted, tmp_path):
    classifier = load_classifier("compact", None, 64)
    found = finetune(painted, classifier, QUIET)
    assert found.classes == ("blue", "red")
    assert found.mean_average_precision > 0.9
    save_finetuned(found, classifier, tmp_path / "mine.safetensors")
    mine = load_classifier("compact", str(tmp_path / "mine.safetensors"), 64)
    localizer = Localizer(OpenVinoEngine(build_graph(mine), "fp32"))
    assert localizer.class_names == ("blue", "red")
    for sample in painted[:6]:
        kinds = {truth.class_name for truth in sample.truths}
        assert localizer.localize([sample.read()])[0].class_name in kinds
    assert json.loads(build_graph(mine).metadata_props[1].value) == ["blue", "red"]


def test_another_last_layer_keeps_the_dense_head_with_the_classes_of_its_own(painted, tmp_path):
    classifier = EngineOptions("lite0").classifier()
    found, path = finetune(painted, classifier, QUIET), tmp_path / "mine.safetensors"
    save_finetuned(found, classifier, path)
    usual = load_head(head_path("lite0_dense"))
    choice = EngineOptions("lite0", weights=str(path))
    assert choice.default_head == "lite0_dense"
    images = [sample.read() for sample in painted[:2]]
    with open_localizer("lite0") as before, open_localizer(choice) as after:
        assert after.class_names == ("blue", "red")
        assert after.names == before.names == usual.naming.names
        assert json.loads(before.engine.metadata["sightline"])["naming"]["finer"]
        assert json.loads(after.engine.metadata["sightline"])["naming"]["finer"] == []
        before.abstain_below(0.0)
        after.abstain_below(0.0)
        for image in images:
            first, same = before.localize([image])[0], after.localize([image])[0]
            np.testing.assert_allclose(same.box_xyxy_px, first.box_xyxy_px, atol=0.5)
    other = load_classifier("lite0", "random", 320, GivenInput(resize="letterbox"))
    save_finetuned(found, other, tmp_path / "other.safetensors")
    assert EngineOptions("lite0", weights=str(tmp_path / "other.safetensors")).default_head is None


@pytest.mark.parametrize(
    "model", ["compact", "alexnet"]
)  # a linear layer over the average; the last of three
def test_what_the_last_layer_reads_gives_the_networks_scores(model, painted):
    classifier = load_classifier(
        model, None if model == "compact" else "random", {"compact": 64, "vgg16": 64}.get(model)
    )
    row = last_inputs(painted[:1], classifier, QUIET)[0]
    prefix = classifier.network.last_linear
    weight, bias = (classifier.weights[f"{prefix}.{kind}"] for kind in ("weight", "bias"))
    last = torch_network(classifier).get_submodule(prefix)
    assert row.shape == (last.in_features,)
    np.testing.assert_array_equal(last.weight.numpy(), weight)
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, expose=("scores",)), "fp32"))
    scores = localizer.infer([localizer.prepare(painted[0].read())])["scores_out"][0]
    np.testing.assert_allclose(weight @ row + bias, scores, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_fitted_says_so(painted):
    classifier = load_classifier("compact", "random", 64)
    with pytest.raises(SourceError, match="two classes"):
        finetune(
            [s for s in painted if len(s.truths) == 1 and s.truths[0].class_name == "red"],
            classifier,
            QUIET,
        )
    with pytest.raises(ModelError, match="squeezenet has none"):
        last_inputs(painted, load_classifier("squeezenet", "random", 64), QUIET)
