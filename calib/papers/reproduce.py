"""The command ``reproduce``: a paper's table computed again, beside the numbers that it printed.

A table is a line of ``TABLES``. It says which paper it is from, and names the function that
computes it. That function gets a ``Request``, and returns ``Findings``: the tables to print, what
was measured and how, what differs from the paper, and pictures for the page.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table as Printed

from calib.bench.machine import machine
from calib.data.choose import VOC_ARCHIVES, load_voc2007
from calib.data.datasets import Sample, load_dataset
from calib.evaluation.report import Picture, check_report, write_document
from engines.downloads import cache_dir
from engines.errors import InputError, SourceError
from engines.head import NO_HEAD
from engines.options import LOOK_AT, NETWORK, OUTPUT, SPEED, EngineOptions, Option

FAST_OR_EXACT = ("fp32", "bf16")


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of ``reproduce`` besides the network's."""

    folder: Annotated[
        Path | None,
        Option(
            "Folder with the set: trainval.csv and test.csv (or .json), VOC's tars or its unpacked"
            " folder, ImageNet's val.csv or XML, COCO's folder. Without it VOC 2007 is downloaded.",
            LOOK_AT,
            ("data",),
        ),
    ] = None
    model: Annotated[
        str | None, Option("The network; the paper's own, VGG16, where none is named.", NETWORK)
    ] = None
    out: Annotated[Path | None, Option("Page to write: FILE.html or FILE.md.", OUTPUT)] = None
    limit: Annotated[
        int | None,
        Option(
            "At most so many images of each part, drawn at random, the same each time.",
            LOOK_AT,
            min=1,
        ),
    ] = None
    precision: Annotated[
        str, Option("fp32, or bf16, which takes half of the time and is less exact.", SPEED)
    ] = "fp32"


@dataclass(frozen=True)
class Figures:
    """A table of numbers.

    Attributes:
        title: what it is of.
        columns: their headings; the first names the rows.
        rows: one text for each column.
        note: a sentence below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What a table's function found.

    Attributes:
        figures: in the order in which they are shown.
        protocol: which images, how many objects of each, which boxes count, each a sentence.
        differs: what is not as in the paper, each a sentence.
        pictures: by the heading that stands over them.
        numbers: for JSON.
    """

    figures: tuple[Figures, ...]
    protocol: tuple[str, ...]
    differs: tuple[str, ...] = ()
    pictures: dict[str, tuple[Picture, ...]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What the function of a table gets.

    Attributes:
        table: which.
        options: the user's.
        choice: the network's; ``choice.weights`` is None where none were named.
        console: for progress and notes.
    """

    table: "PaperTable"
    options: ReproduceOptions
    choice: EngineOptions
    console: Console

    def samples(self, split: str) -> list[Sample]:
        """The labelled images of ``trainval``, ``test`` or ``val``, or what is there of them."""
        found = labelled(self.options.folder, split)
        limit = self.options.limit
        if limit is None or limit >= len(found):
            return found
        order = list(range(len(found)))
        random.Random(0).shuffle(order)  # the first of an order: a larger limit has them all, too
        return [found[row] for row in sorted(order[:limit])]

    def say(self, text: str) -> None:
        """Print a line of what is being done."""
        self.console.print(text, style="dim", soft_wrap=True, markup=False)


@dataclass(frozen=True)
class PaperTable:
    """The record of a table.

    Attributes:
        name: what the command takes.
        title: what it shows.
        paper: authors, title, and where in it.
        run: ``module:function``, which takes a ``Request`` and returns ``Findings``.
        model: the network where the user names none.
    """

    name: str
    title: str
    paper: str
    run: str
    model: str = "vgg16"

    def load(self) -> Callable[[Request], Findings]:
        """The function that computes it."""
        found: Callable[[Request], Findings] = resolve_name(self.run)
        return found


FAST = "Ebrahimpour & Noelle, Fast Object Localization via Sensitivity Analysis"
WEAK = "Ebrahimpour & Noelle, Weakly Supervised Object Localization via Sensitivity Analysis"
DAM = "Dwaraknath, Menghani & Mongia, Fast Unsupervised Object Localization"
BEAM = "Bency et al., Weakly Supervised Localization using Deep Feature Maps"
TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        PaperTable(
            "sensitivity-voc2007",
            "CorLoc on VOC 2007, class by class",
            f"{FAST}, section 3, table 1",
            "calib.papers.sensitivity:voc2007",
        ),
        PaperTable(
            "sensitivity-imagenet",
            "CorLoc on ImageNet, beside the constant box",
            f"{FAST}, section 3, table 3; {WEAK}, table 1",
            "calib.papers.sensitivity:imagenet",
        ),
        PaperTable(
            "aggregation",
            "Maximum and mean over the colour channels",
            f"{FAST} (ICLR 2019 submission), section 3.6",
            "calib.papers.sensitivity:aggregation",
        ),
        PaperTable(
            "heuristic",
            "CorLoc on VOC 2007 of the box around the top 20 % of a blurred map",
            f"{FAST}, section 3, table 2",
            "calib.papers.sensitivity:heuristic",
        ),
        PaperTable(
            "dam-imagenet",
            "DAM on ImageNet: mean IoU, and where the centres are",
            f"{DAM}, section 5.3",
            "calib.papers.dam:imagenet",
        ),
        PaperTable(
            "beam-voc",
            "Beam search on VOC 2007: classification, localization and detection",
            f"{BEAM}, tables 1 and 3",
            "calib.papers.bency:voc",
        ),
        PaperTable(
            "beam-coco",
            "Beam search on COCO: localization",
            f"{BEAM}, table 2",
            "calib.papers.bency:coco",
        ),
    )
}


COCO_PARTS = {"trainval": "instances_train", "val": "instances_val"}
"""How COCO's files of labels begin, by what they are here."""


def labelled(folder: Path | None, split: str) -> list[Sample]:
    """The labelled images of one part of a set.

    Args:
        folder: see ``ReproduceOptions.folder``; None downloads VOC 2007.
        split: ``trainval``, ``test`` or ``val``.

    Raises:
        SourceError: nothing of it is there.
        DownloadError: VOC 2007 cannot be fetched.
    """
    if folder is None:
        if split not in VOC_ARCHIVES:
            raise SourceError(
                "this set is given only to who signs for it: name the folder where it lies",
                option="folder",
            )
        return load_voc2007(split, cache_dir() / "datasets")
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder", option="folder")
    for ending in (".csv", ".json"):
        if (folder / f"{split}{ending}").is_file():
            return load_dataset(folder / f"{split}{ending}")
    if split in VOC_ARCHIVES and (folder / VOC_ARCHIVES[split].file).is_file():
        return load_voc2007(split, folder)
    ids = folder / "ImageSets" / "Main" / f"{split}.txt"
    if ids.is_file():
        return load_dataset(folder / "Annotations", folder / "JPEGImages", ids)
    for path in sorted((folder / "annotations").glob(f"{COCO_PARTS.get(split, '')}20??.json")):
        return load_dataset(path, folder / path.stem.removeprefix("instances_"))
    if split == "val":
        return load_dataset(folder)
    raise SourceError(
        f"{folder} holds neither {split}.csv nor VOC's {VOC_ARCHIVES[split].file} nor its"
        f" ImageSets/Main/{split}.txt",
        option="folder",
    )


def reproduce_chosen(
    name: str, options: ReproduceOptions, choice: EngineOptions, console: Console
) -> dict[str, Any]:
    """Compute a table again, print it beside the paper's, and write the page.

    Returns:
        The numbers, and what they are of.

    Raises:
        SightlineError: the data or the network cannot be used, or the page cannot be written.
    """
    if name not in TABLES:
        raise InputError(f"there is no table '{name}': there are {', '.join(TABLES)}")
    if options.precision not in FAST_OR_EXACT:
        raise InputError(
            f"the precision is {' or '.join(FAST_OR_EXACT)}, not '{options.precision}'",
            option="precision",
        )
    if options.out:
        check_report(options.out, (options.folder, *choice.inputs))
    table = TABLES[name]
    choice = replace(choice, model=options.model or table.model, head=NO_HEAD)
    found = table.load()(Request(table, options, choice, console))
    print_findings(table, found, console)
    facts = {"model": choice.model, "precision": options.precision, "machine": machine()}
    if options.out:
        pictures = [each for group in found.pictures.values() for each in group]
        content = {"table": table, "found": found, "facts": facts, "title": table.title}
        write_document(options.out, "paper", content, pictures)
        console.print(f"wrote {options.out}")
    return {"table": name, "paper": table.paper, **found.numbers, **facts}


def print_findings(table: PaperTable, found: Findings, console: Console) -> None:
    """Print what was found, and what differs from the paper."""
    console.print(table.title, style="bold")
    console.print(table.paper, style="dim", soft_wrap=True)
    for figures in found.figures:
        printed = Printed(*figures.columns, title=figures.title, title_justify="left")
        for row in figures.rows:
            printed.add_row(*row)
        console.print(printed)
        if figures.note:
            console.print(figures.note, soft_wrap=True)
    for heading, sentences in (("Measured:", found.protocol), ("Differs:", found.differs)):
        if sentences:
            console.print(heading, style="bold")
        for sentence in sentences:
            console.print(f"- {sentence}", soft_wrap=True, markup=False)


def percent(share: float) -> str:
    """A share in percent with one decimal place."""
    return f"{100 * share:.1f} %"
