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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.bench.gpu_stand_in import (
    OPENINGS,
    Driven,
    build_pycuda,
    check_sessions,
    feed,
    in_flight,
    lost_mib,
    outputs_of,
    pictures,
    timed,
)
from calib.bench.gpu_torch import (
    BATCHES,
    LEAST_CORRELATION,
    MOST_LOST_MIB,
    Day,
    Found,
    NotHereError,
    agreement,
    method_heads,
    peers_there,
    peers_timed,
    repeated,
    torch_is_right,
    torch_is_used,
    torch_lasts,
    torch_on_processor,
    torch_timed,
    vgg16_timed,
)
from engines.backends import tensorrt as backend
from engines.backends.cuda import load_pycuda, probe_gpu
from engines.backends.tensorrt_build import Build, build_plan
from engines.build import build_graph
from engines.choose import build_chosen
from engines.engine import Engine
from engines.errors import EngineError, SightlineError
from engines.files import Kind, checked_output, read_json_object, whole_file
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from engines.typed_graph import typed_graph

REPORT_FILE = Kind("report of a GPU day", (".json",), rb'\{\s*"[\w ]+": \{\s*"state": ')
SKIPPED = "skipped: no GPU"
PAGE_FILE = Kind("page of a GPU day", (".md",), rb"# GPU results")
MODULES = (
    "engines.backends.torch_reference",
    "engines.backends.tensorrt",
    "calib.bench.torch_peers",
    "calib.bench.gpu",
    "calib.precision.build",
)
ABSENT = ("openvino", "av", "tensorrt", "tensorrt_rtx")
"""Packages that the machine lacks: no stage may import one of them."""


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
        for method, classifier, head in method_heads(choice):
            graph = build_graph(classifier, head=head)
            content = graph.SerializeToString()
            if len(content) < 2**31:  # the checker takes no more
                onnx.checker.check_model(content)
            digest = hashlib.sha256(content).hexdigest()
            found[f"{name} {method}"] = {"nodes": len(graph.graph.node), "sha256": digest}
    return found


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
        AssertionError: an output is wrong, or a CUDA graph was not captured.
    """
    driven = Driven.of(load_classifier("compact"), EngineOptions("compact"))
    return check_sessions(driven)


def memory(_: Day) -> Found:
    """Open and close engines again and again.

    Raises:
        EngineError: GPU memory is lost.
    """
    lost = lost_mib(Driven.of(load_classifier("compact"), EngineOptions("compact")))
    if lost > MOST_LOST_MIB:
        raise EngineError(f"{lost:.0f} MiB of GPU memory are lost in {OPENINGS} openings")
    return {f"MiB lost in {OPENINGS} openings": lost}


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
    """Build, check, run and time plans of each network with its usual method.

    Raises:
        NotHereError: TensorRT is not here.
        EngineError: no CUDA graph was captured; maps differ from the processor's by more than
            ``LEAST_CORRELATION`` allows; or see ``repeated``.
    """
    from engines.backends.torch_reference import TorchEngine

    try:
        library = backend.load_tensorrt()
    except EngineError as error:
        raise NotHereError(str(error)) from error
    found: Found = {"library": f"{library.__name__} {library.__version__}"}
    for name, choice in day.networks():
        _, classifier, head = next(method_heads(choice))
        feeds = [feed([image]) for image in pictures(classifier.size_px, 12)]
        reference = TorchEngine(classifier, head=head)
        true = [reference.infer(each) for each in feeds]
        for precision, batch in product(("fp32", "fp16", "int8"), BATCHES):
            what = f"{name} {precision} batch {batch}"
            try:
                graph = build_chosen(replace(choice, precision=precision), batch)
            except SightlineError as error:  # no calibration for int8
                found[what] = str(error)
                continue
            with closing(_built_plan(graph, library, precision)) as engine:
                fed = feed(pictures(classifier.size_px, batch))
                found[what] = {"device": engine.device, **timed(engine, fed, day.timed_s)}
                if batch == 1:
                    agreed = agreement(true, list(in_flight(engine, feeds)))
                    found[what] |= {**agreed, **repeated(engine, feeds, day.calls)}
                    if agreed["correlation"] < LEAST_CORRELATION.get(precision, 0.0):
                        raise EngineError(f"{what}: {agreed}")
    return found


def _built_plan(graph: onnx.ModelProto, library: Any, precision: str) -> Engine:
    """An engine of a graph for the GPU that is here.

    Raises:
        EngineError: no CUDA graph was captured.
    """
    typed = typed_graph(graph, precision, library.__name__, probe_gpu().sm)
    plan = build_plan(typed, Build(library))
    engine = backend.TensorRtEngine(plan, graph, precision)
    if not engine.captured:
        engine.close()
        raise EngineError("; ".join(engine.losses))
    return engine


STAGES: dict[str, Stage] = {
    "imports": Stage("All modules load without OpenVINO, PyAV and TensorRT.", imports),
    "facts": Stage("The driver answers; copies and products are as fast as sold.", facts, versions),
    "graphs": Stage("Every graph that a GPU is to run is built and valid.", graphs),
    "torch is right": Stage(
        "PyTorch's engine on the GPU gives the maps, boxes and classes of the processor.",
        torch_is_right,
        torch_on_processor,
    ),
    "pycuda is built": Stage(
        "pycuda compiles and finds the driver.", pycuda_is_built, pycuda_archive
    ),
    "sessions": Stage(
        "Contexts, slots, threads and CUDA graphs are right on the driver.",
        sessions,
        stand_in_fits,
    ),
    "memory": Stage(
        "No GPU memory is lost, in whatever thread and order engines are closed.",
        memory,
        lambda _: {},
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
        "Localizing runs on the GPU as users call it.",
        torch_is_used,
        lambda _: {},
    ),
    "VGG16 timed": Stage(
        "VGG16's whole localization beside its forward pass and PyTorch's own gradient.",
        vgg16_timed,
        lambda _: {},
    ),
    "peers timed": Stage("How fast PyTorch's users are on this GPU.", peers_timed, peers_there),
    "TensorRT": Stage(
        "Plans are built and captured here, agree with the processor, last, and are timed.",
        tensorrt_runs,
        lambda _: {},
    ),
}
"""In the order in which they run. pycuda is compiled meanwhile, and done before times are taken."""


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
