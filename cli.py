"""Sightline's command line. Each command is a thin face of one function in ``realtime``, ``calib`` or ``engines``."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from calib import bench as benches
from calib import calibrate as calibration
from calib import certified
from calib import curve as curves
from calib import evaluate as evaluation
from calib.baselines import baselines, check_disjoint
from calib.bench_compare import print_comparison
from calib.bench_plots import plot_bench
from calib.bench_report import print_bench
from calib.choose import OPTIONS, DataChoice, labels_beside, load_chosen
from calib.fit import default_features, fit_head
from calib.machine import machine
from calib.report import SUFFIXES, write_report
from engines.base import OutputError, SightlineError
from engines.choose import Choice, build_chosen, open_localizer
from engines.classifiers import load_classifier
from engines.files import checked_suffix
from engines.localizer import Localizer
from engines.options import ENGINE, NETWORK, takes, takes_choice
from realtime import batch as batches
from realtime import live
from realtime.governed import Governed
from realtime.latency import latency_table

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Find the main object in every frame, with nothing but an image classifier: a box, and the reason for it.",
)  # fmt: skip
console = Console(stderr=True)
DEFAULT, NO_DATA = Choice(), DataChoice()
takes_data = takes("chosen", DataChoice, OPTIONS)

Budget = Annotated[
    float | None,
    typer.Option(
        "--budget-ms", min=0.1, help="Hold this time per frame by stepping to cheaper settings and back; 33 is 30 fps."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Single = Annotated[
    bool, typer.Option("--single", help="Only images with exactly one labelled object, of whatever class (--classes or not).")
]


@app.command(epilog="Example:  sightline demo --out out")
@takes_choice(*ENGINE, "wanted_class")
def demo(
    out: Out = Path("out"), frames: Annotated[int, typer.Option(help="Length of the clip.", min=1)] = 300,
    choice: Choice = DEFAULT, budget_ms: Budget = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Localize a cat in a clip whose true boxes are known, and show what comes out."""
    localizer = _open_for(choice, budget_ms, streams=0)
    _report(batches.process_all([f"demo:{frames}"], out, localizer, console), as_json)


@app.command(epilog="Example:  sightline batch holiday.mp4 photos/ --out out")
@takes_choice(*ENGINE, "wanted_class")
def batch(
    sources: Annotated[list[str], typer.Argument(help="Video files, folders, globs, zips or tars of images.")],
    out: Out = Path("out"),
    video: Annotated[bool, typer.Option(help="Write the annotated video, or only the data.")] = True,
    choice: Choice = DEFAULT, budget_ms: Budget = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Localize every frame of video files or image folders: annotated MP4, JSONL log, latency plot, summary."""
    localizer = _open_for(choice, budget_ms, streams=0)
    _report(batches.process_all(sources, out, localizer, console, video), as_json)


@app.command(epilog="Examples:  sightline stream 0   ·   sightline stream rtsp://camera/1 --record cam.mp4 --budget-ms 33")
@takes_choice(*ENGINE, "wanted_class")
def stream(
    source: Annotated[str, typer.Argument(help="Camera number, rtsp:// or http(s):// address, file, folder or demo:")],
    window: Annotated[bool, typer.Option(help="Open a window where there is a display.")] = True,
    record: Annotated[Path | None, typer.Option(help="Annotated MP4 to write.")] = None,
    log: Annotated[Path | None, typer.Option(help="Per-frame JSONL to write.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after this long.", min=0.1)] = None,
    choice: Choice = DEFAULT, budget_ms: Budget = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Localize live: the newest frame of a camera or stream, or a file at its own pace; late frames are counted as dropped."""
    localizer = _open_for(choice, budget_ms)
    _report([live.stream(source, localizer, console, window=window, record=record, log=log, seconds=seconds)], as_json)


@app.command(
    epilog="Examples:  sightline fit photos.csv --out head.safetensors --curve curve.png"
    "   ·   sightline fit --dataset voc2007 --model vgg16 --weights vgg16.pth --out voc_head.safetensors"
)
@takes_choice(*NETWORK)
@takes_data
def fit(
    out: Annotated[Path, typer.Option(help="The head to write (.safetensors).")],
    chosen: DataChoice = NO_DATA,
    kind: Annotated[str, typer.Option(help="best; paper or paper-sgd: the papers' linear layer on the whole map.")] = "best",
    per_class: Annotated[bool, typer.Option("--per-class", help="A layer per class besides the one for everything.")] = False,
    curve: Annotated[Path | None, typer.Option(help="Picture of accuracy over the number of boxes to draw: FILE.png.")] = None,
    curve_on: Annotated[Path | None, typer.Option(help="Labels the curve is measured on; else a fifth of DATA.")] = None,
    curve_ids: Annotated[Path | None, typer.Option(help="Text file naming the images of --curve-on to keep.")] = None,
    choice: Choice = DEFAULT, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fit a box head to labelled images with one object each, by cross-validation; a published set's test half measures it."""
    checked_suffix(out, (".safetensors",), "head")
    if curve:
        checked_suffix(curve, curves.SUFFIXES, "picture")
    elif curve_on:
        raise OutputError("--curve-on says what a learning curve is measured on: name its picture with --curve FILE.png")
    training, test = load_chosen(chosen, "trainval"), load_chosen(chosen, "test") if chosen.dataset else []
    held_out = load_chosen(labels_beside(chosen, curve_on, curve_ids), "") if curve_on else None
    if curve:
        curves.check_enough(training, held_out)
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    spec, features = default_features(classifier, choice.method, kind, choice.layer)
    fitted = fit_head(training, classifier, spec, features, console, chosen.name, kind, per_class)
    fitted.head.save(out)
    console.print(f"cross-validated CorLoc {100 * fitted.cv_corloc:.1f} %, mean IoU {fitted.cv_mean_iou:.3f}; wrote {out}")
    result = {**fitted.head.card, "head": str(out)}
    if test:
        localizer = _open(replace(choice, head=str(out)))
        found = evaluation.evaluate(test, localizer, console, baselines(localizer, None))
        result["test"] = evaluation.print_report(*found, True, console)
    if curve:
        learned = curves.curve_of(training, held_out, classifier, spec, features, console)
        curves.plot_curve(learned, curve, f"Heads fitted on {chosen.title}")
        console.print(curves.curve_table(learned), f"wrote {curve}")
        result["curve"] = asdict(learned)
    if as_json:
        print(json.dumps(result))


@app.command(
    epilog="Examples:  sightline evaluate photos.csv --single --json   ·   sightline evaluate photos.csv --report photos.html"
    "   ·   sightline evaluate --dataset voc2007 --head voc_head.safetensors --classes dog,cat"
)
@takes_choice(*ENGINE)
@takes_data
def evaluate(
    chosen: DataChoice = NO_DATA, single: Single = False,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.", min=1)] = None,
    train: Annotated[Path | None, typer.Option(help="Where constant boxes come from, if not from the head's data.")] = None,
    train_ids: Annotated[Path | None, typer.Option(help="Text file naming the images of --train to keep.")] = None,
    report: Annotated[Path | None, typer.Option(help="Report to write, with pictures: FILE.html or FILE.md.")] = None,
    choice: Choice = DEFAULT, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure boxes against the truth, beside constant boxes that need no image; of a published set, its test half."""
    if report:
        checked_suffix(report, SUFFIXES, "report")
    samples = load_chosen(chosen, "test")[:limit]
    training = load_chosen(labels_beside(chosen, train, train_ids), "") if train else None
    if training:
        check_disjoint(training, samples, "name those of --train to keep with --train-ids FILE")
    localizer = _open(choice)
    found, cases = evaluation.evaluate(samples, localizer, console, baselines(localizer, training), single)
    measured, engine = evaluation.print_report(found, cases, chosen.dataset is not None, console), localizer.engine
    facts = {
        "model": choice.model, "method": choice.method, "head": choice.head or localizer.box_reader,
        "backend": engine.backend, "precision": engine.precision, "machine": machine(),
    }  # fmt: skip
    if report:
        write_report(report, f"Localization on {chosen.title}", found, cases, localizer, facts)
        console.print(f"wrote {report}")
    if as_json:
        print(json.dumps({**measured, **facts}))


@app.command(
    epilog="Examples:  sightline calibrate holiday.mp4   ·   sightline calibrate photos.csv --model vgg16 --weights vgg16.pth"
)
@takes_choice(*NETWORK[:3], "head", "size_px", "layer")
def calibrate(
    data: Annotated[str, typer.Argument(help="Labelled images, as for evaluate, or any source: clip, folder, zip, demo:.")],
    images: Annotated[Path | None, typer.Option(help="Folder, zip, tar or video, where it is not beside the labels.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Text file that names the images to use, by file stem, one a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="FILE.json; else where --precision int8 finds it.")] = None,
    ranges: Annotated[str, typer.Option(help="minmax, percentile, entropy, mse, or auto: the one that harms least.")] = "auto",
    limit: Annotated[int, typer.Option(help="How many images, evenly spread.", min=16)] = 128,
    plot: Annotated[Path | None, typer.Option(help="Picture of what each layer costs: FILE.png.")] = None,
    choice: Choice = DEFAULT, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a network ready for int8: measure ranges, keep the layers that suffer in floating point, prove what comes out."""
    if plot:
        checked_suffix(plot, (".png", ".svg"), "picture")
    found = calibration.calibrate_chosen(calibration.Images(data, images, ids, limit), choice, ranges, out, console)
    if plot:
        calibration.plot_layers(found, plot, choice.model)
        console.print(f"wrote {plot}")
    if as_json:
        print(json.dumps(found.report()))


@app.command(
    epilog="Examples:  sightline build --model squeezenet --weights squeezenet.net --out squeezenet_map.onnx"
    "   ·   sightline build --backend tensorrt --precision fp16   ·   sightline build --backend tensorrt --for sm89"
)
@takes_choice(*NETWORK, "head", "precision", "calibration")
def build(
    out: Annotated[Path | None, typer.Option(help="ONNX file to write: image in; box, class, score and map out.")] = None,
    batch: Annotated[int, typer.Option(help="Images per call.", min=1)] = 1,
    backend: Annotated[str, typer.Option(help="auto: the ONNX file alone; openvino or tensorrt: certified for it.")] = "auto",
    target: Annotated[str | None, typer.Option("--for", help="A GPU that is not here: sm75, sm80, sm86, sm89, sm120.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even where the engine is in the cache.")] = False,
    on: Annotated[str | None, typer.Option(help="Clip or folder whose frames certify the engine; else the demo's.")] = None,
    choice: Choice = DEFAULT,
) -> None:  # fmt: skip
    """Write the whole localization graph as one ONNX file, or build an engine of it, proved against the reference."""
    wanted = certified.BuildChoice(out, backend, choice.precision, target, rebuild, on)
    certified.check_options(wanted)
    reference = build_chosen(replace(choice, precision="fp32"), batch)
    graph = build_chosen(choice, batch) if choice.precision == "int8" else reference
    certified.build_chosen_engine(graph, wanted, console, reference)


@app.command(
    epilog="Examples:  sightline bench   ·   sightline bench holiday.mp4 --models squeezenet --json"
    "   ·   sightline bench --plots plots --sizes 96,128,160,224,320 --batches 1,2,4,8"
    "   ·   sightline bench compare before.json after.json"
)
@takes_choice("weights", "method", "head", "size_px")
def bench(
    what: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE] | compare A.json B.json", show_default=False, help=(
        "What to run end to end, demo:300 unless told (a file called compare: ./compare). Or two results of --json to compare."
    ))] = None,
    models: Annotated[str, typer.Option("--models", "--model", help="Networks to time; the first one end to end too.")] = (
        "compact,vgg16"
    ),
    seconds: Annotated[float, typer.Option(help="Time limit of each part that has not settled before.", min=0.1)] = 60.0,
    sizes: Annotated[str, typer.Option(help="Also time the first network at these input sides: 96,128,224.")] = "",
    batches: Annotated[str, typer.Option(help="Also time it with so many images in a call: 1,2,4.")] = "",
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures of everything.")] = None,
    choice: Choice = DEFAULT, as_json: AsJson = False,
    across_machines: Annotated[bool, typer.Option("--across-machines", help="Compare what was not measured alike.")] = False,
) -> None:  # fmt: skip
    """Measure fps end to end, and the engine beside its peers, in turns, until all has settled. No outlier is removed.

    compare A B: exit status 1 where something of ours is slower in B, by more than the noise of the two runs.
    """
    source, *others = what or ["demo:300"]
    if source == "compare":
        if print_comparison(others, across_machines, console, as_json):
            raise typer.Exit(1)
        return
    if others:
        raise SightlineError(
            f"bench runs one source, not also {others[0]}; to compare two results: bench compare A.json B.json"
        )
    lists = benches.whole_numbers(sizes, "--sizes"), benches.whole_numbers(batches, "--batches")
    result, run = benches.bench(source, benches.choices(models, choice), seconds, console, *lists)
    print_bench(result, console)
    for picture in plot_bench(result, run, plots) if plots else ():
        console.print(f"wrote {picture}")
    if as_json:
        print(json.dumps(result))


def _open(choice: Choice, streams: int = 1) -> Localizer:
    reasons: list[str] = []
    with console.status(f"building {choice.model} ..."):
        localizer = open_localizer(choice, reasons.append, streams)
    engine = localizer.engine
    what = f"{choice.model} at {localizer.size_px} px on {engine.backend} {engine.precision}, {engine.device}"
    console.print("; ".join([what, *reasons]), style="dim", soft_wrap=True)
    if localizer.box_reader.startswith("heuristic") and choice.method != "heuristic":
        console.print(f"no fitted head for this network yet ('fit' makes one); {localizer.box_reader}", style="yellow")
    return localizer


def _open_for(choice: Choice, budget_ms: float | None, streams: int = 1) -> Localizer | Governed:
    """One engine, or one that changes to hold a budget."""
    if budget_ms is None:
        return _open(choice, streams)
    with console.status(f"building {choice.model} ..."):
        governed = Governed(choice, budget_ms, lambda line: console.print(line, style="yellow"), streams=streams)
    console.print(f"{choice.model} within {budget_ms:g} ms a frame, from {governed.rung.name}", style="dim")
    return governed


def _report(summaries: list[dict[str, Any]], as_json: bool) -> None:
    for summary in summaries:
        console.print(latency_table(summary["source"], summary))
        for kind, path in summary.get("files", {}).items():
            console.print(f"  {kind.replace('_', ' '):13} {path}")
    if as_json:
        print(json.dumps(summaries[0] if len(summaries) == 1 else summaries))
    if any(summary["interrupted"] for summary in summaries):
        raise typer.Exit(130)


def main() -> None:
    """Run the command line; a user's mistake is one line and status 2."""
    try:
        app()
    except SightlineError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
