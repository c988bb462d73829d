"""Networks of timm, torchvision and Hugging Face by name: each is exported to ONNX once and kept in
the cache.

``timm:resnet50``, ``torchvision:resnet50`` and ``hf:microsoft/resnet-50`` become an ONNX file with
a ``config.json`` beside it, which says what their input is. From then on they are read as any other
file, and neither PyTorch nor the package is imported.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engines.downloads import cache_dir
from engines.engine import Array
from engines.errors import DownloadError, ModelError, install_packages
from engines.files import digest_of_file, read_object, whole_file
from engines.graph import OPSET
from engines.networks.weights import read_weights
from engines.text import Terminal

RANDOM = "random"
FORMAT = 1
"""Of the exported files: another one is exported anew."""
SEED = 0
USUAL_SIDE_PX = 224
NEAR_ZERO = 1e-3
"""Untrained weights that are all this small switch off what they belong to."""
SAME_SCORES = 1e-3
"""Of the largest score: so much may the exported network differ from its own package's."""


@dataclass(frozen=True)
class Built:
    """A network as its package builds it.

    Attributes:
        module: the PyTorch module; gives the class scores ``[N, classes]``.
        side_px: of its input.
        sidecars: the files that say what its input is and what its classes are called, by name; see
            ``engines.networks.sidecars``.
    """

    module: Any
    side_px: int
    sidecars: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a package.

    Attributes:
        name: of the network.
        size_px: side of its input; its own when None.
        classes: how many; its own when None.
        is_pretrained: whether its published weights are wanted.
    """

    name: str
    size_px: int | None
    classes: int | None
    is_pretrained: bool


@dataclass(frozen=True)
class Package:
    """A package that networks are taken from.

    Attributes:
        modules: that must be there, each with what ``pip install`` takes for it; the first is the
            one whose version counts.
        build: makes a network.
    """

    modules: Mapping[str, str]
    build: Callable[[Wanted], Built]


def is_packaged(model: str) -> bool:
    """Whether ``--model`` names a network of a package, such as ``timm:resnet50``."""
    return model.partition(":")[0] in PACKAGES and ":" in model


def exported(model: str, weights: str | None = None, size_px: int | None = None) -> Path:
    """The ONNX file of a network by its name: from the cache, else exported now.

    Args:
        model: ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME``.
        weights: None for the published ones, ``random``, or a file of them.
        size_px: side of the input; the network's own when None.

    Raises:
        ModelError: its package is missing, does not know the name, or the network cannot be
            exported.
        DownloadError: its published weights cannot be fetched.
    """
    kind, _, name = model.partition(":")
    package = PACKAGES[kind]
    try:
        version = importlib.metadata.version(next(iter(package.modules.values())))
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    folder, usual = (
        cache_dir() / "networks" / _key(kind, name, version, weights, size)
        for size in (size_px, None)
    )
    path = folder / "model.onnx"
    if path.is_file():
        return path
    if size_px is not None and _side_of(usual) == size_px:
        return usual / "model.onnx"
    _check_installed(model, package)
    told = "is exported once" if weights else "is fetched and exported once"
    Terminal(stderr=True).print(
        f"{model} {told}, which takes a minute, and kept in {folder.parent}",
        style="dim",
        soft_wrap=True,
        markup=False,
    )
    with quiet():
        built = build(model, weights, size_px)
        for file, content in built.sidecars.items():
            with whole_file(folder / file) as part:
                part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        with whole_file(path) as part:
            write_onnx(built, part, model)
    return path


def _side_of(folder: Path) -> int | None:
    """The side of what was exported there; None where nothing was, or nothing says so."""
    config = folder / "config.json"
    if not (folder / "model.onnx").is_file() or not config.is_file():
        return None
    sizes = read_object(config).get("pretrained_cfg", {}).get("input_size", [None])
    return int(sizes[-1]) if sizes[-1] else None


def _key(kind: str, name: str, version: str, weights: str | None, size_px: int | None) -> str:
    """Name of the folder: another version of the package, or other weights, have another."""
    given = weights or ""
    if weights not in (None, RANDOM) and Path(given).is_file():
        given = digest_of_file(Path(given))
    said = json.dumps([FORMAT, kind, name, version, given, size_px])
    short = re.sub(r"[^\w.-]+", "-", name)[-60:]
    return f"{kind}-{short}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _check_installed(model: str, package: Package) -> None:
    missing = [
        pip for module, pip in package.modules.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ModelError(
            f"{model} needs {' and '.join(missing)} to be exported once:"
            f" {install_packages(*missing)}",
            option="model",
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch and the packages print and log; standard output belongs to results."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def build(model: str, weights: str | None = None, size_px: int | None = None) -> Built:
    """Make the PyTorch module of a network; the arguments and errors are those of ``exported``."""
    import torch

    kind, _, name = model.partition(":")
    make = PACKAGES[kind].build
    torch.manual_seed(SEED)
    built = make(Wanted(name, size_px, None, weights is None))
    if weights == RANDOM:
        awaken(built.module)
    elif weights is not None:
        state = _bare(read_weights(Path(weights)))
        classes = _classes_of(built.module, state)
        if classes is not None:
            built = make(Wanted(name, size_px, classes, False))
        _load(built.module, state, f"weights {weights}", model)
    built.module.eval()
    return built


def awaken(module: Any) -> None:
    """Give untrained weights a signal at every depth, the same each time.

    Many networks begin with factors of 0 or nearly so, which switch their blocks off until training
    has moved them: maps would show nothing of them.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith("bias") or not value.is_floating_point():
                continue
            if float(value.abs().max()) <= NEAR_ZERO:
                span = 0.5 if value.ndim < 2 else 0.5 / value[0].numel() ** 0.5
                value.copy_(span * (1 + torch.rand(value.shape, generator=generator)))


def _bare(values: Mapping[str, Any]) -> dict[str, Any]:
    """Weights without what those who save them put before all names, and without counters."""
    return {
        re.sub(r"^(module\.|model\.|_orig_mod\.)+", "", name): value
        for name, value in values.items()
        if not name.endswith("num_batches_tracked")
    }


def _classes_of(module: Any, state: Mapping[str, Array]) -> int | None:
    """How many classes a file of weights has, where it differs from the network in that alone."""
    counts = {
        state[name].shape[0]
        for name, value in _bare(module.state_dict()).items()
        if name in state
        and state[name].shape[:1] != tuple(value.shape)[:1]
        and state[name].shape[1:] == tuple(value.shape)[1:]
    }
    return int(counts.pop()) if len(counts) == 1 else None


def _load(module: Any, state: Mapping[str, Array], what: str, model: str) -> None:
    """Give a module the weights of a file.

    Raises:
        ModelError: they are others.
    """
    import torch

    own = _bare(module.state_dict())
    wrong = [f"'{name}' is missing" for name in own if name not in state]
    wrong += [
        f"'{name}' has the shape {list(state[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != tuple(value.shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(f"{what} are not those of {model}: {wrong[0]}{more}", option="weights")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(torch.from_numpy(np.array(state[name])))


def _timm(wanted: Wanted) -> Built:
    timm = _imported("timm")
    timm.layers.set_fused_attn(False)
    given: dict[str, Any] = {"exportable": True}
    if wanted.classes:
        given["num_classes"] = wanted.classes
    _check_known("timm", wanted.name, wanted.name.split(".")[0], timm.list_models())
    sized = [{**given, "img_size": wanted.size_px}, given] if wanted.size_px else [given]
    module = _made(
        f"timm:{wanted.name}",
        sized,
        lambda more: timm.create_model(wanted.name, pretrained=wanted.is_pretrained, **more),
    )
    config = dict(timm.data.resolve_model_data_config(module))
    side = wanted.size_px or int(config["input_size"][-1])
    config["input_size"] = [3, side, side]
    names = list((module.pretrained_cfg or {}).get("label_names") or ())
    subset = timm.data.infer_imagenet_subset(module)
    if not names and subset and not wanted.classes:
        info = timm.data.ImageNetInfo(subset)
        described = (info.index_to_description(i) for i in range(info.num_classes()))
        names = [text.split(",")[0] for text in described]
    return Built(module, side, {"config.json": _config(wanted.name, config, names)})


def _config(name: str, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """In timm's form, which says it for torchvision's networks too."""
    return {"architecture": name, "pretrained_cfg": dict(config), "label_names": list(names)}


def _torchvision(wanted: Wanted) -> Built:
    models = _imported("torchvision").models
    known = models.list_models(module=models)
    _check_known("torchvision", wanted.name, wanted.name, known)
    weights = models.get_model_weights(wanted.name).DEFAULT
    given: dict[str, Any] = {"weights": weights if wanted.is_pretrained else None}
    if wanted.classes:
        given["num_classes"] = wanted.classes
    if wanted.name in ("googlenet", "inception_v3") and not wanted.is_pretrained:
        given["init_weights"] = True
    if wanted.name.startswith("vit") and wanted.size_px:
        given["image_size"] = wanted.size_px
    module = _made(
        f"torchvision:{wanted.name}", [given], lambda more: models.get_model(wanted.name, **more)
    )
    how = weights.transforms()
    side = wanted.size_px or int(how.crop_size[0])
    config = {
        "input_size": [3, side, side],
        "mean": list(how.mean),
        "std": list(how.std),
        "interpolation": str(how.interpolation.value),
        "crop_pct": min(1.0, how.crop_size[0] / how.resize_size[0]),
        "crop_mode": "center",
    }
    names = [] if wanted.classes else weights.meta["categories"]
    return Built(module, side, {"config.json": _config(wanted.name, config, names)})


def _hf(wanted: Wanted) -> Built:
    transformers, name = _imported("transformers"), wanted.name
    more = {"num_labels": wanted.classes} if wanted.classes else {}
    kind = transformers.AutoModelForImageClassification
    by_kind = not Path(name).exists() and name in transformers.CONFIG_MAPPING
    if by_kind and not wanted.is_pretrained:
        config = transformers.AutoConfig.for_model(name, **more)
        how: dict[str, Any] = {}
    else:
        auto = transformers.AutoConfig
        config = _made(f"hf:{name}", [more], lambda given: auto.from_pretrained(name, **given))
        how = _hf_processor(transformers, name)
    config._attn_implementation = "eager"
    if type(config) not in kind._model_mapping:
        raise ModelError(f"hf:{name} is no image classifier", option="model")
    if wanted.is_pretrained:
        module = _made(f"hf:{name}", [{}], lambda _: kind.from_pretrained(name, config=config))
    else:
        module = kind.from_config(config)
    names = {str(index): label for index, label in config.id2label.items()}
    if names.get("0") == "LABEL_0":
        names = {}
    side = wanted.size_px or _hf_side(config, how)
    found = {"config.json": {"id2label": names}, "preprocessor_config.json": how}
    return Built(_logits_of(module), side, {file: said for file, said in found.items() if said})


def _hf_processor(transformers: Any, name: str) -> dict[str, Any]:
    """What its ``preprocessor_config.json`` says; empty where there is none."""
    base = transformers.image_processing_base.ImageProcessingMixin
    try:
        found, _ = base.get_image_processor_dict(name)
    except Exception:  # transformers raises OSError and more where there is no such file
        return {}
    return dict(found)


def _hf_side(config: Any, how: Mapping[str, Any]) -> int:
    cropped = how.get("crop_size") if how.get("do_center_crop") else None
    for stated in (cropped, how.get("size"), getattr(config, "image_size", None)):
        found = stated
        if isinstance(stated, Mapping):
            found = stated.get("height") or stated.get("shortest_edge")
        elif isinstance(stated, Sequence) and stated:
            found = stated[0]
        if isinstance(found, int):
            return found
    return USUAL_SIDE_PX


def _logits_of(module: Any) -> Any:
    """A module that gives the class scores alone."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, pixels: Any) -> Any:
            return self.model(pixels).logits

    return Logits()


PACKAGES: Mapping[str, Package] = {
    "timm": Package({"timm": "timm", "torch": "torch"}, _timm),
    "torchvision": Package({"torchvision": "torchvision", "torch": "torch"}, _torchvision),
    "hf": Package({"transformers": "transformers", "torch": "torch"}, _hf),
}


def _imported(name: str) -> Any:
    """A package. torchvision's compiled operators are those of detectors: where they are of another
    build of PyTorch, they are declared, so that it can be imported without them.
    """
    import torch

    try:
        return importlib.import_module(name)
    except (RuntimeError, ImportError) as error:
        if "torchvision::" not in str(error):
            raise ModelError(f"{name} cannot be imported: {_line(error)}") from error
    spec = importlib.util.find_spec("torchvision")
    folder = Path((spec.submodule_search_locations or ["."])[0] if spec else ".")
    text = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    operators = set(re.findall(r'(?:register_meta\("|torchvision::)(\w+)"', text))
    make: Any = torch.library.Library
    _DECLARED.append(make("torchvision", "DEF"))
    for operator in operators:
        _DECLARED[0].define(f"{operator}(Tensor x) -> Tensor")
    return importlib.import_module(name)


_DECLARED: list[Any] = []
"""PyTorch forgets operators whose library is not kept."""


def _check_known(package: str, name: str, stem: str, known: Sequence[str]) -> None:
    """Refuse a name that the package does not know; one with a slash or a colon is of a hub."""
    if stem in known or "/" in name:
        return
    near = difflib.get_close_matches(stem, known, 3)
    like = f": is it {', '.join(near)}?" if near else ""
    raise ModelError(f"{package} has no network '{name}'{like}", option="model")


def _made(
    model: str, tries: Sequence[Mapping[str, Any]], make: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """What a package makes, with the first options that it takes.

    Raises:
        DownloadError: it cannot fetch what it needs.
        ModelError: it refuses.
    """
    for place, given in enumerate(tries):
        try:
            return make(given)
        except TypeError as error:
            if place + 1 == len(tries):
                raise ModelError(f"{model} cannot be built: {_line(error)}") from error
        except Exception as error:  # each package and each network library has errors of its own
            raise DownloadError(
                f"the files of {model} cannot be fetched ({_line(error)}): try again online, or"
                " name a file of weights, or random",
                option="weights",
            ) from error
    raise AssertionError("there is a last try")


def _line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text[:200].rstrip(" .:")


Exporter = Callable[[Any, Any, Path], None]


def export_by_tracing(module: Any, image: Any, path: Path) -> None:
    """With PyTorch's older exporter, which needs no other package."""
    import torch

    torch.onnx.export(module, (image,), str(path), dynamo=False, opset_version=OPSET)


def export_by_dynamo(module: Any, image: Any, path: Path) -> None:
    """With PyTorch's newer exporter, which needs onnxscript."""
    import torch

    torch.onnx.export(module, (image,), str(path), dynamo=True, external_data=False, verbose=False)


EXPORTERS: Mapping[str, Exporter] = {"TorchScript": export_by_tracing, "dynamo": export_by_dynamo}


def write_onnx(built: Built, path: Path, model: str) -> None:
    """Export a network with the first exporter whose file scores an image as the module does.

    Raises:
        ModelError: none does.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    image = torch.randn(1, 3, built.side_px, built.side_px, generator=generator)
    said = []
    for name, export in EXPORTERS.items():
        try:
            with torch.no_grad():
                export(built.module, image, path)
                expected = built.module(image).numpy()
            proto = onnx.load(path)
            proto.producer_version = ""  # another PyTorch writes the same file
            path.write_bytes(proto.SerializeToString())
            _check_scores(path, image.numpy(), expected)
            return
        except Exception as error:  # the exporters raise whatever they meet
            said.append(f"{name}: {_line(error)}")
    raise ModelError(f"{model} cannot be exported to ONNX ({'; '.join(said)})", option="model")


def _check_scores(path: Path, image: Array, expected: Array) -> None:
    """Raise ValueError where the exported network scores an image otherwise than the module."""
    from engines.backends.openvino import shared_core  # only where it is used

    how = {"INFERENCE_PRECISION_HINT": "f32"}
    found = shared_core().compile_model(str(path), "CPU", how)(image)[0]
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= SAME_SCORES:
        raise ValueError(f"its scores differ by {difference:.1e} of the largest")
