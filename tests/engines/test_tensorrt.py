"""The run part on a stand-in for GPU, pycuda and TensorRT's runtime (``tests.engines.gpu``): data,
order, slots, shutdown.

What a real GPU does is not shown here: see docs/tensorrt.md.
"""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.backends import tensorrt as backend
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import EngineError, InputError
from engines.networks.registry import load_classifier
from tests.engines.gpu import SIZE, plan_of


def feeds(seed, batch=1):
    image = np.random.default_rng(seed).integers(0, 256, (batch, SIZE, SIZE, 3)).astype(np.uint8)
    return {IMAGE: image, WANTED_CLASS: np.full(batch, seed - 1)}


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
    assert gpu.libcuda.launched == (7 if capture else 0)
    engine.close()


def test_every_call_is_timed_on_the_gpu_s_own_clock(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert engine.times is None
    engine.infer(feeds(0))
    first = engine.times
    assert min(first.h2d_ms, first.d2h_ms) > 0
    assert first.compute_ms > first.h2d_ms
    engine.infer(feeds(1))
    assert engine.times is not first
    engine.close()


def test_nothing_runs_before_it_is_waited_for(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    first, second = engine.submit(feeds(0)), engine.submit(feeds(1))
    # Up: event, copy, event. Work: wait, event, run, event. Down as up, behind a wait. Twice.
    assert gpu.driver.waiting == 22
    engine.collect(first)
    assert 0 < gpu.driver.waiting <= 11
    engine.collect(second)
    assert not gpu.driver.waiting
    engine.close()


def test_copies_of_one_call_are_done_while_another_one_runs(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    engine.submit(feeds(0))
    engine.submit(feeds(1))
    _, work, _ = gpu.driver.streams.values()
    gpu.driver.cuStreamSynchronize(next(iter(gpu.driver.streams)))  # upwards
    assert len(work.queue) == 8, "both inputs are there, and nothing has run"
    engine.close()


def test_a_batch_of_cameras(gpu):
    model = build_graph(load_classifier("compact", "random", SIZE), batch=3)
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert_equal(
        engine.infer(feeds(2, batch=3)), OpenVinoEngine(model, "fp32").infer(feeds(2, batch=3))
    )
    engine.close()


def test_an_engine_whose_graph_ignores_an_input(gpu):
    from engines.maps import MapSpec

    model = build_graph(load_classifier("compact", "random", SIZE), MapSpec("gestalt"))
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert engine.infer(feeds(0))["map"].any()
    engine.close()


def test_the_stream_waits_for_no_other_and_events_sleep_or_spin(gpu, model):
    for spin, flags in ((False, 1), (True, 0)):
        gpu.driver.log.clear()
        backend.TensorRtEngine(plan_of(model), model, "fp32", spin=spin).close()
        assert gpu.driver.log == [*["stream 1"] * 3, *[f"event {flags}"] * 12]


def test_closing_frees_everything_in_any_order(gpu, model):
    first, second = (
        backend.TensorRtEngine(plan_of(model), model, "fp32", slots=3) for _ in range(2)
    )
    first.submit(feeds(0))
    # Of each engine and slot: six events; memory for inputs, outputs and the execution's own.
    one = {"context": 1, "stream": 3, "event": 18, "device": 9, "host": 6, "graph": 6}
    assert gpu.driver.alive == {kind: 2 * count for kind, count in one.items()}
    first.close()
    first.close()
    assert gpu.driver.alive == one
    assert second.infer(feeds(1))["map"].any()
    del second  # never closed
    gc.collect()
    assert not any(gpu.driver.alive.values())
    assert not gpu.driver.current
    with pytest.raises(EngineError, match="this engine is closed"):
        first.infer(feeds(0))


def test_the_context_is_current_only_inside_calls(gpu, model):
    mine = gpu.Device(0).retain_primary_context()
    mine.push()
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert gpu.upper() is mine
    engine.infer(feeds(0))
    assert gpu.upper() is mine
    engine.close()
    assert gpu.upper() is mine
    assert len(gpu.driver.current) == 1
    mine.pop()


def in_a_thread(work):
    """Run it there; what it returns or raises comes back."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_it_may_be_handed_to_another_thread_and_closed_there(gpu, model):
    engine, expected = (
        backend.TensorRtEngine(plan_of(model), model, "fp32"),
        OpenVinoEngine(model, "fp32"),
    )
    ticket = engine.submit(feeds(0))
    assert_equal(in_a_thread(lambda: engine.collect(ticket)), expected.infer(feeds(0)))
    assert_equal(in_a_thread(lambda: engine.infer(feeds(1))), expected.infer(feeds(1)))
    assert_equal(engine.infer(feeds(2)), expected.infer(feeds(2)))
    in_a_thread(engine.close)
    assert not any(gpu.driver.alive.values())
    assert not gpu.driver.current


def test_it_is_opened_in_a_thread_that_ends_and_closed_in_another(gpu, model):
    """pycuda gives a context back in its own thread, or where it is current."""
    engine = in_a_thread(lambda: backend.TensorRtEngine(plan_of(model), model, "fp32"))
    other = in_a_thread(lambda: backend.TensorRtEngine(plan_of(model), model, "fp32"))
    assert engine.infer(feeds(0))["map"].any()
    mine = gpu.Device(0).retain_primary_context()
    mine.push()
    engine.close()
    assert gpu.driver.alive["context"] == 2
    assert gpu.upper() is mine
    assert len(gpu.driver.current) == 1
    mine.pop()
    mine.detach()
    del other
    gc.collect()
    assert not any(gpu.driver.alive.values())


def test_two_threads_at_once_are_refused(gpu, model, monkeypatch):
    engine, copy, caught = (
        backend.TensorRtEngine(plan_of(model), model, "fp32"),
        gpu.memcpy_htod_async,
        [],
    )

    def meanwhile(*arguments):
        for call in (lambda: engine.submit(feeds(1)), engine.close):
            with pytest.raises(
                EngineError, match="in the middle of a call in another thread"
            ) as error:
                in_a_thread(call)
            caught.append(error)
        copy(*arguments)

    monkeypatch.setattr(gpu, "memcpy_htod_async", meanwhile)
    assert engine.infer(feeds(0))["map"].any()
    assert len(caught) == 2
    engine.close()


def test_calls_out_of_turn_say_so(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32", slots=2)
    first, second = engine.submit(feeds(0)), engine.submit(feeds(1))
    with pytest.raises(EngineError, match="2 calls are under way"):
        engine.submit(feeds(2))
    with pytest.raises(EngineError, match="collect the older one first"):
        engine.collect(second)
    with pytest.raises(EngineError, match="not collected yet"):
        engine.infer(feeds(2))
    engine.collect(first)
    engine.collect(second)
    with pytest.raises(EngineError, match="collected before"):
        engine.collect(second)
    with pytest.raises(InputError, match="input 'wanted_class' is missing"):
        engine.submit({IMAGE: feeds(0)[IMAGE]})
    engine.infer(feeds(0))  # none of it cost a slot
    engine.close()


def test_a_graph_that_cannot_be_captured_runs_all_the_same_and_says_so(gpu, model):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert engine.captured
    assert not engine.losses
    assert engine.device.endswith(", CUDA graphs")
    engine.close()

    gpu.driver.failing["cuStreamEndCapture"] = 900
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert not engine.captured
    (loss,) = engine.losses
    assert "no CUDA graph (the NVIDIA driver answers cuStreamEndCapture with error 900" in loss
    assert engine.device.endswith(", no CUDA graphs")
    assert_equal(engine.infer(feeds(0)), OpenVinoEngine(model, "fp32").infer(feeds(0)))
    engine.close()


def test_a_plan_that_the_library_says_cannot_be_captured_is_not_tried(gpu, model):
    gpu.library.capturable = False
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32")
    assert not engine.captured
    assert "says that this plan cannot be captured" in engine.losses[0]
    assert gpu.libcuda.captured == 0
    assert engine.infer(feeds(0))["map"].any()
    engine.close()


def test_kernels_are_compiled_at_the_first_start_only(gpu, model, tmp_path):
    def compiled(path):
        before = gpu.library.compiled
        engine = backend.TensorRtEngine(plan_of(model), model, "fp32", kernels=path)
        losses = engine.losses
        engine.close()
        return gpu.library.compiled - before, losses

    path = tmp_path / "new" / "kept.kernels"
    assert compiled(path) == (1, ())
    assert compiled(path) == (0, ())
    path.write_bytes(b"of another GPU")
    assert compiled(path) == (1, ())
    assert compiled(path) == (0, ())
    (tmp_path / "file").write_text("")
    count, (loss,) = compiled(tmp_path / "file" / "kept.kernels")
    assert count == 1
    assert "compiled anew at each start: cannot write" in loss
    gc.collect()
    assert not any(gpu.driver.alive.values())


def test_what_fails_while_it_opens_leaves_nothing(gpu, model):
    with pytest.raises(
        EngineError,
        match=r"tensorrt_rtx 1\.7\.1\.116 refuses the engine \(Serialization assertion .*\): run 'sightline build",
    ):
        backend.TensorRtEngine(b"rubbish", model, "fp32")
    other = build_graph(load_classifier("compact", "random", 96))
    with pytest.raises(EngineError, match="this engine is of another graph"):
        backend.TensorRtEngine(plan_of(other), model, "fp32")
    gc.collect()
    assert not any(gpu.driver.alive.values())


def test_a_failure_of_the_driver_is_one_line_and_the_slot_is_free_again(gpu, model, monkeypatch):
    engine = backend.TensorRtEngine(plan_of(model), model, "fp32", slots=1)
    copy = gpu.memcpy_htod_async

    def fails(*_):
        raise gpu.Error("cuMemcpyHtoDAsync failed: unspecified launch failure\nmore")

    monkeypatch.setattr(gpu, "memcpy_htod_async", fails)
    with pytest.raises(
        EngineError,
        match=r"NVIDIA L4 failed: cuMemcpyHtoDAsync failed: unspecified launch failure$",
    ):
        engine.infer(feeds(0))
    monkeypatch.setattr(gpu, "memcpy_htod_async", copy)
    assert engine.infer(feeds(0))["map"].any()
    assert not gpu.driver.current
    engine.close()
