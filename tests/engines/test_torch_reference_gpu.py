"""The GPU's PyTorch engine on the processor: slots, order, half precision. What only a GPU has is
marked ``gpu``.
"""

import numpy as np
import pytest
import torch

from engines.backends.torch_reference import TorchEngine, TorchStreamEngine, open_torch
from engines.build import IMAGE, WANTED_CLASS
from engines.choose import choose_head
from engines.errors import EngineError
from engines.maps import MapSpec
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from tests.virtual_camera import DemoCamera

SIZE = 64


def feeds(seed, size=SIZE, batch=1):
    image = np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
    return {IMAGE: image, WANTED_CLASS: np.full(batch, seed - 1)}


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_it_gives_what_the_reference_gives_whatever_is_under_way(slots):
    classifier = load_classifier("compact", "random", SIZE)
    engine = TorchStreamEngine(classifier, batch=2, device="cpu", precision="fp32", slots=slots)
    reference = TorchEngine(classifier, batch=2)
    assert (engine.inputs, engine.outputs, engine.metadata) == (
        reference.inputs,
        reference.outputs,
        reference.metadata,
    )
    tickets = []
    for seed in range(slots):
        fed = feeds(seed, batch=2)
        tickets.append(engine.submit(fed))
        fed[IMAGE][:] = 0  # it was taken at once
    for seed, ticket in enumerate(tickets):
        found, expected = engine.collect(ticket), reference.infer(feeds(seed, batch=2))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7)
    engine.close()


def photo(size):
    import cv2

    return {
        IMAGE: cv2.resize(DemoCamera(300).shoot(40)[0], (size, size))[None],
        WANTED_CLASS: np.array([-1]),
    }


@pytest.mark.parametrize("method", ["sensitivity", "gestalt", "heuristic"])
@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.998), ("bf16", 0.96)])
def test_half_precision_keeps_boxes_and_maps(method, precision, least):
    classifier = load_classifier("compact")
    head = choose_head(EngineOptions(method=method), classifier)
    engine = TorchStreamEngine(classifier, head=head, device="cpu", precision=precision)
    found, exact = engine.infer(photo(128)), TorchEngine(classifier, head=head).infer(photo(128))
    assert found["map"].dtype == np.float32
    assert found["class_index"] == exact["class_index"]
    np.testing.assert_allclose(
        found["box_xyxy"], exact["box_xyxy"], atol=0.02 if precision == "fp16" else 0.06
    )
    assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > least
    assert found["map"].mean() == pytest.approx(exact["map"].mean(), rel=0.02)


def test_calls_out_of_turn_and_after_closing_say_so():
    engine = TorchStreamEngine(
        load_classifier("compact", "random", SIZE), device="cpu", precision="fp32", slots=2
    )
    first, second = engine.submit(feeds(0)), engine.submit(feeds(1))
    with pytest.raises(EngineError, match="2 calls are under way"):
        engine.submit(feeds(2))
    with pytest.raises(EngineError, match="collect the older one first"):
        engine.collect(second)
    with pytest.raises(EngineError, match="not collected yet"):
        engine.infer(feeds(2))
    kept = engine.collect(first)["map"].copy()
    engine.collect(second)
    np.testing.assert_array_equal(engine.infer(feeds(0))["map"], kept)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.infer(feeds(0))


def test_float32_is_not_rounded_to_tf32_and_what_was_set_stays(monkeypatch):
    kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    seen, before = [], [kind.fp32_precision for kind in kinds]
    assert before[0] == "tf32", "as PyTorch has it by itself"
    engine = TorchEngine(load_classifier("compact", "random", SIZE))
    convolved = torch.nn.functional.conv2d

    def watched(*arguments):
        seen.append([kind.fp32_precision for kind in kinds])
        return convolved(*arguments)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    engine.infer(feeds(0))
    assert len(seen) > 3
    assert all(each == ["ieee", "ieee"] for each in seen)
    assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")
def test_without_a_gpu_it_is_the_reference():
    classifier = load_classifier("compact", "random", SIZE)
    engine = open_torch(classifier, MapSpec(), None, "auto")
    assert type(engine) is TorchEngine
    assert engine.precision == "fp32"
    with pytest.raises(EngineError, match="the fp32 reference where PyTorch sees no GPU, not fp16"):
        open_torch(classifier, MapSpec(), None, "fp16")
    with pytest.raises(EngineError, match="PyTorch engines run in fp32, bf16, fp16, not int8"):
        open_torch(classifier, MapSpec(), None, "int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU")
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999), ("fp16", 0.998), ("bf16", 0.96)])
def test_a_gpu_gives_what_the_processor_gives(precision, least):
    classifier = load_classifier("compact")
    head = choose_head(EngineOptions(), classifier)
    engine = TorchStreamEngine(classifier, head=head, precision=precision, slots=3)
    exact = TorchEngine(classifier, head=head).infer(photo(128))
    black = {**photo(128), IMAGE: np.zeros((1, 128, 128, 3), np.uint8)}
    tickets = [engine.submit(fed) for fed in (photo(128), black, photo(128))]
    found, other, again = (engine.collect(ticket) for ticket in tickets)
    scale = found["map"].max()  # a GPU adds in an order of its own each time
    np.testing.assert_allclose(found["map"], again["map"], rtol=1e-3, atol=1e-3 * scale)
    assert not np.allclose(found["map"], other["map"], rtol=1e-2, atol=1e-2 * scale)
    assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > least
    np.testing.assert_allclose(found["box_xyxy"], exact["box_xyxy"], atol=0.06)
    engine.close()
