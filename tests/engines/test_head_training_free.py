"""The training-free head: against a slow oracle, and on pictures whose bright part is known."""

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.backends.torch_reference import TorchEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import ModelError
from engines.graph import FLOAT, Graph
from engines.head import Heuristic, append_heuristic_box, gaussian_matrix
from engines.localizer import Localizer
from engines.maps import MapSpec
from engines.networks.registry import load_classifier


def box_of(maps, heuristic):
    graph = Graph()
    name = graph.input("m", FLOAT, maps.shape)
    graph.output(append_heuristic_box(graph, name, heuristic), "found")
    return OpenVinoEngine(graph.model(), "fp32").infer({"m": maps.astype(np.float32)})["found"]


def slow_box(image, sigma, share):
    """Pixel by pixel: blur with a Gaussian that ends at the border, sort, keep, look for the
    outermost.
    """
    height, width = image.shape
    blurred = np.zeros_like(image, dtype=np.float64)
    for y in range(height):
        for x in range(width):
            ys = np.exp(-0.5 * ((np.arange(height) - y) / (sigma * height)) ** 2)
            xs = np.exp(-0.5 * ((np.arange(width) - x) / (sigma * width)) ** 2)
            blurred[y, x] = (np.outer(ys / ys.sum(), xs / xs.sum()) * image).sum()
    least = sorted(blurred.ravel())[-max(1, round(share * image.size))]
    inside = [(x, y) for y in range(height) for x in range(width) if blurred[y, x] >= least]
    xs, ys = zip(*inside, strict=True)
    return [min(xs) / width, min(ys) / height, (max(xs) + 1) / width, (max(ys) + 1) / height]


@pytest.mark.parametrize(("sigma", "share"), [(0.05, 0.2), (0.2, 0.5), (0.1, 0.001)])
def test_the_box_is_the_oracles(sigma, share):
    maps = np.random.default_rng(0).random((2, 11, 14)) ** 4
    for image, found in zip(maps, box_of(maps, Heuristic(sigma=sigma, share=share)), strict=True):
        np.testing.assert_allclose(found, slow_box(image, sigma, share), atol=1e-6)


def test_without_a_blur_the_brightest_pixels_are_boxed():
    image = np.zeros((1, 10, 20))
    image[0, 3:5, 4:9] = 1
    np.testing.assert_allclose(
        box_of(image, Heuristic(sigma=0, share=10 / 200))[0], [0.2, 0.3, 0.45, 0.5], atol=1e-6
    )


def test_an_empty_map_gives_the_whole_image():
    np.testing.assert_allclose(box_of(np.zeros((1, 8, 8)), Heuristic())[0], [0, 0, 1, 1])


def test_blur_rows_sum_to_one():
    np.testing.assert_allclose(gaussian_matrix(9, 2.0).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"sigma": -1}, {"share": 0}, {"share": 1.5}])
def test_impossible_settings(changes):
    with pytest.raises(ModelError, match="heuristic"):
        Heuristic(**changes)


@pytest.mark.parametrize("spec", [MapSpec(), MapSpec(layer="conv5_3", signal="layercam")], ids=str)
def test_the_engine_gives_the_references_box(spec, photos):
    classifier = load_classifier("compact", "random", 64)
    head = Heuristic(spec, 0.1, 0.2)
    engine, reference = (
        OpenVinoEngine(build_graph(classifier, head=head), "fp32"),
        TorchEngine(classifier, head=head),
    )
    localizer, cell = Localizer(engine), 1 / engine.outputs[2].shape[1]
    for photo in photos[:4]:
        feed = {IMAGE: localizer.prepare(photo)[None], WANTED_CLASS: np.array([-1])}
        assert (
            np.abs(engine.infer(feed)["box_xyxy"] - reference.infer(feed)["box_xyxy"]).max()
            < cell + 1e-6
        )
