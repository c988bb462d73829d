"""Reads the structure and tensors of an ONNX file. Sizes are checked before memory is allocated."""

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from engines.engine import Array
from engines.errors import ModelError
from engines.files import checked_file, shown

MOST_FIELDS = 500_000
"""Large transformers have 200,000."""
DEEPEST = 60
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_structure(content: bytes) -> None:
    """Raise ValueError unless these are the bytes of an ``onnx.ModelProto`` of bearable size."""
    counted = 0
    pending = [(onnx.ModelProto.DESCRIPTOR, 0, len(content), 0)]
    while pending:
        kind, at, end, depth = pending.pop()
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        messages, strings = _messages_of(kind), _strings_of(kind)
        while at < end:
            counted += 1
            if counted > MOST_FIELDS:
                raise ValueError(
                    f"it has more than {MOST_FIELDS:,} fields: no classifier has so many"
                )
            tag, at = _varint(content, at, end)
            start, at = _skipped(content, at, end, tag & 7)
            inner = messages.get(tag >> 3)
            if inner is not None and tag & 7 == _BYTES:
                pending.append((inner, start, at, depth + 1))
            elif tag >> 3 in strings and not _is_text(content[start:at]):
                raise ValueError("a name in it is not text")


@cache
def _messages_of(kind: Any) -> dict[int, Any]:
    """Field number to message type, of those fields that hold messages."""
    return {
        field.number: field.message_type for field in kind.fields if field.message_type is not None
    }


@cache
def _strings_of(kind: Any) -> frozenset[int]:
    """Numbers of the fields that hold text, which protobuf's newer readers do not check."""
    return frozenset(field.number for field in kind.fields if field.type == field.TYPE_STRING)


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _skipped(content: bytes, at: int, end: int, wire_type: int) -> tuple[int, int]:
    """(where the value begins, where it ends)."""
    if wire_type == _VARINT:
        return at, _varint(content, at, end)[1]
    if wire_type == _BYTES:
        length, at = _varint(content, at, end)
        after = at + length
    elif wire_type in (_FIXED64, _FIXED32):
        after = at + (8 if wire_type == _FIXED64 else 4)
    else:
        raise ValueError("its bytes cannot be parsed")
    if after > end:
        raise ValueError("it is cut off, or its bytes cannot be parsed")
    return at, after


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("it is cut off, or its bytes cannot be parsed")


MOST_BYTES = (1 << 31) - (1 << 20)
"""Protobuf, in which every engine reads a graph, holds 2 GB."""
MOST_AXES = 16
_BYTES_OF: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.DOUBLE: 8,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.BOOL: 1,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
    TensorProto.INT16: 2,
    TensorProto.UINT16: 2,
    TensorProto.INT32: 4,
    TensorProto.UINT32: 4,
    TensorProto.INT64: 8,
    TensorProto.UINT64: 8,
}
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
"""Types of numbers that a network may be stored in; all are computed as float32."""


class TensorReader:
    """Reads the tensors of one file, and counts what it reads.

    Args:
        path: of the ONNX file.
        content_bytes: its size.

    Attributes:
        bytes_beside: how much came from other files.
        digest: hash object over those bytes, in the order of reading.
    """

    def __init__(self, path: Path, content_bytes: int) -> None:
        self._path = path
        self._left = MOST_BYTES - content_bytes
        self._files: dict[Path, int] = {}
        self.bytes_beside = 0
        self.digest = hashlib.sha256()

    def array(self, tensor: TensorProto, what: str) -> Array:
        """The values; those of every floating-point type as float32.

        Args:
            tensor: of the file.
            what: in words, for messages.

        Raises:
            ModelError: its type, its size or its values cannot be used.
        """
        what = f"{self._path}: {what} {shown(tensor.name)}"
        size = _checked_size(tensor, what)
        if tensor.data_location == TensorProto.EXTERNAL:
            values = self._from_beside(tensor, what, size)
        elif tensor.HasField("raw_data"):
            _check_bytes(len(tensor.raw_data), size * _BYTES_OF[tensor.data_type], what)
            values = _of_bytes(tensor, tensor.raw_data)
        else:
            values = _of_field(tensor, what, size)
        return _as_float32(values, what) if tensor.data_type in FLOATS else values

    def _from_beside(self, tensor: TensorProto, what: str, size: int) -> Array:
        said = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = (
            _whole(said.get(key), f"{what}: its {key}") for key in ("offset", "length")
        )
        file = self.file_beside(said.get("location", ""), what)
        needed, start = size * _BYTES_OF[tensor.data_type], offset or 0
        held = self._files[file]
        _check_bytes(
            max(0, held - start) if length is None else length, needed, f"{what} in {file.name}"
        )
        if start + needed > held:
            raise ModelError(
                f"{what} lies at bytes {start:,} to {start + needed:,} of {file.name}, which has"
                f" {held:,}"
            )
        self._left -= needed
        self.bytes_beside += needed
        if self._left < 0 or self.bytes_beside > 2 * sum(self._files.values()):
            raise ModelError(
                f"{self._path}: its weights need more bytes than a graph holds, or than their files"
                " have"
            )
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                content = stream.read(needed)
        except OSError as error:
            raise ModelError(f"cannot read {file}: {error.strerror}") from error
        self.digest.update(content)
        return _of_bytes(tensor, content)

    def file_beside(self, location: str, what: str) -> Path:
        """The file that a tensor names, which must lie in the folder of the model, or of the file
        that the model links to.
        """
        relative = Path(location.replace("\\", "/"))
        folders = list(dict.fromkeys([self._path.absolute().parent, self._path.resolve().parent]))
        try:
            found = next(
                (f / relative for f in folders if location and (f / relative).exists()),
                folders[0] / relative,
            )
            target = found.resolve()
            if (
                not location
                or not any(target.is_relative_to(f.resolve()) for f in folders)
                or target in folders
            ):
                raise ModelError(
                    f"{what} lies at {shown(location)}, outside the model's folder: weights must"
                    " lie beside the model"
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{what} lies at {shown(location)}, which cannot be looked up"
            ) from error
        if not target.exists():
            raise ModelError(
                f"{what} lies in a file of its own, {shown(location)}, which is not there: put it"
                f" into {folders[0]}"
            )
        if target not in self._files:
            self._files[target] = checked_file(target, "weights")
        return target


def _checked_size(tensor: TensorProto, what: str) -> int:
    """How many values its shape makes."""
    if tensor.HasField("segment"):
        raise ModelError(
            f"{what} is stored in segments, which is not supported: export the model again"
        )
    if tensor.data_type not in _BYTES_OF:
        names = {number: name for name, number in TensorProto.DataType.items()}
        kind = names.get(tensor.data_type, str(tensor.data_type))
        raise ModelError(
            f"{what} holds {kind}: weights must be floating-point numbers of 16, 32 or 64 bits"
        )
    if len(tensor.dims) > MOST_AXES or any(length < 0 for length in tensor.dims):
        raise ModelError(f"{what} has the shape {shown(list(tensor.dims))}, which no array has")
    return math.prod(tensor.dims)


def _check_bytes(held: int, needed: int, what: str) -> None:
    if held != needed:
        raise ModelError(
            f"{what} has {held:,} bytes, and its shape needs {needed:,}: the file is damaged"
        )


def _of_bytes(tensor: TensorProto, content: bytes) -> Array:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(tuple(tensor.dims))


def _of_field(tensor: TensorProto, what: str, size: int) -> Array:
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    if len(getattr(tensor, field)) != size:
        raise ModelError(
            f"{what} has {len(getattr(tensor, field)):,} values, and its shape needs {size:,}: the"
            " file is damaged"
        )
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError(f"{what} holds values that its type does not have") from error


def _as_float32(values: Array, what: str) -> Array:
    with np.errstate(over="ignore"):
        cast = values.astype(np.float32, copy=False)
    if values.dtype.itemsize > 4 and not np.array_equal(np.isfinite(cast), np.isfinite(values)):
        raise ModelError(f"{what} holds values beyond float32")
    if values.size != 1 and not np.isfinite(cast).all():
        raise ModelError(
            f"{what} holds values that are not finite (NaN or infinity): the network cannot be used"
        )
    return cast


def _whole(value: Any, what: str) -> int | None:
    if value is None:
        return None
    if not (str(value).isascii() and str(value).isdigit() and len(str(value)) < 19):
        raise ModelError(f"{what} is {shown(value)}, not a number of bytes")
    return int(value)
