"""The ``build`` command: writes the graph as a file, or builds an engine and compares it with the
reference.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import onnx
from rich.console import Console

from engines import certificate as cache
from engines.backends.cuda import check_driver, probe_gpu
from engines.backends.openvino import OpenVinoEngine
from engines.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    certificate_path,
    certify,
    key_of,
    openvino_key,
    openvino_subject,
    subject_of,
)
from engines.choose import build_chosen
from engines.engine import Engine
from engines.errors import EngineError, InputError, OutputError, SourceError
from engines.files import checked_output, whole_file
from engines.graph import GRAPH_FILE
from engines.localizer import ImageBgr, Localizer
from engines.options import ADVANCED, LOOK_AT, MOST_IMAGES, OUTPUT, SPEED, EngineOptions, Option
from engines.typed_graph import checked_precision, typed_graph

FRAMES = 16
READ_AT_MOST = 600
DEMO = "demo:300"


def parsed_frame_size(text: str) -> tuple[int, int]:
    """Width and height, or the ratio of them, such as ``1280x720`` or ``16:9``.

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})[x:]([1-9]\d{0,4})", str(text).strip().lower())
    if found is None:
        raise InputError(f"{text!r} is no size of frames: write WIDTHxHEIGHT, such as 1280x720")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class BuildOptions:
    """The options of ``build`` besides the network's.

    ``out`` may be None for TensorRT, whose engines are kept in the cache. ``precision`` is that of
    the engine's options.
    """

    out: Annotated[
        Path | None, Option("ONNX file to write: image in; box, class, score and map out.", OUTPUT)
    ] = None
    backend: Annotated[
        str,
        Option("auto: the ONNX file alone; openvino or tensorrt: certified for it.", SPEED),
    ] = "auto"
    precision: str = "auto"
    target: Annotated[
        str | None,
        Option("A GPU that is not here: sm75, sm80, sm86, sm89, sm120.", ADVANCED, ("for",)),
    ] = None
    rebuild: Annotated[bool, Option("Build even where the engine is in the cache.", ADVANCED)] = (
        False
    )
    on: Annotated[
        str | None,
        Option("Clip or folder whose frames certify the engine; else the demo's.", LOOK_AT),
    ] = None
    batch: Annotated[int, Option("Images per call.", SPEED, min=1, max=MOST_IMAGES)] = 1
    frame_size: Annotated[
        tuple[int, int] | None,
        Option(
            "With a dense head: for frames of this size, such as 1280x720 (or 16:9), in place of"
            " a square input.",
            SPEED,
            parser=parsed_frame_size,
            metavar="WxH",
        ),
    ] = None


def run_build(options: BuildOptions, engine: EngineOptions, console: Console) -> None:
    """Build what the options of the command say, with the graph in fp32 as the reference.

    Raises:
        SightlineError: the options contradict each other, or see ``build_chosen_engine``.
    """
    wanted = replace(options, precision=engine.precision)
    check_options(wanted, engine.inputs)

    def say(note: str) -> None:
        console.print(note, style="dim", soft_wrap=True, markup=False)

    size = options.batch, options.frame_size
    reference = build_chosen(replace(engine, precision="fp32"), *size, say)
    graph = build_chosen(engine, *size) if engine.precision == "int8" else reference
    build_chosen_engine(graph, wanted, console, reference)


def build_chosen_engine(
    model: onnx.ModelProto,
    choice: BuildOptions,
    console: Console,
    reference: onnx.ModelProto | None = None,
) -> Certificate | None:
    """Build what was chosen of a graph, and say what was written.

    Args:
        model: the graph; for int8 with its scales.
        choice: what to make of it.
        console: for lines and progress.
        reference: the graph to hold it against, in fp32 on the processor; the same one when None.
            For int8, the one without scales.

    Returns:
        The certificate; None where nothing was certified: an ONNX file for any runtime, or an
        engine for an absent GPU.

    Raises:
        EngineError: it cannot be built, or it failed its certificate.
        OutputError: there is no place to write, or it cannot be written.
    """
    check_options(choice)
    reference = reference or model
    if choice.backend == "tensorrt":
        return _build_tensorrt(model, reference, choice, console)
    assert choice.out is not None  # check_options
    with whole_file(choice.out) as part:
        part.write_bytes(model.SerializeToString())
    console.print(
        f"wrote {choice.out}: {len(model.graph.node)} nodes,"
        f" {choice.out.stat().st_size / 1e6:.1f} MB"
    )
    return (
        _certify_openvino(model, reference, choice, console)
        if choice.backend == "openvino"
        else None
    )


def check_options(choice: BuildOptions, inputs: Iterable[str] = ()) -> None:
    """Refuse options that contradict each other, and names that cannot be written to, before
    anything is built.

    Args:
        choice: the options.
        inputs: files that the network is read from.

    Raises:
        EngineError, OutputError: one line that says which.
    """
    if choice.backend not in ("auto", "openvino", "tensorrt"):
        raise EngineError(
            f"'build' makes engines of openvino or tensorrt, not of '{choice.backend}'",
            option="backend",
        )
    if choice.backend != "tensorrt":
        if choice.out is None:
            raise OutputError("say where the ONNX file goes: FILE.onnx", option="out")
        if choice.target or choice.rebuild:
            raise EngineError(
                "another GPU and rebuilding are about TensorRT engines: use backend tensorrt",
                option=("target", "rebuild", "backend"),
            )
        if choice.backend == "auto" and (choice.precision != "auto" or choice.on):
            raise EngineError(
                "a precision and the frames to certify on are about an engine: use backend openvino"
                " or tensorrt",
                option=("precision", "on", "backend"),
            )
    else:
        checked_precision(choice.precision)
    read = (*inputs, choice.on)
    if choice.out is not None:
        checked_output(
            choice.out, GRAPH_FILE if choice.backend != "tensorrt" else cache.ENGINE_FILE, read
        )
        if choice.backend == "tensorrt" and choice.out.exists() and not choice.rebuild:
            raise OutputError(
                f"engine {choice.out} is there: rebuild it to replace it, or choose another name",
                option=("rebuild", "out"),
            )
        if choice.backend == "openvino":
            checked_output(certificate_path(choice.out), CERTIFICATE_FILE, read)


def _certify_openvino(
    model: onnx.ModelProto, reference: onnx.ModelProto, choice: BuildOptions, console: Console
) -> Certificate:
    assert choice.out is not None
    engine = OpenVinoEngine(model, choice.precision)
    key = openvino_key(model, engine)
    certificate = _certified(reference, engine, choice, console).of(openvino_subject(key))
    for place in (
        choice.out,
        key.path,
    ):  # beside the file for people, in the cache for what runs the same graph
        certificate.save(certificate_path(place))
    return _reported(certificate, certificate_path(choice.out), console)


def _build_tensorrt(
    model: onnx.ModelProto, reference: onnx.ModelProto, choice: BuildOptions, console: Console
) -> Certificate | None:
    from engines.backends.tensorrt import load_tensorrt
    from engines.backends.tensorrt_build import Build, build_plan

    precision = checked_precision(choice.precision)
    gpu = None if choice.target else probe_gpu()
    library = load_tensorrt(ahead=gpu is None)
    if gpu is not None:
        check_driver(gpu, library.__name__)
    sm = gpu.sm if gpu else str(choice.target)
    typed = typed_graph(model, precision, library.__name__, sm)
    key = key_of(model, typed, library, str(gpu or sm), precision)
    timings = (
        cache.engines_dir() / f"{library.__name__}-{library.__version__}-{sm}.timings"
        if gpu
        else None
    )
    options = Build(library, choice.target, timings, console)

    def notify(line: str) -> None:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)

    plan = cache.load_or_build(key, lambda: build_plan(typed, options), notify, choice.rebuild)
    words = (
        f"{len(plan) / 1e6:.1f} MB, {library.__name__} {library.__version__}, {precision},"
        f" {key.target}"
    )
    console.print(f"{key.path}: {words}", highlight=False, soft_wrap=True)
    if choice.out is not None:
        with whole_file(choice.out) as part:
            shutil.copyfile(key.path, part)
        console.print(f"wrote {choice.out}")
    if gpu is None:
        notify(
            f"not certified, there is no {key.target} here: where there is, put the file into"
            f" {cache.engines_dir()} under the same name, and run this command without --for"
        )
        return None
    certificate = _certify_plan(model, reference, key, plan, choice, console)
    return _reported(certificate, certificate_path(key.path), console)


def _certify_plan(
    model: onnx.ModelProto,
    reference: onnx.ModelProto,
    key: cache.EngineKey,
    plan: bytes,
    choice: BuildOptions,
    console: Console,
) -> Certificate:
    from engines.backends.tensorrt import TensorRtEngine

    engine = TensorRtEngine(plan, model, key.precision, kernels=cache.kernels_path(key.path))
    for loss in engine.losses:
        console.print(loss, style="yellow", highlight=False, soft_wrap=True)
    try:
        certificate = _certified(reference, engine, choice, console).of(subject_of(key, plan))
    finally:
        engine.close()
    certificate.save(certificate_path(key.path))
    return certificate


def _certified(
    reference: onnx.ModelProto, engine: Engine, choice: BuildOptions, console: Console
) -> Certificate:
    """Compare the engine with the reference in fp32 on the processor."""
    with console.status("certifying ..."):
        trusted = Localizer(OpenVinoEngine(reference, "fp32"))
        return certify(trusted, Localizer(engine), frames_of(choice.on or DEMO))


def _reported(certificate: Certificate, path: Path, console: Console) -> Certificate:
    console.print(str(certificate), highlight=False, soft_wrap=True)
    console.print(f"wrote {path}")
    if not certificate.passed:
        raise EngineError(
            f"the engine failed its certificate ({'; '.join(certificate.failures)}): it will not be"
            " used"
        )
    return certificate


def frames_of(source: str, count: int = FRAMES) -> list[ImageBgr]:
    """Read about ``count`` to twice as many frames of a source.

    They are evenly spread over its first ``READ_AT_MOST`` frames.

    Raises:
        SourceError: it cannot be read, or holds no frame.
    """
    from realtime.sources.spec import open_source  # only where it is used: it needs PyAV

    kept: list[ImageBgr] = []
    step = 1
    with open_source(source) as frames:
        for index, frame in enumerate(frames):
            if index >= READ_AT_MOST:
                break
            if index % step == 0:
                kept.append(frame.image_bgr)
            if len(kept) > 2 * count:  # how long the source is shows only at its end
                kept, step = kept[::2], step * 2
    if not kept:
        raise SourceError(f"{source} holds no frame to certify an engine on")
    return kept
