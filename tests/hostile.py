"""Small files of each kind that Sightline reads of others, sound ones to begin with, for tests that
spoil them.
"""

import json
import struct
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import SightlineError
from engines.networks.registry import load_classifier

SIDE = 32
RNG = np.random.default_rng(5)
NODE = helper.make_node
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
WEIGHT = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
DENSE = RNG.standard_normal((4, 5)).astype(np.float32)


def image(name="x", shape=(1, 3, SIDE, SIDE), elem=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, elem, shape)


def scores(name="y", elem=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, elem, None)


def small_nodes():
    return [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["y"]),
    ]


def small_model(
    nodes=None, tensors=None, inputs=None, outputs=None, opset=17, **extra
) -> onnx.ModelProto:
    """conv, relu, mean, matrix product: a classifier of five classes, whose parts may be
    replaced.
    """
    tensors = {"w": WEIGHT, "d": DENSE} if tensors is None else tensors
    made = [
        numpy_helper.from_array(v, k) if isinstance(v, np.ndarray) else v
        for k, v in tensors.items()
    ]
    graph = helper.make_graph(
        nodes or small_nodes(),
        "net",
        inputs or [image()],
        [scores()] if outputs is None else outputs,
        made,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **extra
    )


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


def load(path) -> onnx.ModelProto:
    """All of it, to the graph that an engine would compile."""
    return build_graph(load_classifier(str(path)), expose=["scores"])


def answer(path) -> dict[str, np.ndarray]:
    """Of one image."""
    pixels = np.random.default_rng(2).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    feeds = {IMAGE: pixels, WANTED_CLASS: np.array([-1])}
    return OpenVinoEngine(load(path), "fp32").infer(feeds)


def saved(tmp_path, model, name="net.onnx") -> Path:
    return written(tmp_path / name, model.SerializeToString())


def external(tensor: TensorProto, **said) -> TensorProto:
    """A tensor whose values lie in a file of their own."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in said.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def head_parts(network="0" * 64):
    """(tensors, description) of a head of one feature."""
    tensors = {
        "weight": RNG.standard_normal((1, 4, 6)).astype(np.float32),
        "bias": np.full((1, 4), 0.5, np.float32),
        "routes": np.zeros(0, np.int64),
    }
    cues = ["logit", "probability", "strength", "inside", "spread", "off_centre", "size", "aspect"]
    description = {
        "spec": {
            "objective": "class",
            "aggregation": "max",
            "layer": "conv4_3",
            "relu_rule": "plain",
            "signal": "gradient",
        },
        "features": [
            {"kind": "quantiles", "layer": "conv4_3", "size": 3, "power": 0.5, "signal": "gradient"}
        ],
        "network": network,
        "size_px": 64,
        "card": {"constant_boxes": {"mean_box": [0.1, 0.1, 0.9, 0.9]}},
        "trust": {
            "mean": [0.0] * 8,
            "scale": [1.0] * 8,
            "weight": [0.1] * 8,
            "bias": 0.0,
            "signs": cues,
        },
    }
    return tensors, description


def head_bytes(tensors, description) -> bytes:
    text = description if isinstance(description, str) else json.dumps(description)
    return save(tensors, {"sightline_head": text})


def calibration(network="0" * 64):
    return {
        "sightline_int8": 1,
        "ranges": {"pixels": 255.0, "conv1_1": 3.5},
        "kept": ["conv1_1_linear"],
        "network": network,
        "size_px": 64,
        "objective": "class",
        "layer": "conv4_3",
        "card": {"images": 16},
    }


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, and any length of it."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def message_of(call, *arguments) -> str:
    """The one line of the error that a call must end with."""
    try:
        call(*arguments)
    except SightlineError as error:
        text = str(error)
        assert text.strip()
        assert "\n" not in text
        assert len(text) < 700
        return text
    raise AssertionError("it was taken")


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
