"""The cache of built engines. Each is kept under the key of what it was built from, and checked
when it is read.

A file is ``SIGHTLINE`` , the header's length, the header (JSON: the key, the plan's sha256) and the
plan as the library wrote it. A plan loads only in the very build of the library that wrote it, and
on the GPU that it was written for: both are part of the key, so another build or GPU simply finds
nothing and builds its own.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from engines.downloads import cache_dir
from engines.errors import EngineError, ModelError
from engines.files import Kind, whole_file
from engines.install import REBUILD
from engines.reading import json_object, read_file

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


def read_engine(path: Path) -> tuple[EngineKey, bytes]:
    """(key, plan) of an engine file.

    Raises:
        CorruptEngineError: it is no engine, is cut off, or its plan is not what was written.
    """
    start = len(MAGIC) + 4
    try:
        content = read_file(path, "engine", MOST_BYTES)
        if not content.startswith(MAGIC):
            raise ValueError("it is no engine of Sightline's")
        (length,) = struct.unpack("<I", content[len(MAGIC) : start])
        header = json_object(content[start : start + length])
        key, plan = EngineKey(**header["key"]), content[start + length :]
        if hashlib.sha256(plan).hexdigest() != header["sha256"]:
            raise ValueError("it is cut off or damaged")
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
    return key, plan


def find_engine(keys: list[EngineKey]) -> tuple[EngineKey, bytes] | None:
    """The first of these engines that is in the cache; None where none is.

    Raises:
        CorruptEngineError: the file is damaged, or holds another engine.
    """
    for key in keys:
        if key.path.exists():
            found, plan = read_engine(key.path)
            if found != key:
                raise CorruptEngineError(
                    f"engine {key.path} holds another engine: build it again with '{REBUILD}'"
                )
            return key, plan
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
            return found[1]
    plan = build()
    write_engine(key.path, key, plan)
    return plan
