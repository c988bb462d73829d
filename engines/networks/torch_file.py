"""Reads state dictionaries that PyTorch saved, without PyTorch: of today's archives and of the form
before them.

Such a file is a pickle, which may name any function of Python's to be called. Here the only things
that are made of it are dictionaries, numbers, text and descriptions of tensors. A name of PyTorch's
that is none of a dense tensor stays a word, and one of anything else is refused.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from engines.engine import Array
from engines.errors import ModelError
from engines.files import MOST_UNPACKED, check_unpacked, checked_file, reason_of, shown

MAGIC = 0x1950A86A20F9469CFC6C
"""The first number of a file of before PyTorch 1.6."""
OTHER_ORDER = "its numbers are in the other order of bytes"
DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
"""NumPy's names for what storages hold; bfloat16 is the upper half of a float32."""


class _Word(str):
    """A name of PyTorch's in the pickle; called, it is itself."""

    __slots__ = ()

    def __call__(self, *_: object) -> "_Word":
        return self


class _Storage(NamedTuple):
    kind: str
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: object) -> _Tensor:
    """In place of ``torch._utils._rebuild_tensor_v2``."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("it holds a tensor that is not described as PyTorch does")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("it holds a tensor whose shape is no row of numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: _Tensor, *_: object) -> _Tensor:
    """In place of ``torch._utils._rebuild_parameter``."""
    return tensor


MADE: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle._Unpickler):
    """The one written in Python: that in C allocates as much as the file says.

    Attributes:
        storages: all that are referred to, by key.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in MADE:
            return MADE[module, name]
        if module.partition(".")[0] == "torch" and not module.startswith("torch.nn"):
            return _Word(name)
        raise pickle.UnpicklingError(
            f"it asks for {shown(f'{module}.{name}')}, which is no tensor: save model.state_dict()"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, count, *_ = pid
        if what != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return self.storages.setdefault(key, _Storage(str(kind), key, count))


def read_torch(path: Path) -> dict[str, Array]:
    """The state dictionary in a file of PyTorch's, in the types that it holds, bfloat16 as float32;
    code in it is not run.

    Raises:
        ModelError: the file is no state dictionary of dense tensors, or is damaged.
    """
    size = checked_file(path, "weights")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unpacked(archive, size)
                state, storages = _of_archive(archive)
        else:
            state, storages = _of_stream(path.read_bytes())
        tensors = _checked(state, path, size)
        return {name: _values(each, storages) for name, each in tensors.items()}
    except ModelError:
        raise
    except Exception as error:  # pickle, zip, memory, value and end-of-file errors: it is damaged
        raise ModelError(f"cannot read weights {path}: {reason_of(error)}") from error


def _of_archive(archive: zipfile.ZipFile) -> tuple[Any, Mapping[str, memoryview]]:
    """(what was saved, the bytes of its storages) of an archive; its members lie in one folder."""
    names = archive.namelist()
    folder = next((name for name in names if name.endswith("data.pkl")), None)
    if folder is None:
        raise ValueError("it is no archive of PyTorch's")
    folder = folder[: -len("data.pkl")]
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError(OTHER_ORDER)
    unpickler = _Unpickler(io.BytesIO(archive.read(f"{folder}data.pkl")))
    state = unpickler.load()
    return state, {
        key: memoryview(archive.read(f"{folder}data/{key}")) for key in unpickler.storages
    }


def _of_stream(content: bytes) -> tuple[Any, Mapping[str, memoryview]]:
    """The same of the form before archives: pickles in a row, then each storage."""
    stream = io.BytesIO(content)
    if _Unpickler(stream).load() != MAGIC:
        raise ValueError("it is no file of PyTorch's")
    _Unpickler(stream).load()  # the version of the form
    machine = _Unpickler(stream).load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError(OTHER_ORDER)
    unpickler = _Unpickler(stream)
    state = unpickler.load()
    found: dict[str, memoryview] = {}
    for key in _Unpickler(stream).load():
        storage = unpickler.storages[str(key)]
        (count,) = struct.unpack("<q", stream.read(8))
        start, length = stream.tell(), count * _dtype(storage).itemsize
        if count < 0 or start + length > len(content):
            raise EOFError("it is cut off")
        found[storage.key] = memoryview(content)[start : start + length]
        stream.seek(start + length)
    return state, found


def _checked(state: Any, path: Path, size: int) -> dict[str, _Tensor]:
    """The tensors by name.

    Raises:
        ModelError: it is no state dictionary, or one of other tensors, or of too many values.
    """
    if not isinstance(state, dict) or not all(
        isinstance(each, _Tensor | _Word) for each in state.values()
    ):
        raise ModelError(
            f"weights {path} are not a state dictionary of tensors: save model.state_dict()"
        )
    if not all(isinstance(name, str) for name in state):
        raise ModelError(f"weights {path} are not a state dictionary: its names are not text")
    for name, each in state.items():
        if not isinstance(each, _Tensor) or each.storage.kind not in DTYPES:
            raise ModelError(f"weights {path}: {shown(name)} is not a dense tensor of real numbers")
    claimed = sum(math.prod(each.shape) * _dtype(each.storage).itemsize for each in state.values())
    if claimed > MOST_UNPACKED * size:
        raise ModelError(
            f"weights {path}: its tensors claim more values than the file has bytes for: it is"
            " damaged"
        )
    return state


def _dtype(storage: _Storage) -> np.dtype[Any]:
    """How many bytes a value has; of an unknown kind one, as nothing is read of it."""
    return np.dtype(DTYPES.get(storage.kind, "u1"))


def _values(tensor: _Tensor, storages: Mapping[str, memoryview]) -> Array:
    """A copy, row by row.

    Raises:
        ValueError: the tensor reaches beyond its storage.
    """
    dtype = _dtype(tensor.storage)
    values = np.frombuffer(storages[tensor.storage.key], dtype)
    last = tensor.offset + sum(
        (length - 1) * step for length, step in zip(tensor.shape, tensor.strides, strict=True)
    )
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    if last >= len(values):
        raise ValueError("a tensor reaches beyond its values")
    steps = [step * dtype.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, steps)
    if tensor.storage.kind == "BFloat16Storage":
        return (view.astype(np.uint32) << 16).view(np.float32)
    return view.copy()
