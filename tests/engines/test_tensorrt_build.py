"""TensorRT for RTX compiles our graphs with no GPU: every precision, batch and kind of GPU, and
every way to fail.

The library comes from PyPI (``.[rtx]`` or the tests' own extra); without it these tests skip.
"""

import io
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from rich.console import Console

from calib.precision.build import BuildOptions, build_chosen_engine
from calib.precision.calibrate import rough_quantization
from engines.backends.tensorrt import load_tensorrt
from engines.backends.tensorrt_build import Build, build_plan, network_flags, quiet_logger, targets
from engines.build import build_graph
from engines.certificate import engines_dir, read_engine
from engines.choose import build_chosen
from engines.errors import EngineError, ModelError
from engines.head import head_path, load_head
from engines.maps import MapSpec
from engines.networks import vgg
from engines.networks.registry import classifier_of, load_classifier
from engines.options import EngineOptions
from engines.typed_graph import to_half, typed_graph
from tests.engines.foreign import KINDS, export

trt = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[rtx]'"
)
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")


def built(model, target="sm89", console=None):
    return build_plan(model, Build(trt, target, console=console))


def typed(model, precision, target):
    return typed_graph(model, precision, "tensorrt_rtx", target)


def quantized(batch=1):
    """A small network, forward and backward, with a pair behind each ReLU that both directions
    read, as int8 wants it.

    Symmetric, without zero points; weights per output channel; biases and what lies between in
    float32.
    """
    rng = np.random.default_rng(0)
    nodes, constants = [], {"zero": np.zeros((), np.int8), "nothing": np.zeros((), np.float32)}

    def weight(name, *shape):
        values = rng.integers(-127, 128, shape).astype(np.int8)
        constants.update(
            {
                f"{name}8": values,
                f"{name}_s": np.full(shape[0], 0.002, np.float32),
                f"{name}_z": np.zeros(shape[0], np.int8),
            }
        )
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}8", f"{name}_s", f"{name}_z"], [name], axis=0
            )
        )

    def pair(x, scale):
        constants[f"{x}_s"] = np.array(scale, np.float32)
        nodes.append(helper.make_node("QuantizeLinear", [x, f"{x}_s", "zero"], [f"{x}8"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{x}8", f"{x}_s", "zero"], [f"{x}_r"]))
        return f"{x}_r"

    def add(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    x = add(
        "Transpose",
        [add("Cast", ["image"], "floats", to=TensorProto.FLOAT)],
        "pixels",
        perm=[0, 3, 1, 2],
    )
    weight("w1", 16, 3, 3, 3)
    weight("w2", 32, 16, 3, 3)
    weight("b2", 16, 32, 3, 3)
    weight("b1", 3, 16, 3, 3)
    y1 = pair(add("Relu", [add("Conv", [pair(x, 2.0), "w1"], "c1", pads=[1] * 4)], "r1"), 0.5)
    y2 = pair(add("Relu", [add("Conv", [y1, "w2"], "c2", pads=[1] * 4)], "r2"), 0.5)
    g2 = pair(add("Where", [add("Greater", [y2, "nothing"], "on2"), y2, "nothing"], "g2"), 0.5)
    back = add("Conv", [g2, "b2"], "d2", pads=[1] * 4)
    g1 = pair(add("Where", [add("Greater", [y1, "nothing"], "on1"), back, "nothing"], "g1"), 1.0)
    constants["axes"] = np.array([1], np.int64)
    weight("w3", 8, 32)
    constants["bias"] = rng.standard_normal(8).astype(np.float32)
    pooled = pair(add("Flatten", [add("GlobalAveragePool", [y2], "average")], "pooled"), 0.1)
    add("Gemm", [pooled, "w3", "bias"], "scores", transB=1)
    gradient = add("Abs", [add("Conv", [g1, "b1"], "d1", pads=[1] * 4)], "sensitivity")
    add("ReduceMax", [gradient, "axes"], "map", keepdims=0)
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 32, 32, 3])
    output = helper.make_tensor_value_info("map", TensorProto.FLOAT, [batch, 32, 32])
    outputs = [output, helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 8])]
    graph = helper.make_graph(
        nodes, "q", [image], outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_builder_that_does_not_start_says_why(model, monkeypatch):
    from engines.backends import tensorrt_build as build
    from tests.engines.gpu import GPU

    class Library:
        __name__, __version__ = "tensorrt_rtx", "1.7"
        ILogger = trt.ILogger

        @staticmethod
        def Builder(logger):
            logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 2")
            raise TypeError("factory function returned nullptr")

    def starts():
        build_plan(model, Build(Library()))

    with pytest.raises(
        EngineError, match=r"builder of tensorrt_rtx 1\.7 does not start: no NVIDIA"
    ):
        starts()
    monkeypatch.setattr(build, "probe_gpu", lambda: GPU)
    with pytest.raises(
        EngineError, match="does not start: CUDA initialization failure with error: 2"
    ):
        starts()
    monkeypatch.setattr(build, "probe_gpu", lambda: replace(GPU, cuda_version=12080))
    with pytest.raises(EngineError, match="does not start: the NVIDIA driver serves CUDA 12"):
        starts()


@pytest.mark.parametrize(("target", "expected"), [(None, "CURRENT"), ("sm75", "SM75")])
def test_what_is_built_for_is_said_and_memory_is_had_before_a_capture(
    model, monkeypatch, target, expected
):
    """What the library takes by itself is no Turing, and its memory may be had while a call runs."""
    asked = []

    def build(builder, network, config):
        asked.append(config.num_compute_capabilities)
        asked.append(config.get_compute_capability(0))
        asked.append(config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION))

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build)
    with pytest.raises(EngineError, match="cannot build"):
        built(model, target)
    assert asked == [1, getattr(trt.ComputeCapability, expected), True]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_shipped_network_without_a_gpu(target, precision):
    model = build_chosen(EngineOptions(head="none"))
    assert len(built(typed(model, precision, target), target)) > 1e6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("method", ["sensitivity", "gestalt", "heuristic"])
def test_every_method_with_its_head_and_a_batch(method, batch, precision):
    model = build_chosen(EngineOptions(method=method), batch)
    assert len(built(typed(model, precision, "sm89"))) > 1e6


@pytest.mark.parametrize(
    ("target", "shape", "precision"),
    [("sm75", (160, 160), "fp16"), ("sm75", (320, 320), "fp32"), ("sm89", (96, 160), "fp16")],
)
def test_the_dense_head_for_a_square_and_for_16_9(target, shape, precision):
    """At 320 px cells of the coarse maps are interpolated, which Turing has no products for."""
    head = load_head(head_path("lite0_dense"))
    size_px = max(shape)
    classifier = replace(EngineOptions("lite0", size_px=size_px).classifier(), other_shape=shape)
    model = build_graph(classifier, head.spec, head)
    assert len(built(typed(model, precision, target), target)) > 1e6


def test_squeezenet(squeezenet):
    model = build_chosen(EngineOptions("squeezenet", weights=squeezenet))
    for target in ("sm75", "sm120"):
        assert len(built(typed(model, "fp16", target), target)) > 1e6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 8])
def test_int8_forward_and_backward(target, batch):
    model = typed(quantized(batch), "int8", target)
    assert built(model, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_shipped_network_in_8_bits(target, batch):
    """The very file that OpenVINO runs."""
    model = build_chosen(EngineOptions(precision="int8"), batch)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 15
    assert len(built(typed(model, "int8", target), target)) > 1e6


def test_an_8_bit_product_as_a_convolution_gives_the_same():
    """For Turing, whose other products in float32 are refused."""
    feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)}
    model = quantized()
    turned = typed(model, "int8", "sm75")
    assert "Gemm" in {node.op_type for node in model.graph.node}
    assert "Gemm" not in {node.op_type for node in turned.graph.node}
    for expected, found in zip(
        ReferenceEvaluator(model).run(None, feeds),
        ReferenceEvaluator(turned).run(None, feeds),
        strict=True,
    ):
        assert expected.any()
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.long
def test_vgg16_at_full_width_for_one_gpu():
    model = build_graph(load_classifier("vgg16", "random"), batch=8)
    assert len(built(typed(model, "fp16", "sm89"), "sm89")) > 2e8


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_vgg16_at_full_width(batch, precision):
    model = build_graph(load_classifier("vgg16", "random"), batch=batch)
    for target in TARGETS:
        assert len(built(typed(model, precision, target), target)) > 2e8


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_convolutions_alone(precision):
    """Of VGG16, without class scores: the wanted class stays an input."""
    values = vgg.random_weights((8, 8, 8, 8, 8), hidden=0)
    convolutions = {n: v for n, v in values.items() if n.startswith("features")}
    classifier = classifier_of(vgg.VGG16, convolutions, size_px=64)
    model = build_graph(classifier, MapSpec("gestalt"))
    assert len(built(typed(model, precision, "sm89"))) > 1e4


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 8])
def test_vgg16_in_8_bits(batch):
    classifier = load_classifier("vgg16", "random")
    model = build_graph(
        classifier, batch=batch, quantization=rough_quantization(classifier, "class")
    )
    for target in TARGETS:
        assert len(built(typed(model, "int8", target), target)) > 1e8


def test_half_precision_halves_the_plan():
    model = build_graph(load_classifier("compact", "random", 64))
    assert len(built(to_half(model))) < 0.75 * len(built(model))


def test_progress_is_shown_phase_by_phase():
    text = io.StringIO()
    built(
        build_graph(load_classifier("compact", "random", 64)),
        console=Console(file=text, force_terminal=True, width=100),
    )
    assert "Building engine" in text.getvalue()


def test_ctrl_c_ends_a_build(monkeypatch):
    from rich.progress import Progress

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(
            build_graph(load_classifier("compact", "random", 64)),
            console=Console(file=io.StringIO()),
        )


def test_a_node_that_it_cannot_read_is_named():
    x, y = (
        helper.make_tensor_value_info("x", 1, [1, 3, 8, 8]),
        helper.make_tensor_value_info("y", 7, [4, None]),
    )
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"], name="odd")], "g", [x], [y]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(
        ModelError, match=r"tensorrt_rtx cannot read the graph: node 'odd' \(NonZero\): "
    ) as caught:
        built(model)
    assert "\n" not in str(caught.value)


def test_a_graph_without_outputs_is_refused():
    with pytest.raises(ModelError, match="it has no output"):
        built(onnx.ModelProto())


def test_what_it_cannot_compile_is_one_line():
    """Its own reason for Turing, which ``engines.typed_graph`` is there for."""
    with pytest.raises(
        EngineError, match=r"tensorrt_rtx cannot build for sm75: .*FP32 GEMM is not supported"
    ) as caught:
        built(build_graph(load_classifier("compact", "random", 64)), "sm75")
    assert "\n" not in str(caught.value)


def test_without_a_gpu_it_cannot_build_for_this_one():
    try:
        from engines.backends.cuda import probe_gpu

        probe_gpu()
    except EngineError:
        with pytest.raises(
            EngineError, match="cannot build for sm90 ahead of time: it can for sm75, sm80"
        ):
            built(build_graph(load_classifier("compact", "random", 64)), "sm90")
    else:
        pytest.skip("there is a GPU here")


def test_the_library_is_found_and_its_targets_known():
    assert load_tensorrt(ahead=True) is trt
    assert set(TARGETS) <= set(targets(trt))
    assert network_flags(trt) == 0


@pytest.mark.parametrize(("version", "flags"), [("10.16.1", 1), ("11.4.0", 0)])
def test_strong_typing_is_asked_for_only_where_it_is_a_choice(version, flags):
    class Library:
        __name__, __version__ = "tensorrt", version

        class NetworkDefinitionCreationFlag:
            STRONGLY_TYPED = 0

    assert network_flags(Library()) == flags


def test_errors_are_kept_and_nothing_is_printed(capfd):
    logger, messages = quiet_logger(trt)
    logger.log(trt.ILogger.ERROR, "bad\n  thing")
    logger.log(trt.ILogger.WARNING, "never mind")
    assert messages == ["bad thing"]
    assert capfd.readouterr() == ("", "")


def test_build_keeps_the_engine_and_says_that_it_is_not_certified(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    text = io.StringIO()
    console = Console(file=text, width=300)
    model = build_graph(load_classifier("compact", "random", 64), batch=2)
    choice = BuildOptions(tmp_path / "net.engine", "tensorrt", "fp16", "sm89")
    assert build_chosen_engine(model, choice, console) is None
    (path,) = engines_dir().iterdir()
    key, plan, _ = read_engine(path)
    assert (key.model, key.library, key.target, key.precision, key.batch) == (
        "compact",
        "tensorrt_rtx",
        "sm89",
        "fp16",
        2,
    )
    assert (tmp_path / "net.engine").read_bytes() == path.read_bytes()
    assert "not certified, there is no sm89 here" in text.getvalue()
    monkeypatch.setattr(
        "engines.backends.tensorrt_build.build_plan", lambda *_: pytest.fail("built twice")
    )
    choice = replace(choice, out=None)  # an engine's file is replaced only on request
    build_chosen_engine(model, choice, console)
    path.write_bytes(path.read_bytes()[:-5])
    monkeypatch.undo()
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    build_chosen_engine(model, choice, console)
    assert "cut off or damaged; building it again" in text.getvalue()
    assert len(read_engine(path)[1]) == pytest.approx(len(plan), rel=0.01)


@pytest.mark.parametrize("target", ["sm75", "sm89"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_networks_of_gates_tokens_windows_and_channels_last(tmp_path, kind, target):
    export(kind, tmp_path / "net.onnx")
    model = build_graph(load_classifier(str(tmp_path / "net.onnx")))
    assert built(typed(model, "fp16", target), target)


def test_lite0_with_its_head():
    assert len(built(typed(build_chosen(EngineOptions("lite0")), "fp16", "sm89"))) > 5e6


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "vit_small_patch16_224"])
def test_a_network_of_timm(tmp_path, name):
    """With random weights."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = timm.create_model(name, pretrained=False).eval()
        torch.onnx.export(
            module,
            torch.zeros(1, 3, 224, 224),
            tmp_path / "net.onnx",
            dynamo=False,
            opset_version=17,
        )
    model = build_chosen(EngineOptions(str(tmp_path / "net.onnx"), head="none"))
    assert len(built(typed(model, "fp16", "sm89"))) > 2e7
