"""Tries networks of timm and torchvision, and writes the page of them:
``python -m calib.research.networks --photos FOLDER --out docs/networks.md``.

Each is built with random weights, exported, read as any foreign classifier, and held against its
own PyTorch module and its gradient. Weights are random because no network is reached; batch
normalizations get the mean square of what comes, else the values of deep networks vanish or grow.

Where the gradient is not autograd's in float32, both are computed in float64: a rectifier whose
input is near zero may be on in one and off in the other by rounding. Where they differ even so,
central differences of the module's own scores decide. Autograd alone is no judge: that of
PyTorch 2.13 is wrong behind a convolution whose gradient comes through a transposed tensor.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from rich.console import Console

from calib.bench.machine import machine
from calib.research.command_line import run
from engines.backends.openvino import OpenVinoEngine
from engines.engine import Array
from engines.errors import SightlineError
from engines.files import read_object, whole_file, write_json
from engines.gradient import attach_gradient
from engines.graph import INT64, Graph
from engines.networks.network import Forward
from engines.networks.packages import EXPORTERS, Built, build
from engines.networks.registry import Classifier, load_classifier
from engines.objectives import class_score_cotangent
from engines.options import Option
from engines.typed_graph import to_double

DL_STREAMER = (
    "densenet121#96 dla34#96 dm_nfnet_f0#96 efficientnet_b0#96 efficientnetv2_rw_s#96"
    " inception_resnet_v2#139 mixnet_l#96 mobilenetv2_100#96 mobilenetv3_large_100#96"
    " mobilenetv3_small_100#96 regnetx_032#96 repvgg_a0#96 repvgg_b1#96 repvgg_b3#96"
    " resnest50d#96 resnet18#96 resnet34#96 resnet50#96 rexnet_100#96 semnasnet_100#96"
    " seresnet50#96 seresnext50_32x4d#96 swin_tiny_patch4_window7_224#224 tf_efficientnet_b0#96"
    " tf_efficientnetv2_b0#96 vgg16#224 vgg19#224"
)
"""The families that DL Streamer imports, each with the side that it is tried at."""
OTHERS = (
    "convnext_tiny#96 convnextv2_atto#96 vit_small_patch16_224#96"
    " deit_tiny_distilled_patch16_224#224 maxvit_rmlp_pico_rw_256#256 coatnet_nano_rw_224#224"
    " mobilenetv4_conv_small#96 ghostnet_100#96 inception_v3#139 legacy_xception#139"
    " hrnet_w18_small#96 fastvit_t8#128 edgenext_xx_small#128 mobilevit_xxs#128"
    " efficientformer_l1#224 tf_efficientnet_lite0#96"
)
ZOO = tuple(f"timm:{name}" for name in f"{DL_STREAMER} {OTHERS}".split())
"""Of each network its name and its side, ``timm:resnet50#96``."""
FURTHER = (
    "swinv2_tiny_window8_256#256 pvt_v2_b0#128 poolformer_s12#96 levit_128s#224"
    " tiny_vit_5m_224#224 repvit_m0_9#96 mobileone_s0#96 mixer_s32_224#224"
    " xcit_nano_12_p16_224#224 cait_xxs24_224#224 eva02_tiny_patch14_224#224 pit_ti_224#224"
    " crossvit_9_240#240 twins_svt_small#224 nest_tiny#224 hgnetv2_b0#96 ese_vovnet19b_dw#96"
    " cspdarknet53#96 skresnet18#96 botnet26t_256#256 efficientvit_b0#96 mambaout_femto#96"
    " starnet_s1#96 ecaresnet26t#96 coat_tiny#224 fasternet_t0#96"
)
BEYOND = tuple(f"timm:{name}" for name in FURTHER.split())
"""Further families, to find what fails."""
TIMED = 20
DIFFERENCES_PX = 4
"""Differences are taken at so many values where the gradients are furthest apart, and as many where
ours is largest."""
STEP = 1e-3
EXACT, BY_DIFFERENCES = 1e-6, 1e-5
"""How far a gradient may be off in float64: from autograd's, and from differences."""


@dataclass(frozen=True)
class Trial:
    """What was found of a network.

    Attributes:
        network: its name and side.
        exporter: ``TorchScript`` or ``dynamo``.
        why: it does not run; empty where it does.
        parameters: of its module.
        stages: cells and channels of each map, ``56x96``.
        scores_off: the largest difference of scores from the module's, as a share of the largest.
        gradient_off: the median difference of the gradient at the pixels from autograd's, relative
            to each value.
        torch_off: the same of autograd in float32 against float64: how much the network itself
            enlarges rounding.
        exact_off: the largest difference from autograd's in float64 as a share of the largest
            value; None where float32 told enough.
        differences_off, autograd_off: the same from central differences at a few values, of ours
            and of autograd's; None where float64 told enough.
        is_same_class, is_mapped: the class is the module's on every photo; no map is zero, and
            those of two photos differ.
        forward_ms, whole_ms: median times of the forward pass, and of that with the gradient to the
            pixels, in one run.
    """

    network: str
    exporter: str
    why: str = ""
    parameters: int = 0
    stages: tuple[str, ...] = ()
    scores_off: float = 0.0
    gradient_off: float = 0.0
    torch_off: float = 0.0
    exact_off: float | None = None
    differences_off: float | None = None
    autograd_off: float | None = None
    is_same_class: bool = False
    is_mapped: bool = False
    forward_ms: float = 0.0
    whole_ms: float = 0.0


def try_network(
    network: str, exporter: str, folder: Path, photos_nchw: Array, timed: int = 0
) -> Trial:
    """Build, export, read and run a network.

    Args:
        network: its name and side, ``timm:resnet50#96``.
        exporter: one of ``EXPORTERS``.
        folder: for its file.
        photos_nchw: two or more, normalised, of any size; float32.
        timed: how often both graphs are timed; 0 for not at all.
    """
    name, _, side = network.partition("#")
    trial = Trial(network, exporter)
    try:
        built = build(name, "random", int(side) if side else None)
        photos = _sized(photos_nchw, built.side_px)
        settle(built, photos)
        path = folder / "network.onnx"
        export(built, exporter, path)
        classifier = load_classifier(str(path))
        return _tried(trial, built, classifier, photos, timed)
    except SightlineError as error:
        return replace(trial, why=str(error).removeprefix(str(folder / "network.onnx")))
    except Exception as error:  # the exporters and PyTorch raise whatever they meet
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return replace(trial, why=f"{type(error).__name__}: {text[:160]}")


def _sized(photos_nchw: Array, side_px: int) -> Array:
    import torch

    given = torch.from_numpy(photos_nchw)
    found: Array = torch.nn.functional.interpolate(
        given, (side_px, side_px), mode="bilinear", antialias=True
    ).numpy()
    return found


def settle(built: Built, photos_nchw: Array) -> None:
    """Make the batch normalizations of untrained networks divide by about what comes, a power of 2,
    so that exporters fold them into convolutions without rounding.
    """
    import torch

    def fit(norm: Any, given: Sequence[Any]) -> None:
        power = float(given[0].square().mean())
        norm.running_mean.zero_()
        norm.running_var.fill_(4.0 ** round(np.log(max(power, 1e-12)) / np.log(4)))

    kind: Any = torch.nn.modules.batchnorm._BatchNorm
    norms = [m for m in built.module.modules() if isinstance(m, kind) and m.track_running_stats]
    with torch.no_grad():
        for norm in norms:
            norm.eps = 0.0
            if norm.weight is not None:
                norm.weight.fill_(1.0)
        hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
        built.module(torch.from_numpy(photos_nchw))
        for hook in hooks:
            hook.remove()


def export(built: Built, exporter: str, path: Path) -> None:
    """Write the module as ONNX."""
    import torch

    from engines.networks.packages import quiet

    image = torch.zeros(1, 3, built.side_px, built.side_px)
    with quiet(), torch.no_grad():
        EXPORTERS[exporter](built.module, image, path)


def gradient_graph(classifier: Classifier) -> tuple[Graph, Forward]:
    """The forward graph with the gradients of a class score; its outputs are ``scores_out`` and
    ``gradient_0`` (pixels), ``gradient_1`` ... of the stages.
    """
    graph, forward = classifier.forward_graph()
    wanted = graph.input("wanted", INT64, (1,))
    tensors = ["pixels", *(forward.layers[name] for name in classifier.network.head_layers)]
    cotangents = class_score_cotangent(graph, forward.scores, wanted)
    gradients = attach_gradient(graph, cotangents, tensors)
    graph.output(forward.scores, "scores_out")
    for place, tensor in enumerate(tensors):
        graph.output(gradients[tensor], f"gradient_{place}")
    return graph, forward


def autograd(module: Any, photo_nchw: Array) -> tuple[int, Array, Array]:
    """(best class, scores, gradient of its score) by PyTorch, in the photo's own precision."""
    import torch

    image = torch.from_numpy(photo_nchw).requires_grad_(True)
    scores = module(image)
    best = int(scores.argmax())
    (gradient,) = torch.autograd.grad(scores[0, best], image)
    return best, scores.detach().numpy(), gradient.numpy()


def _tried(trial: Trial, built: Built, classifier: Classifier, photos: Array, timed: int) -> Trial:
    graph, forward = gradient_graph(classifier)
    engine = OpenVinoEngine(graph.model(), "fp32")
    answers, scores_off, gradient_off, same = [], [0.0], [0.0], True
    for photo in photos[:, None]:
        best, scores, gradient = autograd(built.module, photo)
        answer = engine.infer({"pixels": photo, "wanted": np.array([best])})
        same &= int(answer["scores_out"].argmax()) == best
        scores_off.append(float(np.abs(answer["scores_out"] - scores).max() / np.abs(scores).max()))
        gradient_off.append(_median_off(answer["gradient_0"], gradient))
        answers.append(answer)
    photo = photos[int(np.argmax(gradient_off[1:]))][None]
    gradient = autograd(built.module, photo)[2]
    exact = autograd(built.module.double(), photo.astype(np.float64))[2]
    layers = classifier.network.head_layers
    maps = [f"gradient_{place}" for place in range(len(layers) + 1)]
    mapped = all(np.abs(answer[name]).max() > 0 for answer in answers for name in maps)
    mapped &= not np.array_equal(answers[0]["gradient_0"], answers[1]["gradient_0"])
    shapes = [graph.shape(forward.layers[name]) for name in layers]
    found = replace(
        trial,
        parameters=sum(value.numel() for value in built.module.parameters()),
        stages=tuple(f"{shape[2]}x{shape[1]}" for shape in shapes),
        scores_off=max(scores_off),
        gradient_off=max(gradient_off),
        torch_off=_median_off(gradient, exact),
        is_same_class=bool(same),
        is_mapped=bool(mapped),
    )
    if not _is_close(found):
        found = _decided(found, built.module, graph.model(), photo, exact)
    built.module.float()
    if timed:
        found = _timed(found, classifier, photos[:1], timed)
    engine.close()
    return found


def _decided(
    trial: Trial, module: Any, model: onnx.ModelProto, photo: Array, autograds: Array
) -> Trial:
    """The trial with what float64 says, and differences where that is not enough.

    Args:
        trial: so far.
        module: in float64.
        model: of ``gradient_graph``.
        photo: ``[1, 3, S, S]``.
        autograds: the gradient by PyTorch in float64.
    """
    import torch

    exact = photo.astype(np.float64)
    with torch.no_grad():
        best = int(module(torch.from_numpy(exact)).argmax())
    feeds = {"pixels": exact, "wanted": np.array([best])}
    answers: Any = ReferenceEvaluator(to_double(model)).run(["gradient_0"], feeds)
    ours = answers[0]
    off = float(np.abs(ours - autograds).max() / np.abs(autograds).max())
    trial = replace(trial, exact_off=off)
    if off < EXACT:
        return trial
    furthest, largest = (np.argsort(np.abs(v).ravel()) for v in (ours - autograds, ours))
    places = np.concatenate([furthest[-DIFFERENCES_PX:], largest[-DIFFERENCES_PX:]])
    slopes = differences(module, exact, best, places)
    scale = np.abs(slopes).max()
    both = [np.abs(v.ravel()[places] - slopes).max() / scale for v in (ours, autograds)]
    return replace(trial, differences_off=float(both[0]), autograd_off=float(both[1]))


def differences(module: Any, photo: Array, best: int, places: Array) -> Array:
    """The slopes of a score by central differences of two steps, extrapolated (Richardson).

    Args:
        module: in float64.
        photo: ``[1, 3, S, S]``, float64.
        best: the class.
        places: of the values that are moved, in the flat photo.
    """
    import torch

    def slope(place: int, step: float) -> float:
        moved = np.repeat(photo, 2, axis=0)
        moved.reshape(2, -1)[:, place] += (step, -step)
        with torch.no_grad():
            scores = [module(torch.from_numpy(each[None]))[0, best] for each in moved]
        return float(scores[0] - scores[1]) / (2 * step)

    found = [(4 * slope(at, STEP) - slope(at, 2 * STEP)) / 3 for at in places.tolist()]
    return np.array(found)


def _median_off(found: Array, expected: Array) -> float:
    return float(np.median(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30)))


def _timed(trial: Trial, classifier: Classifier, photo: Array, turns: int) -> Trial:
    """Both graphs in turns in one process, in fp32; medians."""
    plain, forward = classifier.forward_graph()
    plain.output(forward.scores, "scores_out")
    whole, forward = classifier.forward_graph()
    best = whole.add("ArgMax", forward.scores, axis=1, keepdims=0)
    cotangents = class_score_cotangent(whole, forward.scores, best)
    gradients = attach_gradient(whole, cotangents, ["pixels"])
    largest = whole.add(
        "ReduceMax",
        whole.add("Abs", gradients["pixels"]),
        whole.constant([1], np.int64),
        keepdims=0,
    )
    whole.output(largest, "map")
    engines = [OpenVinoEngine(graph.model(), "fp32") for graph in (plain, whole)]
    times: list[list[float]] = [[], []]
    for turn in range(turns + 3):
        for engine, taken in zip(engines, times, strict=True):
            start = time.perf_counter()
            engine.infer({"pixels": photo})
            if turn >= 3:
                taken.append(1000 * (time.perf_counter() - start))
    for engine in engines:
        engine.close()
    return replace(
        trial, forward_ms=float(np.median(times[0])), whole_ms=float(np.median(times[1]))
    )


def _is_close(trial: Trial) -> bool:
    """Whether the gradient is autograd's, as far as float32 tells."""
    return trial.gradient_off < max(1e-4, 10 * trial.torch_off)


def decided_by(trial: Trial) -> str:
    """What shows that the gradient is right; empty where nothing does."""
    if _is_close(trial):
        return "autograd"
    if trial.exact_off is not None and trial.exact_off < EXACT:
        return "autograd in float64"
    if trial.differences_off is not None and trial.differences_off < BY_DIFFERENCES:
        return "differences"
    return ""


def runs(trial: Trial) -> bool:
    """Whether the network runs as it should: the class is its own, maps are there, and the gradient
    is right.
    """
    return bool(not trial.why and trial.is_same_class and trial.is_mapped and decided_by(trial))


def networks(
    photos: Annotated[Path, Option("A folder or archive with two photos or more.")],
    out: Annotated[Path, Option("The page to write (Markdown).")] = Path("docs/networks.md"),
    only: Annotated[
        str, Option("Comma-separated networks, timm:resnet50#96; all unless told.")
    ] = "",
    exporters: Annotated[str, Option("Comma-separated.")] = "TorchScript,dynamo",
    kept: Annotated[Path, Option("What was found before, and is added to (.json).")] = Path(
        "networks.json"
    ),
    timed: Annotated[int, Option("How often each graph is timed.", min=0)] = TIMED,
) -> None:
    """Try networks of timm and torchvision, and write the page that says which run."""
    console = Console(stderr=True)
    found = {name: Trial(**value) for name, value in read_object(kept).items()}
    shown = two_photos(photos)
    for network in only.split(",") if only else (*ZOO, *BEYOND):
        for exporter in exporters.split(","):
            key = f"{network} {exporter}"
            if key in found:
                continue
            with TemporaryDirectory() as folder:
                turns = timed if exporter == "TorchScript" else 0
                found[key] = try_network(network, exporter, Path(folder), shown, turns)
            console.print(key, "runs" if runs(found[key]) else f"does not run: {found[key]}")
            write_json(kept, {name: asdict(trial) for name, trial in found.items()})
    with whole_file(out) as part:
        part.write_text(page(list(found.values())), encoding="utf-8")


def two_photos(source: Path) -> Array:
    """The first and the last picture of a source, normalised: ``[2, 3, 224, 224]``."""
    from engines.networks.preprocessing import Preprocessing
    from engines.resizing import resized
    from realtime.sources.spec import open_source

    with open_source(str(source)) as opened:
        frames = [frame.image_bgr for frame in opened]
    usual = Preprocessing()
    chosen = [resized(frame, 224)[..., ::-1] for frame in (frames[0], frames[-1])]
    pixels = (np.stack(chosen) - np.array(usual.mean)) / np.array(usual.std)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)


HEADER = """# Networks that were tried

{good} of {tried} networks run, {most_good} of {most_tried} of the families that users name most.
Each was built by its package with random weights (no others were at hand), exported by PyTorch, and
read as any ONNX file. `#96` is the side in pixels. A network runs if

- the class is that of its own PyTorch module on two photos,
- no map of any stage is zero, and maps of two photos differ,
- its gradient at the pixels is right.

Three oracles decide about the gradient, in this order; the last column names the one that did.

1. **autograd**: in float32 the median relative difference from PyTorch's gradient is below 1e-4, or
   below ten times that of PyTorch's float32 from its float64, where the network itself enlarges
   rounding.
2. **autograd in float64**: both are computed in float64, and the largest difference is below 1e-6
   of the largest value. In float32 a rectifier whose input is near zero is on in one and off in
   the other.
3. **differences**: where they differ in float64 too, the network's own scores are computed at moved
   pixels: the four where both differ most, and the four where ours is largest. PyTorch's autograd
   (2.13) is wrong behind a 1 x 1 convolution whose gradient comes through a transposed tensor.

Machine: {machine}. It was busy with other work: milliseconds say little, the ratio more, as both
graphs were timed in turns in one process. Medians, fp32. *Whole* is the forward pass and the
backward pass to the pixels.
"""
TITLES = (
    "network",
    *EXPORTERS,
    "parameters",
    "maps (cells x channels)",
    "forward ms",
    "whole ms",
    "ratio",
    "gradient off",
    "decided by",
)
COLUMNS = ("", f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|")


def page(trials: Sequence[Trial]) -> str:
    """The page, in Markdown."""
    by_network: dict[str, dict[str, Trial]] = {}
    for trial in trials:
        by_network.setdefault(trial.network, {})[trial.exporter] = trial
    good = [name for name, found in by_network.items() if any(runs(t) for t in found.values())]
    header = HEADER.format(
        good=len(good),
        tried=len(by_network),
        most_good=sum(name in ZOO for name in good),
        most_tried=sum(name in ZOO for name in by_network),
        machine=machine(),
    )
    parts = {"The families that users name most": ZOO, "Others": ()}
    lines = header.splitlines()
    for title, members in parts.items():
        chosen = [name for name in by_network if (name in ZOO) == bool(members)]
        if chosen:
            lines += [
                "",
                f"## {title}",
                *COLUMNS,
                *(_row(name, by_network[name]) for name in chosen),
            ]
    command = "python -m calib.research.networks --photos FOLDER --out docs/networks.md"
    return "\n".join([*lines, "", f"Made by `{command}`, with timm and torchvision installed.", ""])


def _row(network: str, found: dict[str, Trial]) -> str:
    best = next((each for each in found.values() if runs(each)), next(iter(found.values())))
    ratio = f"{best.whole_ms / best.forward_ms:.1f}" if best.forward_ms else ""
    times = (f"{value:.1f}" if value else "" for value in (best.forward_ms, best.whole_ms))
    size = f"{best.parameters / 1e6:.1f} M" if best.parameters else ""
    verdicts = [_verdict(found.get(name)) for name in EXPORTERS]
    off = f"{best.gradient_off:.0e}" if best.parameters else ""
    row = [network, *verdicts, size, ", ".join(best.stages), *times, ratio, off, _oracle(best)]
    return f"| {' | '.join(row)} |"


def _oracle(trial: Trial) -> str:
    """What decided, and how far the gradient is off by it."""
    said = decided_by(trial) if runs(trial) else ""
    if said == "autograd in float64":
        return f"{said}: {trial.exact_off:.0e}"
    if said == "differences":
        return f"{said}: ours {trial.differences_off:.0e} off, autograd {trial.autograd_off:.0e}"
    return said


def _verdict(trial: Trial | None) -> str:
    if trial is None:
        return "not tried"
    if runs(trial):
        return "runs"
    return trial.why.replace("|", "/").replace("\n", " ")[:160] or "differs"


if __name__ == "__main__":
    run(networks)
