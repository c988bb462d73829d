"""What is differentiated, in float64, against PyTorch's autograd and against differences.

Ebrahimpour & Noelle, "Fast Object Localization via Sensitivity Analysis", equations 2 and 3.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import ModelError
from engines.graph import FLOAT, INT64, Graph
from engines.maps import AGGREGATIONS, MapSpec
from engines.networks.network import Forward
from engines.networks.registry import load_classifier
from engines.objectives import OBJECTIVES, objective_cotangents
from tests.engines.double import run_in_float64

RNG = np.random.default_rng(3)
SCORES = RNG.standard_normal((2, 5)) * 2
WANTED = np.array([4, 1])


def cotangent(objective, *, independent=False):
    """Of the scores above, by the graph."""
    graph = Graph()
    scores = graph.input("scores", FLOAT, SCORES.shape)
    wanted = graph.input("wanted", INT64, WANTED.shape)
    forward = replace(Forward(scores, scores, {}), independent=independent)
    found = objective_cotangents(graph, forward, wanted, objective)
    graph.output(found[scores], "found")
    return run_in_float64(graph.model(), {"scores": SCORES, "wanted": WANTED})["found"]


@pytest.mark.parametrize("independent", [False, True])
def test_the_gradient_of_a_probability_is_autograds(independent):
    scores = torch.from_numpy(SCORES).requires_grad_(True)
    probabilities = torch.sigmoid(scores) if independent else torch.softmax(scores, 1)
    probabilities.gather(1, torch.from_numpy(WANTED)[:, None]).sum().backward()
    found = cotangent("probability", independent=independent)
    np.testing.assert_allclose(found, scores.grad.numpy(), atol=1e-12)


def test_the_gradient_of_a_probability_is_its_differences():
    """An output unit's sensitivity is g'(eta), its own derivative."""

    def probability(scores, row):
        powers = np.exp(scores)
        return powers[WANTED[row]] / powers.sum()

    found, step = cotangent("probability"), 1e-6
    for row, place in np.ndindex(*SCORES.shape):
        moved = np.eye(SCORES.shape[1])[place] * step
        rise = probability(SCORES[row] + moved, row) - probability(SCORES[row] - moved, row)
        assert found[row, place] == pytest.approx(rise / (2 * step), abs=1e-8)


def test_the_gradient_of_a_score_is_its_class():
    np.testing.assert_array_equal(cotangent("class"), np.eye(5)[WANTED])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_maps_move_with_the_objective_as_its_pixels_do(objective, aggregation):
    """A pixel's sensitivity is how much the objective moves with it, of the three colours the
    largest or their mean (section 2, "Aggregating Across Color Channels").
    """
    classifier = load_classifier("compact", "random", 32)
    model = build_graph(classifier, MapSpec(objective, aggregation), expose=("scores", "conv5_3"))
    image = RNG.integers(0, 256, (1, 32, 32, 3)).astype(np.float64)
    wanted = np.array([3])

    def measured(pixels):
        found = run_in_float64(model, {IMAGE: pixels, WANTED_CLASS: wanted})
        scores = found["scores_out"][0]
        return {
            "class": scores[3],
            "probability": np.exp(scores[3]) / np.exp(scores).sum(),
            "gestalt": found["conv5_3_out"].mean(),
        }[objective], found["map"][0]

    _, found = measured(image)
    step, reduce = 1e-4, {"max": np.max, "mean": np.mean}[aggregation]
    for y, x in ((20, 31),):
        slopes = []
        for colour in range(3):
            moved = np.zeros_like(image)
            moved[0, y, x, colour] = step
            rise = measured(image + moved)[0] - measured(image - moved)[0]
            slopes.append(abs(rise / (2 * step)))
        assert found[y, x] == pytest.approx(reduce(slopes), rel=1e-4)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ModelError, match="unknown objective"):
        MapSpec("colour")
