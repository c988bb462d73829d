"""Sightline's command line. Each command calls one function of ``realtime``, ``calib`` or
``engines``.
"""

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from calib.bench.run import BenchOptions, bench_chosen, takes_bench
from calib.commands import EvaluateOptions, FitOptions, evaluate_chosen, fit_chosen
from calib.data.choose import OPTIONS, DataChoice, load_chosen
from calib.heads import finetune as finetuning
from calib.precision import build as certified
from calib.precision import calibrate as calibration
from engines.choose import Choice, build_chosen
from engines.errors import SightlineError
from engines.files import checked_output
from engines.networks.registry import load_classifier
from engines.options import ENGINE, LARGEST, MOST_IMAGES, NETWORK, finite, takes, takes_choice
from engines.text import Terminal, shown
from realtime import direct, live
from realtime import doctor as doctors
from realtime.batch.estimate import plan_chosen
from realtime.batch.options import Settings, takes_settings
from realtime.batch.scale import Scale, batch_chosen, takes_scale
from realtime.latency_budget import open_within
from realtime.options import StreamOptions, takes_stream
from realtime.sources.spec import examples as source_examples
from realtime.statistics import print_summaries
from realtime.tracking.options import WHOLE_FRAMES, FollowOptions

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
"""What typer raises where a line of words does not fit its command; typer has no public name for
it.
"""
DEFECT = "this is a defect of Sightline, please report it"
DEFAULT, NO_DATA, AS_USUAL, AS_IS, AS_TIMED = (
    Choice(),
    DataChoice(),
    StreamOptions(),
    Settings(),
    BenchOptions(),
)
ONE = Scale()
takes_data = takes("chosen", DataChoice, OPTIONS)
FOLLOW_OPTIONS: dict[str, Any] = {
    "follow": Annotated[
        bool,
        typer.Option(
            "--follow", help="Look where the object was: finds small ones, calms the box."
        ),
    ],
    "min_score": Annotated[
        float,
        typer.Option(
            help="No box where that is less likely to be right; 0.8 is right 8 times in 10.",
            min=0,
            max=1,
        ),
    ],
    "select": Annotated[
        str | None,
        typer.Option(help="With --follow: what, on the first frame: X0,Y0,X1,Y1, X,Y, or a class."),
    ],
    "every_frame": Annotated[
        bool,
        typer.Option(
            "--every-frame",
            help="With --follow: look at each frame, not at every other: surer, but fewer fps.",
        ),
    ],
}
takes_follow = takes("following", FollowOptions, FOLLOW_OPTIONS)
"""A command's parameter ``following`` becomes one option for each of these."""

Budget = Annotated[
    float | None,
    typer.Option(
        "--budget-ms",
        min=0.1,
        callback=finite,
        help="Hold this time per frame by stepping to cheaper settings and back; 33 is 30 fps.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the summary as JSON on standard output.")
]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Single = Annotated[
    bool,
    typer.Option(
        "--single",
        help="Only images with exactly one labelled object, of whatever class (--classes or not).",
    ),
]


@app.command(epilog="Example:  sightline demo --out out")
@takes_choice(*ENGINE, "wanted_class")
def demo(
    out: Out = Path("out"),
    frames: Annotated[int, typer.Option(help="Length of the clip.", min=1, max=LARGEST)] = 300,
    choice: Choice = DEFAULT,
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize a cat in a clip whose true boxes are known, and show what comes out."""
    localizer = open_within(choice, budget_ms, console, streams=0)
    _report(direct.process_all([f"demo:{frames}"], out, localizer, console), as_json)


@app.command(
    epilog=(
        "Examples:  sightline batch holiday.mp4 photos/ --out out   ·   sightline batch *.mp4"
        " --every 5 --plan --machines 4   ·   sightline batch film.mkv --end 1:10:00 --heat-video  "
        " ·   sightline batch 's3://b/*' --out s3://b/out --ray auto"
    )
)
@takes_choice(*ENGINE, "wanted_class")
@takes_settings
@takes_follow
@takes_scale
def batch(
    sources: Annotated[
        list[str], typer.Argument(help=f"What to look at, one or several: {source_examples()}.")
    ],
    out: Annotated[
        str, typer.Option(help="Folder for the results; with --ray, an address, too.")
    ] = "out",
    settings: Settings = AS_IS,
    following: FollowOptions = WHOLE_FRAMES,
    scale: Scale = ONE,
    choice: Choice = DEFAULT,
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize every frame of video files or image folders: annotated MP4, JSONL, Parquet, report;
    goes on where it was killed.

    Exit status 1 where a source was damaged or could not be read, and the others are done.
    """
    following, choice = following.beside(choice)
    settings = replace(settings, following=following)
    if scale.plan:
        plan_chosen(sources, settings, scale, choice, console, as_json)
    else:
        _report(batch_chosen(sources, out, settings, scale, choice, budget_ms, console), as_json)


@app.command(
    epilog=(
        "Examples:  sightline stream 0   ·   sightline stream rtsp://camera/1 --record cam.mp4"
        " --budget-ms 33   ·   sightline stream 0 1 rtsp://door/live --log log.jsonl --log-max-mb"
        " 50   ·   sightline stream 0 --follow"
    )
)
@takes_choice(*ENGINE, "wanted_class")
@takes_stream
@takes_follow
def stream(
    sources: Annotated[
        list[str],
        typer.Argument(help=f"What to look at, one or several: {source_examples()}."),
    ],
    options: StreamOptions = AS_USUAL,
    following: FollowOptions = WHOLE_FRAMES,
    choice: Choice = DEFAULT,
    budget_ms: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Localize live: the newest frames of cameras and streams, or files at their own pace; every
    frame is accounted for.
    """
    following, choice = following.beside(choice)
    localizer = open_within(choice, budget_ms, console, batch=min(options.batch, len(sources)))
    _report([live.stream(sources, localizer, console, options, following)], as_json)


@app.command(
    epilog=(
        "Examples:  sightline fit photos.csv --out head.safetensors --curve curve.png   ·  "
        " sightline fit --dataset voc2007 --model vgg16 --weights vgg16.pth --out"
        " voc_head.safetensors"
    )
)
@takes_choice(*NETWORK)
@takes_data
def fit(
    out: Annotated[Path, typer.Option(help="The head to write (.safetensors).")],
    chosen: DataChoice = NO_DATA,
    kind: Annotated[
        str,
        typer.Option(help="best; paper or paper-sgd: the papers' linear layer on the whole map."),
    ] = "best",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="A layer per class besides the one for everything.")
    ] = False,
    curve: Annotated[
        Path | None,
        typer.Option(help="Picture of accuracy over the number of boxes to draw: FILE.png."),
    ] = None,
    curve_on: Annotated[
        Path | None, typer.Option(help="Labels the curve is measured on; else a fifth of DATA.")
    ] = None,
    curve_ids: Annotated[
        Path | None, typer.Option(help="Text file naming the images of --curve-on to keep.")
    ] = None,
    choice: Choice = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Fit a box head to labelled images with one object each, by cross-validation; a published
    set's test half measures it.
    """
    options = FitOptions(out, kind, per_class, curve, curve_on, curve_ids)
    result = fit_chosen(chosen, options, choice, console)
    if as_json:
        print(json.dumps(result))


@app.command(epilog="Example:  sightline finetune scenes.csv --out my_weights.safetensors")
@takes_choice("model", "weights", "size_px")
@takes_data
def finetune(
    out: Annotated[Path, typer.Option(help="The weights to write (.safetensors), for --weights.")],
    chosen: DataChoice = NO_DATA,
    choice: Choice = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Fit the classifier's last layer to classes of your own, several in an image; boxes are not
    looked at.
    """
    checked_output(out, finetuning.WEIGHTS_FILE, (*chosen.inputs, *choice.inputs))
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    found = finetuning.finetune(load_chosen(chosen, "trainval"), classifier, console)
    finetuning.save_finetuned(found, classifier, out)
    console.print(
        f"{len(found.classes)} classes, mean AP {100 * found.mean_average_precision:.1f} % held"
        f" out; wrote {out}"
    )
    if as_json:
        print(
            json.dumps(
                {
                    "classes": found.classes,
                    "average_precision": found.average_precision,
                    "weights": str(out),
                }
            )
        )


@app.command(
    epilog=(
        "Examples:  sightline evaluate photos.csv --single --json   ·   sightline evaluate"
        " photos.csv --report photos.html   ·   sightline evaluate --dataset voc2007 --head"
        " voc_head.safetensors --classes dog,cat   ·   sightline evaluate street_boxes.csv --follow"
        " --report street.html"
    )
)
@takes_choice(*ENGINE)
@takes_data
@takes_follow
def evaluate(
    chosen: DataChoice = NO_DATA,
    single: Single = False,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N images.", min=1, max=LARGEST)
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="Where constant boxes, and which classes come together, are from."),
    ] = None,
    train_ids: Annotated[
        Path | None, typer.Option(help="Text file naming the images of --train to keep.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Report to write, with pictures: FILE.html or FILE.md.")
    ] = None,
    following: FollowOptions = WHOLE_FRAMES,
    choice: Choice = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Measure boxes against the truth, beside constant boxes that need no image; of a published
    set, its test half.
    """
    result = evaluate_chosen(
        chosen, EvaluateOptions(single, limit, train, train_ids, report), choice, console, following
    )
    if as_json:
        print(json.dumps(result))


@app.command(
    epilog=(
        "Examples:  sightline calibrate holiday.mp4   ·   sightline calibrate photos.csv --model"
        " vgg16 --weights vgg16.pth"
    )
)
@takes_choice(*NETWORK[:3], "head", "size_px", "layer")
def calibrate(
    data: Annotated[
        str,
        typer.Argument(
            help="Labelled images, as for evaluate, or any source: clip, folder, zip, demo:."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder, zip, tar or video, where it is not beside the labels."),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(help="Text file that names the images to use, by file stem, one a line."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="FILE.json; else where --precision int8 finds it.")
    ] = None,
    ranges: Annotated[
        str,
        typer.Option(help="minmax, percentile, entropy, mse, or auto: the one that harms least."),
    ] = "auto",
    limit: Annotated[
        int, typer.Option(help="How many images, evenly spread.", min=16, max=LARGEST)
    ] = 128,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of what each layer costs: FILE.png.")
    ] = None,
    choice: Choice = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Make a network ready for int8: measure ranges, keep the layers that suffer in floating point,
    prove what comes out.
    """
    pictures = calibration.Images(data, images, ids, limit)
    calibration.check_outputs(pictures, choice, out, plot)
    found = calibration.calibrate_chosen(pictures, choice, ranges, out, console)
    if plot:
        calibration.plot_layers(found, plot, choice.model)
        console.print(f"wrote {plot}")
    if as_json:
        print(json.dumps(found.report()))


@app.command(
    epilog=(
        "Examples:  sightline build --model squeezenet --weights squeezenet.net --out"
        " squeezenet_map.onnx   ·   sightline build --backend tensorrt --precision fp16   ·  "
        " sightline build --backend tensorrt --for sm89"
    )
)
@takes_choice(*NETWORK, "head", "precision", "calibration")
def build(
    out: Annotated[
        Path | None,
        typer.Option(help="ONNX file to write: image in; box, class, score and map out."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per call.", min=1, max=MOST_IMAGES)] = 1,
    backend: Annotated[
        str, typer.Option(help="auto: the ONNX file alone; openvino or tensorrt: certified for it.")
    ] = "auto",
    target: Annotated[
        str | None,
        typer.Option("--for", help="A GPU that is not here: sm75, sm80, sm86, sm89, sm120."),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build even where the engine is in the cache.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(help="Clip or folder whose frames certify the engine; else the demo's."),
    ] = None,
    choice: Choice = DEFAULT,
) -> None:
    """Write the whole localization graph as one ONNX file, or build an engine of it, proved against
    the reference.
    """
    wanted = certified.BuildChoice(out, backend, choice.precision, target, rebuild, on)
    certified.check_options(wanted, choice.inputs)
    reference = build_chosen(replace(choice, precision="fp32"), batch)
    graph = build_chosen(choice, batch) if choice.precision == "int8" else reference
    certified.build_chosen_engine(graph, wanted, console, reference)


@app.command(
    epilog=(
        "Examples:  sightline bench   ·   sightline bench holiday.mp4 --models squeezenet --json  "
        " ·   sightline bench --plots plots --sizes 96,128,160,224,320 --batches 1,2,4,8   ·  "
        " sightline bench compare before.json after.json   ·   sightline bench --screen 0"
        " --seconds 20"
    )
)
@takes_choice("weights", "method", "head", "size_px", "backend", "precision")
@takes_bench
def bench(
    options: BenchOptions = AS_TIMED, choice: Choice = DEFAULT, as_json: AsJson = False
) -> None:
    """Measure fps end to end, and the engine beside its peers, in turns, until all has settled. No
    outlier is removed.

    compare A B: exit status 1 where something of ours is slower in B, by more than the noise of the
        two runs.
    """
    if bench_chosen(options, choice, console, as_json):
        raise typer.Exit(1)


@app.command(
    epilog=(
        "Examples:  sightline doctor   ·   sightline doctor --json   ·   where that fails: python"
        " -m realtime.doctor"
    )
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
        _stop(str(error))
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
