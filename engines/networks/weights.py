"""Loads weights by name or from files: safetensors, torchvision's .pth, NumPy archives, Deep
Compression's .net.
"""

import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engines.downloads import Download, cache_dir, downloaded
from engines.engine import Array
from engines.errors import ModelError
from engines.install import install_extra
from engines.networks.squeezenet import shapes
from engines.reading import (
    MOST_UNPACKED,
    check_unpacked,
    checked_file,
    parsed_json,
    read_file,
    read_npz,
    read_safetensors,
    read_safetensors_metadata,
    reason_of,
    shown,
    text,
)

MOST_BYTES = 1 << 24
"""The published file has 675,763."""


def decode_net(path: Path) -> dict[str, np.ndarray]:
    """Float32 weights and biases by layer name.

    Raises:
        ModelError: the file cannot be read or is not SqueezeNet's.
    """
    layers = shapes()
    try:
        data = read_file(path, "weights", MOST_BYTES)
        counts = np.frombuffer(data, "<u4", len(layers))
        offset, weights = counts.nbytes, {}
        for (name, shape), count in zip(layers.items(), counts, strict=True):
            codebook = np.frombuffer(data, "<f4", 256, offset)
            bias = np.frombuffer(data, "<f4", shape[0], offset + 1024)
            offset += 1024 + bias.nbytes
            index = np.frombuffer(data, np.uint8, count, offset)
            packed = np.frombuffer(data, np.uint8, (int(count) + 1) // 2, offset + int(count))
            offset += int(count) + packed.nbytes
            gaps = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
            flat = np.full(int(np.prod(shape)), codebook[0], np.float32)
            flat[np.cumsum(gaps.astype(np.int64) + 1) - 1] = codebook[index]
            weights[f"{name}.weight"], weights[f"{name}.bias"] = flat.reshape(shape), bias.copy()
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"cannot read {path} as SqueezeNet's compressed weights: {error}"
        ) from error
    if offset != len(data):
        raise ModelError(
            f"{path} holds {len(data)} bytes, SqueezeNet's compressed weights take {offset}"
        )
    return weights


ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {"compact": ASSETS / "compact.safetensors"}


DOWNLOADS: Mapping[str, Download] = {
    "vgg16": Download(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        "vgg16-397923af.pth",
    ),
    "alexnet": Download(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        244_408_911,
        "alexnet-owt-7be5be79.pth",
    ),
    "squeezenet": Download(
        "https://raw.githubusercontent.com/songhan/SqueezeNet-Deep-Compression/"
        "fb13faa2cf121ced9999f8a9d538ec6c56084733/compressed_SqueezeNet.net",
        "e4ab6960ae8cd81505e1c2136921201507e930966c53deaf15862a395b3a3261",
        675_763,
        "compressed_SqueezeNet.net",
    ),
}
"""torchvision's file names end in the first eight digits of the file's sha256. Neither VGG16's nor
AlexNet's file could be
fetched where this was written: sha256 and size are those that many projects publish. Names, shapes
and finite values are checked when a file is read.
"""


def load_weights(model: str, weights: str | None = None) -> dict[str, np.ndarray]:
    """Weights of ``model`` as float32 arrays under the names that the builders read.

    Args:
        model: ``compact``, ``vgg16``, ``alexnet`` or ``squeezenet``.
        weights: a file, or a name in ``DOWNLOADS``; None for the shipped weights, else the download
            of that model.

    Raises:
        ModelError: the file is missing or unreadable.
        DownloadError: it cannot be fetched.
    """
    if weights is None and model in SHIPPED:
        path = SHIPPED[model]
    elif weights is None or weights in DOWNLOADS:
        path = downloaded(DOWNLOADS[weights or model], cache_dir() / "weights")
    else:
        path = Path(weights)
    if not path.exists():
        raise ModelError(
            f"weights {path} do not exist: give a file, or one of {', '.join(DOWNLOADS)}, or random"
        )
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ModelError(
            f"weights {path}: unknown format '{path.suffix}'; use {', '.join(READERS)}"
        )
    return {_torchvision_name(name): _float32(name, value) for name, value in reader(path).items()}


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
    flat = name.startswith(("pre_logits.fc", "head.fc")) and array.ndim == 4
    return array.reshape(len(array), -1) if flat else array


_TIMM = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}


def _torchvision_name(name: str) -> str:
    """Timm's VGG16 keeps the hidden layers as convolutions under other names; the order of values
    is the same.
    """
    prefix, _, kind = name.rpartition(".")
    return f"{_TIMM[prefix]}.{kind}" if prefix in _TIMM else name


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
