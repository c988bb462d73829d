"""What is counted, and what this machine reaches."""

import threading

import numpy as np
import pytest
from onnx import TensorProto, helper

from calib.bench.machine import (
    TASKS,
    Neighbours,
    Peaks,
    ThreadTimes,
    Work,
    count_work,
    large_convolution,
    large_product,
    multiply_adds,
    roofline_point,
    tensor_shapes,
)
from calib.bench.turns import forward_graph
from engines.build import build_graph
from engines.networks.registry import load_classifier


def node_of(op, inputs, **attributes):
    return helper.make_node(op, inputs, ["y"], **attributes)


@pytest.mark.parametrize(
    ("node", "shapes", "expected"),
    [
        (
            node_of("Conv", ["x", "w"]),
            {"x": (1, 8, 10, 10), "w": (16, 8, 3, 3), "y": (1, 16, 8, 8)},
            16 * 64 * 8 * 9,
        ),
        (
            node_of("Conv", ["x", "w"], group=8),
            {"x": (2, 8, 5, 5), "w": (8, 1, 5, 5), "y": (2, 8, 1, 1)},
            2 * 8 * 25,
        ),
        (
            node_of("ConvTranspose", ["x", "w"]),
            {"x": (1, 8, 5, 5), "w": (8, 4, 2, 2), "y": (1, 4, 6, 6)},
            8 * 25 * 4 * 4,
        ),
        (
            node_of("Gemm", ["x", "w"], transB=1),
            {"x": (2, 30), "w": (7, 30), "y": (2, 7)},
            2 * 30 * 7,
        ),
        (
            node_of("Gemm", ["x", "w"], transA=1),
            {"x": (30, 2), "w": (30, 7), "y": (2, 7)},
            2 * 30 * 7,
        ),
        (
            node_of("MatMul", ["x", "w"]),
            {"x": (5, 4, 6), "w": (6, 3), "y": (5, 4, 3)},
            5 * 4 * 6 * 3,
        ),
        (node_of("Relu", ["x"]), {"x": (1, 8), "y": (1, 8)}, 0),
    ],
    ids=[
        "conv",
        "grouped",
        "transposed",
        "gemm",
        "gemm of a transposed",
        "batched product",
        "relu",
    ],
)
def test_multiply_adds_by_hand(node, shapes, expected):
    assert multiply_adds(node, shapes) == expected


def test_a_small_graph_by_hand():
    """3 x 3 convolution of 2 to 4 channels on 6 x 6 without padding, ReLU, product with 64 x 5."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["y"]),
    ]
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, np.zeros(np.prod(dims)))
        for name, dims in (("w", (4, 2, 3, 3)), ("m", (64, 5)))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [value("x", TensorProto.FLOAT, (1, 2, 6, 6))],
        [value("y", TensorProto.FLOAT, (1, 5))],
        weights,
    )
    work = count_work(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert work.flop == 2 * (4 * 16 * 18 + 64 * 5)
    assert work.values == (72 + 72 + 64) + (64 + 320 + 5)


@pytest.mark.long
def test_vgg16_forward_is_15_47_giga_multiply_adds_and_its_gradient_as_much_again():
    classifier = load_classifier("vgg16", "random")
    forward = count_work(forward_graph(classifier)).flop / 2
    assert forward == pytest.approx(15.47e9, rel=1e-3)
    assert count_work(build_graph(classifier)).flop / 2 == pytest.approx(2 * forward, rel=0.01)


def test_every_shape_is_the_engine_s_own():
    classifier = load_classifier("squeezenet", "random", 99)
    graph = build_graph(classifier)
    shapes = tensor_shapes(graph)
    assert all(
        min(shapes[name]) > 0 for node in graph.graph.node for name in node.output if shapes[name]
    )
    assert shapes["map"] == (1, 99, 99)


def test_the_roofline_is_the_longer_bound():
    peaks = Peaks({"fp32": 100.0, "bf16": 200.0}, 10.0)
    point = roofline_point(Work(flop=10**9, values=10**6), "fp32", peaks, 20.0)
    assert (point["compute_ms"], point["memory_ms"], point["roofline_ms"], point["bound"]) == (
        10,
        0.4,
        10,
        "compute",
    )
    assert (point["gap"], point["flop_per_byte"], point["gflop_per_s"]) == (2, 250, 50)
    point = roofline_point(Work(flop=10**9, values=10**8), "bf16", peaks, 30.0)
    assert (point["compute_ms"], point["memory_ms"], point["roofline_ms"], point["bound"]) == (
        5,
        20,
        20,
        "memory",
    )
    assert point["gap"] == 1.5


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are told apart on Linux only")
def test_the_time_of_threads_goes_to_what_they_do():
    times = ThreadTimes(lambda name: "read" if name == "read a film" else "other")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work, name="read a film")
    thread.start()
    while "read" not in (shares := times.shares()):
        times.look()
    stop.set()
    thread.join()
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("kernel", "flop"), [(large_convolution, 4 * 256**2 * 9 * 28**2), (large_product, 4 * 1024**3)]
)
def test_the_kernels_that_peaks_are_measured_on(kernel, flop):
    for precision in ("fp32", "int8"):
        assert count_work(kernel(precision)).flop == flop
    quantized = [node.op_type for node in kernel("int8").graph.node]
    assert quantized.count("QuantizeLinear") == 2
    assert quantized.count("DequantizeLinear") >= 3


def test_the_share_of_other_programs_is_a_share():
    share = Neighbours().share()
    assert share is None or 0 <= share <= 1
