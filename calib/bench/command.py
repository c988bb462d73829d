"""The options of the ``bench`` command, and the function that runs it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from calib.bench.compare import print_comparison
from calib.bench.report import check_plots, plot_bench, print_bench
from calib.bench.run import bench, choices, whole_numbers
from calib.bench.screen import bench_screen, print_screen
from engines.choose import Choice
from engines.errors import SightlineError
from engines.options import takes


@dataclass(frozen=True)
class BenchOptions:
    """See ``calib.bench.run.bench``.

    Attributes:
        what: the source, or ``compare`` and two results.
        models: networks to time, with commas between them.
        seconds: time limit of each part.
        sizes, batches: whole numbers with commas between them.
        plots: folder for pictures; None for none.
        screen: glass to glass, in place of all that.
        across_machines: compare what was not measured alike.
    """

    what: list[str] | None = None
    models: str = "compact,vgg16"
    seconds: float = 60.0
    sizes: str = ""
    batches: str = ""
    plots: Path | None = None
    screen: bool = False
    across_machines: bool = False


OPTIONS: dict[str, Any] = {
    "what": Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE] | compare A.json B.json",
            show_default=False,
            help=(
                "What to run end to end, demo:300 unless told (a file called compare: ./compare)."
                " Or two results of --json."
            ),
        ),
    ],
    "models": Annotated[
        str,
        typer.Option("--models", "--model", help="Networks to time; the first one end to end too."),
    ],
    "seconds": Annotated[
        float, typer.Option(help="Time limit of each part that has not settled before.", min=0.1)
    ],
    "sizes": Annotated[
        str, typer.Option(help="Also time the first network at these input sides: 96,128,224.")
    ],
    "batches": Annotated[
        str, typer.Option(help="Also time it with so many images in a call: 1,2,4.")
    ],
    "plots": Annotated[Path | None, typer.Option(help="Folder for pictures of everything.")],
    "screen": Annotated[
        bool,
        typer.Option(
            "--screen",
            help=(
                "Glass to glass: show codes on this screen, watch them through a camera (0 unless"
                " told; to try it: loop:100)."
            ),
        ),
    ],
    "across_machines": Annotated[
        bool, typer.Option("--across-machines", help="Compare what was not measured alike.")
    ],
}
takes_bench = takes("options", BenchOptions, OPTIONS)
"""A command's parameter ``options`` becomes one option for each of these."""


def bench_chosen(options: BenchOptions, choice: Choice, console: Console, as_json: bool) -> bool:
    """Time, or compare two results; print, draw and, for ``as_json``, write it on standard output.

    Returns:
        Whether, of two results, something of ours is slower in the second.

    Raises:
        SightlineError: what is asked for cannot be run or compared.
    """
    source, *others = options.what or ["0" if options.screen else "demo:300"]
    if source == "compare":
        return print_comparison(others, options.across_machines, console, as_json)
    if others:
        raise SightlineError(
            f"bench runs one source, not also {others[0]}; to compare two results: bench compare"
            " A.json B.json"
        )
    chosen = choices(options.models, choice)
    if options.plots:
        check_plots(options.plots, (source, *choice.inputs))
    if options.screen:
        result = bench_screen(source, chosen[0], options.seconds, console)
        print_screen(result, console)
    else:
        lists = whole_numbers(options.sizes, "--sizes"), whole_numbers(options.batches, "--batches")
        result, run = bench(source, chosen, options.seconds, console, *lists)
        print_bench(result, console)
        for picture in plot_bench(result, run, options.plots) if options.plots else ():
            console.print(f"wrote {picture}")
    if as_json:
        print(json.dumps(result))
    return False
