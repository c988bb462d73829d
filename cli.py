"""Sightline's command line. Each command calls one function of ``realtime``, ``calib`` or
``engines``.

All options are fields of dataclasses, or parameters of commands, that are annotated with an
``engines.options.Option``; ``command`` makes typer's options of them. Only this module knows typer.
"""

import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import typer

from calib.bench.run import BenchOptions, bench_chosen
from calib.commands import (
    EvaluateOptions,
    FinetuneOptions,
    FitOptions,
    evaluate_chosen,
    finetune_chosen,
    fit_chosen,
)
from calib.data.choose import DataOptions
from calib.evaluation.comparison import CompareOptions, compare_logs
from calib.inspection import InspectOptions, inspect_chosen
from calib.papers.reproduce import TABLES, ReproduceOptions, reproduce_chosen
from calib.precision.build import BuildOptions, run_build
from calib.precision.calibrate import CalibrateOptions, calibrate_chosen
from calib.teaching import fit_command, import_labels
from engines.errors import SightlineError
from engines.networks.preprocessing import GivenInput
from engines.options import LOOK_AT, OUTPUT, PANELS, SPEED, EngineOptions, Option
from engines.text import Terminal, shown
from realtime import doctor as doctors
from realtime import live
from realtime.batch.estimate import plan_chosen
from realtime.batch.options import Scale, Settings
from realtime.batch.run import batch_chosen
from realtime.options import StreamOptions
from realtime.sources.spec import examples as source_examples
from realtime.statistics import print_summaries
from realtime.tracking.options import FollowOptions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Find the main object in every frame, with nothing but an image classifier: a box, and the"
        " reason for it."
    ),
)
console = Terminal(stderr=True)
UsageError: Any = typer.BadParameter.__base__
"""What typer raises where words do not fit their command; typer has no public name for it."""
DEFECT = "this is a defect of Sightline, please report it"
LABEL_PORT = "8000"
LARGEST = 10**9
"""Of a number that counts something, where its option sets no limit."""


@dataclass(frozen=True)
class Only:
    """Stands in a parameter's type beside the dataclass: the fields that the command takes; the
    others keep their defaults.
    """

    names: tuple[str, ...]


INPUT_OPTIONS = tuple(GivenInput.__dataclass_fields__)
"""What is said of a classifier's input and output."""
MAP_OPTIONS = ("method", "as_published", "aggregation", "layer")
NETWORK_OPTIONS = ("model", "weights", "class_layer", "size_px", *MAP_OPTIONS, *INPUT_OPTIONS)
"""What decides the maps that a head is fitted on."""
ENGINE_OPTIONS = ("head", "backend", "precision", "calibration", "objects", "threads", "sigma_px")
Budget = Annotated[
    float | None,
    Option(
        "Hold this time per frame by stepping to cheaper settings and back; 33 is 30 fps.",
        SPEED,
        min=0.1,
    ),
]
AsJson = Annotated[bool, Option("Print the summary as JSON on standard output.", OUTPUT, ("json",))]


class HelpInPanel(typer.core.TyperCommand):
    """A command whose ``--help`` stands in the last panel, beside other options."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option ``--help``."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = PANELS[-1]
        return option


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of ``app``. Each of its parameters that is annotated with an
    ``Option`` becomes one option; each whose type is a dataclass becomes one for each field that
    is annotated so, and the function gets an instance.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, tuple[Any, list[str]]] = {}
        found: list[inspect.Parameter] = []
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            kind, *extras = get_args(hints[name]) or (hints[name],)
            if is_dataclass(kind):
                options = list(_options_of(kind, extras))
                groups[name] = kind, [option.name for option in options]
                found += options
            else:
                found.append(_typer_option(name, hints[name], parameter.default))

        def run(**given: Any) -> None:
            try:
                for name, (kind, names) in groups.items():
                    given[name] = kind(**{each: given.pop(each) for each in names})
                function(**given)
            except SightlineError as error:
                _add_flags(error, found)
                raise

        found.sort(key=_place_in_help)
        run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in found}
        epilog = f"Example{'s' * (len(examples) > 1)}:  {'   ·   '.join(examples)}"
        app.command(
            function.__name__.rstrip("_"),
            cls=HelpInPanel,
            epilog=epilog,
            help=inspect.getdoc(function),
        )(run)
        return function

    return register


def _options_of(kind: Any, extras: list[Any]) -> Iterator[inspect.Parameter]:
    """A typer option for each field of a dataclass that is annotated as one."""
    chosen = next((extra.names for extra in extras if isinstance(extra, Only)), None)
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        annotated = any(isinstance(extra, Option) for extra in get_args(hints[field.name])[1:])
        if annotated and (chosen is None or field.name in chosen):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield _typer_option(field.name, hints[field.name], default)


def _typer_option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """The parameter from which typer makes an option or an argument."""
    kind, about = get_args(hint)
    kinds = (kind, *get_args(kind))
    if about.parser is not None and any(get_origin(each) is tuple for each in kinds):
        kind = str | None  # typer would take a text for each of a tuple's parts
    common: dict[str, Any] = {"help": about.help, "metavar": about.metavar}
    if about.panel is None:
        made = typer.Argument(**common, show_default=about.metavar is None)
    else:
        made = typer.Option(
            *_names(name, about, default, kind),
            **common,
            rich_help_panel=about.panel,
            min=about.min,
            max=LARGEST if int in kinds and about.max is None else about.max,
            envvar=about.envvar,
            parser=_parser(about.parser) if about.parser else None,
            callback=_finite if float in kinds and not about.parser else None,
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, made, about],
    )


def _names(name: str, about: Option, default: Any, kind: Any = None) -> list[str]:
    """What an option is called on the command line, such as ``--size``."""
    names = [f"--{each.replace('_', '-')}" for each in about.names or (name,)]
    both = default is True or kind == bool | None
    return [f"{names[0]}/--no-{names[0][2:]}"] if both else names


def _add_flags(error: SightlineError, parameters: list[inspect.Parameter]) -> None:
    """Note behind an error how the options that it is about are written for this command."""
    flags: dict[str, str] = {}
    for parameter in parameters:
        about = parameter.annotation.__metadata__[-1]
        if about.panel is not None:
            written = _names(parameter.name, about, parameter.default)[0].split("/")[-1]
            flags.update(dict.fromkeys((parameter.name, *about.names), written))
    named: list[str] = []
    cause: BaseException | None = error
    while isinstance(cause, SightlineError):
        named += [flags[option] for option in cause.options if option in flags]
        cause = cause.__cause__
    if named:
        error.add_note(f"({', '.join(dict.fromkeys(named))})")


def _place_in_help(parameter: inspect.Parameter) -> int:
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return PANELS.index(panel) if panel else -1


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose error names the option."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except SightlineError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


def _finite(value: float | None) -> float | None:
    """Limits alone let NaN through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


@command("sightline demo --out out")
def demo(
    frames: Annotated[
        int | None, Option("So many frames of the clip, again and again.", LOOK_AT, min=1)
    ] = None,
    out: Annotated[Path, Option("Folder for the results.", OUTPUT)] = Path("out"),
    engine: EngineOptions = EngineOptions(),
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize a clip whose true boxes are known, and show what comes out."""
    _report(live.demo_chosen(frames, out, engine, budget_ms, console), as_json)


@command(
    "sightline batch holiday.mp4 photos/ --out out",
    "sightline batch *.mp4 --every 5 --plan --machines 4",
    "sightline batch film.mkv --end 1:10:00 --heat-video",
    "sightline batch 's3://b/*' --out s3://b/out --ray auto",
)
def batch(
    sources: Annotated[
        list[str], Option(f"What to look at, one or several: {source_examples()}.", None)
    ],
    out: Annotated[
        str, Option("Folder for the results; with --ray, an address, too.", OUTPUT)
    ] = "out",
    settings: Settings = Settings(),
    following: FollowOptions = FollowOptions(),
    work: Scale = Scale(),
    engine: EngineOptions = EngineOptions(),
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize every frame of video files or image folders: annotated MP4, JSONL, Parquet, report;
    goes on where it was killed.

    Exit status 1 where a source was damaged or could not be read, and the others are done.
    """
    settings = replace(settings, following=following)
    if work.plan:
        plan_chosen(sources, settings, work, engine, console, as_json)
    else:
        _report(batch_chosen(sources, out, settings, work, engine, budget_ms, console), as_json)


@command(
    "sightline stream 0",
    "sightline stream rtsp://camera/1 --record cam.mp4 --budget-ms 33",
    "sightline stream 0 1 rtsp://door/live --log log.jsonl --log-max-mb 50",
    "sightline stream 0 --follow",
)
def stream(
    sources: Annotated[
        list[str], Option(f"What to look at, one or several: {source_examples()}.", None)
    ],
    options: StreamOptions = StreamOptions(),
    following: FollowOptions = FollowOptions(),
    engine: EngineOptions = EngineOptions(),
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize live: the newest frames of cameras and streams, or files at their own pace; every
    frame is accounted for.
    """
    fitted = fit_command(engine, NETWORK_OPTIONS)
    summary = live.stream_chosen(sources, options, following, engine, budget_ms, console, fitted)
    _report([summary], as_json)


@command("sightline label holiday.mp4", "sightline label photos/ --labels-dir mug --web 8001")
def label(
    sources: Annotated[
        list[str], Option(f"What to label, one or several: {source_examples()}.", None)
    ],
    options: Annotated[StreamOptions, Only(("labels_dir", "web", "web_token", "seconds"))],
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head", "objects"))],
    add: Annotated[
        Path | None,
        Option("Labels of another program to begin with: COCO, VOC, CSV ... are copied.", LOOK_AT),
    ] = None,
) -> None:
    """Label frames of a video, a folder or a camera on a page, and teach a head your objects; films
    play again and again, until Ctrl-C.
    """
    if add is not None:
        import_labels(add, options.labels_dir, console)
    chosen = replace(options, web=options.web or LABEL_PORT, window=False, repeat=True)
    alone, fitted = FollowOptions(follow=False), fit_command(engine, NETWORK_OPTIONS)
    live.stream_chosen(sources, chosen, alone, engine, None, console, fitted)


@command(
    "sightline fit photos.csv --out head.safetensors --curve curve.png",
    "sightline fit --dataset voc2007 --model vgg16 --weights vgg16.pth --out voc_head.safetensors",
)
def fit(
    options: FitOptions,
    data: DataOptions,
    engine: Annotated[EngineOptions, Only(NETWORK_OPTIONS)],
    as_json: AsJson = False,
) -> None:
    """Fit a box head to labelled images with one object each, by cross-validation; a published
    set's test half measures it.
    """
    _print_json(fit_chosen(data, options, engine, console), as_json)


@command(
    "sightline inspect classifier.onnx",
    "sightline inspect timm:resnet50 --image photo.jpg --out maps.png",
)
def inspect_(
    network: Annotated[str, Option("A name, FILE.onnx or timm:NAME, as --model takes it.", None)],
    options: InspectOptions = InspectOptions(),
    engine: Annotated[
        EngineOptions, Only(("weights", "class_layer", "size_px", *INPUT_OPTIONS))
    ] = EngineOptions(),
    as_json: AsJson = False,
) -> None:
    """Say what a classifier is: input, classes, stages, work, what is missing; draw its maps on a
    photo.
    """
    chosen = replace(engine, model=network)
    _print_json(inspect_chosen(network, options, chosen, console), as_json)


@command("sightline finetune scenes.csv --out my_weights.safetensors")
def finetune(
    options: FinetuneOptions,
    data: DataOptions,
    engine: Annotated[EngineOptions, Only(("model", "weights", "size_px", *INPUT_OPTIONS))],
    as_json: AsJson = False,
) -> None:
    """Fit the classifier's last layer to classes of your own, several in an image; boxes are not
    looked at.
    """
    _print_json(finetune_chosen(data, options, engine, console), as_json)


@command(
    "sightline evaluate photos.csv --single --json",
    "sightline evaluate photos.csv --report photos.html",
    "sightline evaluate --dataset voc2007 --head voc_head.safetensors --classes dog,cat",
    "sightline evaluate street_boxes.csv --follow --report street.html",
)
def evaluate(
    data: DataOptions,
    options: EvaluateOptions,
    following: FollowOptions,
    engine: Annotated[
        EngineOptions,
        Only((*NETWORK_OPTIONS, *ENGINE_OPTIONS)),
    ],
    as_json: AsJson = False,
) -> None:
    """Measure boxes against the truth, beside constant boxes that need no image; of a published
    set, its test half.
    """
    _print_json(evaluate_chosen(data, options, engine, console, following), as_json)


@command(
    "sightline reproduce sensitivity-voc2007 --weights vgg16.pth --out voc.html",
    "sightline reproduce heuristic --data VOCdevkit/VOC2007 --weights vgg16.pth",
)
def reproduce(
    table: Annotated[str, Option(f"Which table: {', '.join(TABLES)}.", None)],
    options: ReproduceOptions,
    engine: Annotated[EngineOptions, Only(("weights", "class_layer", "size_px"))],
    as_json: AsJson = False,
) -> None:
    """Compute a table of the papers again, as they did, and print their numbers beside ours; goes
    on where it was stopped.
    """
    _print_json(reproduce_chosen(table, options, engine, console), as_json)


@command(
    "sightline compare before.jsonl after.jsonl --source holiday.mp4",
    "sightline compare out/holiday.jsonl detector.jsonl --out beside.html --frames 30",
)
def compare(
    a: Annotated[Path, Option("A log: NAME.jsonl of batch, or of stream --log.", None)],
    b: Annotated[
        Path,
        Option(
            "Another one, or another program's boxes: a JSON object a line, with frame, x0, y0, x1,"
            " y1 in pixels, and, if known, label and confidence.",
            None,
        ),
    ],
    options: CompareOptions = CompareOptions(),
    as_json: AsJson = False,
) -> None:
    """Compare two logs of the same frames: where their boxes differ, and the frames in which they
    differ most.
    """
    _print_json(compare_logs(a, b, options, console), as_json)


@command(
    "sightline calibrate holiday.mp4",
    "sightline calibrate photos.csv --model vgg16 --weights vgg16.pth",
)
def calibrate(
    options: CalibrateOptions,
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head"))],
    as_json: AsJson = False,
) -> None:
    """Make a network ready for int8: measure ranges, keep the layers that suffer in floating point,
    prove what comes out.
    """
    _print_json(calibrate_chosen(options, engine, console).report(), as_json)


@command(
    "sightline build --model squeezenet --weights squeezenet.net --out squeezenet_map.onnx",
    "sightline build --backend tensorrt --precision fp16",
    "sightline build --backend tensorrt --for sm89",
)
def build(
    options: BuildOptions,
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head", "precision", "calibration"))],
) -> None:
    """Write the whole localization graph as one ONNX file, or build an engine of it, proved against
    the reference.
    """
    run_build(options, engine, console)


@command(
    "sightline bench",
    "sightline bench holiday.mp4 --models squeezenet --json",
    "sightline bench --plots plots --sizes 96,128,160,224,320 --batches 1,2,4,8",
    "sightline bench compare before.json after.json",
    "sightline bench --screen 0 --seconds 20",
    "sightline bench --models lite0 --profile",
    "sightline bench --models lite0 --detector yolox_nano.onnx",
)
def bench(
    options: BenchOptions,
    engine: Annotated[
        EngineOptions,
        Only(
            (
                *("weights", "class_layer", "method", "head", "size_px", "backend", "precision"),
                *INPUT_OPTIONS,
            )
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Measure fps end to end, and the engine beside its peers, in turns, until all has settled. No
    outlier is removed.

    compare A B: exit status 1 where something of ours is slower in B, by more than the noise of the
        two runs.
    """
    if bench_chosen(options, engine, console, as_json):
        raise typer.Exit(1)


@command(
    "sightline doctor",
    "sightline doctor --json",
    "where that fails: python -m realtime.doctor",
)
def doctor(as_json: AsJson = False) -> None:
    """Look at packages, processor, codecs, display, cameras, GPU, weights and cache: each problem
    with its fix.

    Exit status 1 where something that running on the processor needs is broken.
    """
    with console.status("looking ..."):
        findings = doctors.examine()
    doctors.print_findings(findings, console)
    if as_json:
        print(doctors.as_json(findings))
    if not doctors.is_fit(findings):
        raise typer.Exit(1)


def _print_json(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


def _report(summaries: list[dict[str, Any]], as_json: bool) -> None:
    summaries = shown(summaries)
    print_summaries(summaries, console)
    if as_json:
        print(json.dumps(summaries[0] if len(summaries) == 1 else summaries))
    if any(summary["interrupted"] for summary in summaries):
        raise typer.Exit(130)
    if any(summary.get("error") or summary.get("trouble") for summary in summaries):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a user's mistake is one line and status 2.

    Any other exception is a defect of Sightline: one line and status 2 as well.
    ``SIGHTLINE_TRACEBACK=1`` shows all of it.
    """
    try:
        status = app(standalone_mode=False)
    except SightlineError as error:
        _stop(" ".join([str(error), *getattr(error, "__notes__", ())]))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "sightline"
        _stop(
            f"{' '.join(shown(error.format_message()).split()).rstrip('.')}; '{command} --help'"
            " lists what it takes"
        )
    except Exception as error:
        if os.environ.get("SIGHTLINE_TRACEBACK"):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _stop(
            f"{DEFECT}: {what} ({Path(frame.filename).name}:{frame.lineno}; SIGHTLINE_TRACEBACK=1"
            " shows all of it)"
        )
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str) -> NoReturn:
    console.print(f"error: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
