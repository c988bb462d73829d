"""ONNX files as attackers, damaged disks and unusual exporters make them: each runs, or is refused
in one true line.
"""

import contextlib
import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engines.errors import SightlineError
from engines.networks.onnx_tensors import MOST_FIELDS, check_structure
from tests.command_line import refused
from tests.hostile import (
    DENSE,
    LFS,
    NODE,
    SIDE,
    WEIGHT,
    behind_the_convolution,
    image,
    load,
    message_of,
    of_functions,
    saved,
    scores,
    small_model,
    small_nodes,
    written,
)


def with_weight(**changed):
    """The small model, whose convolution's weight is another tensor."""
    tensor = numpy_helper.from_array(WEIGHT, "w")
    for key, value in changed.items():
        if key in ("dims", "float_data"):
            tensor.ClearField(key)
            getattr(tensor, key).extend(value)
        elif key == "no_data":
            tensor.ClearField("raw_data")
        else:
            setattr(tensor, key, value)
    return small_model(tensors={"w": tensor, "d": DENSE})


def filled(value, where=7):
    changed = WEIGHT.copy()
    changed.flat[where] = value
    return small_model(tensors={"w": changed, "d": DENSE})


def calling_itself():
    model = of_functions(0, 1)
    model.functions[0].node[0].CopyFrom(NODE("f0", ["a"], ["b"], domain="own"))
    return model


def loop():
    body = helper.make_graph(
        [NODE("Identity", ["go"], ["go_on"]), NODE("Add", ["v", "v"], ["w2"])],
        "body",
        [
            helper.make_tensor_value_info("i", 7, []),
            helper.make_tensor_value_info("go", 9, []),
            scores("v"),
        ],
        [helper.make_tensor_value_info("go_on", 9, []), scores("w2")],
    )
    often, true = np.array(2**62), np.array(True)
    return behind_the_convolution(
        NODE("Loop", ["often", "true", "c"], ["r"], body=body), often=often, true=true
    )


def branch():
    arm = helper.make_graph([NODE("Relu", ["c"], ["out"])], "arm", [], [scores("out")])
    return behind_the_convolution(
        NODE("If", ["true"], ["r"], then_branch=arm, else_branch=arm), true=np.array(True)
    )


def sparse():
    model = small_model()
    values, places = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.array([0]), "i"),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5]))
    return model


def without(field):
    model = small_model()
    model.ClearField(field)
    return model


def big_constant(op, *values, **attributes):
    """A node that would compute a huge constant of small ones."""
    names = {f"k{i}": np.asarray(value) for i, value in enumerate(values)}
    nodes = [NODE(op, list(names), ["huge"], **attributes), NODE("Add", ["c", "huge"], ["r"])]
    return behind_the_convolution(*nodes, **names)


SOUND = small_model().SerializeToString()
BAD = {
    # not a model at all
    "empty": (lambda: b"", "is empty"),
    "garbage": (lambda: b"not a model", "is not an ONNX model"),
    "zeros": (lambda: bytes(999), "is not an ONNX model"),
    "cut off": (lambda: SOUND[:-40], "is not an ONNX model"),
    "git lfs pointer": (lambda: LFS, "Git LFS pointer"),
    "web page": (lambda: "<!DOCTYPE html><html>404</html>", "a web page"),
    "archive": (lambda: b"PK\x03\x04" + bytes(80), "PyTorch file or an archive"),
    "pickle": (lambda: b"\x80\x02" + bytes(80), "PyTorch file or an archive"),
    "no graph": (lambda: without("graph"), "holds no operators"),
    "nested messages": (lambda: b"\x3a\x80\x80\x80\x80\x08", "is not an ONNX model"),
    "a million empty nodes": (
        lambda: b"\x3a\x80\x89\x7a" + b"\x0a\x00" * 1_000_000,
        "more than 500,000 fields",
    ),
    "no opset": (lambda: without("opset_import"), "does not say its opset"),
    "opset of the future": (lambda: small_model(opset=99), "is of opset 99"),
    "opset of long ago": (lambda: small_model(opset=3), "is of opset 3"),
    "negative opset": (lambda: small_model(opset=-5), "is of opset -5"),
    # inputs and outputs
    "two inputs": (
        lambda: small_model(inputs=[image(), image("z")]),
        r"has 2 inputs \(.*a classifier takes one",
    ),
    "no output": (lambda: small_model(outputs=[]), "has 0 outputs"),
    "an output that nothing writes": (
        lambda: small_model(outputs=[scores("ghost")]),
        "nothing computes its output 'ghost'",
    ),
    "a vector for an image": (
        lambda: small_model(inputs=[image(shape=(1, 3))]),
        r"not a colour image \[N, 3, H, W\]",
    ),
    "one channel": (
        lambda: small_model(inputs=[image(shape=(1, 1, SIDE, SIDE))]),
        r"not a colour image \[N, 3, H, W\]",
    ),
    "bytes for pixels": (
        lambda: small_model(inputs=[image(elem=TensorProto.INT8)]),
        "holds int8",
    ),
    "an oblong image": (
        lambda: small_model(inputs=[image(shape=(1, 3, 32, 48))]),
        "48 x 32 pixels",
    ),
    "an image of 2^40 pixels": (
        lambda: small_model(inputs=[image(shape=(1, 3, 2**40, 2**40))]),
        "pixels a side",
    ),
    "a negative image": (
        lambda: small_model(inputs=[image(shape=(1, 3, -4, -4))]),
        "pixels a side",
    ),
    # weights
    "NaN in a weight": (lambda: filled(np.nan), "weight 'w' holds values that are not finite"),
    "infinity in a weight": (lambda: filled(np.inf), "weight 'w' holds values that are not finite"),
    "a weight too short": (
        lambda: with_weight(dims=[9, 3, 3, 3]),
        "432 bytes, and its shape needs 972",
    ),
    "a weight of 2^40 values": (
        lambda: with_weight(dims=[2**40, 3, 3, 3]),
        "432 bytes, and its shape needs",
    ),
    "a weight of 2^120 values": (
        lambda: with_weight(dims=[2**60, 2**60]),
        "432 bytes, and its shape needs",
    ),
    "a negative shape": (lambda: with_weight(dims=[-4, 3, 3, -3]), "which no array has"),
    "a hundred axes": (lambda: with_weight(dims=[1] * 100), "which no array has"),
    "a weight without values": (
        lambda: with_weight(no_data=True),
        "0 values, and its shape needs 108",
    ),
    "values of another length": (
        lambda: with_weight(no_data=True, float_data=[1.0] * 7),
        "7 values, and its shape needs 108",
    ),
    "a weight of strings": (lambda: with_weight(data_type=TensorProto.STRING), "holds STRING"),
    "a weight of complex numbers": (
        lambda: with_weight(data_type=TensorProto.COMPLEX64),
        "holds COMPLEX64",
    ),
    "a weight of 8 bits": (
        lambda: with_weight(data_type=TensorProto.FLOAT8E4M3FN),
        "holds FLOAT8E4M3FN",
    ),
    "a type that does not exist": (lambda: with_weight(data_type=77), "holds 77"),
    "two weights of one name": (
        lambda: small_model(tensors={"w": WEIGHT, "d": numpy_helper.from_array(DENSE, "w")}),
        "two constants with the name 'w'",
    ),
    "a sparse weight": (sparse, "sparse weights"),
    "beyond float32": (
        lambda: small_model(tensors={"w": WEIGHT.astype(np.float64) * 1e300, "d": DENSE}),
        "beyond float32",
    ),
    # nodes
    "a cycle": (
        lambda: behind_the_convolution(NODE("Add", ["c", "e"], ["r"]), NODE("Relu", ["r"], ["e"])),
        "reads 'e'",
    ),
    "an unknown input": (
        lambda: behind_the_convolution(NODE("Add", ["c", "ghost"], ["r"])),
        "reads 'ghost'",
    ),
    "a tensor written twice": (
        lambda: behind_the_convolution(NODE("Relu", ["c"], ["r"]), NODE("Relu", ["c"], ["r"])),
        "writes 'r'",
    ),
    "a weight that is overwritten": (
        lambda: behind_the_convolution(NODE("Relu", ["c"], ["w"]), NODE("Relu", ["c"], ["r"])),
        "'w'",
    ),
    "a node without outputs": (
        lambda: behind_the_convolution(NODE("Relu", ["c"], []), NODE("Relu", ["c"], ["r"])),
        "writes nothing",
    ),
    "a node without inputs": (
        lambda: behind_the_convolution(NODE("Relu", [], ["r"])),
        "not valid ONNX",
    ),
    "an operator that does not exist": (
        lambda: behind_the_convolution(NODE("Frobnicate", ["c"], ["r"])),
        "Frobnicate",
    ),
    "a vendor's operator": (
        lambda: behind_the_convolution(NODE("Attention", ["c"], ["r"], domain="com.microsoft")),
        "that ONNX Runtime's optimizer made",
    ),
    "a vendor's operator of another": (
        lambda: small_model(
            [small_nodes()[0], NODE("Fused", ["c"], ["r"], domain="org.me"), *small_nodes()[2:]]
        ),
        "an operator of 'org.me', not of ONNX's own",
    ),
    "operators without a rule": (
        lambda: behind_the_convolution(
            NODE("Round", ["c"], ["a"]), NODE("Round", ["a"], ["b"]), NODE("Ceil", ["b"], ["r"])
        ),
        r"Ceil \(1 node, .*'r'\), Round \(2 nodes, the first 'a'\) have no gradient rule",
    ),
    "strides of zero": (
        lambda: small_model([NODE("Conv", ["x", "w"], ["c"], strides=[0, 0]), *small_nodes()[1:]]),
        r"strides \[0, 0\]",
    ),
    "a window of 2^40": (
        lambda: behind_the_convolution(NODE("MaxPool", ["c"], ["r"], kernel_shape=[2**40, 1])),
        r"kernel_shape \[1099511627776, 1\]",
    ),
    "padding of 2^40": (
        lambda: small_model(
            [NODE("Conv", ["x", "w"], ["c"], pads=[2**40, 0, 0, 0]), *small_nodes()[1:]]
        ),
        "pads",
    ),
    "padding of 60,000": (
        lambda: small_model(
            [NODE("Conv", ["x", "w"], ["c"], pads=[60_000] * 4), *small_nodes()[1:]]
        ),
        "more than a classifier",
    ),
    "no groups": (
        lambda: small_model([NODE("Conv", ["x", "w"], ["c"], group=0), *small_nodes()[1:]]),
        r"group \[0\]",
    ),
    "groups that do not divide": (
        lambda: small_model([NODE("Conv", ["x", "w"], ["c"], group=7), *small_nodes()[1:]]),
        "group",
    ),
    "a kernel larger than the image": (
        lambda: small_model(tensors={"w": np.ones((4, 3, 99, 99), np.float32), "d": DENSE}),
        "too small or too large|not valid ONNX",
    ),
    "a kernel for other channels": (
        lambda: small_model(tensors={"w": WEIGHT[:, :2], "d": DENSE}),
        "channels|not valid ONNX",
    ),
    "a matrix that does not fit": (
        lambda: small_model(tensors={"w": WEIGHT, "d": DENSE[:3]}),
        "not valid ONNX",
    ),
    "a loop of 2^62 turns": (loop, "is a loop or a branch"),
    "a branch": (branch, "is a loop or a branch"),
    "a function that calls itself": (calling_itself, "calls itself"),
    "10^12 operators in functions": (lambda: of_functions(12, 10), "more than 20,000 operators"),
    "integers with a computed scale": (
        lambda: behind_the_convolution(
            NODE("ReduceMax", ["c"], ["s"], keepdims=0),
            NODE("QuantizeLinear", ["c", "s"], ["q"]),
            NODE("DequantizeLinear", ["q", "s"], ["r"]),
        ),
        "computes its scale or its zero from the image",
    ),
    "integers with a scale of no channel": (
        lambda: behind_the_convolution(
            NODE("DequantizeLinear", ["k", "s"], ["meant"], axis=0),
            NODE("Add", ["c", "meant"], ["r"]),
            k=np.ones((4, 1, 1), np.int8),
            s=np.ones(3, np.float32),
        ),
        "its scale does not fit its values",
    ),
    "a product of integers": (
        lambda: behind_the_convolution(NODE("ConvInteger", ["c", "w"], ["r"])),
        "computes with integers, which have no gradient",
    ),
    "groups that do not divide channels": (
        lambda: behind_the_convolution(
            NODE("GroupNormalization", ["c", "s", "s"], ["r"], num_groups=3),
            s=np.ones(4, np.float32),
            opset=21,
        ),
        "3 groups do not divide 4 channels",
    ),
    "a fused operator without inputs": (
        lambda: behind_the_convolution(NODE("FusedMatMul", [], ["r"], domain="com.microsoft")),
        r"\(MatMul\) is not valid",
    ),
    "a thousand times attention": (
        lambda: behind_the_convolution(
            *(NODE("Attention", ["c", "c", "c"], [f"a{i}"]) for i in range(3000)),
            NODE("Relu", ["c"], ["r"]),
            opset=24,
        ),
        "3,000 operators that stand for many others",
    ),
    # not a classifier
    "boxes": (
        lambda: small_model(
            [*small_nodes()[:-1], NODE("MatMul", ["f", "d"], ["boxes"])], outputs=[scores("boxes")]
        ),
        "gives boxes, not class scores: its output is called 'boxes'",
    ),
    "an embedding": (
        lambda: small_model(
            [
                *small_nodes()[:-1],
                NODE("MatMul", ["f", "d"], ["e"]),
                NODE("ReduceL2", ["e"], ["n"], axes=[1]),
                NODE("Clip", ["n", "least"], ["n2"]),
                NODE("Div", ["e", "n2"], ["y"]),
            ],
            {"w": WEIGHT, "d": DENSE, "least": np.array(1e-9, np.float32)},
        ),
        "an embedding, not class scores: its output is a vector of length 1",
    ),
    "features": (
        lambda: small_model(
            [
                *small_nodes()[:2],
                NODE("Conv", ["r", "w2"], ["c2"]),
                NODE("Add", ["c2", "r"], ["sum"]),
                NODE("Relu", ["sum"], ["last"]),
                NODE("GlobalAveragePool", ["last"], ["g"]),
                NODE("Flatten", ["g"], ["y"]),
            ],
            {"w": WEIGHT, "w2": np.ones((4, 4, 1, 1), np.float32)},
        ),
        "features, not class scores: no linear layer makes its output",
    ),
    "a measured number": (
        lambda: small_model(
            [*small_nodes()[:-1], NODE("MatMul", ["f", "d"], ["v"]), NODE("Relu", ["v"], ["y"])],
            {"w": WEIGHT, "d": DENSE[:, :1]},
        ),
        "a measured number, not class scores: its output is one number behind Relu",
    ),
    "a mask": (
        lambda: small_model(small_nodes()[:1], outputs=[scores("c")]),
        r"the shape \[1, 4, 30, 30\], which is no vector of class scores",
    ),
    "a limit that is no number": (
        lambda: behind_the_convolution(
            NODE("Clip", ["c", "low"], ["r"]), low=np.array(np.nan, np.float32)
        ),
        "nan: not a finite",
    ),
    "a sum with infinity": (
        lambda: behind_the_convolution(
            NODE("Add", ["c", "far"], ["r"]), far=np.array(np.inf, np.float32)
        ),
        "inf: not a finite",
    ),
    # constants that would be computed
    "2^40 ones": (
        lambda: big_constant("ConstantOfShape", [2**20, 2**20]),
        "computes 1,099,511,627,776 constant values",
    ),
    "expanded to 2^40": (
        lambda: big_constant("Expand", np.float32(1), [2**20, 2**20]),
        "computes 1,099,511,627,776 constant values",
    ),
    "2^40 random numbers": (
        lambda: big_constant("RandomNormal", shape=[2**20, 2**20]),
        "more than a classifier",
    ),
    "a range of 2^40": (
        lambda: big_constant("Range", np.int64(0), np.int64(2**40), np.int64(1)),
        "computes|not valid",
    ),
    "tiled to 2^40": (
        lambda: big_constant("Tile", np.ones((1, 1), np.float32), [2**20, 2**20]),
        "computes",
    ),
    "a division by zero": (
        lambda: behind_the_convolution(
            NODE("Div", ["one", "none"], ["k"]),
            NODE("Mul", ["c", "k"], ["r"]),
            one=np.ones((4, 1, 1), np.float32),
            none=np.zeros((4, 1, 1), np.float32),
        ),
        "not finite",
    ),
    "no convolution": (
        lambda: small_model(
            [NODE("GlobalAveragePool", ["x"], ["g"]), NODE("Flatten", ["g"], ["y"])], {}
        ),
        "the network has no map",
    ),
    "an output that ignores the image": (
        lambda: small_model([*small_nodes()[:-1], NODE("Identity", ["d"], ["y"])]),
        "does not depend on its input",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_is_one_line(tmp_path, kind):
    make, words = BAD[kind]
    made = make()
    path = written(
        tmp_path / "net.onnx", made if isinstance(made, bytes | str) else made.SerializeToString()
    )
    with pytest.raises(SightlineError, match=words):
        load(path)
    message_of(load, path)


def test_places_that_are_no_files(tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "is a folder" in message_of(load, tmp_path / "folder.onnx")
    assert "not a regular file" in message_of(load, tmp_path / "pipe.onnx")
    assert "cannot read model" in message_of(load, tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    "kind", ["NaN in a weight", "a loop of 2^62 turns", "git lfs pointer", "2^40 ones", "cut off"]
)
def test_from_the_command_line(tmp_path, kind):
    make, words = BAD[kind]
    made = make()
    path = written(
        tmp_path / "net.onnx", made if isinstance(made, bytes | str) else made.SerializeToString()
    )
    assert words in refused(
        "build", "--model", path, "--head", "none", "--out", tmp_path / "out.onnx"
    )


def test_the_number_of_fields_is_bounded_before_objects_are_made():
    with pytest.raises(ValueError, match=f"{MOST_FIELDS:,} fields"):
        check_structure(b"\x3a\x80\x89\x7a" + b"\x0a\x00" * 1_000_000)
    check_structure(SOUND)


# Bytes changed at random


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=6
    ),
    st.integers(0, 40),
)
def test_changed_bytes_load_or_are_one_line(tmp_path_factory, changes, cut):
    content = bytearray(SOUND)
    for place, value in changes:
        content[place] = value
    path = written(
        tmp_path_factory.getbasetemp() / "changed.onnx", bytes(content[: len(content) - cut])
    )
    with contextlib.suppress(SightlineError):
        load(path)


def test_the_sound_model_is_sound(tmp_path):
    onnx.checker.check_model(load(saved(tmp_path, small_model())))
