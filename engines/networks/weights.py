"""Reads files of weights: safetensors, PyTorch's .pth, NumPy archives, Deep Compression's .net."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engines.errors import ModelError
from engines.files import (
    parsed_json,
    read_npz,
    read_safetensors,
    read_safetensors_metadata,
    shown,
    text,
)
from engines.networks.squeezenet import decode_net
from engines.networks.torch_file import read_torch

ASSETS = Path(__file__).parent.parent / "assets"


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights in a file, as float32 arrays under the file's own names.

    Raises:
        ModelError: the file is of no known format, is damaged, or holds what cannot be weights.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ModelError(
            f"weights {path}: unknown format '{path.suffix}'; use {', '.join(READERS)}"
        )
    return {name: _float32(name, value) for name, value in reader(path).items()}


def load_class_names(weights: str) -> tuple[str, ...]:
    """The names that a ``.safetensors`` file gives the classes of its weights; none where it or
    another file does not.
    """
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return ()
    try:
        names = parsed_json(read_safetensors_metadata(path, "weights").get("class_names", "[]"))
        if not isinstance(names, list) or len(set(names)) != len(names):
            raise ValueError("they are no list of different names")
        return tuple(text(name, "a class name") for name in names)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the class names in weights {path} cannot be used: {error}") from error


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind != "f" and value.ndim:
        raise ModelError(
            f"weight {shown(name)} holds {value.dtype}: give the weights as floating-point numbers,"
            " not quantised"
        )
    with np.errstate(over="ignore"):
        array = np.asarray(value, dtype=np.float32)
    if not array.size:
        raise ModelError(f"weight {shown(name)} is empty: its shape is {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ModelError(f"weight '{name}' holds values that are not finite: the file is damaged")
    return array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    return read_safetensors(path, "weights")[0]


READERS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".pth": read_torch,
    ".pt": read_torch,
    ".npz": read_npz,
    ".net": decode_net,
}
