"""Reads files of weights: safetensors, PyTorch's .pth, NumPy archives, Deep Compression's .net."""

import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engines.engine import Array
from engines.errors import ModelError, install_extra
from engines.files import (
    MOST_UNPACKED,
    check_unpacked,
    checked_file,
    parsed_json,
    read_npz,
    read_safetensors,
    read_safetensors_metadata,
    reason_of,
    shown,
    text,
)
from engines.networks.squeezenet import decode_net

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


def _read_torch(path: Path) -> dict[str, Array]:
    """The state dictionary in a file of PyTorch's, as float32; code in it is not run.

    Raises:
        ModelError: PyTorch is missing, or the file is no state dictionary of dense tensors.
    """
    size = checked_file(path, "weights")
    try:
        import torch
    except ImportError as error:
        raise ModelError(
            f"reading {path.name} needs PyTorch: {install_extra('torch')}, or give a .safetensors"
            " file"
        ) from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unpacked(archive, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript files are refused behind a warning
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # pickle, zip, runtime, memory and end-of-file errors for damaged files
        raise ModelError(f"cannot read weights {path}: {reason_of(error)}") from error
    if not isinstance(state, dict) or not all(
        isinstance(each, torch.Tensor) for each in state.values()
    ):
        raise ModelError(
            f"weights {path} are not a state dictionary of tensors: save model.state_dict()"
        )
    if not all(isinstance(name, str) for name in state):
        raise ModelError(f"weights {path} are not a state dictionary: its names are not text")
    for name, value in state.items():
        if (
            value.layout is not torch.strided
            or value.is_quantized
            or value.is_complex()
            or value.device.type != "cpu"
        ):
            raise ModelError(f"weights {path}: {shown(name)} is not a dense tensor of real numbers")
    if sum(value.numel() * value.element_size() for value in state.values()) > MOST_UNPACKED * size:
        raise ModelError(
            f"weights {path}: its tensors claim more values than the file has bytes for: it is"
            " damaged"
        )
    return {name: value.float().contiguous().numpy() for name, value in state.items()}


READERS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".npz": read_npz,
    ".net": decode_net,
}
