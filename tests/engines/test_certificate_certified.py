"""Which built engine may run, on a stand-in for GPU, pycuda and TensorRT's runtime
(``tests.engines.gpu``).
"""

import hashlib
import sys
from types import ModuleType

import pytest

from engines.backends import tensorrt as backend
from engines.backends.cuda import BindingsDriver
from engines.backends.openvino import OpenVinoEngine
from engines.backends.tensorrt import open_certified
from engines.build import build_graph
from engines.certificate import write_engine
from engines.choose import open_localizer
from engines.errors import EngineError
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from engines.typed_graph import checked_precision, typed_graph
from tests.engines.driver import SimulatedDriver
from tests.engines.gpu import SIZE, certify_plan, keep_plan, plan_of
from tests.engines.test_tensorrt import assert_equal, feeds


@pytest.fixture
def own_engines(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))


@pytest.mark.usefixtures("own_engines")
def test_only_a_certified_engine_is_opened(gpu, model):
    with pytest.raises(
        EngineError,
        match="no TensorRT engine of this graph is built for NVIDIA L4 sm89: run 'sightline build",
    ):
        open_certified(lambda: model, "fp32")
    key = keep_plan(model, gpu)
    with pytest.raises(
        EngineError,
        match="has no certificate yet: run 'sightline build --backend tensorrt --precision fp32'",
    ):
        open_certified(lambda: model, "fp32")
    certify_plan(model, key, failures=("a map is zero everywhere",))
    with pytest.raises(EngineError, match="failed its certificate"):
        open_certified(lambda: model, "fp32")
    certify_plan(model, key)
    engine = open_certified(lambda: model, "fp32")
    assert (engine.backend, engine.precision, engine.device) == (
        "tensorrt",
        "fp32",
        "NVIDIA L4 sm89, tensorrt_rtx 1.7.1.116, CUDA graphs",
    )
    assert_equal(engine.infer(feeds(0)), OpenVinoEngine(model, "fp32").infer(feeds(0)))
    engine.close()
    write_engine(key.path, key, plan_of(model) + b"\x18\x00")
    with pytest.raises(EngineError, match="stale certificate"):
        open_certified(lambda: model, "fp32")
    key.path.write_bytes(key.path.read_bytes()[:-1])
    with pytest.raises(
        EngineError,
        match="cut off or damaged; build it again with 'sightline build --backend tensorrt --rebuild'",
    ):
        open_certified(lambda: model, "fp32")


@pytest.mark.usefixtures("own_engines")
def test_graph_and_plan_are_hashed_once_as_an_engine_is_opened(gpu, model, monkeypatch):
    """Those of VGG16 have up to 1.1 GB each."""
    certify_plan(model, keep_plan(model, gpu, target="sm89"))
    sizes, sha256 = [], hashlib.sha256

    def counted(content):
        sizes.append(len(content))
        return sha256(content)

    monkeypatch.setattr(hashlib, "sha256", counted)
    open_certified(lambda: model, "fp32").close()
    assert sum(size > 10_000 for size in sizes) == 2


@pytest.mark.usefixtures("own_engines")
def test_an_engine_built_ahead_for_this_kind_of_gpu_is_found(gpu, model):
    certify_plan(model, keep_plan(model, gpu, target="sm89"))
    open_certified(lambda: model, "fp32").close()
    with pytest.raises(EngineError, match="no TensorRT engine"):
        open_certified(lambda: model, "fp16")


@pytest.mark.usefixtures("own_engines")
def test_auto_takes_tensorrt_where_all_of_it_is_there_and_else_says_why(gpu, monkeypatch):
    choice, notify = (
        EngineOptions(weights="random", size_px=SIZE, head="none", precision="fp32"),
        [],
    )
    localizer = open_localizer(choice, notify.append)
    assert localizer.engine.backend == "openvino"
    assert notify[0].split(":")[:2] == [
        "not TensorRT",
        " no TensorRT engine of this graph is built for NVIDIA L4 sm89",
    ]
    assert notify[1:] == localizer.engine.losses, "and what the processor costs, on some"
    graph = build_graph(load_classifier("compact", "random", SIZE))
    certify_plan(graph, keep_plan(graph, gpu))
    notify.clear()
    localizer = open_localizer(choice, notify.append)
    assert localizer.engine.backend == "tensorrt"
    assert notify == []
    localizer.engine.close()

    def missing(**_):
        raise EngineError("TensorRT is not installed")

    monkeypatch.setattr(backend, "load_tensorrt", missing)
    assert open_localizer(choice, notify.append).engine.backend == "openvino"
    assert notify[0] == (
        "not TensorRT: TensorRT is not installed; backend torch computes on NVIDIA L4 sm89"
    )


def test_the_driver_is_asked_before_any_library(monkeypatch, model):
    def no_driver(*_):
        raise EngineError("no NVIDIA driver")

    def too_early(*_, **__):
        raise AssertionError("a library was loaded before the driver was asked")

    monkeypatch.setattr(backend, "probe_gpu", no_driver)
    monkeypatch.setattr(backend, "load_tensorrt", too_early)
    monkeypatch.setattr(backend, "load_pycuda", too_early)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        backend.TensorRtEngine(b"", model, "fp32")
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        open_certified(too_early)


def test_missing_libraries_are_named_with_what_to_install(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx", "pycuda", "pycuda.driver", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"TensorRT is not installed: .*install 'tensorrt_rtx>="):
        backend.load_tensorrt()
    with pytest.raises(EngineError, match=r"pycuda cannot be loaded .* needs nvcc .*cuda-bindings"):
        backend.load_pycuda()


def test_without_pycuda_the_driver_is_called_through_cuda_bindings(monkeypatch):
    driver = SimulatedDriver()
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    package = ModuleType("cuda.bindings")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    assert isinstance(backend.load_pycuda(), BindingsDriver)
    monkeypatch.setattr(driver, "cuInit", lambda flags: (100,))
    with pytest.raises(EngineError, match="cuda-bindings does not start: cuInit failed: error 100"):
        backend.load_pycuda()


def test_precisions_and_graphs_that_do_not_fit(model):
    assert checked_precision("auto") == "fp16"
    with pytest.raises(EngineError, match="TensorRT engines run in fp32, fp16, int8, not bf16"):
        checked_precision("bf16")
    with pytest.raises(EngineError, match="a graph without 8-bit scales cannot be built in int8"):
        typed_graph(model, "int8", "tensorrt", "sm89")
    turned = typed_graph(model, "fp32", "tensorrt_rtx", "sm75")
    assert not any(node.op_type == "Gemm" for node in turned.graph.node)
    assert typed_graph(model, "fp32", "tensorrt", "sm75") is model
