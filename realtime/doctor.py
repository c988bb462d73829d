"""The ``doctor`` command: what this machine has, and each problem with its fix. A failed check does
not end the others.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.errors import REBUILD, install_extra, install_packages, restore, sightline_command
from engines.text import displayable

WATCH_ON_PAGE = sightline_command("stream", web="8000")
PACKAGES = {
    "numpy": "numpy",
    "cv2": "opencv-python",
    "onnx": "onnx",
    "openvino": "openvino",
    "av": "av",
    "typer": "typer",
    "rich": "rich",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "pyarrow": "pyarrow",
    "packaging": "packaging",
}
"""Modules without which nothing runs, and the packages that bring them."""
PHOTO = Path(__file__).parent / "assets" / "chelsea.jpg"
DECODERS = ("h264", "hevc", "vp9", "av1", "mjpeg", "mpeg4")
ENCODERS = ("libx264", "libx265", "libsvtav1", "h264_nvenc", "h264_qsv", "h264_vaapi")
CPU_FLAGS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_tile",),
}
ROOM_BYTES = 1 << 30
PLATFORMS = {
    ("Linux", "x86_64"): ("tested", "every test runs here"),
    ("Linux", "aarch64"): (
        "untested",
        "wheels of every package exist, for glibc 2.35 or newer; Jetson too is untested",
    ),
    ("Windows", "amd64"): ("untested", "wheels of every package exist"),
    ("Windows", "arm64"): ("not supported", "OpenVINO, OpenCV and PyArrow have no wheels for it"),
    ("Darwin", "arm64"): ("untested", "wheels of every package exist, those for NVIDIA GPUs apart"),
    ("Darwin", "x86_64"): ("not supported", "OpenVINO has no wheel for it any more"),
}
"""Where Sightline runs, by ``platform.system()`` and ``platform.machine()`` in small letters: what
is known of the pinned versions (November 2026)."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: ``ok``; ``absent``: not here, and not needed; ``problem``: not as it should be.
        found: in words.
        fix: what to do, for all that is not ok and can be mended.
        needed: running on the processor needs it.
    """

    name: str
    state: str
    found: str
    fix: str = ""
    needed: bool = False


Findings = Iterator[Finding]


def python() -> Findings:
    """Python: its version and the packages that everything needs."""
    old = sys.version_info < (3, 11)
    state, fix = ("problem", "install Python 3.11 or newer") if old else ("ok", "")
    yield Finding(
        "Python",
        state,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        fix,
        True,
    )
    where = (platform.system(), platform.machine().lower())
    support, known = PLATFORMS.get(where, ("untested", "nothing is known of it"))
    yield Finding(
        "platform",
        "ok" if support == "tested" else "absent",
        f"{' '.join(where)}: {support}; {known}",
    )
    versions = []
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(package)  # of another build, such as opencv-python-headless
        except Exception as error:  # broken libraries raise all kinds of things
            yield Finding(
                package,
                "problem",
                f"cannot be imported: {error}".splitlines()[0],
                _package_fix(module, error),
                True,
            )
    yield Finding("packages", "ok", ", ".join(versions))


def _package_fix(module: str, error: Exception) -> str:
    if module == "cv2" and "lib" in str(error):
        return (
            f"apt-get install libgl1 libglib2.0-0, or {install_packages('opencv-python-headless')}"
        )
    return install_packages(PACKAGES[module], options="--force-reinstall")


def processor() -> Findings:
    """Processor: its instruction sets, and the cap on them."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        flags = {
            flag
            for line in lines
            if line.startswith(("flags", "Features"))
            for flag in line.split()
        }
        has = [name for name, any_of in CPU_FLAGS.items() if flags & set(any_of)]
        lacks = [name for name in CPU_FLAGS if name not in has]
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
        found = (
            f"{name}, {os.cpu_count()} threads;"
            f" {', '.join(has) or 'none of the fast instruction sets'}"
        )
        yield Finding("processor", "ok", found + (f"; without {', '.join(lacks)}" if lacks else ""))
    else:
        yield Finding(
            "processor",
            "ok",
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads",
        )
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if os.environ.get(variable):
            found = f"{variable}={os.environ[variable]} caps the instruction sets, and so the speed"
            yield Finding(
                "instruction cap", "problem", found, f"unset {variable}, unless you meant to"
            )


def openvino() -> Findings:
    """OpenVINO: version, devices, what it computes in."""
    import openvino as ov

    from engines.backends.openvino import best_precision, shared_core

    core = shared_core()
    if "CPU" not in core.available_devices:
        yield Finding(
            "OpenVINO",
            "problem",
            "has no CPU device",
            install_packages("openvino", options="--force-reinstall"),
            True,
        )
        return
    abilities = set(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    if best_precision() != "bf16":
        abilities.discard("BF16")  # OpenVINO does not know of the cap
    kinds = [kind for kind in ("FP32", "BF16", "FP16", "INT8") if kind in abilities]
    found = (
        f"{ov.__version__.split('-')[0]}, devices {', '.join(core.available_devices)}; CPU computes"
        f" {', '.join(kinds)}"
    )
    yield Finding("OpenVINO", "ok", found)


def network() -> Findings:
    """Shipped network: weights, heads and calibrations can be read, and it finds the cat."""
    import cv2
    import numpy as np

    from engines.choose import open_localizer
    from engines.head import load_head, shipped_head_names, shipped_head_path
    from engines.networks.weights import ASSETS
    from engines.options import EngineOptions

    names = shipped_head_names()
    for name in names:
        try:
            load_head(shipped_head_path(name))
        except Exception as error:  # damaged files raise all kinds of things
            words = f"{name}: {error}".splitlines()[0]
            yield Finding("head", "problem", words, restore(shipped_head_path(name)))
    yield Finding(
        "heads", "ok" if names else "problem", f"{len(names)} shipped: {', '.join(names)}"
    )
    scales = [path.name.removesuffix(".int8.json") for path in sorted(ASSETS.glob("*.int8.json"))]
    yield Finding(
        "calibrations", "ok" if scales else "absent", f"{len(scales)} shipped: {', '.join(scales)}"
    )
    try:
        localizer = open_localizer(EngineOptions(backend="openvino"))
        photo = np.asarray(cv2.imread(str(PHOTO), cv2.IMREAD_COLOR_BGR), np.uint8)
        localizer.localize([photo])
        start = time.perf_counter()
        (found,) = localizer.localize([photo])
        took_ms = (time.perf_counter() - start) * 1e3
    except Exception as error:  # the one thing that must work: say what it is, whatever it is
        words = f"does not run: {error}".splitlines()[0]
        fix = f"{restore(ASSETS)}; or {install_packages('openvino', options='--force-reinstall')}"
        yield Finding("shipped network", "problem", words, fix, True)
        return
    engine = localizer.engine
    losses = "".join(f"; {loss}" for loss in getattr(engine, "losses", ()))
    how = f"{localizer.size_px} px, {engine.precision}, {took_ms:.1f} ms"
    yield Finding(
        "shipped network",
        "ok",
        f"runs at {how}: sees '{found.class_name}' in a photo{losses}",
        "",
        True,
    )


def video() -> Findings:
    """Video: what PyAV decodes and encodes; one picture is put through H.264."""
    import av

    def known(names: tuple[str, ...], mode: Any) -> list[str]:
        found = []
        for name in names:
            try:
                av.Codec(name, mode)
                found.append(name)
            except (av.error.FFmpegError, ValueError):
                continue
        return found

    decoders, encoders = known(DECODERS, "r"), known(ENCODERS, "w")
    libraries = ".".join(str(part) for part in av.library_versions["libavcodec"])
    fix = (
        f"{install_packages('av', options='--force-reinstall')} (its own wheel, not one built"
        " against the system's FFmpeg)"
    )
    good = "h264" in decoders
    found = f"{', '.join(decoders)} (libavcodec {libraries})"
    yield Finding("decoders", "ok" if good else "problem", found, "" if good else fix, True)
    good = "libx264" in encoders and _encodes()
    found = ", ".join(encoders) or "none that is used"
    yield Finding(
        "encoders",
        "ok" if good else "problem",
        found,
        "" if good else f"{fix}; until then: --no-video",
        False,
    )


def _encodes() -> bool:
    """Whether a frame comes back from H.264 in an MP4."""
    import av
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "one.mp4")
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="bgr24")
                )
            )
            container.mux(stream.encode(None))
        with av.open(path) as container:
            return sum(1 for _ in container.decode(video=0)) == 1


def display() -> Findings:
    """Display: whether a window can be opened."""
    import cv2

    from realtime.sinks import has_display

    lines = [line.strip() for line in cv2.getBuildInformation().splitlines()]
    toolkit = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("GUI:")), "NONE"
    )
    if toolkit in ("", "NONE"):
        fix = (
            f"{install_packages('opencv-python')} (in place of opencv-python-headless); or watch on"
            f" the page: {WATCH_ON_PAGE}"
        )
        yield Finding("display", "absent", "this OpenCV opens no windows", fix)
    elif not has_display():
        yield Finding(
            "display",
            "absent",
            "no display here, so no window",
            f"watch on the page: {WATCH_ON_PAGE}",
        )
    else:
        yield Finding("display", "ok", f"windows by {toolkit}")


def cameras() -> Findings:
    """Cameras: each opened for a moment, its real rate counted."""
    from realtime.sources.video import find_cameras

    found = find_cameras()
    if not found:
        yield Finding(
            "cameras", "absent", "none here", "plug one in; in a container: --device /dev/video0"
        )
    for camera in found:
        name = f"camera {camera.index}"
        if camera.problem:
            fix = (
                "close what uses it; on Linux your user must be in group 'video' (metadata devices"
                " cannot be opened: ignore)"
            )
            yield Finding(name, "problem", camera.problem, fix)
            continue
        slow = camera.nominal_fps and camera.fps < 0.8 * camera.nominal_fps
        found_words = (
            f"{camera.width_px} x {camera.height_px}, {camera.fps:g} frames/s measured,"
            f" {camera.nominal_fps:g} said"
        )
        fix = "more light (long exposures halve the rate), or another USB port" if slow else ""
        yield Finding(name, "problem" if slow else "ok", f"{found_words} ({camera.backend})", fix)


def nvidia() -> Findings:
    """NVIDIA GPU: driver, TensorRT, pycuda, PyTorch."""
    from engines.backends.cuda import check_driver, probe_gpu
    from engines.errors import EngineError

    gpu = None
    try:
        gpu = probe_gpu()
        version = f"CUDA {gpu.cuda_version // 1000}.{gpu.cuda_version % 1000 // 10}"
        yield Finding("CUDA driver", "ok", f"{gpu}, {version}")
    except EngineError as error:
        broken = "error" in str(error)
        fix = (
            "reinstall the NVIDIA driver, then: nvidia-smi"
            if broken
            else "none is needed: Sightline runs on the processor"
        )
        yield Finding("CUDA driver", "problem" if broken else "absent", str(error), fix)
    libraries = {
        "TensorRT": ("tensorrt", "tensorrt_rtx"),
        "pycuda": ("pycuda", "cuda.bindings"),
        "PyTorch": ("torch",),
    }
    fixes = {
        "PyTorch": f"{install_extra('torch')}, for --backend torch",
        "pycuda": f"{install_packages('pycuda')}, which needs nvcc; or"
        f" {install_extra('bindings')}, which needs no compiler",
    }
    for name, modules in libraries.items():
        found = [module for module in modules if _is_there(module)]
        fix = fixes.get(
            name,
            f"{install_extra('rtx')} (GeForce, RTX), or {install_extra('tensorrt')} (data centre)",
        )
        missing = "problem" if gpu is not None and name != "PyTorch" else "absent"
        no_use = "" if gpu is not None or name == "PyTorch" else "of use with an NVIDIA GPU only"
        yield Finding(
            name,
            "ok" if found else missing,
            ", ".join(f"{module} {_version(module)}" for module in found) or "not installed",
            "" if found else no_use or fix,
        )
        if gpu is not None and found and name == "TensorRT":
            try:
                check_driver(gpu, found[0])
            except EngineError as error:
                yield Finding("driver for TensorRT", "problem", str(error), "then: nvidia-smi")
    yield from _built_engines()


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _built_engines() -> Findings:
    """The TensorRT engines of the cache, and what their certificates say: CUDA graphs or not."""
    try:
        from engines.certificate import SUFFIX, certificate_path, engines_dir, load_certificate
        from engines.errors import EngineError
    except ImportError:  # of a package that another check tells of
        return
    for path in sorted(engines_dir().glob(f"*{SUFFIX}")):
        proof = certificate_path(path)
        try:
            found = load_certificate(proof) if proof.exists() else None
        except EngineError as error:
            yield Finding(path.stem, "problem", str(error), REBUILD)
            continue
        if found is None:
            yield Finding(path.stem, "problem", "not certified", REBUILD)
        else:
            state = "ok" if found.passed else "problem"
            words = f"certified: {found.candidate}" if found.passed else "failed its certificate"
            yield Finding(path.stem, state, words, "" if found.passed else REBUILD)


def page() -> Findings:
    """Page: what stream --web needs."""
    missing = [name for name in ("fastapi", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        yield Finding(
            "page",
            "absent",
            f"{' and '.join(missing)} not installed",
            f"{install_extra('web')}, for stream --web",
        )
    else:
        yield Finding("page", "ok", f"fastapi {_version('fastapi')}, uvicorn {_version('uvicorn')}")


def cache() -> Findings:
    """Cache: its place, size and free room."""
    from engines.downloads import cache_dir

    place = cache_dir()
    fix = "point SIGHTLINE_CACHE at a folder that you may write"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("cache", "problem", f"{place} cannot be written: {error.strerror}", fix)
        return
    files = [path for path in place.rglob("*") if path.is_file()]
    used, free = sum(path.stat().st_size for path in files), shutil.disk_usage(place).free
    found = f"{place}: {len(files)} files, {used / 1e6:.1f} MB; {free / 1e9:.1f} GB free"
    roomy = free >= ROOM_BYTES
    yield Finding(
        "cache",
        "ok" if roomy else "problem",
        found,
        "" if roomy else "free some room: engines and weights are kept here",
    )


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


CHECKS: tuple[Callable[[], Findings], ...] = (
    python,
    processor,
    openvino,
    network,
    video,
    display,
    cameras,
    nvidia,
    page,
    cache,
)


def examine(checks: Sequence[Callable[[], Findings]] = CHECKS) -> list[Finding]:
    """Every check's findings; a check that fails is itself a finding."""
    findings: list[Finding] = []
    for check in checks:
        name = (check.__doc__ or check.__name__).split(":")[0].rstrip(".")
        try:
            findings += check()
        except Exception as error:  # whatever is broken here must not hide what else is
            reason = str(error).strip() or "no reason given"
            found = f"cannot be told: {type(error).__name__}: {reason}".splitlines()[0]
            findings.append(
                Finding(name, "problem", found, "mend what is named before; else report this line")
            )
    return findings


def is_fit(findings: list[Finding]) -> bool:
    """Whether everything that running on the processor needs is there."""
    return not any(finding.needed and finding.state == "problem" for finding in findings)


def as_json(findings: list[Finding]) -> str:
    """``ok`` and ``findings`` (``name, state, found, fix, needed``)."""
    return json.dumps(
        {"ok": is_fit(findings), "findings": [asdict(finding) for finding in findings]}
    )


def print_findings(findings: list[Finding], to: Any) -> None:
    """As lines with their fixes, on a rich console."""
    marks = {"ok": "[green]ok     [/]", "absent": "[dim]absent [/]", "problem": "[red]problem[/]"}
    from rich.markup import escape

    for finding in findings:
        to.print(
            f"{marks[finding.state]}  [bold]{escape(finding.name)}[/]: {escape(finding.found)}",
            highlight=False,
            soft_wrap=True,
        )
        if finding.fix:
            to.print(
                f"         → {escape(finding.fix)}",
                style="yellow" if finding.state == "problem" else "dim",
                soft_wrap=True,
            )
    fit = is_fit(findings)
    words = (
        "everything that running on the processor needs is here"
        if fit
        else "something that running needs is broken, see above"
    )
    to.print(words, style="bold green" if fit else "bold red")


def main() -> None:
    """``python -m realtime.doctor``: the same where ``sightline`` does not start."""
    findings = examine()
    for finding in findings:
        fix = f"\n         → {finding.fix}" if finding.fix else ""
        print(f"{finding.state:8} {displayable(finding.name)}: {displayable(finding.found)}{fix}")
    sys.exit(not is_fit(findings))


if __name__ == "__main__":
    main()
