"""Arrays by name from the files that others keep them in: sizes are checked before they are allocated, nothing is executed.

Formats: safetensors and NumPy's archives (``.npz``). What is packed is unpacked only where it stays within ``MOST_UNPACKED``
times the file's size, as true weights do: they hardly compress.
"""

import io
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from engines.base import Array, ModelError
from engines.reading import checked_file, json_object, shown

MOST_UNPACKED = 32
FREELY_UNPACKED = 1 << 22  # bytes that small archives may always unpack to
LONGEST_HEADER = 1 << 26
ZIP_ERRORS = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
NUMPY_OF = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4",
    "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""NumPy's names for safetensors' types. BF16, which NumPy lacks, is the upper half of a float32."""


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; BF16 comes as float32.

    Args:
        path: of the file.
        what: ``head`` or ``weights``, for messages.

    Raises:
        ModelError: it is none, is cut off, or its header does not fit it.
    """
    size = checked_file(path, what)
    try:
        with safe_open(path, framework="numpy") as file:  # checks header, offsets and sizes
            metadata, names = dict(file.metadata() or {}), list(file.keys())
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json_object(raw.read(min(length, LONGEST_HEADER)))
            return {name: _tensor(raw, 8 + length, size, name, header[name]) for name in names}, metadata
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"cannot read {what} {path}: {reason_of(error)}") from error


def read_safetensors_metadata(path: Path, what: str) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.

    Raises:
        ModelError: see ``read_safetensors``.
    """
    checked_file(path, what)
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {what} {path}: {reason_of(error)}") from error


def _tensor(raw: io.BufferedReader, data: int, size: int, name: str, entry: dict[str, list[int]]) -> Array:
    """One tensor, at its offsets behind ``data``."""
    kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if kind != "BF16" and kind not in NUMPY_OF:
        raise ValueError(f"tensor {shown(name)} holds {kind}, which is not supported: convert it to F32")
    dtype = np.dtype("<u2" if kind == "BF16" else NUMPY_OF[kind])
    if not 0 <= start <= end <= size - data or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {shown(name)} does not fit its shape {list(shape)}")
    raw.seek(data + start)
    values = np.frombuffer(raw.read(end - start), dtype)
    if kind == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a NumPy archive.

    Raises:
        ModelError: it is none, is damaged, or would unpack to much more than it is.
    """
    size = checked_file(path, "weights")
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked(archive, size)
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {info.filename.removesuffix(".npy"): _npy(info.filename, archive.read(info)) for info in members}
    except ZIP_ERRORS as error:
        raise ModelError(f"cannot read weights {path} as a NumPy archive: {reason_of(error)}") from error


def check_unpacked(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError where an archive of ``size`` bytes would fill the memory."""
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(MOST_UNPACKED * size, FREELY_UNPACKED):
        raise ValueError(f"{size:,} bytes would unpack to {unpacked:,}, which no weights do")


def _npy(name: str, content: bytes) -> Array:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{shown(name)} is of NumPy's format {version}, which is not supported")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ValueError(f"{shown(name)} holds {dtype}: only numbers are read")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"{shown(name)} does not fit its shape {shown(list(shape))}")
    values = np.frombuffer(content, dtype, offset=stream.tell())
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def reason_of(error: Exception) -> str:
    """An error's first line, printable and not too long."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(c if c.isprintable() else "?" for c in said)[:200]
