"""Every gradient rule against central differences of a slow float64 definition of its operator."""

from pathlib import Path

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.errors import ModelError
from engines.gradient import RULES, attach_gradient, walk
from engines.graph import FLOAT, Graph
from tests import oracles
from tests.engines.differences import check, distinct, graph_gradient, op

RNG = np.random.default_rng(20)


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "pads", "dilation", "groups"),
    [
        ((2, 3, 6, 5), (4, 3, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        (
            (1, 2, 5, 5),
            (3, 2, 1, 1),
            (1, 1),
            (1, 1, 1, 1),
            (1, 1),
            1,
        ),  # SqueezeNet's last layer: padding beyond reach
        ((1, 2, 7, 8), (3, 2, 3, 2), (1, 1), (0, 2, 1, 0), (1, 1), 1),
        ((1, 3, 11, 10), (4, 3, 7, 7), (2, 2), (0, 0, 0, 0), (1, 1), 1),  # SqueezeNet's first
        ((1, 3, 13, 12), (4, 3, 5, 5), (4, 4), (2, 2, 2, 2), (1, 1), 1),  # AlexNet's first, smaller
        ((1, 2, 9, 8), (2, 2, 3, 3), (2, 3), (1, 0, 0, 1), (1, 1), 1),
        (
            (1, 2, 9, 9),
            (2, 2, 1, 1),
            (2, 2),
            (0, 0, 0, 0),
            (1, 1),
            1,
        ),  # stride over kernel: pixels that nothing reads
        ((1, 2, 9, 9), (2, 2, 3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1),
        ((1, 2, 10, 9), (2, 2, 3, 3), (2, 2), (1, 1, 1, 1), (2, 2), 1),
        ((1, 4, 6, 6), (6, 2, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
        ((1, 4, 7, 7), (4, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 4),
        ((2, 3, 8, 7), (3, 1, 5, 5), (2, 3), (1, 2, 2, 0), (1, 1), 3),  # TensorFlow's SAME
        ((1, 2, 9, 8), (2, 1, 3, 3), (2, 2), (0, 3, 1, 0), (2, 1), 2),
        ((1, 2, 8, 9), (2, 1, 2, 2), (3, 3), (0, 0, 0, 0), (1, 1), 2),
        ((1, 2, 8, 7), (3, 2, 1, 1), (3, 2), (1, 0, 2, 1), (1, 1), 1),
        ((1, 4, 8, 8), (4, 2, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 2),
        ((1, 3, 7, 7), (6, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 3),  # two filters a channel
    ],
)
def test_conv(shape, weight, stride, pads, dilation, groups):
    kernel = RNG.standard_normal(weight).astype(np.float32)
    build = op(
        "Conv",
        kernel,
        kernel_shape=weight[2:],
        strides=stride,
        pads=pads,
        dilations=dilation,
        group=groups,
    )
    check(
        build,
        lambda x: oracles.conv(x, kernel.astype(np.float64), stride, pads, dilation, groups),
        distinct(*shape),
    )


POOLS = [
    ((1, 2, 6, 8), (2, 2), (2, 2), (0, 0, 0, 0), 0),
    ((1, 2, 7, 5), (2, 2), (2, 2), (0, 0, 0, 0), 0),  # a last row and column that no window reads
    ((1, 2, 8, 8), (3, 3), (2, 2), (0, 0, 0, 0), 1),  # SqueezeNet's: overlapping, rounded up
    ((1, 2, 7, 7), (3, 3), (2, 2), (0, 0, 0, 0), 0),  # AlexNet's
    ((1, 2, 6, 6), (3, 3), (1, 1), (1, 1, 1, 1), 0),
    ((2, 1, 9, 9), (2, 2), (3, 3), (0, 0, 0, 0), 0),  # gaps between windows
    ((1, 1, 8, 10), (3, 2), (2, 3), (1, 0, 1, 0), 1),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "pads", "ceil"), POOLS)
def test_max_pool(shape, kernel, stride, pads, ceil):
    build = op("MaxPool", kernel_shape=kernel, strides=stride, pads=pads, ceil_mode=ceil)
    check(
        build, lambda x: oracles.pool(x, "max", kernel, stride, pads, bool(ceil)), distinct(*shape)
    )


@pytest.mark.parametrize("count_pads", [0, 1])
@pytest.mark.parametrize(("shape", "kernel", "stride", "pads", "ceil"), POOLS)
def test_average_pool(shape, kernel, stride, pads, ceil, count_pads):
    build = op(
        "AveragePool",
        kernel_shape=kernel,
        strides=stride,
        pads=pads,
        ceil_mode=ceil,
        count_include_pad=count_pads,
    )
    check(
        build,
        lambda x: oracles.pool(x, "mean", kernel, stride, pads, bool(ceil), bool(count_pads)),
        distinct(*shape),
    )


@pytest.mark.parametrize(("kernel", "stride"), [((2, 2), (2, 2)), ((3, 3), (2, 2))])
def test_equal_maxima_of_a_window_give_the_gradient_to_the_first(kernel, stride):
    """As PyTorch does: a flat region must not shine brighter than autograd says."""
    import torch

    x = np.ones((1, 1, 7, 7))
    x[0, 0, 2:5, 3:] = 2
    source = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.max_pool2d(source, kernel, stride)
    cotangent = np.arange(1.0, 1 + y.numel()).reshape(y.shape)
    (y * torch.tensor(cotangent)).sum().backward()
    found = graph_gradient(op("MaxPool", kernel_shape=kernel, strides=stride), x, cotangent)
    np.testing.assert_array_equal(found, source.grad.numpy())


def test_relu():
    check(op("Relu"), lambda x: np.maximum(x, 0), distinct(2, 3, 4, 5))


def test_guided_relu_passes_only_positive_gradients_of_active_units():
    x, cotangent = np.array([[1.0, 1.0, -1.0, -1.0]]), np.array([[2.0, -2.0, 2.0, -2.0]])
    np.testing.assert_array_equal(
        graph_gradient(op("Relu"), x, cotangent, "guided"), [[2, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        graph_gradient(op("Relu"), x, cotangent, "plain"), [[2, -2, 0, 0]]
    )


@pytest.mark.parametrize(
    "limits",
    [
        (np.float32(-0.5), np.float32(0.9)),
        (np.float32(0.1),),
        (np.float32(0), np.float32(0.75)),
        (np.float32(-0.5), np.float32(0.75)),
        (np.float32(-0.25),),
    ],
)
def test_clip(limits):
    low, high = limits[0], limits[1] if len(limits) == 2 else np.inf
    check(op("Clip", *limits), lambda x: np.clip(x, low, high), distinct(2, 3, 4))


def test_batch_normalization():
    gamma, beta, mean, variance = (RNG.uniform(0.5, 2, 3).astype(np.float32) for _ in range(4))

    def forward(x):
        g, b, m, v = (
            p.astype(np.float64).reshape(1, 3, 1, 1) for p in (gamma, beta, mean, variance)
        )
        return g * (x - m) / np.sqrt(v + 1e-3) + b

    check(
        op("BatchNormalization", gamma, beta, mean, variance, epsilon=1e-3),
        forward,
        distinct(2, 3, 4, 4),
    )


@pytest.mark.parametrize("size", [1, 3, 5])
def test_lrn(size):
    settings = {"size": size, "alpha": 0.3, "beta": 0.75, "bias": 1.0}  # OpenVINO knows bias 1 only
    check(op("LRN", **settings), lambda x: oracles.lrn(x, **settings), distinct(1, 6, 3, 2))


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed):
    weight, bias = (
        RNG.standard_normal((4, 5)).astype(np.float32),
        RNG.standard_normal(5).astype(np.float32),
    )
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    check(
        op("Gemm", stored, bias, transB=transposed, alpha=0.5),
        lambda x: 0.5 * x @ weight.astype(np.float64) + bias,
        distinct(3, 4),
    )


STACK = RNG.standard_normal((5, 2, 3, 4, 3)).astype(np.float32)
MATRIX = RNG.standard_normal((3, 5)).astype(np.float32)
SCALE = np.array([[[0.5]], [[-2.0]], [[3.0]]], np.float32)


@pytest.mark.parametrize(
    ("build", "forward"),
    [
        (op("GlobalAveragePool"), lambda x: x.mean(axis=(2, 3), keepdims=True)),
        (op("ReduceMean", np.array([2, 3]), keepdims=0), lambda x: x.mean(axis=(2, 3))),
        (op("ReduceMean", np.array([-1]), keepdims=1), lambda x: x.mean(axis=3, keepdims=True)),
        (op("ReduceMean", keepdims=0), lambda x: x.mean()),
        (op("MatMul", MATRIX), lambda x: x @ MATRIX.astype(np.float64)),
        (op("Add", SCALE), lambda x: x + SCALE),
        (op("Add", STACK), lambda x: x + STACK),  # x itself is broadcast
        (op("Sub", SCALE), lambda x: x - SCALE),
        (op("Mul", SCALE), lambda x: x * SCALE),
        (op("Div", SCALE), lambda x: x / SCALE),
        (op("Flatten", axis=2), lambda x: x.reshape(6, 12)),
        (op("Reshape", np.array([3, -1])), lambda x: x.reshape(3, -1)),
        (op("Unsqueeze", np.array([1])), lambda x: x[:, None]),
        (op("Transpose", perm=[2, 0, 3, 1]), lambda x: x.transpose(2, 0, 3, 1)),
        (op("Identity"), lambda x: x),
        (op("Dropout"), lambda x: x),
    ],
)
def test_elementwise_and_shape_rules(build, forward):
    check(build, forward, distinct(2, 3, 4, 3))


def test_squeeze():
    check(op("Squeeze", np.array([1])), lambda x: x[:, 0], distinct(3, 1, 4))


def test_constant_minus_input():
    def build(graph: Graph, x: str) -> str:
        return graph.add("Sub", graph.constant(SCALE), x)

    check(build, lambda x: SCALE - x, distinct(1, 3, 2, 2))


def test_concat_and_a_tensor_that_is_read_twice():
    def build(graph: Graph, x: str) -> str:
        doubled = graph.add("Mul", x, graph.constant(2.0))
        return graph.add("Concat", x, graph.add("Relu", doubled), doubled, axis=1)

    check(
        build, lambda x: np.concatenate([x, np.maximum(2 * x, 0), 2 * x], axis=1), distinct(2, 3, 4)
    )


def test_sum_of_two_branches_of_the_input():
    def build(graph: Graph, x: str) -> str:
        return graph.add("Add", graph.add("Relu", x), graph.add("Mul", x, graph.constant(3.0)))

    check(build, lambda x: np.maximum(x, 0) + 3 * x, distinct(2, 5))


def test_several_tensors_are_differentiated_by_in_one_walk():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3))
    inner = graph.add("Mul", x, graph.constant(2.0))
    y = graph.add("Mul", inner, graph.constant(5.0))
    gradients = attach_gradient(graph, {y: graph.constant(np.ones((1, 3)))}, [x, inner])
    graph.output(gradients[x], "dx")
    graph.output(gradients[inner], "dinner")
    found = OpenVinoEngine(graph.model(), "fp32").infer({"x": np.ones((1, 3), np.float32)})
    np.testing.assert_array_equal(found["dx"], [[10, 10, 10]])
    np.testing.assert_array_equal(found["dinner"], [[5, 5, 5]])


@pytest.mark.parametrize("factor", [1.001, 0.999])
@pytest.mark.parametrize("rule", ["Conv", "MaxPool", "AveragePool", "LRN", "Gemm"])
def test_the_checker_catches_a_planted_error_of_a_thousandth(monkeypatch, rule, factor):
    right = RULES[rule]

    def wrong(step, index):
        return step.add("Mul", right(step, index), step.graph.constant(factor))

    monkeypatch.setattr(walk, "RULES", {**RULES, rule: wrong})
    cases = {
        "Conv": lambda: test_conv((1, 2, 5, 5), (3, 2, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        "MaxPool": lambda: test_max_pool(*POOLS[2]),
        "AveragePool": lambda: test_average_pool(*POOLS[2], 0),
        "LRN": lambda: test_lrn(3),
        "Gemm": lambda: test_gemm(1),
    }
    with pytest.raises(AssertionError, match="relative error"):
        cases[rule]()


def test_every_rule_is_tested():
    """By its name in one of the files beside this one."""
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {kind for kind in RULES if f'"{kind}"' not in texts} == set()


def test_unknown_operators_are_all_named_with_a_node():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 4))
    y = graph.add("Ceil", graph.add("Round", x, hint="first"), hint="second")
    with pytest.raises(
        ModelError,
        match=r"operators Ceil \(1 node, 'second'\), Round \(1 node, 'first'\) have no gradient rule",
    ):
        attach_gradient(graph, {y: graph.constant(np.ones((1, 4)))}, [x])


def test_a_tensor_behind_the_objective_is_refused():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 4))
    y = graph.add("Relu", x)
    behind = graph.add("Relu", y)
    with pytest.raises(ModelError, match="does not depend on tensor"):
        attach_gradient(graph, {y: graph.constant(np.ones((1, 4)))}, [behind])


def test_several_objectives_over_one_forward_pass_are_each_alone():
    """A batch of cotangents over a forward pass of one image: every rule that knows shapes is on
    the way.
    """
    rng = np.random.default_rng(0)
    seeds = rng.standard_normal((3, 4)).astype(np.float32)

    def gradient_of(cotangents):
        graph = Graph()
        x = graph.input("x", FLOAT, (1, 6, 8, 8))
        scaled = graph.add("Mul", x, graph.constant(rng_values(1, 6, 1, 1)))
        shifted = graph.add(
            "Add", graph.add("LRN", scaled, size=3, alpha=0.5), graph.constant(rng_values(6, 1, 1))
        )
        joined = graph.add(
            "Add", graph.add("Relu", shifted), graph.add("Sub", scaled, graph.constant(0.5))
        )
        pooled = graph.add("MaxPool", joined, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        flat = graph.add("Reshape", pooled, graph.constant([1, 6, 16], np.int64))
        mean = graph.add("ReduceMean", flat, graph.constant([2], np.int64), keepdims=0)
        mean = graph.add("Add", mean, graph.add("Flatten", graph.add("GlobalAveragePool", pooled)))
        y = graph.add("Gemm", mean, graph.constant(rng_values(4, 6)), transB=1)
        seed = graph.constant(cotangents)
        graph.output(attach_gradient(graph, {y: seed}, [x])[x], "gradient")
        return OpenVinoEngine(graph.model(), "fp32").infer({"x": rng_values(1, 6, 8, 8)})[
            "gradient"
        ]

    together = gradient_of(seeds)
    assert together.shape == (3, 6, 8, 8)
    alone = np.concatenate([gradient_of(seed[None]) for seed in seeds])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def rng_values(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
