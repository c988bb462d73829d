"""Measures on real images which ranges 8 bits must cover, and which layers stay in floating point.

The ``calibrate`` command chooses the images, writes the calibration, and shows what each layer
costs.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.data.choose import IdsOption, ImagesOption
from calib.data.datasets import Sample, decoded, load_dataset
from calib.evaluation.evaluate import evaluate
from calib.precision.build import frames_of
from calib.precision.ranges import METHODS, Histogram, histograms, ranges_of
from engines import certificate as certificates
from engines.backends.openvino import OpenVinoEngine
from engines.build import AnyHead, assemble, build_graph
from engines.certificate import FEWEST_FRAMES, Certificate, Thresholds, certify, correlation
from engines.choose import calibration_paths, choose_head, chosen_spec
from engines.dense import DenseHead
from engines.errors import EngineError, OutputError, SourceError
from engines.files import checked_output, picture_kind, signed, whole_file
from engines.graph import Graph
from engines.head import Head
from engines.int8 import (
    CALIBRATION_FILE,
    Quantization,
    layers,
    source_of,
)
from engines.localizer import ImageBgr, Localization, Localizer
from engines.maps import PIXELS, MapSpec
from engines.networks.registry import Classifier
from engines.options import ADVANCED, LOOK_AT, MOST_OBJECTS, OUTPUT, EngineOptions, Option
from engines.text import Terminal
from realtime.latency_budget import classifier_with_notes

FITTED = (Head, DenseHead)  # training-free boxes are too unsteady to be held against others
MOST_ALONE = 40
"""Of a network with more layers groups are tried alone, not each layer, which takes minutes."""
MOST_TRIALS = 32
"""Of groups."""
CELLS = 8
FREE_BOX_IOU_P5 = 0.5
"""Asked of training-free boxes, which hang on single pixels of the map."""


@dataclass(frozen=True)
class Harm:
    """What an 8-bit graph changes, over some images.

    Attributes:
        map_correlation: median over images, of the map averaged to at most ``CELLS`` x ``CELLS``
            cells, as heads read it.
        box_iou: median overlap with the box of fp32; 1 where there is no fitted head.
        class_agreement: share of images with the same class.
    """

    map_correlation: float
    box_iou: float
    class_agreement: float

    @property
    def total(self) -> float:
        """One number to compare by: 0 for none."""
        return 3 - self.map_correlation - self.box_iou - self.class_agreement


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found.

    Attributes:
        quantization: to save; its card holds the rest.
        certificate: against fp32, on images that no range was measured on.
        by_method: harm of each way to choose ranges.
        by_layer: harm of each layer alone in 8 bits, in network order; of a network with more than
            ``MOST_ALONE`` layers that of groups, called by their first and last.
        path: where it was saved; None where it was not.
    """

    quantization: Quantization
    certificate: Certificate
    by_method: Mapping[str, Harm]
    by_layer: Mapping[str, Harm]
    path: Path | None = None

    def report(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        kept, layer = list(self.quantization.kept), self.quantization.layer
        return {"file": str(self.path), "kept": kept, "layer": layer, **self.quantization.card}


@dataclass
class Calibrator:
    """Compares trials of a graph in 8 bits with its reference in fp32.

    Args:
        classifier: the network.
        spec, head: the map and head that are compared.
        images_bgr: at least 16. Those at odd places are held out for the comparison; ranges are
            measured on the others.
        console: for progress.

    Raises:
        SourceError: there are too few images.
    """

    classifier: Classifier
    spec: MapSpec
    head: AnyHead | None
    images_bgr: Sequence[ImageBgr]
    console: Console
    _true: list[Localization] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.images_bgr) < 2 * FEWEST_FRAMES:
            raise SourceError(
                f"{len(self.images_bgr)} images are too few to calibrate on: give at least"
                f" {2 * FEWEST_FRAMES}"
            )
        self.reference = self._opened(build_graph(self.classifier, self.spec, self.head), "fp32")
        self.held_out = list(self.images_bgr[1::2])
        self._true = self.reference.localize(self.held_out)

    def quantization(self, ranges: Mapping[str, float], kept: Sequence[str]) -> Quantization:
        """A trial with these ranges, and these layers in floating point."""
        return Quantization(
            dict(ranges),
            tuple(kept),
            self.classifier.digest,
            self.classifier.size_px,
            self.spec.objective,
            self.spec.layer,
        )

    def localizer(self, quantization: Quantization) -> Localizer:
        """The graph in 8 bits, opened."""
        graph = build_graph(self.classifier, self.spec, self.head, quantization=quantization)
        return self._opened(graph, "int8")

    def _opened(self, graph: onnx.ModelProto, precision: str) -> Localizer:
        localizer = Localizer(OpenVinoEngine(graph, precision))
        if isinstance(self.head, DenseHead):
            localizer.objects = MOST_OBJECTS
        return localizer

    def harm(self, quantization: Quantization) -> Harm:
        """What a trial changes on the images that are held out."""
        found = self.localizer(quantization).localize(self.held_out)
        pairs = list(zip(self._true, found, strict=True))
        fitted = isinstance(self.head, FITTED)
        overlaps = [certificates.box_iou(t, f) or 0.0 for t, f in pairs if fitted] or [1.0]
        maps = [correlation(_cells(t.map_hw), _cells(f.map_hw)) for t, f in pairs]
        same = [t.class_index == f.class_index for t, f in pairs]
        return Harm(float(np.median(maps)), float(np.median(overlaps)), float(np.mean(same)))


def calibrate(calibrator: Calibrator, method: str = "auto") -> Calibration:
    """Choose ranges and the layers that stay in floating point.

    Args:
        calibrator: the graph and its images.
        method: of choosing ranges, one of ``calib.precision.ranges.METHODS``; ``auto`` for the
            one that harms least.

    Raises:
        ModelError: the method is unknown.
        EngineError: no layer can run in 8 bits, or too few meet the certificate.
    """
    console = calibrator.console
    prepared = [calibrator.reference.prepare(image) for image in calibrator.images_bgr[::2]]
    measured, names, always = measure(
        calibrator.classifier, calibrator.spec.objective, prepared, console
    )
    used = _used(calibrator, names, always)
    if not used:
        raise EngineError(
            f"nothing of {calibrator.classifier.name} can run in 8 bits: it has no convolution nor"
            " fully connected layer but the first and the last; use bf16 or fp32"
        )
    methods = list(METHODS) if method == "auto" else [method]
    ranges = {each: ranges_of(measured, each) for each in methods}
    trials = {each: calibrator.quantization(ranges[each], always) for each in methods}
    by_method = {
        each: calibrator.harm(trials[each])
        for each in track(methods, "trying ranges", console=console)
    }
    best = min(by_method, key=lambda each: by_method[each].total)
    if len(used) > MOST_ALONE:
        groups = harm_of_groups(calibrator, ranges[best], names, used, by_method[best])
    else:
        groups = []
        for name in track(used, "layer by layer", console=console):
            trial = calibrator.quantization(ranges[best], [n for n in names if n != name])
            groups.append(((name,), calibrator.harm(trial)))
    by_layer = {_called(group): harm for group, harm in groups}
    ordered = sorted(groups, key=lambda each: -each[1].total / len(each[0]))
    worst = [name for group, _ in ordered for name in group]
    trial, certificate = _certified(calibrator, ranges[best], always, worst)
    card = _card(best, by_method, by_layer, certificate, len(calibrator.images_bgr))
    card["input"] = calibrator.classifier.preprocessing.stored()
    return Calibration(replace(trial, card=card), certificate, by_method, by_layer)


def _called(group: Sequence[str]) -> str:
    """The name of a layer, or of the first and the last of several that follow each other."""
    return group[0] if len(group) == 1 else f"{group[0]} .. {group[-1]} ({len(group)})"


def harm_of_groups(
    calibrator: Calibrator,
    ranges: Mapping[str, float],
    names: Sequence[str],
    used: Sequence[str],
    whole: Harm,
) -> list[tuple[tuple[str, ...], Harm]]:
    """What groups of layers do alone in 8 bits. The group that harms most is halved, and both
    halves are tried, again and again, up to ``MOST_TRIALS`` trials or to single layers.

    Args:
        calibrator: compares.
        ranges: of the tensors.
        names: of all layers.
        used: the layers that may be in 8 bits, in network order.
        whole: the harm of all of them.

    Returns:
        Each group with its harm, in network order.
    """
    groups = [(tuple(used), whole)]
    for _ in track(range(MOST_TRIALS // 2), "halving groups of layers", console=calibrator.console):
        several = [each for each in groups if len(each[0]) > 1]
        if not several:
            break
        worst = max(several, key=lambda each: each[1].total)
        half, place = len(worst[0]) // 2, groups.index(worst)
        halves = worst[0][:half], worst[0][half:]
        trials = [
            calibrator.quantization(ranges, [name for name in names if name not in group])
            for group in halves
        ]
        found = [(each, calibrator.harm(trial)) for each, trial in zip(halves, trials, strict=True)]
        groups[place : place + 1] = found
    return groups


def _certified(
    calibrator: Calibrator,
    ranges: Mapping[str, float],
    always: Sequence[str],
    worst: Sequence[str],
) -> tuple[Quantization, Certificate]:
    """The first trial that meets the certificate, with more and more layers in floating point.

    Args:
        calibrator: compares.
        ranges: of the tensors.
        always: layers that are spared in any case.
        worst: all others, those first that suffer most.

    Raises:
        EngineError: none meets it.
    """
    fitted = isinstance(calibrator.head, FITTED)
    limits = Thresholds() if fitted else Thresholds(box_iou_p5=FREE_BOX_IOU_P5)
    for spared in _counts(len(worst)):
        trial = calibrator.quantization(ranges, [*always, *worst[:spared]])
        certificate = certify(
            calibrator.reference, calibrator.localizer(trial), calibrator.held_out, limits
        )
        calibrator.console.print(
            f"{spared} of {len(worst)} layers kept in floating point: {certificate}",
            style="dim",
            soft_wrap=True,
        )
        if certificate.passed:
            return trial, certificate
    raise EngineError(
        "no mix of 8-bit and floating-point layers meets the certificate: calibrate on images like"
        " those to come"
    )


def measure(
    classifier: Classifier, objective: str, prepared: Sequence[ImageBgr], console: Console
) -> tuple[dict[str, Histogram], list[str], tuple[str, ...]]:
    """Measure the whole graph back to the pixels, so that the ranges serve maps at any layer.

    Returns:
        (histograms of every tensor that may get a range, names of the layers, names of those that
        always stay in floating point).
    """
    graph = assemble(classifier, MapSpec(objective)).graph
    nodes = layers(graph)
    sources = list(dict.fromkeys(source_of(graph, str(node.input[0])) for node in nodes))
    localizer = Localizer(
        OpenVinoEngine(build_graph(classifier, MapSpec(objective), expose=sources), "fp32")
    )
    return (
        histograms(localizer, sources, prepared, console),
        [node.name for node in nodes],
        always_kept(graph),
    )


def rough_quantization(classifier: Classifier, objective: str) -> Quantization:
    """Ranges from two images of noise, to time a network that has no calibration.

    Speed does not depend on them.
    """
    shape = (2, classifier.size_px, classifier.size_px, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    measured, _, always = measure(classifier, objective, list(noise), Terminal(quiet=True))
    return Quantization(
        ranges_of(measured, "minmax"),
        always,
        classifier.digest,
        classifier.size_px,
        objective,
        PIXELS,
    )


def always_kept(graph: Graph) -> tuple[str, ...]:
    """The layers that read the image, make the scores, and make the gradient of the pixels.

    They are a few percent of the work, and the scores are compared with each other.
    """
    names = [node.name for node in layers(graph)]
    forward = [name for name in names if not name.startswith("grad_")]
    return tuple(dict.fromkeys([forward[0], forward[-1], names[-1]]))


def _counts(layers_in_all: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 9 ... all but one: the first layers matter most, and trials take long."""
    counts = [0]
    while counts[-1] < layers_in_all - 1:
        counts.append(min(layers_in_all - 1, max(counts[-1] + 1, counts[-1] * 3 // 2)))
    return counts


def _used(calibrator: Calibrator, names: Sequence[str], always: Sequence[str]) -> list[str]:
    """The layers of the graph that may be in 8 bits. Its backward pass may stop early."""
    assembled = assemble(calibrator.classifier, calibrator.spec, calibrator.head)
    present = {node.name for node in layers(assembled.graph)} - set(assembled.exact)
    return [name for name in names if name in present and name not in always]


def _card(
    method: str,
    by_method: Mapping[str, Harm],
    by_layer: Mapping[str, Harm],
    certificate: Certificate,
    images: int,
) -> dict[str, object]:
    return {
        "ranges": method,
        "images": images,
        "by_method": {name: asdict(harm) for name, harm in by_method.items()},
        "by_layer": {name: asdict(harm) for name, harm in by_layer.items()},
        "certificate": {"passed": certificate.passed, **asdict(certificate)},
    }


def _cells(map_hw: np.ndarray) -> np.ndarray:
    """A map averaged over as many square blocks as fit."""
    side = max(1, min(map_hw.shape) // CELLS)
    height, width = (n // side * side for n in map_hw.shape)
    blocks = map_hw[:height, :width].reshape(height // side, side, width // side, side)
    return np.asarray(blocks.mean(axis=(1, 3)), np.float64)


LAYERS = "cost of layers"
LAYERS_FILE = picture_kind(LAYERS, ".png", ".svg")
LABELS = (".csv", ".tsv", ".xml", ".json", ".txt")


@dataclass(frozen=True)
class CalibrateOptions:
    """What to calibrate on, how, and what to write; ``data`` is a label file or any source of
    frames.
    """

    data: Annotated[
        str,
        Option("Labelled images, as for evaluate, or any source: clip, folder, zip, demo:.", None),
    ]
    images: ImagesOption = None
    ids: IdsOption = None
    out: Annotated[
        Path | None, Option("FILE.json; else where --precision int8 finds it.", OUTPUT)
    ] = None
    ranges: Annotated[
        str,
        Option("minmax, percentile, entropy, mse, or auto: the one that harms least.", ADVANCED),
    ] = "auto"
    limit: Annotated[int, Option("How many images, evenly spread.", LOOK_AT, min=16)] = 128
    plot: Annotated[Path | None, Option("Picture of what each layer costs: FILE.png.", OUTPUT)] = (
        None
    )

    def read(self) -> tuple[list[ImageBgr], list[Sample]]:
        """Read the images.

        Returns:
            (images, their labels in the same order; no labels for a source that has none).

        Raises:
            SourceError: they cannot be read.
        """
        labelled = (
            self.images is not None
            or self.data.lower().endswith(LABELS)
            or Path(self.data).with_suffix(".csv").exists()
        )
        if not labelled:
            if self.ids is not None:
                raise SourceError("ids are of the images of a label file: give one", option="ids")
            return frames_of(self.data, self.limit // 2), []
        samples = load_dataset(Path(self.data), self.images, self.ids)
        places = np.unique(
            np.linspace(0, len(samples) - 1, min(self.limit, len(samples))).astype(int)
        )
        chosen = list(decoded(samples[place] for place in places))
        return [image for _, image in chosen], [sample for sample, _ in chosen]


def check_outputs(options: CalibrateOptions, engine: EngineOptions) -> None:
    """Refuse names that cannot be written to, before any work.

    Raises:
        OutputError: one of them; see ``engines.files.checked_output``.
    """
    out, plot = options.out, options.plot
    inputs = (options.data, options.images, options.ids, *engine.inputs)
    if plot:
        checked_output(plot, LAYERS_FILE, inputs)
    if out:
        checked_output(out, CALIBRATION_FILE, inputs)
    if out and plot and os.path.realpath(out) == os.path.realpath(plot):
        raise OutputError(
            f"{plot} cannot hold both the calibration and the picture: name another file",
            option=("out", "plot"),
        )


def calibrate_chosen(
    options: CalibrateOptions, choice: EngineOptions, console: Console
) -> Calibration:
    """Calibrate, save, draw, and print what it does to maps, boxes and CorLoc.

    Raises:
        SightlineError: the images, the network or the method cannot be used, or the certificate is
            not met.
    """
    check_outputs(options, choice)
    classifier = classifier_with_notes(choice, console)
    head = choose_head(choice, classifier)
    spec = chosen_spec(choice, head, classifier)
    with console.status("reading images ..."):
        pictures, samples = options.read()
    calibrator = Calibrator(classifier, spec, head, pictures, console)
    found = calibrate(calibrator, options.ranges)
    labelled = [sample for sample in samples[1::2] if sample.truths]
    before = after = None
    if labelled and head is not None:
        engines = calibrator.reference, calibrator.localizer(found.quantization)
        found_by = [evaluate(labelled, engine, console, None)[0] for engine in engines]
        before, after = (float(each["corloc"]) for each in found_by)
    card = {
        **found.quantization.card,
        "data": options.data if "://" in options.data else Path(options.data).name,
    }
    card |= {"corloc_fp32": before, "corloc_int8": after, "judged_images": len(calibrator.held_out)}
    quantization = replace(found.quantization, card=card)
    path = options.out or calibration_paths(classifier, spec.objective)[0]
    quantization.save(path)
    console.print(str(found.certificate), highlight=False, soft_wrap=True)
    console.print(table_of(found))
    if before is not None and after is not None:
        console.print(
            f"CorLoc {100 * before:.1f} % in fp32, {100 * after:.1f} % in int8, on {len(labelled)}"
            " images"
        )
    console.print(f"wrote {path}", soft_wrap=True)
    result = replace(found, quantization=quantization, path=path)
    if options.plot:
        plot_layers(result, options.plot, choice.model)
        console.print(f"wrote {options.plot}")
    return result


def table_of(found: Calibration) -> Table:
    """A table: harm of each way to choose ranges, and of the layers that are harmed most."""
    table = Table(title="what 8 bits change, median over images", title_justify="left")
    for column in ("", "map correlation", "box IoU", "same class"):
        table.add_column(column, justify="left" if not column else "right")
    worst = sorted(found.by_layer.items(), key=lambda item: -item[1].total)[:8]
    rows = [(f"all layers, {name}", harm) for name, harm in found.by_method.items()]
    rows += [
        (f"{name} alone" + (", kept in fp32" if name in found.quantization.kept else ""), harm)
        for name, harm in worst
    ]
    for name, harm in rows:
        table.add_row(
            name,
            f"{harm.map_correlation:.4f}",
            f"{harm.box_iou:.4f}",
            f"{100 * harm.class_agreement:.0f} %",
        )
    return table


def plot_layers(found: Calibration, path: Path, network: str) -> None:
    """Draw what each layer alone in 8 bits costs in correlation of the map and IoU of the box."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    by_layer, kept = found.by_layer, found.quantization.kept
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(by_layer)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(by_layer))
    for shift, what, colour in ((-0.2, "map_correlation", "#1f77b4"), (0.2, "box_iou", "#ff7f0e")):
        lost = [1 - asdict(harm)[what] for harm in by_layer.values()]
        axes.barh(
            places + shift,
            lost,
            0.4,
            color=colour,
            label=f"1 - {what.replace('_', ' ').replace('iou', 'IoU')}",
        )
    names = [f"{name} (kept in fp32)" if name in kept else name for name in by_layer]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("lost against fp32 with this layer alone in 8 bits, median over images")
    axes.set_title(f"What each layer of {network} costs in 8 bits", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with whole_file(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=150, metadata=signed(LAYERS, path.suffix))
