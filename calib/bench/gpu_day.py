"""Proves and times the GPU path on a bare machine: ``python -m calib.bench.gpu_day --out DIR``.

The machine needs a GPU, NVIDIA's compiler, and PyTorch for CUDA, NumPy, ONNX, OpenCV, rich and
safetensors. It needs neither OpenVINO nor PyAV nor TensorRT; where TensorRT is, it is tried, too.
``--pycuda FILE`` names the source archive of pycuda, which is compiled while the first stages run.

Each stage stands alone. A stage that fails is one line and a traceback in the report
(``gpu_day.json``, and ``gpu_day.md`` for people), and the next stage runs.

``--dry`` runs what needs no GPU, on any machine. It imports all modules, builds and checks the
graphs, and runs PyTorch's engine once on the processor. Its report has the same form. ``--only``
takes some of the stages. ``--sanitize`` runs those under NVIDIA's compute-sanitizer that use the
driver directly. ``--page FILE.md`` makes a page of a report that is there.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.bench.gpu_stand_in import (
    OPENINGS,
    PHOTO,
    Driven,
    build_pycuda,
    call_ms,
    check_sessions,
    feed,
    in_flight,
    lost_mib,
    outputs_of,
    pictures,
    timed,
)
from engines.backends import tensorrt as backend
from engines.backends.cuda import load_pycuda, probe_gpu
from engines.backends.tensorrt_build import Build, build_plan
from engines.boxes import iou
from engines.build import CANDIDATES, IMAGE, AnyHead, build_graph
from engines.choose import choose_head, open_localizer
from engines.engine import Array, Engine
from engines.errors import EngineError, SightlineError
from engines.files import Kind, checked_output, read_json_object, whole_file
from engines.networks.registry import Classifier, load_classifier
from engines.options import EngineOptions
from engines.typed_graph import typed_graph

REPORT_FILE = Kind("report of a GPU day", (".json",), rb'\{\s*"[\w ]+": \{\s*"state": ')
SKIPPED = "skipped: no GPU"
PAGE_FILE = Kind("page of a GPU day", (".md",), rb"# GPU results")
METHODS = ("sensitivity", "gestalt", "heuristic")
MODULES = (
    "engines.backends.torch_reference",
    "engines.backends.tensorrt",
    "calib.bench.torch_peers",
    "calib.bench.gpu",
    "calib.precision.build",
)
ABSENT = ("openvino", "av", "tensorrt", "tensorrt_rtx")
"""Packages that the machine lacks: no stage may import one of them."""
LEAST_CORRELATION = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.9}
"""Of an engine's map with the reference's, by precision."""
PEERS = ("autograd", "captured_autograd", "compiled", "forward", "captured_forward")
TIMED_S = 2.0
LASTING_CALLS = 10_000
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

    def networks(self) -> Iterator[tuple[str, EngineOptions]]:
        """Name and choice of each network. A dry run leaves out the large one."""
        yield "compact", EngineOptions("compact")
        yield "lite0", EngineOptions("lite0")
        if not self.dry:
            yield "vgg16", EngineOptions(model="vgg16", weights=self.vgg)


Found = dict[str, Any]


class NotHereError(Exception):
    """A stage needs what this machine lacks; says what."""


@dataclass(frozen=True)
class Stage:
    """A part of the day.

    Attributes:
        proves: what is known when it ends without an error.
        run: does it, and returns figures.
        dry: does what of it needs no GPU; None where all of it needs none.
    """

    proves: str
    run: Callable[[Day], Found]
    dry: Callable[[Day], Found] | None = None


def imports(_: Day) -> Found:
    """Import what the later stages use."""
    before = set(sys.modules)
    for module in MODULES:
        import_module(module)
    unwanted = [name for name in ABSENT if name in sys.modules.keys() - before]
    if unwanted:
        raise EngineError(f"{', '.join(unwanted)} was imported, and a bare machine lacks it")
    return {"modules": [*MODULES]}


def facts(day: Day) -> Found:
    """Describe the machine, and measure its copy rate and its rate of matrix products."""
    import torch

    gpu = probe_gpu()
    run = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    right = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    copy_ms = _gpu_ms(lambda: target.copy_(source))
    product_ms = _gpu_ms(lambda: left @ right)
    return {
        **versions(day),
        "gpu": str(gpu),
        "driver_cuda": gpu.cuda_version,
        "copy_tb_per_s": 2 * 2**30 / copy_ms / 1e9,
        "fp16_tflop_per_s": 2 * 8192**3 / product_ms / 1e9,
        "nvidia_smi": run.stdout,
    }


def versions(_: Day) -> Found:
    """Of Python and the libraries."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "onnx": onnx.__version__,
    }


def _gpu_ms(work: Callable[[], object], times: int = 20) -> float:
    """The mean time of one call, between two events on the GPU."""
    import torch

    for _ in range(3):
        work()
    begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begun.record()
    for _ in range(times):
        work()
    done.record()
    done.synchronize()
    return float(begun.elapsed_time(done)) / times


def graphs(day: Day) -> Found:
    """Build the graph of each network and method, and check it with ONNX's own checker."""
    found: Found = {}
    for name, choice in day.networks():
        for method, classifier, head in _heads(choice):
            graph = build_graph(classifier, head=head)
            content = graph.SerializeToString()
            if len(content) < 2**31:  # the checker takes no more
                onnx.checker.check_model(content)
            digest = hashlib.sha256(content).hexdigest()
            found[f"{name} {method}"] = {"nodes": len(graph.graph.node), "sha256": digest}
    return found


def _heads(choice: EngineOptions) -> Iterator[tuple[str, Classifier, AnyHead | None]]:
    """Each method with its network, whose input is as its head wants it, and its head."""
    for method in METHODS:
        named = replace(choice, method=method)
        classifier = _classifier(named)
        yield method, classifier, choose_head(named, classifier)


@cache
def _classifier(choice: EngineOptions) -> Classifier:
    """The network of a choice: VGG16 takes seconds to make."""
    return choice.classifier()


def _read_by_torch(choice: EngineOptions) -> Iterator[tuple[str, Classifier, AnyHead | None]]:
    """Those of ``_heads`` that PyTorch's engine reads."""
    from engines.backends.torch_reference import TorchEngine

    for method, network, head in _heads(choice):
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
        agreement = _agreement(true, list(in_flight(engine, feeds)))
        engine.close()
        found[f"{precision} slots {count}"] = agreement
        if not agreement["correlation"] > LEAST_CORRELATION[precision]:
            raise EngineError(f"{classifier.name} in {precision}: {agreement}")
    return found


def _agreement(
    true: Sequence[Mapping[str, Array]], given: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """The worst over all frames; the share of frames with the same class."""
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
            found[f"{name} {precision} batch {batch}"] = timed(engine, feed(images), TIMED_S)
            engine.close()
    return found


def torch_lasts(_: Day) -> Found:
    """Run the usual network with its usual head many times with all slots busy.

    Raises:
        EngineError: a call gives other outputs than the first one of its input, or memory is lost.
    """
    from engines.backends.torch_reference import TorchStreamEngine

    choice = EngineOptions()
    classifier = _classifier(choice)
    engine = TorchStreamEngine(classifier, head=choose_head(choice, classifier), slots=3)
    feeds = [feed([image]) for image in pictures(classifier.size_px, 7)]
    with closing(engine):
        first = [engine.infer(each) for each in feeds]
        free_mib = _free_mib()
        begin = time.perf_counter()
        for index, found in enumerate(in_flight(engine, feeds * (LASTING_CALLS // len(feeds)))):
            true = first[index % len(feeds)]
            if any(not np.array_equal(found[name], true[name]) for name in true):
                raise EngineError(f"call {index} gives other outputs than the same input before")
        seconds = time.perf_counter() - begin
        lost = free_mib - _free_mib()
    if lost > MOST_LOST_MIB:
        raise EngineError(f"{lost:.0f} MiB of GPU memory are lost in {index + 1} calls")
    return {"calls": index + 1, "calls_per_s": (index + 1) / seconds, "MiB lost": lost}


def _free_mib() -> float:
    import torch

    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / 2**20


def torch_is_used(_: Day) -> Found:
    """Localize through the same interface as users, and teach.

    Raises:
        EngineError: an engine does not run on the GPU, or nothing is found in a photo of a cat.
    """
    import cv2

    from calib.teaching import teach

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
    parts = pictures(320, 12)
    begin = time.perf_counter()
    taught = teach(parts, [[("cat", (60.0, 40.0, 260.0, 300.0))]] * 12, engine=choices["usual"])[0]
    with closing(taught):
        seconds = time.perf_counter() - begin
        found["taught"] = {"s": seconds, "device": taught.engine.device}
    return found


def promises(day: Day) -> Found:
    """Compare VGG16's whole localization with its forward pass and with PyTorch's own gradient.

    Raises:
        EngineError: it takes more than ``MOST_OF_FORWARD`` forward passes, is less than
            ``LEAST_OF_EAGER`` times as fast as eager autograd, or gives fewer images a second than
            ``LEAST_IMAGES_PER_S`` at the larger batch.
    """
    from calib.bench.gpu import torch_peer
    from engines.backends.torch_reference import TorchStreamEngine

    choice = EngineOptions("vgg16", weights=day.vgg)
    classifier = _classifier(choice)
    head = choose_head(choice, classifier)
    found: Found = {"input_px": classifier.size_px, "layer": head.spec.layer if head else "-"}
    for batch in BATCHES:
        engine = TorchStreamEngine(classifier, head=head, batch=batch, precision="fp16")
        fed = feed(pictures(classifier.size_px, batch))
        with closing(engine):
            found[f"batch {batch}"] = timed(engine, fed, TIMED_S)
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
    if (
        of_forward > MOST_OF_FORWARD
        or of_eager < LEAST_OF_EAGER
        or images_per_s < LEAST_IMAGES_PER_S
    ):
        raise EngineError(f"a promise is not kept: {found}")
    return found


def peers_timed(day: Day) -> Found:
    """Time what users of PyTorch run on the same GPU."""
    from calib.bench.gpu import torch_peer

    found: Found = {}
    for name, choice in day.networks():
        classifier = _classifier(choice)
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


def pycuda_is_built(day: Day) -> Found:
    """Wait for the compilation, and load pycuda."""
    found = {"at": str(day.building.result())} if day.building is not None else {}
    load_pycuda()
    return found


def pycuda_archive(day: Day) -> Found:
    """Read the source archive, where one is given."""
    if day.pycuda is None:
        return {}
    with tarfile.open(day.pycuda) as tar:
        return {"files": len(tar.getnames())}


def sessions(_: Day) -> Found:
    """Drive pycuda and the driver.

    Raises:
        EngineError: GPU memory is lost.
        AssertionError: an output is wrong, or a CUDA graph was not captured.
    """
    driven = Driven.of(load_classifier("compact"), EngineOptions("compact"))
    found = check_sessions(driven)
    lost = lost_mib(driven)
    if lost > MOST_LOST_MIB:
        raise EngineError(f"{lost:.0f} MiB of GPU memory are lost in {OPENINGS} openings")
    return {**found, f"MiB lost in {OPENINGS} openings": lost}


def stand_in_fits(_: Day) -> Found:
    """The stand-in's outputs have the shapes of the graph's."""
    import torch

    driven = Driven.of(load_classifier("compact"), EngineOptions("compact"))
    image = torch.zeros((1, driven.size_px, driven.size_px, 3), dtype=torch.uint8)
    outputs = outputs_of(image, torch.zeros(1, dtype=torch.int64), driven.library.map_hw)
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    wrong = [name for name, shape in shapes.items() if driven.library.specs[name].shape != shape]
    if wrong:
        raise EngineError(f"the stand-in gives other shapes for {', '.join(wrong)}")
    return {"outputs": shapes}


def tensorrt_runs(day: Day) -> Found:
    """Build, run and time plans of each network with its usual method, where TensorRT is here.

    Raises:
        NotHereError: it is not.
        EngineError: no CUDA graph was captured, or outputs of one input differ.
    """
    try:
        library = backend.load_tensorrt()
    except EngineError as error:
        raise NotHereError(str(error)) from error
    found: Found = {"library": f"{library.__name__} {library.__version__}"}
    for name, choice in day.networks():
        _, classifier, head = next(_heads(choice))
        for precision, batch in product(("fp32", "fp16"), BATCHES):
            graph = build_graph(classifier, head=head, batch=batch)
            engine = _built_plan(graph, library, precision)
            found[f"{name} {precision} batch {batch}"] = _checked_plan(engine, batch, day)
    return found


def _built_plan(graph: onnx.ModelProto, library: Any, precision: str) -> Engine:
    """An engine of a graph for the GPU that is here."""
    typed = typed_graph(graph, precision, library.__name__, probe_gpu().sm)
    plan = build_plan(typed, Build(library))
    engine = backend.TensorRtEngine(plan, graph, precision)
    if not engine.captured:
        engine.close()
        raise EngineError("; ".join(engine.losses))
    return engine


def _checked_plan(engine: Engine, batch: int, day: Day) -> Found:
    """How the plan agrees with the processor, and its times. Closes the engine.

    Raises:
        EngineError: the same input gives other outputs with other calls under way.
    """
    side = engine.inputs[0].shape[1]
    feeds = [feed(pictures(side, batch + 12)[i : i + batch]) for i in range(12)]
    with closing(engine):
        alone = [engine.infer(each) for each in feeds]
        for a, b in zip(alone, in_flight(engine, feeds), strict=True):
            if any(not np.array_equal(a[name], b[name]) for name in a):
                raise EngineError("a call gives other outputs while others are under way")
        return {"device": engine.device, **timed(engine, feeds[0], TIMED_S if not day.dry else 0.0)}


STAGES: dict[str, Stage] = {
    "imports": Stage("All modules load without OpenVINO, PyAV and TensorRT.", imports),
    "facts": Stage("The driver answers; copies and products are as fast as sold.", facts, versions),
    "graphs": Stage("Every graph that a GPU is to run is built and valid.", graphs),
    "torch is right": Stage(
        "PyTorch's engine on the GPU gives the maps, boxes and classes of the processor.",
        torch_is_right,
        torch_on_processor,
    ),
    "torch timed": Stage(
        "How fast PyTorch's engine is, with all slots busy.", torch_timed, lambda _: {}
    ),
    "torch lasts": Stage(
        "Many calls of the usual network give the same each time, and no memory is lost.",
        torch_lasts,
        lambda _: {},
    ),
    "torch is used": Stage(
        "Localizing and teaching run on the GPU as users call them.",
        torch_is_used,
        lambda _: {},
    ),
    "promises": Stage(
        "VGG16's whole localization beside its forward pass and PyTorch's own gradient.",
        promises,
        lambda _: {},
    ),
    "peers timed": Stage("How fast PyTorch's users are on this GPU.", peers_timed, peers_there),
    "pycuda is built": Stage(
        "pycuda compiles and finds the driver.", pycuda_is_built, pycuda_archive
    ),
    "sessions": Stage(
        "Contexts, slots, threads and CUDA graphs are right on the driver, and no memory is lost.",
        sessions,
        stand_in_fits,
    ),
    "TensorRT": Stage(
        "Plans are built, captured and run here, each call apart from the others, and timed.",
        tensorrt_runs,
        lambda _: {},
    ),
}
"""In the order in which they run. pycuda needs the time of those before it."""


def run_day(day: Day, out: Path, stages: Mapping[str, Stage] = STAGES) -> dict[str, Found]:
    """Run all stages, and write the report after each.

    Args:
        day: what is run.
        out: folder for ``gpu_day.json``.
        stages: by name.

    Returns:
        By name of the stage: ``state`` (``ok``, ``skipped`` or ``FAILED`` and why), ``s``
        (seconds), ``proves``, and what the stage found; with ``error`` where it failed.

    Raises:
        OutputError: the report cannot be written, or another file has its name.
    """
    path = out / "gpu_day.json"
    checked_output(path, REPORT_FILE)
    report: dict[str, Found] = {}
    for name, stage in stages.items():
        begin = time.perf_counter()
        dry = stage.dry if day.dry else None
        state = SKIPPED if dry else "ok"
        try:
            found = (dry or stage.run)(day)
        except NotHereError as missing:
            state, found = f"skipped: {missing}"[:150], {}
        except Exception as error:  # the next stage still runs
            first = next(iter(str(error).splitlines()), "")
            state = f"FAILED {type(error).__name__}: {first}"[:150]
            found = {"error": traceback.format_exc()}
        seconds = round(time.perf_counter() - begin, 1)
        report[name] = {"state": state, "s": seconds, "proves": stage.proves, **found}
        print(f"{seconds:>7.1f} s  {name}: {state}. {stage.proves}", flush=True)
        with whole_file(path) as part:
            part.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    print(f"wrote {path}")
    write_page(path, out / "gpu_day.md")
    return report


def write_page(report: Path, page: Path) -> None:
    """Make a page of a report: its stages, and under each its figures.

    Raises:
        ModelError: the report cannot be read.
        OutputError: the page cannot be written, or another file has its name.
    """
    checked_output(page, PAGE_FILE)
    stages = read_json_object(report, "report of a GPU day")
    lines = ["# GPU results", "", "Made by `python -m calib.bench.gpu_day --page`.", ""]
    lines += ["| stage | state | seconds | proves |", "|---|---|---|---|"]
    for name, found in stages.items():
        cells = [name, found["state"], found["s"], found["proves"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    for name, found in stages.items():
        figures = {k: v for k, v in found.items() if k not in ("state", "s", "proves", "error")}
        if figures:
            lines += ["", f"## {name}", "", "| | |", "|---|---|"]
            lines += [f"| {what} | {_cell(value)} |" for what, value in figures.items()]
    with whole_file(page) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {page}")


def _cell(value: Any) -> str:
    """A figure, or several with their names, in one cell."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {_cell(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " / ".join(_cell(each) for each in value)
    words = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(words.replace("|", "\\|").split())


def sanitized(given: Sequence[str]) -> int:
    """Run the stages that use the driver directly under compute-sanitizer; its exit status.

    Raises:
        EngineError: it is not installed.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise EngineError("compute-sanitizer is not there: install NVIDIA's CUDA toolkit")
    stages = [word for name in ("pycuda is built", "sessions") for word in ("--only", name)]
    rest = [word for word in given if word != "--sanitize"]
    command = [program, "--error-exitcode", "1", sys.executable, "-m", "calib.bench.gpu_day"]
    return subprocess.run([*command, *rest, *stages], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0 where nothing failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m calib.bench.gpu_day", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_day_out"), help="folder of the report"
    )
    parser.add_argument("--pycuda", type=Path, help="source archive of pycuda, to compile it")
    parser.add_argument("--dry", action="store_true", help="only what needs no GPU")
    parser.add_argument("--vgg", default="random", help="weights of VGG16")
    parser.add_argument("--only", action="append", choices=[*STAGES], help="this stage; again")
    parser.add_argument("--sanitize", action="store_true", help="under compute-sanitizer")
    parser.add_argument("--page", type=Path, help="page to make of the report in --out")
    given = parser.parse_args(arguments)
    try:
        if given.page is not None:
            write_page(given.out / "gpu_day.json", given.page)
            return 0
        if given.sanitize:
            return sanitized(sys.argv[1:] if arguments is None else arguments)
        if not given.dry:
            probe_gpu()
        with ThreadPoolExecutor(1) as pool:
            compiled = given.pycuda is not None and not given.dry
            building = pool.submit(build_pycuda, given.pycuda) if compiled else None
            stages = {name: STAGES[name] for name in given.only or STAGES}
            day = Day(given.dry, given.vgg, given.pycuda, building)
            report = run_day(day, given.out, stages)
    except SightlineError as error:
        parser.error(f"{error}; --dry runs what needs no GPU" if not given.dry else str(error))
    return int(any(found["state"].startswith("FAILED") for found in report.values()))


if __name__ == "__main__":
    sys.exit(main())
