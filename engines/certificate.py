"""Certificates: the proof on real frames that an engine agrees with its reference; and the cache of
built engines, each under the key of what it was built from.

A file of the cache is ``SIGHTLINE`` , the header's length, the header (JSON: the key, the plan's
sha256) and the plan as the library wrote it. A plan loads only in the very build of the library
that wrote it, and on the GPU that it was written for: both are part of the key, so another build or
GPU simply finds nothing and builds its own.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import onnx

from engines.boxes import iou
from engines.build import stamped
from engines.downloads import cache_dir
from engines.engine import Array, Engine
from engines.errors import REBUILD, EngineError, InputError, ModelError, sightline_command
from engines.files import (
    Kind,
    checked_file,
    json_object,
    number,
    read_json_object,
    text,
    whole_file,
    whole_number,
)
from engines.localizer import ImageBgr, Localization, Localizer

MAGIC = b"SIGHTLINE\n"
SUFFIX = ".engine"
ENGINE_FILE = Kind("engine", (SUFFIX,), MAGIC)
MOST_BYTES = 1 << 34
"""Of an engine file: far more than any graph compiles to."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides what a build makes.

    Attributes:
        model: name, for people.
        graph: sha256 of the ONNX graph, weights included.
        library: ``tensorrt``, ``tensorrt_rtx`` or ``openvino``.
        version: the library's build.
        target: GPU (or processor) name and compute capability, or only the latter (``sm89``) for
            builds ahead of time.
        precision: ``fp32``, ``fp16``, ``int8`` ...
        batch: images per call.
    """

    model: str
    graph: str
    library: str
    version: str
    target: str
    precision: str
    batch: int

    @property
    def digest(self) -> str:
        """sha256 of all of it, in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Where the engine is kept, whether it is there or not."""
        name = f"{Path(self.model).stem}-{self.library}-{self.precision}-b{self.batch}"
        return engines_dir() / f"{name}-{self.digest[:16]}{SUFFIX}"


class CorruptEngineError(EngineError):
    """An engine file is truncated, damaged, or holds another engine than its name says."""


def engines_dir() -> Path:
    """The folder of built engines."""
    return cache_dir() / "engines"


def graph_digest(model: onnx.ModelProto) -> str:
    """sha256 of a graph, its weights and its metadata."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def write_engine(path: Path, key: EngineKey, plan: bytes) -> None:
    """Write an engine, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    header = json.dumps({"key": asdict(key), "sha256": hashlib.sha256(plan).hexdigest()}).encode()
    with whole_file(path) as part, part.open("wb") as file:
        file.write(MAGIC + struct.pack("<I", len(header)) + header)
        file.write(plan)


class KeptEngine(NamedTuple):
    """An engine of the cache; ``sha256`` is that of the plan, which is large and hashed once."""

    key: EngineKey
    plan: bytes
    sha256: str


def read_engine(path: Path) -> KeptEngine:
    """What an engine file holds.

    Raises:
        CorruptEngineError: it is no engine, is cut off, or its plan is not what was written.
    """
    try:
        if checked_file(path, "engine") > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("it is no engine of Sightline's")
            (length,) = struct.unpack("<I", file.read(4))
            header = json_object(file.read(length))
            key, plan = EngineKey(**header["key"]), file.read()
        sha256 = hashlib.sha256(plan).hexdigest()
        if sha256 != header["sha256"]:
            raise ValueError("it is cut off or damaged")
    except OSError as error:
        raise CorruptEngineError(f"cannot read engine {path}: {error.strerror}") from error
    except ModelError as error:
        raise CorruptEngineError(f"{error}; build it again with '{REBUILD}'") from error
    except (ValueError, KeyError, TypeError, struct.error) as error:
        reason = (
            str(error)
            if type(error) is ValueError and "JSON" not in str(error)
            else "its header is damaged"
        )
        raise CorruptEngineError(
            f"engine {path} cannot be used: {reason}; build it again with '{REBUILD}'"
        ) from error
    return KeptEngine(key, plan, sha256)


def find_engine(keys: list[EngineKey]) -> KeptEngine | None:
    """The first of these engines that is in the cache; None where none is.

    Raises:
        CorruptEngineError: the file is damaged, or holds another engine.
    """
    for key in keys:
        if key.path.exists():
            found = read_engine(key.path)
            if found.key != key:
                raise CorruptEngineError(
                    f"engine {key.path} holds another engine: build it again with '{REBUILD}'"
                )
            return found
    return None


def load_or_build(
    key: EngineKey, build: Callable[[], bytes], notify: Callable[[str], None], rebuild: bool = False
) -> bytes:
    """The plan of ``key``: from the cache, or built and put there.

    Args:
        key: which.
        build: makes the plan.
        notify: gets a line where a damaged entry is built again.
        rebuild: build even where there is one.

    Raises:
        EngineError: it cannot be built.
        OutputError: it cannot be kept.
    """
    if not rebuild:
        try:
            found = find_engine([key])
        except CorruptEngineError as error:
            notify(str(error).split(";")[0] + "; building it again")
            found = None
        if found:
            return found.plan
    plan = build()
    write_engine(key.path, key, plan)
    return plan


CERTIFICATE_FILE = Kind("certificate", (), rb'\{\s*"passed": (true|false),\s*"subject": \{')
FEWEST_FRAMES = 8
LEAST_CHANGE = 1e-3
"""Frames whose reference maps change less than this from one to the next cannot show that a map is
not frozen.
"""


@dataclass(frozen=True)
class Thresholds:
    """What an engine must reach.

    Attributes:
        box_iou_p5: 5th percentile over the frames of the overlap of its box with the reference's.
        map_correlation_p5: 5th percentile of Pearson's correlation of its map with the reference's.
        class_agreement: share of the frames in which both name the same class.
        change_ratio: how much its maps change from frame to frame, over how much the reference's
            do.

    The defaults let bf16 through, which our tests hold against the reference: on the demo's frames
    it has a box IoU of 0.91 (training-free boxes, which hang on single pixels) to 0.98, map
    correlation 0.967 to 0.995, class agreement 0.95 to 1.
    """

    box_iou_p5: float = 0.85
    map_correlation_p5: float = 0.90
    class_agreement: float = 0.9
    change_ratio: float = 0.5


@dataclass(frozen=True)
class Certificate:
    """What a comparison found.

    Attributes:
        subject: what was compared, by which a stale certificate is told (graph and engine digests,
            library, precision).
        reference, candidate: the engines in words.
        frames: how many different ones.
        box_iou_p5: None where there is no head.
        map_correlation_p5, class_agreement: see ``Thresholds``.
        map_change, reference_map_change: 1 less the correlation of each map with the next frame's,
            mean.
        thresholds: that were in force.
        failures: a few words for each that was not met; empty for an engine that passed.
    """

    subject: Mapping[str, str]
    reference: str
    candidate: str
    frames: int
    box_iou_p5: float | None
    map_correlation_p5: float
    class_agreement: float
    map_change: float
    reference_map_change: float
    thresholds: Thresholds = field(default_factory=Thresholds)
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold was met."""
        return not self.failures

    def of(self, subject: Mapping[str, str]) -> "Certificate":
        """The same findings, tied to what they are about."""
        return replace(self, subject=dict(subject))

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            OutputError: the place cannot be written.
        """
        with whole_file(path) as part:
            part.write_text(
                json.dumps({"passed": self.passed, **asdict(self)}, indent=2) + "\n",
                encoding="utf-8",
            )

    def __str__(self) -> str:
        box = "no box" if self.box_iou_p5 is None else f"box IoU {self.box_iou_p5:.3f}"
        verdict = "passed" if self.passed else f"FAILED ({'; '.join(self.failures)})"
        return (
            f"certificate {verdict}: {box} and map correlation {self.map_correlation_p5:.4f} (5th"
            f" percentiles), class agreement {100 * self.class_agreement:.0f} %, on {self.frames}"
            f" frames against {self.reference}"
        )


def certify(
    reference: Localizer,
    candidate: Localizer,
    images_bgr: Sequence[ImageBgr],
    thresholds: Thresholds | None = None,
) -> Certificate:
    """Compare two engines on the same frames.

    Args:
        reference: trusted, of the same network, map and head.
        candidate: to be certified.
        images_bgr: at least ``FEWEST_FRAMES`` different ones, in order of time.
        thresholds: None for the usual ones.

    Raises:
        InputError: there are too few different frames, or they are so alike that a frozen map would
            not show.
        EngineError: the two do not have maps of one shape.
    """
    frames = _different(images_bgr)
    if len(frames) < FEWEST_FRAMES:
        raise InputError(
            f"{len(frames)} different frames are too few to certify an engine: give at least"
            f" {FEWEST_FRAMES}"
        )
    true, found = reference.localize(frames), candidate.localize(frames)
    if true[0].map_hw.shape != found[0].map_hw.shape:
        raise EngineError(
            f"maps of {found[0].map_hw.shape} cannot be held against {true[0].map_hw.shape}"
        )
    limits = thresholds or Thresholds()
    result = Certificate(
        {},
        _words(reference),
        _words(candidate),
        len(frames),
        _box_iou_p5(true, found),
        _p5([correlation(t.map_hw, f.map_hw) for t, f in zip(true, found, strict=True)]),
        float(np.mean([t.class_index == f.class_index for t, f in zip(true, found, strict=True)])),
        _change(found),
        _change(true),
        limits,
    )
    if result.reference_map_change < LEAST_CHANGE:
        raise InputError(
            "these frames are all alike, a frozen map would not show: certify on a clip in which"
            " something moves"
        )
    return replace(result, failures=tuple(_failures(result, [f.map_hw for f in found])))


def _failures(result: Certificate, maps: Sequence[Array]) -> list[str]:
    limits = result.thresholds
    if not all(np.isfinite(m).all() for m in maps):
        return ["a map holds values that are not finite"]
    if not all(m.any() for m in maps):
        return ["a map is zero everywhere"]
    failures = []
    if result.map_change < limits.change_ratio * result.reference_map_change:
        failures.append("the map hardly changes with the image")
    for name, value, least in (
        ("box IoU", result.box_iou_p5, limits.box_iou_p5),
        ("map correlation", result.map_correlation_p5, limits.map_correlation_p5),
        ("class agreement", result.class_agreement, limits.class_agreement),
    ):
        if value is not None and not value >= least:
            failures.append(f"{name} {value:.3f} is below {least}")
    return failures


def _different(images_bgr: Sequence[ImageBgr]) -> list[ImageBgr]:
    return list({(image.shape, image.tobytes()): image for image in images_bgr}.values())


def _words(localizer: Localizer) -> str:
    engine = localizer.engine
    return f"{engine.backend} {engine.precision}, {engine.device}"


def _box_iou_p5(true: Sequence[Localization], found: Sequence[Localization]) -> float | None:
    pairs = zip(true, found, strict=True)
    overlaps = [value for t, f in pairs if (value := box_iou(t, f)) is not None]
    return _p5(overlaps) if overlaps else None


def box_iou(true: Localization, found: Localization) -> float | None:
    """Of the first true box with the box that was found, or of several the one that fits best:
    which of two objects comes first may hang on the last digit. None where one of them has no box.
    """
    if true.box_xyxy_px is None or found.box_xyxy_px is None:
        return None
    boxes = [found.box_xyxy_px, *(each.box_xyxy_px for each in found.detections)]
    return float(iou(np.array(boxes), np.array(true.box_xyxy_px)).max())


def _p5(values: Sequence[float]) -> float:
    return float(np.percentile(np.nan_to_num(values), 5))


def correlation(a_hw: Array, b_hw: Array) -> float:
    """Pearson's correlation of two maps; 0 where one has no contrast or is not finite."""
    a, b = (x.astype(np.float64).ravel() - x.astype(np.float64).mean() for x in (a_hw, b_hw))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 and np.isfinite(norm) else 0.0


def _change(found: Sequence[Localization]) -> float:
    """Of finite maps that have contrast; 0 where none has. They may have as many cells as their
    images need, and are compared in as many as the first has.
    """
    columns_rows = found[0].map_hw.shape[::-1]
    maps = [cv2.resize(f.map_hw, columns_rows) for f in found]
    if not all(np.isfinite(m).all() and np.ptp(m) > 0 for m in maps):
        return 0.0
    return float(np.mean([1 - correlation(a, b) for a, b in pairwise(maps)]))


def certificate_path(engine: Path) -> Path:
    """Where the certificate of an engine (or ONNX) file lies: beside it."""
    return engine.with_suffix(".certificate.json")


def kernels_path(engine: Path) -> Path:
    """Where the kernels lie that TensorRT for RTX compiled of an engine file: beside it."""
    return engine.with_suffix(".kernels")


def load_certificate(path: Path) -> Certificate:
    """Read a certificate.

    Raises:
        EngineError: it is damaged.
    """
    try:
        content = read_json_object(path, "certificate")
        passed = content.pop("passed")
        content["failures"] = tuple(text(each, "a failure") for each in content["failures"])
        content["thresholds"] = Thresholds(
            **{n: number(v, f"its {n}", 0, 1) for n, v in content["thresholds"].items()}
        )
        content["subject"] = {
            text(n, "a subject"): text(v, "a subject") for n, v in content["subject"].items()
        }
        certificate = Certificate(**content)
        _check_numbers(certificate)
        if passed is not certificate.passed:
            raise ValueError("it contradicts itself")
    except (ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        reason = f"it has no {error}" if type(error) is KeyError else str(error)
        raise EngineError(
            f"cannot read certificate {path}: {reason}; make it again with '{REBUILD}'"
        ) from error
    return certificate


def _check_numbers(certificate: Certificate) -> None:
    """Raise ValueError unless they are what ``certify`` can have found, and one that passed met its
    thresholds.
    """
    limits = certificate.thresholds
    whole_number(certificate.frames, "its frames", FEWEST_FRAMES, 1 << 31)
    for name in ("map_change", "reference_map_change"):
        number(getattr(certificate, name), f"its {name}", -1e-6, 2 + 1e-6)
    for name in ("box_iou_p5", "map_correlation_p5", "class_agreement"):
        value = getattr(certificate, name)
        if value is None and name == "box_iou_p5":
            continue
        if (
            number(value, f"its {name}", -1 - 1e-6, 1 + 1e-6) < getattr(limits, name)
            and certificate.passed
        ):
            raise ValueError(
                f"it contradicts itself: its {name} of {value} is below what it asks for, and it"
                " passed"
            )
    for name in ("reference", "candidate"):
        text(getattr(certificate, name), f"its {name}")


def status(path: Path, subject: Mapping[str, str]) -> str:
    """``passed``, ``failed``, ``stale`` (it is about something else), or ``missing``.

    Raises:
        EngineError: the certificate is damaged.
    """
    if not path.exists():
        return "missing"
    certificate = load_certificate(path)
    if dict(certificate.subject) != dict(subject):
        return "stale"
    return "passed" if certificate.passed else "failed"


def require(path: Path, subject: Mapping[str, str], precision: str) -> None:
    """Let only a certified engine through.

    Args:
        path: of the certificate.
        subject: what is about to run.
        precision: of the engine.

    Raises:
        EngineError: the certificate is missing, failed, stale or damaged; the message says what to
            do.
    """
    found = status(path, subject)
    if found == "passed":
        return
    rebuild = found != "missing"
    remedy = sightline_command("build", backend="tensorrt", precision=precision, rebuild=rebuild)
    if found == "missing":
        reason = "has no certificate yet"
    elif found == "stale":
        reason = "has a stale certificate, of another graph or build"
    else:
        failures = "; ".join(load_certificate(path).failures)
        reason = f"failed its certificate ({failures})"
    raise EngineError(f"this engine {reason}: run '{remedy}'")


def key_of(
    model: onnx.ModelProto, typed: onnx.ModelProto, library: Any, target: str, precision: str
) -> EngineKey:
    """The cache key of a TensorRT engine.

    Args:
        model: the graph, whose metadata tell the network's name.
        typed: the same as TensorRT reads it.
        library: the module.
        target: GPU in words, or compute capability.
        precision: in words.
    """
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return EngineKey(
        model_name(model),
        graph_digest(typed),
        library.__name__,
        library.__version__,
        target,
        precision,
        batch,
    )


def model_name(model: onnx.ModelProto) -> str:
    """As ``engines.build.stamp`` wrote it."""
    return str(stamped({p.key: p.value for p in model.metadata_props})["model"])


def subject_of(key: EngineKey, plan: bytes, sha256: str = "") -> dict[str, str]:
    """What a certificate is about; ``sha256`` is the plan's, where it is known."""
    return {
        **{name: str(value) for name, value in asdict(key).items()},
        "engine": sha256 or hashlib.sha256(plan).hexdigest(),
    }


def openvino_key(model: onnx.ModelProto, engine: Engine) -> EngineKey:
    """What an OpenVINO certificate is about: there is no plan, the graph is compiled when it is
    opened.
    """
    import openvino

    version = openvino.__version__.split("-")[0]
    return EngineKey(
        model_name(model),
        graph_digest(model),
        "openvino",
        version,
        engine.device,
        engine.precision,
        engine.inputs[0].shape[0],
    )


def refuse_failed(model: onnx.ModelProto, engine: Engine) -> None:
    """Raise EngineError if ``build`` found that this very engine does not give what its reference
    gives.

    An OpenVINO engine that was never certified may run: its precisions are held against the
    reference by our own tests.
    """
    if not any(engines_dir().glob("*-openvino-*")):
        return  # the usual case, in which the graph need not be hashed
    key = openvino_key(model, engine)
    path = certificate_path(key.path)
    if status(path, openvino_subject(key)) == "failed":
        reasons = "; ".join(load_certificate(path).failures)
        raise EngineError(
            f"OpenVINO in {engine.precision} failed its certificate ({reasons}): use fp32",
            option="precision",
        )


def openvino_subject(key: EngineKey) -> Mapping[str, str]:
    """See ``subject_of``."""
    return {name: str(value) for name, value in asdict(key).items()}
