"""The ``calibrate`` command: chooses the images, writes the calibration, and shows what each layer
costs.
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calib.data.datasets import Sample, decoded, load_dataset
from calib.evaluation.evaluate import evaluate
from calib.precision.build import frames_of
from calib.precision.quantize import Calibration, Calibrator, calibrate
from engines.choose import Choice, calibration_paths, choose_head, chosen_spec
from engines.errors import OutputError, SourceError
from engines.files import checked_output, picture_kind, signed, whole_file
from engines.int8 import CALIBRATION_FILE
from engines.localizer import ImageBgr, Localizer
from engines.networks.registry import load_classifier

LAYERS = "cost of layers"
LAYERS_FILE = picture_kind(LAYERS, ".png", ".svg")
LABELS = (".csv", ".tsv", ".xml", ".json", ".txt")


@dataclass(frozen=True)
class Images:
    """What to calibrate on.

    Attributes:
        data: a label file, or any source of frames.
        images, ids: as for ``calib.data.datasets.load_dataset``.
        limit: how many images, evenly spread.
    """

    data: str
    images: Path | None = None
    ids: Path | None = None
    limit: int = 128

    def read(self) -> tuple[list[ImageBgr], list[Sample]]:
        """(images, the labelled ones among them by the same places; empty for a source without
        labels).

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
                raise SourceError("--ids names images of a label file: give one")
            return frames_of(self.data, self.limit // 2), []
        samples = load_dataset(Path(self.data), self.images, self.ids)
        places = np.unique(
            np.linspace(0, len(samples) - 1, min(self.limit, len(samples))).astype(int)
        )
        chosen = list(decoded(samples[place] for place in places))
        return [image for _, image in chosen], [sample for sample, _ in chosen]


def check_outputs(images: Images, choice: Choice, out: Path | None, plot: Path | None) -> None:
    """Refuse names that cannot be written to, before any work.

    Raises:
        OutputError: one of them; see ``engines.files.checked_output``.
    """
    inputs = (images.data, images.images, images.ids, *choice.inputs)
    if plot:
        checked_output(plot, LAYERS_FILE, inputs)
    if out:
        checked_output(out, CALIBRATION_FILE, inputs)
    if out and plot and os.path.realpath(out) == os.path.realpath(plot):
        raise OutputError(
            f"{plot} cannot hold both the calibration and the picture: give --out another name"
        )


def calibrate_chosen(
    images: Images, choice: Choice, method: str, out: Path | None, console: Console
) -> "Found":
    """Calibrate, save, and print what it does to maps, boxes and CorLoc.

    Raises:
        SightlineError: the images, the network or the method cannot be used, or the certificate is
            not met.
    """
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    head = choose_head(choice, classifier)
    spec = chosen_spec(choice, head)
    with console.status("reading images ..."):
        pictures, samples = images.read()
    calibrator = Calibrator(classifier, spec, head, pictures, console)
    found = calibrate(calibrator, method)
    judged = [sample for sample in samples[1::2] if sample.truths]
    before = after = None
    if judged and head is not None:
        engines = calibrator.reference, calibrator.localizer(found.quantization)
        before, after = (_corloc(judged, engine, console) for engine in engines)
    card = {
        **found.quantization.card,
        "data": images.data if "://" in images.data else Path(images.data).name,
    }
    card |= {"corloc_fp32": before, "corloc_int8": after, "judged_images": len(calibrator.judged)}
    quantization = replace(found.quantization, card=card)
    path = out or calibration_paths(classifier, spec.objective)[0]
    quantization.save(path)
    console.print(str(found.certificate), highlight=False, soft_wrap=True)
    console.print(table_of(found))
    if before is not None and after is not None:
        console.print(
            f"CorLoc {100 * before:.1f} % in fp32, {100 * after:.1f} % in int8, on {len(judged)}"
            " images"
        )
    console.print(f"wrote {path}", soft_wrap=True)
    return Found(replace(found, quantization=quantization), path)


@dataclass(frozen=True)
class Found:
    """A calibration and where it was saved."""

    calibration: Calibration
    path: Path

    def report(self) -> dict[str, Any]:
        """For ``--json``."""
        quantization = self.calibration.quantization
        return {
            "file": str(self.path),
            "kept": list(quantization.kept),
            "layer": quantization.layer,
            **quantization.card,
        }


def _corloc(samples: list[Sample], localizer: Localizer, console: Console) -> float:
    return float(evaluate(samples, localizer, console, None)[0]["corloc"])


def table_of(found: Calibration) -> Table:
    """Harm of each way to choose ranges, and of the layers that suffer most."""
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


def plot_layers(found: Found, path: Path, network: str) -> None:
    """Bars: what each layer alone in 8 bits takes from the map's correlation and the box's overlap,
    in network order.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    by_layer, kept = found.calibration.by_layer, found.calibration.quantization.kept
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
