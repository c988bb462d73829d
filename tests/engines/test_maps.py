"""Maps: what is reduced before it is put in place is what is reduced after."""

import numpy as np
import pytest

from engines.gradient import attach_gradient
from engines.graph import FLOAT, Graph
from engines.maps import aggregated
from tests.engines.double import run_in_float64

RNG = np.random.default_rng(8)


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pads", "factor"),
    [
        (8, 3, 2, (1, 1, 1, 1), (3,)),
        (9, 3, 2, (0, 0, 1, 1), (3,)),
        (12, 4, 4, (0, 0, 0, 0), ()),
        (11, 3, 3, (0, 0, 0, 0), (3,)),
        (8, 3, 2, (1, 1, 1, 1), None),
    ],
)
def test_the_map_of_a_strided_first_convolution(side, kernel, stride, pads, factor, aggregation):
    graph = Graph()
    image = graph.input("image", FLOAT, (2, 3, side, side))
    x = image
    if factor is not None:
        value = RNG.standard_normal((1, *factor, 1, 1) if factor else ()).astype(np.float32)
        x = graph.add("Mul", image, graph.constant(value))
    weight = graph.constant(RNG.standard_normal((4, 3, kernel, kernel)), hint="weight")
    y = graph.add("Conv", x, weight, strides=[stride, stride], pads=pads)
    cotangent = graph.input("cotangent", FLOAT, graph.shape(y))
    gradient = attach_gradient(graph, {y: cotangent}, [image])[image]
    hidden = graph.add("Identity", gradient)
    for name, tensor in (("found", gradient), ("expected", hidden)):
        graph.output(aggregated(graph, tensor, aggregation, name), f"map_of_{name}")
    feed = {"cotangent": RNG.standard_normal(graph.shape(y))}
    found = run_in_float64(graph.model(), {"image": np.zeros((2, 3, side, side)), **feed})
    assert found["map_of_found"].shape == (2, side, side)
    np.testing.assert_allclose(found["map_of_found"], found["map_of_expected"], rtol=1e-12)
    assert found["map_of_found"].any()
