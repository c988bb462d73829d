"""Proves and times PyTorch's engine on a GPU: stages of ``calib.bench.gpu_day``."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from calib.bench.gpu_stand_in import PHOTO, call_ms, feed, in_flight, pictures, timed
from engines.boxes import iou
from engines.build import CANDIDATES, IMAGE, AnyHead
from engines.choose import choose_head, open_localizer
from engines.engine import Array, Engine
from engines.errors import EngineError
from engines.networks.registry import Classifier, load_classifier
from engines.options import EngineOptions

METHODS = ("sensitivity", "gestalt", "heuristic")
LEAST_CORRELATION = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.9}
"""Of an engine's map with the reference's, by precision."""
PEERS = ("autograd", "captured_autograd", "compiled", "forward", "captured_forward")
BATCHES = (1, 8)
MOST_LOST_MIB = 16.0
MOST_OF_FORWARD = 1.8
LEAST_OF_EAGER = 5.0
LEAST_IMAGES_PER_S = 1000.0


@dataclass(frozen=True)
class Day:
    """What is run.

    Attributes:
        dry: without a GPU.
        vgg: weights of VGG16.
        pycuda: source archive of pycuda; None where pycuda is installed.
        building: the compilation of pycuda; None where there is none.
    """

    dry: bool
    vgg: str = "random"
    pycuda: Path | None = None
    building: "Future[Path] | None" = None

    @property
    def timed_s(self) -> float:
        """How long each engine is timed."""
        return 0.0 if self.dry else 2.0

    @property
    def calls(self) -> int:
        """How many calls an engine must stand."""
        return 24 if self.dry else 10_000

    def networks(self) -> Iterator[tuple[str, EngineOptions]]:
        """Name and choice of each network. A dry run leaves out the large one."""
        yield "compact", EngineOptions("compact")
        yield "lite0", EngineOptions("lite0")
        if not self.dry:
            yield "vgg16", EngineOptions(model="vgg16", weights=self.vgg)


Found = dict[str, Any]


class NotHereError(Exception):
    """A stage needs what this machine lacks; says what."""


def method_heads(choice: EngineOptions) -> Iterator[tuple[str, Classifier, AnyHead | None]]:
    """Each method with its network, whose input is as its head wants it, and its head."""
    for method in METHODS:
        named = replace(choice, method=method)
        classifier = classifier_of(named)
        yield method, classifier, choose_head(named, classifier)


@cache
def classifier_of(choice: EngineOptions) -> Classifier:
    """The network of a choice: VGG16 takes seconds to make."""
    return choice.classifier()


def _read_by_torch(choice: EngineOptions) -> Iterator[tuple[str, Classifier, AnyHead | None]]:
    """Those of ``_heads`` that PyTorch's engine reads."""
    from engines.backends.torch_reference import TorchEngine

    for method, network, head in method_heads(choice):
        with suppress(EngineError):  # a head that it does not read
            TorchEngine(network, head=head)
            yield method, network, head


def torch_is_right(day: Day) -> Found:
    """Compare PyTorch's engine with slots and graphs with the reference on the processor.

    Raises:
        EngineError: maps differ by more than ``LEAST_CORRELATION`` allows.
    """
    found: Found = {}
    for name, choice in day.networks():
        for method, network, head in _read_by_torch(choice):
            compared = compare_torch(network, head, "cuda", tuple(LEAST_CORRELATION), (1, 3), 12)
            found |= {f"{name} {method} {what}": each for what, each in compared.items()}
    return found


def torch_on_processor(_: Day) -> Found:
    """The same comparison with the smallest network, two frames and no GPU."""
    classifier = load_classifier("compact")
    return compare_torch(
        classifier, choose_head(EngineOptions("compact"), classifier), "cpu", ("fp32",), (2,), 2
    )


def compare_torch(
    classifier: Classifier,
    head: AnyHead | None,
    device: str,
    precisions: Sequence[str],
    slots: Sequence[int],
    frames: int,
) -> dict[str, dict[str, float]]:
    """By precision and number of slots: how well the engine with slots agrees with the reference.

    Raises:
        EngineError: maps differ by more than ``LEAST_CORRELATION`` allows.
    """
    from engines.backends.torch_reference import TorchEngine, TorchStreamEngine

    reference = TorchEngine(classifier, head=head)
    feeds = [feed([image]) for image in pictures(classifier.size_px, frames)]
    true = [reference.infer(each) for each in feeds]
    found = {}
    for precision, count in product(precisions, slots):
        engine = TorchStreamEngine(
            classifier, head=head, device=device, precision=precision, slots=count
        )
        agreed = agreement(true, list(in_flight(engine, feeds)))
        engine.close()
        found[f"{precision} slots {count}"] = agreed
        if not agreed["correlation"] > LEAST_CORRELATION[precision]:
            raise EngineError(f"{classifier.name} in {precision}: {agreed}")
    return found


def agreement(
    true: Sequence[Mapping[str, Array]], given: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """How well outputs agree: the worst over all frames, and the share with the same class."""
    pairs = list(zip(true, given, strict=True))
    maps = [(a["map"].ravel(), b["map"].ravel()) for a, b in pairs]
    lost = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in maps]
    boxes = [(_first_box(a), _first_box(b)) for a, b in pairs]
    same = [bool(a["class_index"][0] == b["class_index"][0]) for a, b in pairs]
    found = {
        "correlation": float(min(np.corrcoef(a, b)[0, 1] for a, b in maps)),
        "relative_difference": float(max(lost)),
        "box_iou": float(min(iou(a[:4], b[:4]) for a, b in boxes)),
        "same_class": float(np.mean(same)),
    }
    if CANDIDATES in true[0]:
        found["confidence_difference"] = float(max(abs(a[4] - b[4]) for a, b in boxes))
    return found


def _first_box(outputs: Mapping[str, Array]) -> Array:
    """The surest box of the first image, ``[4]``, or ``[5]`` with its confidence."""
    if CANDIDATES not in outputs:
        return np.asarray(outputs["box_xyxy"][0])
    rows = outputs[CANDIDATES][0]
    return np.asarray(rows[rows[:, 4].argmax(), :5])


def torch_timed(day: Day) -> Found:
    """Time PyTorch's engine in trtexec's words, for each precision and batch."""
    from engines.backends.torch_reference import TorchStreamEngine

    found: Found = {}
    for name, choice in day.networks():
        _, classifier, head = next(_read_by_torch(choice))
        for precision, batch in product(LEAST_CORRELATION, (*BATCHES, 32)):
            engine = TorchStreamEngine(classifier, head=head, batch=batch, precision=precision)
            images = pictures(classifier.size_px, batch)
            found[f"{name} {precision} batch {batch}"] = timed(engine, feed(images), day.timed_s)
            engine.close()
    return found


def torch_lasts(day: Day) -> Found:
    """Run the usual network with its usual head many times with all slots busy.

    Raises:
        EngineError: see ``repeated``.
    """
    from engines.backends.torch_reference import TorchStreamEngine

    choice = EngineOptions()
    classifier = classifier_of(choice)
    engine = TorchStreamEngine(classifier, head=choose_head(choice, classifier), slots=3)
    with closing(engine):
        feeds = [feed([image]) for image in pictures(classifier.size_px, 7)]
        return repeated(engine, feeds, day.calls)


def repeated(engine: Engine, feeds: Sequence[Mapping[str, Array]], count: int) -> Found:
    """Run an engine about so many times with all slots busy.

    Raises:
        EngineError: a call gives other outputs than the first one of its input, or memory is lost.
    """
    first = [engine.infer(each) for each in feeds]
    free_mib = _free_mib()
    begin = time.perf_counter()
    calls = list(feeds) * max(1, count // len(feeds))
    for index, found in enumerate(in_flight(engine, calls)):
        true = first[index % len(feeds)]
        if any(not _alike(found[name], true[name]) for name in true):
            raise EngineError(f"call {index} gives other outputs than the same input before")
    seconds = time.perf_counter() - begin
    lost = free_mib - _free_mib()
    if lost > MOST_LOST_MIB:
        raise EngineError(f"{lost:.0f} MiB of GPU memory are lost in {len(calls)} calls")
    return {"calls": len(calls), "calls_per_s": len(calls) / seconds, "MiB lost": lost}


def _alike(a: Array, b: Array) -> bool:
    """A GPU adds in an order of its own each time, so that the last digits differ."""
    return bool(np.allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max()))


def _free_mib() -> float:
    """Of the GPU's memory; 0 where PyTorch sees none."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / 2**20


def torch_is_used(_: Day) -> Found:
    """Localize through the same interface as users.

    Raises:
        EngineError: an engine does not run on the GPU, or nothing is found in a photo of a cat.
    """
    import cv2

    photo = np.asarray(cv2.imread(str(PHOTO), cv2.IMREAD_COLOR), np.uint8)
    found: Found = {}
    choices = {
        "usual": EngineOptions(backend="torch"),
        "compact": EngineOptions("compact", backend="torch"),
    }
    for name, choice in choices.items():
        with closing(open_localizer(choice)) as localizer:
            seen = localizer.localize([photo])[0]
            found[name] = {"device": localizer.engine.device, "box": seen.box_xyxy_px}
            if not localizer.engine.on_gpu:
                raise EngineError(f"{name} runs on {localizer.engine.device}")
    return found


def vgg16_timed(day: Day) -> Found:
    """Compare VGG16's whole localization with its forward pass and with PyTorch's own gradient.

    ``kept`` says of each goal whether this GPU reaches it: at most ``MOST_OF_FORWARD`` forward
    passes, at least ``LEAST_OF_EAGER`` times as fast as eager autograd, and at least
    ``LEAST_IMAGES_PER_S`` at the larger batch.
    """
    from calib.bench.gpu import torch_peer
    from engines.backends.torch_reference import TorchStreamEngine

    choice = EngineOptions("vgg16", weights=day.vgg)
    classifier = classifier_of(choice)
    head = choose_head(choice, classifier)
    found: Found = {"input_px": classifier.size_px, "layer": head.spec.layer if head else "-"}
    for batch in BATCHES:
        engine = TorchStreamEngine(classifier, head=head, batch=batch, precision="fp16")
        fed = feed(pictures(classifier.size_px, batch))
        with closing(engine):
            found[f"batch {batch}"] = timed(engine, fed, day.timed_s)
            if batch == 1:
                found["call_ms"] = call_ms(partial(engine.infer, fed), 300)
    image = feed(pictures(classifier.size_px, 1))[IMAGE]
    for method in ("captured_forward", "autograd", "captured_autograd"):
        call = torch_peer(classifier, image, "fp16", method)
        found[f"{method}_ms"] = call_ms(call, 300)
    of_forward = found["call_ms"][0] / found["captured_forward_ms"][0]
    of_eager = found["autograd_ms"][0] / found["call_ms"][0]
    images_per_s = found[f"batch {BATCHES[-1]}"]["images_per_s"]
    found |= {"of_forward": of_forward, "of_eager": of_eager, "images_per_s": images_per_s}
    found["kept"] = {
        f"at most {MOST_OF_FORWARD} forward passes": of_forward <= MOST_OF_FORWARD,
        f"{LEAST_OF_EAGER} times as fast as autograd": of_eager >= LEAST_OF_EAGER,
        f"{LEAST_IMAGES_PER_S} images a second": images_per_s >= LEAST_IMAGES_PER_S,
    }
    return found


def peers_timed(day: Day) -> Found:
    """Time what users of PyTorch run on the same GPU."""
    from calib.bench.gpu import torch_peer

    found: Found = {}
    for name, choice in day.networks():
        classifier = classifier_of(choice)
        image = feed(pictures(classifier.size_px, 1))[IMAGE]
        for precision, method in product(("fp32", "fp16"), PEERS):
            what = f"{name} {precision} {method}"
            try:
                call = torch_peer(classifier, image, precision, method)
                found[what] = call_ms(call, 100)
            except Exception as error:  # the other peers are still timed
                found[what] = f"{type(error).__name__}: {error}"[:200]
    return found


def peers_there(_: Day) -> Found:
    """All peers have a method of their own."""
    from calib.bench.torch_peers import TorchPeers

    missing = [name for name in PEERS if not hasattr(TorchPeers, name)]
    if missing:
        raise EngineError(f"there is no peer {', '.join(missing)}")
    return {"peers": [*PEERS]}
