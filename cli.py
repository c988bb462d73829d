"""Sightline's command line. Each command calls one function of ``realtime``, ``calib`` or
``engines``.

All options are fields of dataclasses, or parameters of commands, that are annotated with an
``engines.options.Option``; ``calib.command_options`` makes typer's options of them. Only this
module and that one know typer. What a command names is imported when it is called for, see
``calib.command_options.load``.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.text import Text

from calib.command_options import Only, all_commands, command, imports_of
from engines.errors import SightlineError
from engines.text import Terminal, masked, shown

if TYPE_CHECKING:
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
    from calib.teaching import ImportOptions, import_chosen
    from calib.why import WhyOptions, why_chosen
    from engines.options import (
        ENGINE_OPTIONS,
        INPUT_OPTIONS,
        LOOK_AT,
        NETWORK_OPTIONS,
        OUTPUT,
        AsJson,
        Budget,
        EngineOptions,
        OpenPage,
        Option,
    )
    from realtime import doctor as doctors
    from realtime import live
    from realtime.batch.estimate import plan_chosen
    from realtime.batch.options import Scale, Settings
    from realtime.batch.run import batch_chosen
    from realtime.documents import open_in_browser
    from realtime.options import StreamOptions
    from realtime.sources.spec import examples as source_examples
    from realtime.teaching.learning import Command
    from realtime.terminal import print_files
    from realtime.tracking.options import FollowOptions

console = Terminal(stderr=True)
UsageError: Any = typer.BadParameter.__base__
"""What typer raises where words do not fit their command; typer has no public name for it."""
DEFECT = "this is a defect of Sightline, please report it"
LABEL_PORT = "8000"
OF_BENCH = ("weights", "class_layer", "method", "head", "size_px", "backend", "precision")
TEACH = "Your own objects and classifiers"
MEASURE = "Measure and compare"
MACHINE = "This machine and its engines"


def __getattr__(name: str) -> Any:
    """What commands import when they are called for, for those who take it from here."""
    places = imports_of(__file__)
    if name not in places:
        raise AttributeError(f"module 'cli' has no attribute {name!r}")
    return resolve_name(places[name])


@command("sightline demo --out out", "sightline demo --frames 1000 --budget-ms 20 --out out")
def demo(
    *,
    frames: Annotated[
        int | None, Option("So many frames of the clip, again and again.", LOOK_AT, min=1)
    ] = None,
    out: Annotated[Path, Option("Folder for the results.", OUTPUT)] = Path("out"),
    engine: EngineOptions,
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize a clip whose true boxes are known, and show what comes out."""
    summaries = live.demo_chosen(frames, out, engine, budget_ms, console)
    _report(
        summaries,
        as_json,
        *(f"open {each['files']['video']}" for each in summaries),
        "$ stream 0 --web 8000  # a camera, and a page to watch it on",
        "$ batch holiday.mp4 --out out --open  # a video, or photos: boxes, names, a report",
    )


@command(
    "sightline batch holiday.mp4 --out out --open  # and look at the report in a browser",
    "sightline batch photos/ photos.zip 'films/*.mp4'",
    "sightline batch film.mkv --heat-map-video --event-clips  # videos of the map, of events",
    "sightline batch *.mp4 --every 5 --plan --machines 4  # how long it would take, nothing else",
    "sightline batch 's3://b/*' --out s3://b/out --ray auto  # on a cluster",
)
def batch(
    *,
    sources: Annotated[
        list[str], Option(f"What to look at, one or several: {source_examples()}.", None)
    ],
    out: Annotated[
        str, Option("Folder for the results; with --ray, an address, too.", OUTPUT)
    ] = "out",
    settings: Settings,
    following: FollowOptions,
    work: Scale,
    engine: EngineOptions,
    budget_ms: Budget = None,
    open_page: OpenPage = False,
    as_json: AsJson = False,
) -> None:
    """Localize every frame of video files or image folders: annotated MP4, JSONL, Parquet, report;
    goes on where it was killed.

    Exit status 1 where a source was damaged or could not be read, and the others are done.
    """
    settings = replace(settings, following=following)
    if work.plan:
        plan_chosen(sources, settings, work, engine, console, as_json)
        return
    summaries = batch_chosen(sources, out, settings, work, engine, budget_ms, console)
    index = Path(out, "index.html")
    pages = [
        Path(each["files"]["report"]) for each in summaries if "report" in each.get("files", {})
    ]
    pages = [index] if len(summaries) > 1 and index.is_file() else pages[:1]
    if open_page:
        for page in pages:
            open_in_browser(page, console.print)
    steps = [] if open_page else [f"open {page} in a browser, or add --open" for page in pages]
    if not any(each.get("localized") for each in summaries):
        steps.append("add --min-score 0  # shows all boxes, however unsure")
    steps.append(
        f"$ label {shlex.quote(masked(sources[0]))}  # teach it what it missed or called wrongly"
    )
    _report(summaries, as_json, *steps)


@command(
    "sightline stream 0 --web 8000  # a webcam, with a page on http://127.0.0.1:8000",
    "sightline stream film.mp4 --repeat --web 8000  # without a camera: a file, at its own pace",
    "sightline stream rtsp://camera/1 --record cam.mp4 --budget-ms 33",
    "sightline stream 0 1 rtsp://door/live --log log.jsonl --log-max-mb 50",
    "sightline stream 0 --events seen.jsonl --event-clips clips --on-event 'notify-send seen'",
)
def stream(
    *,
    sources: Annotated[
        list[str], Option(f"What to look at, one or several: {source_examples()}.", None)
    ],
    options: StreamOptions,
    following: FollowOptions,
    engine: EngineOptions,
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize live: the newest frames of cameras and streams, or files at their own pace; every
    frame is accounted for.
    """
    fitted = None if options.web is None else _fitted(engine)
    summary = live.stream_chosen(sources, options, following, engine, budget_ms, console, fitted)
    steps = []
    if not summary["localized"]:
        steps.append("add --min-score 0  # shows all boxes, however unsure")
    if options.web is None:
        steps.append("add --web 8000  # a page to watch, steer, record and teach on")
    if not summary["files"]:
        steps.append("add --record film.mp4 --events seen.jsonl  # keeps what was seen")
    _report([summary], as_json, *steps)


@command(
    "sightline label holiday.mp4  # then open the page, draw boxes, and press Learn",
    "sightline label photos/ --labels-dir mug --web 8001",
    group=TEACH,
)
def label(
    *,
    options: Annotated[
        StreamOptions, Only(("labels_dir", "web", "web_token", "open_page", "seconds"))
    ],
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head", "objects"))],
    given: ImportOptions,
    sources: Annotated[
        list[str] | None, Option(f"What to label, one or several: {source_examples()}.", None)
    ] = None,
) -> None:
    """Label frames of a video, a folder or a camera on a page, and teach a head your objects; films
    play again and again, until Ctrl-C. With --add, they may be left out.
    """
    import_chosen(given, sources or (), options.labels_dir, console)
    if not sources:
        return
    chosen = replace(options, web=options.web or LABEL_PORT, window=False, repeat=True)
    alone, fitted = FollowOptions(follow=False), _fitted(engine)
    summary = live.stream_chosen(sources, chosen, alone, engine, None, console, fitted)
    table = options.labels_dir / "labels.csv"
    print_files(summary, console)
    if not table.is_file():
        _next(f"$ label {shlex.quote(masked(sources[0]))}  # no frame was labelled")
        return
    _next(
        f"$ fit {shlex.quote(str(table))} --out mine  # a head of these labels",
        "$ stream 0 --head mine --web 8000  # a camera with it",
    )


@command(
    "sightline fit photos.csv --out mine  # a line for each box: image,x0,y0,x1,y1,label",
    "sightline fit labels/labels.csv --kind dense --out mine  # labels made on the page",
    "sightline fit photos.csv --model vgg16 --weights vgg16.pth --out mine --curve curve.png",
    "sightline fit --dataset voc2007 --model vgg16 --weights vgg16.pth --out voc_head.safetensors",
    group=TEACH,
)
def fit(
    *,
    options: FitOptions,
    data: DataOptions,
    engine: Annotated[EngineOptions, Only(NETWORK_OPTIONS)],
    as_json: AsJson = False,
) -> None:
    """Fit a head to labelled images: what reads boxes of your own objects off a classifier; a
    published set's test half measures it.
    """
    result = fit_chosen(data, options, engine, console)
    _print_json(result, as_json)
    used = f"--head {shlex.quote(result['head'])}"
    if engine.model != EngineOptions().model:
        used = f"--model {shlex.quote(engine.model)} {used}"
    _next(f"$ stream 0 --web 8000 {used}", f"$ batch holiday.mp4 {used} --open")


@command(
    "sightline inspect classifier.onnx",
    "sightline inspect timm:resnet50 --image photo.jpg --out maps.png",
    group=TEACH,
)
def inspect_(
    *,
    network: Annotated[str, Option("A name, FILE.onnx or timm:NAME, as --model takes it.", None)],
    options: InspectOptions,
    engine: Annotated[EngineOptions, Only(("weights", "class_layer", "size_px", *INPUT_OPTIONS))],
    as_json: AsJson = False,
) -> None:
    """Say what a classifier is: input, classes, stages, work, what is missing; draw its maps on a
    photo.
    """
    chosen = replace(engine, model=network)
    _print_json(inspect_chosen(network, options, chosen, console), as_json)
    _next(f"$ fit photos.csv --model {shlex.quote(network)} --out mine  # a head for it")


@command(
    "sightline why photo.jpg --out why.html",
    "sightline why holiday.mp4 --at 12.3 --box 10,20,110,140 --add-as 'my mug'",
    group=TEACH,
)
def why(
    *,
    photo_or_film: Annotated[str, Option(f"What the frame is of: {source_examples()}.", None)],
    options: WhyOptions,
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head"))],
    as_json: AsJson = False,
) -> None:
    """Explain a box of a photo or a frame: what speaks for and against it; label it."""
    _print_json(why_chosen(photo_or_film, options, engine, console), as_json)


@command(
    "sightline finetune scenes.csv --out my_weights.safetensors",
    "sightline finetune scenes.csv --model vgg16 --weights vgg16.pth --out my_layer.safetensors",
    group=TEACH,
)
def finetune(
    *,
    options: FinetuneOptions,
    data: DataOptions,
    engine: Annotated[EngineOptions, Only(("model", "weights", "size_px", *INPUT_OPTIONS))],
    as_json: AsJson = False,
) -> None:
    """Fit the classifier's last layer to classes of your own, several in an image; boxes are not
    looked at.
    """
    _print_json(finetune_chosen(data, options, engine, console), as_json)
    weights = shlex.quote(str(options.out))
    _next(f"$ batch holiday.mp4 --model {engine.model} --weights {weights} --open")


@command(
    "sightline evaluate photos.csv --report photos.html --open",
    "sightline evaluate photos.csv --single --json",
    "sightline evaluate --dataset voc2007 --head voc_head.safetensors --classes dog,cat",
    "sightline evaluate street_boxes.csv --follow --report street.html",
    group=MEASURE,
)
def evaluate(
    *,
    data: DataOptions,
    options: EvaluateOptions,
    following: FollowOptions,
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, *ENGINE_OPTIONS))],
    open_page: OpenPage = False,
    as_json: AsJson = False,
) -> None:
    """Measure boxes against the truth, beside constant boxes that need no image; of a published
    set, its test half.
    """
    result = evaluate_chosen(data, options, engine, console, following)
    _print_json(result, as_json)
    page = "add --report report.html --open  # the best and the worst boxes as pictures"
    _next(*_page_step(options.report, open_page) if options.report else [page])


@command(
    "sightline reproduce sensitivity-voc2007 --weights vgg16.pth --out voc.html",
    "sightline reproduce heuristic --data VOCdevkit/VOC2007 --weights vgg16.pth",
    group=MEASURE,
)
def reproduce(
    *,
    table: Annotated[str, Option(f"Which table: {', '.join(TABLES)}.", None)],
    options: ReproduceOptions,
    engine: Annotated[EngineOptions, Only(("weights", "class_layer", "size_px"))],
    open_page: OpenPage = False,
    as_json: AsJson = False,
) -> None:
    """Compute a table of the papers again, as they did, and print their numbers beside ours; goes
    on where it was stopped.
    """
    _print_json(reproduce_chosen(table, options, engine, console), as_json)
    page = "add --out table.html --open  # a page of it, with pictures"
    _next(*_page_step(options.out, open_page) if options.out else [page])


@command(
    "sightline compare before.jsonl after.jsonl --source holiday.mp4",
    "sightline compare out/holiday.jsonl detector.jsonl --out beside.html --frames 30 --open",
    group=MEASURE,
)
def compare(
    *,
    a: Annotated[Path, Option("A log: NAME.jsonl of batch, or of stream --log.", None)],
    b: Annotated[
        Path,
        Option(
            "Another one, or another program's boxes: a JSON object a line, with frame, x0, y0, x1,"
            " y1 in pixels, and, if known, label and confidence.",
            None,
        ),
    ],
    options: CompareOptions,
    open_page: OpenPage = False,
    as_json: AsJson = False,
) -> None:
    """Compare two logs of the same frames: where their boxes differ, and the frames in which they
    differ most.
    """
    _print_json(compare_logs(a, b, options, console), as_json)
    more = "add --source holiday.mp4  # shows the frames that differ most"
    _next(*_page_step(options.out, open_page), *([] if options.source else [more]))


@command(
    "sightline calibrate holiday.mp4",
    "sightline calibrate photos.csv --model vgg16 --weights vgg16.pth",
    group=MACHINE,
)
def calibrate(
    *,
    options: CalibrateOptions,
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head"))],
    as_json: AsJson = False,
) -> None:
    """Make a network ready for int8: measure ranges, keep the layers that suffer in floating point,
    prove what comes out.
    """
    found = calibrate_chosen(options, engine, console)
    _print_json(found.report(), as_json)
    named = f" --calibration {shlex.quote(str(options.out))}" if options.out else ""
    _next(f"$ bench --models {engine.model} --precision int8  # how much faster it is here")
    _next(f"$ stream 0 --model {engine.model} --precision int8{named}")


@command(
    "sightline build --model squeezenet --weights squeezenet.net --out squeezenet_map.onnx",
    "sightline build --backend tensorrt --precision fp16",
    "sightline build --backend tensorrt --for sm89",
    group=MACHINE,
)
def build(
    *,
    options: BuildOptions,
    engine: Annotated[EngineOptions, Only((*NETWORK_OPTIONS, "head", "precision", "calibration"))],
) -> None:
    """Write the whole localization graph as one ONNX file, or build an engine of it, proved against
    the reference.
    """
    run_build(options, engine, console)
    if options.backend == "tensorrt" and not options.target:
        _next("$ stream 0 --web 8000  # takes the engine by itself", "$ bench --backend tensorrt")


@command(
    "sightline bench",
    "sightline bench holiday.mp4 --models squeezenet --json",
    "sightline bench --plots plots --sizes 96,128,160,224,320 --batches 1,2,4,8",
    "sightline bench compare before.json after.json",
    "sightline bench --screen 0 --seconds 20",
    "sightline bench --models lite0 --profile",
    "sightline bench --models lite0 --detector yolox_nano.onnx",
    group=MEASURE,
)
def bench(
    *,
    options: BenchOptions,
    engine: Annotated[EngineOptions, Only((*OF_BENCH, *INPUT_OPTIONS))],
    as_json: AsJson = False,
) -> None:
    """Measure fps end to end, and the engine beside its peers, in turns, until all has settled. No
    outlier is removed.

    compare A B: exit status 1 where something of ours is slower in B, by more than the noise of the
        two runs.
    """
    slower = bench_chosen(options, engine, console, as_json)
    if (options.what or [""])[0] != "compare" and not as_json:
        _next(
            "$ bench --json > before.json  # and again after a change",
            "$ bench compare before.json after.json",
        )
    if slower:
        raise typer.Exit(1)


@command(
    "sightline doctor",
    "sightline doctor --json",
    "python -m realtime.doctor  # where that fails",
    group=MACHINE,
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
        _next("mend what is broken above, then run this again")
        raise typer.Exit(1)
    _next("$ demo --out out  # a clip whose true boxes are known")


def _fitted(engine: EngineOptions) -> Command:
    """How the page fits heads; it needs what ``fit`` needs."""
    from calib.teaching import fit_command
    from engines.options import NETWORK_OPTIONS

    return fit_command(engine, NETWORK_OPTIONS)


def _next(*steps: str) -> None:
    """Print what can be done next. A step that begins with ``$`` is a command of Sightline's, and
    is written as it was started here: in an environment that is not activated, with its folder.
    """
    started = sys.argv[0] if Path(sys.argv[0]).stem == "sightline" else "sightline"
    program = "sightline" if shutil.which("sightline") else started
    for place, step in enumerate(steps):
        text = f"{program}{step[1:]}" if step.startswith("$") else step
        lead = "next:" if place == 0 else "or:  "
        console.print(
            Text.assemble((f"{lead} ", "bold"), text.replace("  #", "   #")), soft_wrap=True
        )


def _page_step(path: Path, open_page: bool) -> list[str]:
    """Show a report in the browser, or say how to."""
    if not open_page:
        return [f"open {path} in a browser, or add --open"]
    if path.suffix == ".html":
        from realtime.documents import open_in_browser

        open_in_browser(path, console.print)
    return []


def _print_json(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


def _report(summaries: list[dict[str, Any]], as_json: bool, *steps: str) -> None:
    from realtime.terminal import print_summaries

    summaries = shown(summaries)
    print_summaries(summaries, console)
    _next(*steps)
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
        gc.disable()  # what is imported stays: looking for garbage takes a tenth of the time
        try:
            app = all_commands(next(iter(sys.argv[1:]), ""))
        finally:
            gc.enable()
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
