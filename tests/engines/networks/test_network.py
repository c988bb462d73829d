"""Whole networks: the compiled graph against PyTorch autograd on an independent module."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from engines.backends.openvino import OpenVinoEngine, best_precision
from engines.backends.torch_networks import torch_network
from engines.backends.torch_reference import TorchEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.choose import choose_head
from engines.localizer import Localizer
from engines.maps import MapSpec
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from tests.engines.double import run_in_float64

BF16 = pytest.mark.skipif(
    best_precision() != "bf16", reason="this processor does not compute in bf16"
)


def feeds(image, wanted=-1):
    return {IMAGE: image[None], WANTED_CLASS: np.array([wanted])}


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def load(model, squeezenet, size_px=None):
    return load_classifier(model, {"squeezenet": squeezenet, "vgg16": "random"}.get(model), size_px)


SPECS = [
    ("compact", MapSpec()),
    ("compact", MapSpec(aggregation="mean")),
    ("compact", MapSpec(objective="gestalt")),
    ("compact", MapSpec(layer="conv3_3")),
    ("compact", MapSpec(layer="pool4", objective="gestalt", aggregation="mean")),
    ("squeezenet", MapSpec()),
    ("squeezenet", MapSpec(objective="gestalt")),
    ("squeezenet", MapSpec(layer="fire5")),
    ("compact", MapSpec(layer="conv4_3", signal="activation")),
    ("compact", MapSpec(layer="conv5_3", signal="gradcam")),
    ("squeezenet", MapSpec(layer="fire9", signal="layercam")),
    ("squeezenet", MapSpec(layer="fire7", signal="layercam", objective="gestalt")),
]


@pytest.mark.parametrize(("model", "size_px"), [("compact", 64), ("squeezenet", 95), ("vgg16", 32)])
def test_in_float64_the_whole_graph_is_autograds(model, size_px, squeezenet):
    """The formula itself: what is left is the rounding of constants that the file keeps as
    float32.
    """
    classifier = load(model, squeezenet, size_px)
    image = np.random.default_rng(0).integers(0, 256, (1, size_px, size_px, 3)).astype(np.uint8)
    found = run_in_float64(build_graph(classifier), {IMAGE: image, WANTED_CLASS: np.array([-1])})[
        "map"
    ]
    order = classifier.preprocessing.order
    pixels = (
        torch.from_numpy(image[..., ::-1].copy() if order == "rgb" else image)
        .permute(0, 3, 1, 2)
        .double()
    )
    pixels = pixels.contiguous().requires_grad_(True)
    mean, std = (
        torch.tensor(np.float32(v), dtype=torch.float64).view(1, 3, 1, 1)
        for v in (PREPROCESSING[order])
    )
    torch_network(classifier).double()((pixels - mean) / std).max().backward()
    assert relative_error(found, pixels.grad.abs().amax(1).numpy()) < 1e-6


PREPROCESSING = {
    "rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "bgr": ((104, 117, 123), (1, 1, 1)),
}


@pytest.mark.parametrize(("model", "spec"), SPECS, ids=str)
def test_map_class_and_score_are_autograds(model, spec, photos, squeezenet):
    """In float32, on real photos: no photo is wrong. That the formula is right is shown in float64,
    above.

    Two correct implementations round differently. A unit whose input lies within rounding of zero
    may then be on in one and off in the other, which costs that photo 1e-4 to 3e-3; how many do
    depends on the kernels. A wrong formula costs 0.1 or more.
    """
    classifier = load(model, squeezenet)
    engine = OpenVinoEngine(build_graph(classifier, spec), "fp32")
    reference, localizer = TorchEngine(classifier, spec), Localizer(engine)
    maps, errors = [], []
    for photo in photos[:7]:
        prepared = localizer.prepare(photo)
        found, expected = engine.infer(feeds(prepared)), reference.infer(feeds(prepared))
        errors.append(relative_error(found["map"], expected["map"]))
        assert found["class_index"] == expected["class_index"]
        np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4)
        maps.append(found["map"])
    assert max(errors) < 2e-2, errors
    for first, second in pairwise(maps):
        assert first.max() > 0
        assert relative_error(first, second) > 0.1, "two photos gave the same map"


@pytest.mark.long
def test_vgg16_at_full_width_is_autograds(photos):
    """Width 1 at 224 px with untrained weights, in float32.

    Of its 13 layers' units and pools, a share p of about 1e-6 lies within rounding of the other
    side, so the expected error is sqrt(2 * 13 * p), 5e-3, whoever computes it: the bound here
    catches wrong formulas, float64 above proves the right one.
    """
    classifier = load_classifier("vgg16", "random")
    engine, reference = OpenVinoEngine(build_graph(classifier), "fp32"), TorchEngine(classifier)
    for photo in photos[:1]:
        prepared = Localizer(engine).prepare(photo)
        found, expected = (
            engine.infer(feeds(prepared))["map"],
            reference.infer(feeds(prepared))["map"],
        )
        assert relative_error(found, expected) < 2e-2
        assert np.median(np.abs(found - expected) / expected.max()) < 1e-4


def test_a_named_class_changes_the_map_without_a_rebuild(photos, squeezenet):
    classifier = load("squeezenet", squeezenet)
    engine, reference = OpenVinoEngine(build_graph(classifier), "fp32"), TorchEngine(classifier)
    errors = []
    for photo in photos[:5]:
        prepared = Localizer(engine).prepare(photo)
        best, other = engine.infer(feeds(prepared)), engine.infer(feeds(prepared, 340))
        assert other["class_index"] == [340]
        assert relative_error(best["map"], other["map"]) > 0.1
        errors.append(relative_error(other["map"], reference.infer(feeds(prepared, 340))["map"]))
    assert max(errors) < 2e-2, errors


def test_a_batch_gives_what_single_images_give(photos):
    """The boxes too: OpenVINO adds a bias of one row to the sums of several images wrongly, see
    ``engines.head``.
    """
    classifier = load_classifier("compact")
    head = choose_head(EngineOptions(), classifier)
    single = OpenVinoEngine(build_graph(classifier, head.spec, head), "fp32")
    triple = OpenVinoEngine(build_graph(classifier, head.spec, head, batch=3), "fp32")
    images = np.stack([Localizer(single).prepare(photo) for photo in photos[:3]])
    wanted = np.array([-1, 7, -1])
    together = triple.infer({IMAGE: images, WANTED_CLASS: wanted})
    for i in range(3):
        alone = single.infer(feeds(images[i], wanted[i]))
        assert (
            relative_error(together["map"][i], alone["map"][0]) < 2e-2
        )  # batches may have kernels of their own
        assert together["class_index"][i] == alone["class_index"][0]
        np.testing.assert_allclose(together["box_xyxy"][i], alone["box_xyxy"][0], atol=2e-3)


@BF16
@pytest.mark.parametrize("model", ["compact", "squeezenet"])
def test_bf16_maps_correlate_with_the_reference(model, photos, squeezenet):
    """At the 8 x 8 cells that heads read; single pixels flip with rounding (see docs/benchmarks.md
    for both figures).
    """
    classifier = load(model, squeezenet)
    engine, reference = OpenVinoEngine(build_graph(classifier), "bf16"), TorchEngine(classifier)
    correlations = []
    for photo in photos:
        prepared = Localizer(engine).prepare(photo)
        pair = [cells(e.infer(feeds(prepared))["map"][0]) for e in (engine, reference)]
        correlations.append(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1])
    assert np.median(correlations) > 0.99, correlations


def cells(map_hw, count=8):
    rows = np.array_split(map_hw, count, axis=0)
    return np.array([[cell.mean() for cell in np.array_split(row, count, axis=1)] for row in rows])


@pytest.mark.parametrize("size_px", [64, 96, 160, 256])
def test_vgg16_with_hidden_layers_at_other_sizes_pools_as_torchvision_does(size_px, photos):
    from engines.backends.torch_networks import Vgg16
    from engines.graph import FLOAT, Graph
    from engines.networks import vgg

    weights = vgg.random_weights((4, 4, 8, 8, 8), classes=11, hidden=12)
    module = Vgg16((4, 4, 8, 8, 8), classes=11, hidden=12).eval()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, size_px, size_px))
    graph.output(vgg.forward(graph, x, weights).scores, "scores")
    image = np.random.default_rng(1).standard_normal((1, 3, size_px, size_px)).astype(np.float32)
    found = OpenVinoEngine(graph.model(), "fp32").infer({"x": image})["scores"]
    np.testing.assert_allclose(found, module(torch.from_numpy(image)).detach().numpy(), atol=1e-4)


def test_squeezenet_names_half_of_the_sample_photos_right(data, squeezenet):
    """One photo for every tenth class: 59 of 100 were right for an independent NumPy implementation
    (data card).
    """
    import csv

    import cv2

    from realtime.sources.images import archive_members, decode_image

    engine = OpenVinoEngine(build_graph(load_classifier("squeezenet", squeezenet)), "fp32")
    readers = dict(archive_members(data / "imagenet_sample" / "images_256.zip"))
    with (data / "imagenet_sample" / "index.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::5]
    right = 0
    for row in rows:
        image = decode_image(row["file"], readers[row["file"]]())
        scale = 256 / min(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale)
        y, x = (image.shape[0] - 227) // 2, (image.shape[1] - 227) // 2
        right += int(engine.infer(feeds(image[y : y + 227, x : x + 227]))["class_index"][0]) == int(
            row["class_index"]
        )
    assert 55 <= right <= 63
