"""DAM and beam search with networks of tokens, of windows and of channels last."""

import numpy as np
import pytest
import torch

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS
from engines.gradient import attach_gradient
from engines.networks.registry import load_classifier
from engines.search.beam import (
    COLUMNS,
    ROWS,
    BeamEngine,
    beam_settings,
    build_features_graph,
    build_tail_graph,
    first_candidates,
)
from engines.search.dam import DamEngine, DamSettings, build_walks_graph
from tests.engines.double import run_in_float64
from tests.engines.foreign import KINDS, SIDE, export
from tests.processors import NORMALIZES

PHOTO = np.random.default_rng(5).integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)
FEEDS = {IMAGE: PHOTO, WANTED_CLASS: np.array([-1])}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def network(request, tmp_path_factory):
    """(the module, the classifier)."""
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    module = export(request.param, path).double()
    return module, load_classifier(str(path))


def normalised(classifier):
    mean, std = (
        np.float32(v) for v in (classifier.preprocessing.mean, classifier.preprocessing.std)
    )
    pixels = (PHOTO[..., ::-1] - mean.astype(np.float64)) * (1 / std).astype(np.float64)
    return pixels.transpose(0, 3, 1, 2)


def test_each_walk_is_the_gradient_of_its_neuron_alone(network):
    """By a graph with one walk, of the first stage's neurons."""
    _, classifier = network
    layer = classifier.network.head_layers[0]
    found = run_in_float64(
        build_walks_graph(classifier, DamSettings(layer=layer, kmax=4, k=2)), FEEDS
    )
    for neuron, walk in zip(found["neurons"], found["walks"], strict=True):
        graph, forward = classifier.forward_graph()
        tensor = forward.layers[layer]
        seed = np.zeros(graph.shape(tensor))
        seed.flat[neuron] = 1
        start = {tensor: graph.constant(seed)}
        graph.output(attach_gradient(graph, start, ["pixels"], "guided")["pixels"], "gradient")
        alone = run_in_float64(graph.model(), {"pixels": normalised(classifier)})["gradient"]
        expected = np.abs(alone[0] / np.reshape(classifier.preprocessing.std, (3, 1, 1))).max(
            axis=0
        )
        np.testing.assert_allclose(walk, expected, atol=1e-5 * expected.max())
    assert len({walk.tobytes() for walk in found["walks"]}) == 4


def test_the_layers_behind_the_cut_give_the_whole_map_the_networks_own_scores(network):
    module, classifier = network
    settings = beam_settings()
    first = run_in_float64(build_features_graph(classifier, settings), FEEDS)
    tail = build_tail_graph(classifier, settings)
    sides = {value.name: value.type.tensor_type.shape.dim for value in tail.graph.input}
    batch, side = sides[ROWS][0].dim_value, sides[ROWS][2].dim_value
    whole = np.stack([first_candidates(side)[0].rows.astype(np.float64)] * batch)[:, None]
    feeds = {name: first[name] for name in sides if name in first}
    scores = run_in_float64(tail, {**feeds, ROWS: whole, COLUMNS: whole})["scores"]
    expected = module(torch.from_numpy(normalised(classifier))).softmax(-1).detach().numpy()
    np.testing.assert_allclose(scores, np.repeat(expected, batch, axis=0), atol=1e-6)


@NORMALIZES
def test_both_searches_find_boxes(network):
    _, classifier = network
    for engine in (
        DamEngine(classifier, DamSettings(classifier.network.dam_layer), in_fp32),
        BeamEngine(classifier, beam_settings(objects=2), in_fp32),
    ):
        found = engine.infer(FEEDS)
        x0, y0, x1, y1 = found["box_xyxy"][0]
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        engine.close()


def in_fp32(model):
    return OpenVinoEngine(model, "fp32")
