"""The writer: shapes at once, errors at the line that made them, folded constants, nothing
unneeded.
"""

import numpy as np
import onnx
import pytest

from engines.errors import ModelError
from engines.graph import FLOAT, Graph, needed


def test_shapes_are_known_as_soon_as_a_node_is_added():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, 7, 9))
    y = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    assert graph.shape(y) == (1, 3, 3, 4)


def test_a_wrong_node_is_refused_with_its_name():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, 4, 4))
    with pytest.raises(ModelError, match=r"node 'odd' \(MatMul\) is not valid ONNX"):
        graph.add("MatMul", x, graph.constant(np.zeros((5, 3))), hint="odd")
    with pytest.raises(ModelError, match="reads 'nothing'"):
        graph.add("Relu", "nothing")
    with pytest.raises(ModelError, match="NoSuchOperator"):
        graph.add("NoSuchOperator", x)


def test_equal_small_constants_share_a_tensor_and_different_types_do_not():
    graph = Graph()
    assert graph.constant([1.0, 2.0]) == graph.constant(np.array([1.0, 2.0]))
    assert graph.constant([1.0, 2.0]) != graph.constant([1, 2], np.int64)
    assert graph.constant([1.0, 2.0]) != graph.constant([[1.0, 2.0]])


def test_what_depends_on_constants_alone_is_computed_at_once():
    graph = Graph()
    x = graph.input("x", FLOAT, (2, 3, 4))
    shape = graph.add("Shape", x)
    half = graph.add("Div", shape, graph.constant(2, np.int64))
    np.testing.assert_array_equal(graph.constants[half], [1, 1, 2])
    assert graph.nodes == []


def test_a_model_holds_only_what_its_outputs_need():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 4))
    graph.add("Relu", graph.add("Mul", x, graph.constant([9.0] * 4)))
    graph.output(graph.add("Neg", x), "y")
    model = graph.model({"key": "value"})
    assert [node.op_type for node in model.graph.node] == ["Neg", "Identity"]
    assert len(model.graph.initializer) == 0
    assert {p.key: p.value for p in model.metadata_props} == {"key": "value"}


def test_needed_keeps_order():
    nodes = [
        onnx.helper.make_node("Relu", [a], [b])
        for a, b in (("x", "a"), ("x", "b"), ("a", "c"), ("c", "d"))
    ]
    assert [n.output[0] for n in needed(nodes, ["c"])] == ["a", "c"]


def test_names_never_clash():
    graph = Graph()
    graph.input("a_1", FLOAT, (1,))
    graph.input("a", FLOAT, (1,))
    names = {graph.fresh("a") for _ in range(3)}
    assert len(names) == 3
    assert not names & {"a", "a_1"}
