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

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import SightlineError
from engines.networks.onnx_tensors import MOST_FIELDS, check_structure
from engines.networks.registry import load_classifier
from tests.command_line import refused
from tests.hostile import (
    DENSE,
    SIDE,
    WEIGHT,
    external,
    image,
    message_of,
    scores,
    small_model,
    small_nodes,
    written,
)

NODE = helper.make_node
PIXELS = np.random.default_rng(2).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)


def load(path):
    """All of it, to the graph that an engine would compile."""
    return build_graph(load_classifier(str(path)))


def answer(path):
    return OpenVinoEngine(load(path), "fp32").infer({IMAGE: PIXELS, WANTED_CLASS: np.array([-1])})


def saved(tmp_path, model, name="net.onnx"):
    return written(tmp_path / name, model.SerializeToString())


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


def behind_the_convolution(*nodes, opset=17, **tensors):
    """Other nodes between the convolution (``c``) and its mean (``r``)."""
    first, _, *rest = small_nodes()
    return small_model([first, *nodes, *rest], {"w": WEIGHT, "d": DENSE, **tensors}, opset=opset)


def of_functions(depth, calls):
    """Functions that call the one below them several times: ``calls ** depth`` operators."""
    relu = [NODE("Relu", ["a"], ["b"])]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    found = [helper.make_function("own", "f0", ["a"], ["b"], relu, imports)]
    for level in range(1, depth + 1):
        names = ["a", *(f"t{i}" for i in range(calls - 1)), "b"]
        nodes = [
            NODE(f"f{level - 1}", [names[i]], [names[i + 1]], domain="own") for i in range(calls)
        ]
        found.append(helper.make_function("own", f"f{level}", ["a"], ["b"], nodes, imports))
    first, _, *rest = small_nodes()
    model = small_model(
        [first, NODE(f"f{depth}", ["c"], ["r"], domain="own"), *rest], functions=found
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


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


def normalised(*outputs, opset=13, **attributes):
    ones = {name: np.ones(4, np.float32) for name in ("s", "b", "m", "v")}
    node = NODE("BatchNormalization", ["c", "s", "b", "m", "v"], ["r", *outputs], **attributes)
    return behind_the_convolution(node, opset=opset, **ones)


def dropped(train):
    half = np.array(0.5, np.float32)
    return behind_the_convolution(
        NODE("Dropout", ["c", "half", "train"], ["r"]), half=half, train=np.array(train)
    )


def big_constant(op, *values, **attributes):
    """A node that would compute a huge constant of small ones."""
    names = {f"k{i}": np.asarray(value) for i, value in enumerate(values)}
    nodes = [NODE(op, list(names), ["huge"], **attributes), NODE("Add", ["c", "huge"], ["r"])]
    return behind_the_convolution(*nodes, **names)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
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
        lambda: behind_the_convolution(NODE("FusedConv", ["c"], ["r"], domain="com.microsoft")),
        "com.microsoft",
    ),
    "an operator without a rule": (
        lambda: behind_the_convolution(NODE("Round", ["c"], ["r"])),
        "has no gradient rule",
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
    "quantised": (
        lambda: behind_the_convolution(
            NODE("QuantizeLinear", ["c", "s"], ["q"]),
            NODE("DequantizeLinear", ["q", "s"], ["r"]),
            s=np.array(0.1, np.float32),
        ),
        "quantised already",
    ),
    "in training mode": (lambda: normalised("", "", opset=17, training_mode=1), "training mode"),
    "in training mode, of old": (lambda: normalised("m1", "v1", "m2", "v2"), "training mode"),
    "with dropout that trains": (lambda: dropped(True), "training mode"),
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


# What only looks unusual, and runs


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_computed_as_float32(tmp_path, dtype):
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = {"w": WEIGHT.astype(dtype), "d": DENSE.astype(dtype)}
    unusual = small_model(tensors=tensors, inputs=[image(elem=elem)], outputs=[scores(elem=elem)])
    usual = small_model(tensors={name: value.astype(np.float32) for name, value in tensors.items()})
    found, expected = answer(saved(tmp_path, unusual)), answer(saved(tmp_path, usual, "usual.onnx"))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_casts_to_float16_within_a_network_are_float32(tmp_path):
    half = WEIGHT.astype(np.float16)
    nodes = [
        NODE("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16),
        NODE("Conv", ["x16", "w"], ["c16"]),
        NODE("Cast", ["c16"], ["c"], to=TensorProto.FLOAT),
        *small_nodes()[1:],
    ]
    found = answer(saved(tmp_path, small_model(nodes, {"w": half, "d": DENSE})))
    expected = answer(
        saved(
            tmp_path, small_model(tensors={"w": half.astype(np.float32), "d": DENSE}), "usual.onnx"
        )
    )
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-6)


def test_local_functions_are_written_out(tmp_path):
    found, expected = (
        answer(saved(tmp_path, of_functions(2, 3))),
        answer(saved(tmp_path, small_model(), "usual.onnx")),
    )
    np.testing.assert_array_equal(found["map"], expected["map"])


def test_networks_at_inference_pass_with_dropout_and_normalisation(tmp_path):
    assert load(saved(tmp_path, dropped(False)))
    assert load(saved(tmp_path, normalised(opset=17)))
    low = np.array(-np.inf, np.float32)
    assert load(saved(tmp_path, behind_the_convolution(NODE("Clip", ["c", "low"], ["r"]), low=low)))


# Weights beside the file


def with_weights_beside(tmp_path, location="w.bin", content=None, folder=None, **said):
    """A model in a folder, and the file that it names."""
    place = tmp_path / "models"
    place.mkdir(exist_ok=True)
    tensor = external(numpy_helper.from_array(WEIGHT, "w"), location=location, **said)
    path = saved(place, small_model(tensors={"w": tensor, "d": DENSE}))
    if content is not False:
        written(
            (folder or place) / location.split("/")[-1],
            WEIGHT.tobytes() if content is None else content,
        )
    return path


def test_weights_beside_the_model_are_read_from_its_folder_and_never_from_the_working_directory(
    tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    written(elsewhere / "w.bin", (WEIGHT * 9).tobytes())
    monkeypatch.chdir(elsewhere)
    path = with_weights_beside(tmp_path)
    expected = answer(saved(tmp_path, small_model(), "usual.onnx"))
    for name in (str(path), os.path.relpath(path)):
        np.testing.assert_array_equal(answer(name)["map"], expected["map"])
    (path.parent / "w.bin").unlink()
    assert "'w.bin', which is not there: put it into" in message_of(load, path)


def test_the_digest_holds_weights_beside_the_model(tmp_path):
    path = with_weights_beside(tmp_path)
    first = load_classifier(str(path)).digest
    assert load_classifier(str(path)).digest == first
    written(path.parent / "w.bin", (WEIGHT * 2).tobytes())
    assert load_classifier(str(path)).digest != first


def test_without_weights_beside_it_the_digest_is_that_of_the_file(tmp_path):
    import hashlib

    path = saved(tmp_path, small_model())
    assert load_classifier(str(path)).digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "..\\w.bin"}, "outside the model's folder"),
        ({"location": ""}, "outside the model's folder"),
        ({"location": "."}, "outside the model's folder"),
        ({"location": "a\0b"}, "cannot be looked up"),
        ({"location": "x" * 5000}, "cannot be looked up|which is not there"),
        ({"content": b""}, "is empty"),
        ({"content": WEIGHT.tobytes()[:-4]}, "428 bytes, and its shape needs 432"),
        ({"content": WEIGHT.tobytes() + b"more"}, "436 bytes, and its shape needs 432"),
        ({"content": LFS.encode()}, "Git LFS pointer"),
        ({"offset": -1}, "not a number of bytes"),
        ({"offset": 2**58}, "0 bytes, and its shape needs 432"),
        ({"offset": "9" * 50}, "not a number of bytes"),
        ({"offset": 4, "length": 432}, r"lies at bytes 4 to 436 of w.bin, which has 432"),
        ({"length": 2**40}, "1,099,511,627,776 bytes, and its shape needs 432"),
        ({"length": "many"}, "not a number of bytes"),
        ({"content": np.full(108, np.nan, np.float32).tobytes()}, "not finite"),
    ],
)
def test_weights_beside_the_model_that_cannot_be_meant(tmp_path, said, words):
    written(tmp_path / "w.bin", WEIGHT.tobytes())
    said = {"location": "w.bin", **said}
    content = said.pop("content", None if said["location"] == "w.bin" else False)
    path = with_weights_beside(tmp_path, content=content, **said)
    with pytest.raises(SightlineError, match=words):
        load(path)
    message_of(load, path)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    written(tmp_path / "secret", WEIGHT.tobytes())
    path = with_weights_beside(tmp_path, content=False)
    (path.parent / "w.bin").symlink_to(tmp_path / "secret")
    assert "outside the model's folder" in message_of(load, path)


def test_a_model_that_is_a_link_finds_its_weights_where_it_truly_lies(tmp_path):
    path = with_weights_beside(tmp_path)
    (tmp_path / "link.onnx").symlink_to(path)
    assert load(tmp_path / "link.onnx")


def test_many_tensors_cannot_claim_one_file_over_and_over(tmp_path):
    tensors = {
        f"w{i}": external(
            numpy_helper.from_array(WEIGHT, f"w{i}"), location="w.bin", offset=0, length=432
        )
        for i in range(9)
    }
    written(tmp_path / "w.bin", WEIGHT.tobytes())
    path = saved(tmp_path, small_model(tensors={"w": WEIGHT, "d": DENSE, **tensors}))
    assert "need more bytes than" in message_of(load, path)


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
