"""Weights from files and by name: safetensors, torchvision's .pth, NumPy archives, Deep Compression's .net."""

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError
from safetensors.numpy import load_file

from engines.base import ModelError
from engines.deep_compression import decode_net

ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"compact": ASSETS / "compact.safetensors"}


@dataclass(frozen=True)
class Download:
    """A file on the web: address, the start of its sha256, and the name it is kept under."""

    url: str
    sha256: str
    file: str


DOWNLOADS: Mapping[str, Download] = {
    "vgg16": Download(
        "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", "vgg16-397923af.pth"
    ),
    "squeezenet": Download(
        "https://raw.githubusercontent.com/songhan/SqueezeNet-Deep-Compression/"
        "fb13faa2cf121ced9999f8a9d538ec6c56084733/compressed_SqueezeNet.net",
        "e4ab6960ae8cd81505e1c2136921201507e930966c53deaf15862a395b3a3261",
        "compressed_SqueezeNet.net",
    ),
}  # fmt: skip


def cache_dir() -> Path:
    """Where downloads and built engines are kept: ``SIGHTLINE_CACHE``, else ``sightline`` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SIGHTLINE_CACHE") or Path(base) / "sightline")


def load_weights(model: str, weights: str | None = None) -> dict[str, np.ndarray]:
    """Weights of ``model`` as float32 arrays under the names that the builders read.

    Args:
        model: ``compact``, ``vgg16`` or ``squeezenet``.
        weights: a file, or a name in ``DOWNLOADS``; None for the shipped weights, else the download of that model.

    Raises:
        ModelError: the file is missing, unreadable, or cannot be downloaded.
    """
    if weights is None and model in SHIPPED:
        path = SHIPPED[model]
    elif weights is None or weights in DOWNLOADS:
        path = downloaded(DOWNLOADS[weights or model])
    else:
        path = Path(weights)
    if not path.is_file():
        raise ModelError(f"weights {path} do not exist: give a file, or one of {', '.join(DOWNLOADS)}, or random")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ModelError(f"weights {path}: unknown format '{path.suffix}'; use {', '.join(READERS)}")
    return {_torchvision_name(name): _float32(name, value) for name, value in reader(path).items()}


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ModelError(f"weight '{name}' holds values that are not finite: the file is damaged")
    flat = name.startswith(("pre_logits.fc", "head.fc")) and array.ndim == 4
    return array.reshape(len(array), -1) if flat else array


_TIMM = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}


def _torchvision_name(name: str) -> str:
    """Timm's VGG16 keeps the hidden layers as convolutions under other names; the order of values is the same."""
    prefix, _, kind = name.rpartition(".")
    return f"{_TIMM[prefix]}.{kind}" if prefix in _TIMM else name


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read weights {path}: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ModelError(
            f"reading {path.name} needs PyTorch: pip install 'sightline[torch]', or give a .safetensors file"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and end-of-file errors for damaged files
        raise ModelError(
            f"cannot read weights {path}: {str(error).splitlines()[0] if str(error) else 'damaged file'}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"weights {path} are not a state dictionary of tensors")
    return {name: value.float().numpy() for name, value in state.items()}


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read weights {path}: {error}") from error


READERS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch, ".npz": _read_numpy, ".net": decode_net,
}  # fmt: skip


def downloaded(source: Download) -> Path:
    """The file, from the cache or the web; it appears in the cache only when its checksum is right.

    Raises:
        ModelError: offline (the message says what to put where) or the checksum differs.
    """
    target = cache_dir() / "weights" / source.file
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(target.suffix + ".part")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(source.url, timeout=20) as reply, part.open("wb") as file, _progress() as bar:
            size = int(reply.headers.get("Content-Length") or 0) or None
            task = bar.add_task(source.file, total=size)
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.advance(task, len(chunk))
        if not digest.hexdigest().startswith(source.sha256):
            raise ModelError(f"{source.url}: the checksum is not {source.sha256}...; try again or fetch it another way")
        part.replace(target)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ModelError(
            f"cannot download {source.url} ({reason}): fetch it on another machine and put it at {target}, "
            "or pass --weights FILE"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
