"""The run part on a stand-in for GPU, pycuda and TensorRT's runtime (``tests.engines.gpu``): data, order, slots, shutdown.

What a real GPU does is not shown here: see docs/tensorrt.md.
"""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

from engines import certified
from engines.backends import tensorrt as backend
from engines.backends.openvino import OpenVinoEngine
from engines.base import EngineError, InputError
from engines.build import WANTED_CLASS, build_graph
from engines.cache import write_engine
from engines.certificate import certificate_path, certify
from engines.certified import key_of, open_certified, subject_of, typed_graph
from engines.choose import Choice, open_localizer
from engines.classifiers import load_classifier
from engines.cuda import Gpu
from engines.localizer import Localizer
from engines.preprocess import IMAGE
from tests.engines.gpu import Driver, Library, captured_graphs

SIZE = 64
GPU = Gpu("NVIDIA L4", (8, 9), 13000)


@pytest.fixture(scope="module")
def model():
    return build_graph(load_classifier("compact", "random", SIZE))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and its libraries; the driver's and the graphs' stand-ins."""
    driver = Driver()
    library = Library(lambda handle, work: driver.streams[handle].queue.append(work))
    graphs = captured_graphs(driver)
    monkeypatch.setattr(backend, "load_tensorrt", lambda ahead=False: library)
    monkeypatch.setattr(backend, "load_pycuda", lambda: driver)
    monkeypatch.setattr(backend, "CapturedGraph", graphs)
    monkeypatch.setattr(backend, "leave_context", lambda: None)
    for module in (backend, certified):
        monkeypatch.setattr(module, "probe_gpu", lambda: GPU)
    driver.library, driver.graphs = library, graphs
    return driver


def feeds(seed, batch=1):
    image = np.random.default_rng(seed).integers(0, 256, (batch, SIZE, SIZE, 3)).astype(np.uint8)
    return {IMAGE: image, WANTED_CLASS: np.full(batch, seed - 1)}


def plan_of(model):
    return model.SerializeToString()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("spin", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_outputs_are_those_of_the_graph_whatever_is_under_way(gpu, model, capture, spin, slots):
    engine, reference = (
        backend.TensorRtEngine(plan_of(model), model, "fp32", slots, spin, capture),
        OpenVinoEngine(model, "fp32"),
    )
    assert engine.inputs == reference.inputs
    assert engine.outputs == reference.outputs
    assert engine.metadata == reference.metadata
    under_way = []
    for seed in range(7):
        if len(under_way) == engine.slots:
            sent, ticket = under_way.pop(0)
            assert_equal(engine.collect(ticket), reference.infer(feeds(sent)))
        fed = feeds(seed)
        under_way.append((seed, engine.submit(fed)))
        fed[IMAGE][:] = 0  # it was taken at once
    for sent, ticket in under_way:
        assert_equal(engine.collect(ticket), reference.infer(feeds(sent)))
    assert gpu.graphs.launched == (7 if capture else 0)
    engine.close()


def test_nothing_runs_before_it_is_waited_for(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    first, second = engine.submit(feeds(0)), engine.submit(feeds(1))
    (stream,) = gpu.streams.values()
    assert len(stream.queue) == 8  # up, run, down, event: twice
    engine.collect(first)
    assert len(stream.queue) == 4
    engine.collect(second)
    assert not stream.queue
    engine.close()


def test_a_batch_of_cameras(gpu):
    model = build_graph(load_classifier("compact", "random", SIZE), batch=3)
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert_equal(engine.infer(feeds(2, batch=3)), OpenVinoEngine(model, "fp32").infer(feeds(2, batch=3)))
    engine.close()


def test_an_engine_whose_graph_ignores_an_input(gpu):
    from engines.maps import MapSpec

    model = build_graph(load_classifier("compact", "random", SIZE), MapSpec("gestalt"))
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert engine.infer(feeds(0))["map"].any()
    engine.close()


def test_the_stream_waits_for_no_other_and_events_sleep_or_spin(gpu, model):
    for spin, flags in ((False, 3), (True, 2)):
        gpu.log.clear()
        backend.TensorRtEngine(plan_of(model), model, "fp32", spin=spin).close()
        assert gpu.log == ["stream 1", f"event {flags}", f"event {flags}"]


def test_closing_frees_everything_in_any_order(gpu, model):
    first, second = (backend.TensorRtEngine(plan_of(model), model, "fp32", slots=3) for _ in range(2))
    first.submit(feeds(0))
    assert gpu.alive == {"context": 2, "stream": 2, "event": 6, "device": 12}
    first.close()
    first.close()
    assert gpu.alive == {"context": 1, "stream": 1, "event": 3, "device": 6}
    assert second.infer(feeds(1))["map"].any()
    del second  # never closed
    gc.collect()
    assert not any(gpu.alive.values())
    assert gpu.graphs.closed == gpu.graphs.made == 6
    assert not gpu.stack
    with pytest.raises(EngineError, match="this engine is closed"):
        first.infer(feeds(0))


def test_the_context_is_current_only_inside_calls(gpu, model):
    mine = gpu.Device(0).retain_primary_context()
    mine.push()
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert gpu.stack == [mine]
    engine.infer(feeds(0))
    assert gpu.stack == [mine]
    engine.close()
    assert gpu.stack == [mine]


def test_one_thread_owns_it(gpu, model):
    engine, caught = backend.TensorRtEngine(plan_of(model), model, "fp32"), []

    def use():
        for call in (lambda: engine.infer(feeds(0)), engine.close):
            try:
                call()
            except EngineError as error:
                caught.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(caught) == 2
    assert all("belongs to the thread that opened it" in line for line in caught)
    engine.close()


def test_calls_out_of_turn_say_so(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32", slots=2)
    first, second = engine.submit(feeds(0)), engine.submit(feeds(1))
    with pytest.raises(EngineError, match="all 2 slots of the engine are busy"):
        engine.submit(feeds(2))
    with pytest.raises(EngineError, match="collect the older one first"):
        engine.collect(second)
    with pytest.raises(EngineError, match="not collected yet"):
        engine.infer(feeds(2))
    engine.collect(first)
    engine.collect(second)
    with pytest.raises(EngineError, match="nothing was submitted"):
        engine.collect(second)
    with pytest.raises(InputError, match="input 'wanted_class' is missing"):
        engine.submit({IMAGE: feeds(0)[IMAGE]})
    engine.infer(feeds(0))  # none of it cost a slot
    engine.close()


def test_a_graph_that_cannot_be_captured_runs_all_the_same(gpu, model, monkeypatch):
    def refuses(handle, enqueue):
        raise EngineError("cuStreamEndCapture 900")

    monkeypatch.setattr(backend, "CapturedGraph", refuses)
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert_equal(engine.infer(feeds(0)), OpenVinoEngine(model, "fp32").infer(feeds(0)))
    engine.close()


def test_what_fails_while_it_opens_leaves_nothing(gpu, model):
    with pytest.raises(
        EngineError, match=r"tensorrt_rtx 1\.7\.1\.116 refuses the engine \(Serialization assertion .*\): run 'build"
    ):
        backend.TensorRtEngine(b"rubbish", model, "fp32")
    other = build_graph(load_classifier("compact", "random", 96))
    with pytest.raises(EngineError, match="this engine is of another graph"):
        backend.TensorRtEngine(plan_of(other), model, "fp32")
    gc.collect()
    assert not any(gpu.alive.values())


def test_a_failure_of_the_driver_is_one_line_and_the_slot_is_free_again(gpu, model, monkeypatch):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32", slots=1)
    copy = gpu.memcpy_htod_async

    def fails(*_):
        raise gpu.Error("cuMemcpyHtoDAsync failed: unspecified launch failure\nmore")

    monkeypatch.setattr(gpu, "memcpy_htod_async", fails)
    with pytest.raises(EngineError, match=r"NVIDIA L4 failed: cuMemcpyHtoDAsync failed: unspecified launch failure$"):
        engine.infer(feeds(0))
    monkeypatch.setattr(gpu, "memcpy_htod_async", copy)
    assert engine.infer(feeds(0))["map"].any()
    assert not gpu.stack
    engine.close()


# Which engine runs


def kept(model, gpu, target=str(GPU), precision="fp32"):
    typed = typed_graph(model, precision, gpu.library.__name__, GPU.sm)
    key = key_of(model, typed, gpu.library, target, precision)
    write_engine(key.path, key, plan_of(model))
    return key


def passed(model, key, failures=()):
    camera = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8)
    engines = [Localizer(OpenVinoEngine(model, "fp32")) for _ in range(2)]
    found = replace(certify(*engines, list(camera)).of(subject_of(key, plan_of(model))), failures=failures)
    found.save(certificate_path(key.path))


@pytest.fixture
def own_engines(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))


@pytest.mark.usefixtures("own_engines")
def test_only_a_certified_engine_is_opened(gpu, model):
    with pytest.raises(EngineError, match="no TensorRT engine of this graph is built for NVIDIA L4 sm89: run 'sightline build"):
        open_certified(lambda: model, "fp32")
    key = kept(model, gpu)
    with pytest.raises(EngineError, match="has no certificate yet: run 'sightline build --backend tensorrt --precision fp32'"):
        open_certified(lambda: model, "fp32")
    passed(model, key, failures=("a map is zero everywhere",))
    with pytest.raises(EngineError, match="failed its certificate"):
        open_certified(lambda: model, "fp32")
    passed(model, key)
    engine = open_certified(lambda: model, "fp32")
    assert (engine.backend, engine.precision, engine.device) == ("tensorrt", "fp32", "NVIDIA L4 sm89, tensorrt_rtx 1.7.1.116")
    assert_equal(engine.infer(feeds(0)), OpenVinoEngine(model, "fp32").infer(feeds(0)))
    engine.close()
    write_engine(key.path, key, plan_of(model) + b"\x18\x00")
    with pytest.raises(EngineError, match="stale certificate"):
        open_certified(lambda: model, "fp32")
    key.path.write_bytes(key.path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="cut off or damaged; build it again with 'build --rebuild'"):
        open_certified(lambda: model, "fp32")


@pytest.mark.usefixtures("own_engines")
def test_an_engine_built_ahead_for_this_kind_of_gpu_is_found(gpu, model):
    passed(model, kept(model, gpu, target="sm89"))
    open_certified(lambda: model, "fp32").close()
    with pytest.raises(EngineError, match="no TensorRT engine"):
        open_certified(lambda: model, "fp16")


@pytest.mark.usefixtures("own_engines")
def test_auto_takes_tensorrt_where_all_of_it_is_there_and_else_says_why(gpu, monkeypatch):
    choice, told = Choice(weights="random", size_px=SIZE, head="none", precision="fp32"), []
    localizer = open_localizer(choice, told.append)
    assert localizer.engine.backend == "openvino"
    assert [line.split(":")[:2] for line in told] == [
        ["not TensorRT", " no TensorRT engine of this graph is built for NVIDIA L4 sm89"]
    ]
    graph = build_graph(load_classifier("compact", "random", SIZE))
    passed(graph, kept(graph, gpu))
    told.clear()
    localizer = open_localizer(choice, told.append)
    assert localizer.engine.backend == "tensorrt"
    assert told == []
    localizer.engine.close()

    def missing(**_):
        raise EngineError("TensorRT is not installed")

    monkeypatch.setattr(backend, "load_tensorrt", missing)
    assert open_localizer(choice, told.append).engine.backend == "openvino"
    assert told == ["not TensorRT: TensorRT is not installed"]


def test_the_driver_is_asked_before_any_library(monkeypatch, model):
    def no_driver(*_):
        raise EngineError("no NVIDIA driver")

    def too_early(*_, **__):
        raise AssertionError("a library was loaded before the driver was asked")

    for module in (backend, certified):
        monkeypatch.setattr(module, "probe_gpu", no_driver)
    monkeypatch.setattr(backend, "load_tensorrt", too_early)
    monkeypatch.setattr(backend, "load_pycuda", too_early)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        backend.TensorRtEngine(b"", model, "fp32")
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        open_certified(too_early)


def test_missing_libraries_are_named_with_what_to_install(monkeypatch):
    import sys

    for name in ("tensorrt", "tensorrt_rtx", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"TensorRT is not installed: pip install 'sightline\[rtx\]'"):
        backend.load_tensorrt()
    with pytest.raises(EngineError, match="pycuda cannot be loaded"):
        backend.load_pycuda()


def test_precisions_and_graphs_that_do_not_fit(model):
    assert certified.checked_precision("auto") == "fp16"
    with pytest.raises(EngineError, match="TensorRT engines run in fp32, fp16, int8, not bf16"):
        certified.checked_precision("bf16")
    with pytest.raises(EngineError, match="a graph without 8-bit scales cannot be built in int8"):
        typed_graph(model, "int8", "tensorrt", "sm89")
    turned = typed_graph(model, "fp32", "tensorrt_rtx", "sm75")
    assert not any(node.op_type == "Gemm" for node in turned.graph.node)
    assert typed_graph(model, "fp32", "tensorrt", "sm75") is model
