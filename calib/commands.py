"""The commands ``fit``, ``finetune`` and ``evaluate``: from labelled images to heads, weights,
figures, pictures and reports.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from calib.bench.machine import machine
from calib.data.choose import DataOptions, labels_beside, load_chosen
from calib.data.datasets import Sample
from calib.data.labels import Remarks
from calib.evaluation import evaluate as evaluation
from calib.evaluation.metrics import baselines, check_disjoint, conditional_probabilities
from calib.evaluation.report import check_report, write_report
from calib.evaluation.sequences import (
    follow_sequences,
    load_sequences,
    sequences_table,
    write_sequence_report,
)
from calib.evaluation.sequences import report_of as following_report
from calib.heads import curve as curves
from calib.heads import dense
from calib.heads import finetune as finetuning
from calib.heads.fit import LINEAR, default_features, fit_head
from calib.papers import adaptation
from calib.papers.adaptation import PUBLISHED
from engines.errors import InputError, OutputError
from engines.explain import Explainer
from engines.files import checked_output
from engines.head import HEAD_FILE, NO_HEAD, dense_input
from engines.localizer import Localizer
from engines.options import ADVANCED, LOOK_AT, NETWORK, OUTPUT, SPEED, EngineOptions, Option
from realtime.latency_budget import classifier_with_notes, open_with_notes
from realtime.tracking.options import WHOLE_FRAMES, FollowOptions


@dataclass(frozen=True)
class FitOptions:
    """The options of ``fit`` besides the data's and the network's; ``kind`` and ``per_class`` are
    those of ``calib.heads.fit.fit_head``.
    """

    out: Annotated[
        Path, Option("The head to write: NAME, for --head NAME, or FILE.safetensors.", OUTPUT)
    ]
    kind: Annotated[
        str | None,
        Option(
            "dense: many boxes from one call, the default for lite0, which comes with such a head;"
            " linear: one box, read off maps, else the default; paper or paper-sgd: the papers'"
            " linear layer on the whole map.",
            NETWORK,
        ),
    ] = None
    from_head: Annotated[
        str | None,
        Option(
            "Of a dense head: the one to stay near to, so that few boxes do no harm: FILE, NAME of"
            " a shipped one (the default, where it fits), or none.",
            ADVANCED,
        ),
    ] = None
    even_if_worse: Annotated[
        bool, Option("Write a dense head that is worse than the one it started from.", ADVANCED)
    ] = False
    move_boxes: Annotated[
        bool,
        Option(
            "Of a dense head and at most 30 images: fit the boxes, too, and not only how sure they"
            " are. It pays where all images are of one place.",
            ADVANCED,
        ),
    ] = False
    per_class: Annotated[
        bool, Option("A layer per class besides the one for everything.", NETWORK)
    ] = False
    curve: Annotated[
        Path | None,
        Option("Picture of accuracy over the number of boxes to draw: FILE.png.", OUTPUT),
    ] = None
    curve_on: Annotated[
        Path | None, Option("Labels the curve is measured on; else a fifth of DATA.", ADVANCED)
    ] = None
    curve_ids: Annotated[
        Path | None, Option("Text file naming the images of --curve-on to keep.", ADVANCED)
    ] = None


def fit_chosen(
    data: DataOptions, options: FitOptions, choice: EngineOptions, console: Console
) -> dict[str, Any]:
    """Fit and save a head; measure it on a published set's test half; draw its learning curve.

    Returns:
        The head's card, its file, and what was measured.

    Raises:
        SightlineError: the data or the network cannot be used, or a result cannot be written.
    """
    out, curve = options.out, options.curve
    if not out.suffix:
        out = out.with_suffix(".safetensors")
    inputs = (*data.inputs, *choice.inputs, options.curve_on, options.curve_ids)
    checked_output(out, HEAD_FILE, inputs)
    if curve:
        checked_output(curve, curves.CURVE_FILE, inputs)
    elif options.curve_on:
        raise OutputError(
            "labels to measure a learning curve on are given, but no picture of it: name it,"
            " FILE.png",
            option=("curve", "curve_on"),
        )
    training, test = (
        load_chosen(data, "trainval"),
        load_chosen(data, "test") if data.dataset else [],
    )
    held_out = (
        load_chosen(labels_beside(data, options.curve_on, options.curve_ids), "")
        if options.curve_on
        else None
    )
    kind = options.kind or (dense.KIND if dense_input(choice.default_head) else LINEAR)
    if kind == dense.KIND:
        return _fit_dense(training, test, data, replace(options, out=out), choice, console)
    if curve:
        curves.check_enough(training, held_out)
    choice = replace(choice, head=NO_HEAD)
    classifier = classifier_with_notes(choice, console)
    spec, features = default_features(
        classifier,
        choice.method,
        kind,
        choice.layer,
        choice.aggregation or "max",
        choice.as_published,
    )
    fitted = fit_head(
        training, classifier, spec, features, console, data.name, kind, options.per_class
    )
    fitted.head.save(out)
    console.print(
        f"cross-validated CorLoc {100 * fitted.cv_corloc:.1f} %, mean IoU {fitted.cv_mean_iou:.3f};"
        f" wrote {out}"
    )
    result = {**fitted.head.card, "head": str(out)}
    if test:
        localizer = open_with_notes(replace(choice, head=str(out), layer=None), console)
        found = evaluation.evaluate(test, localizer, console, baselines(localizer, None))
        result["test"] = evaluation.print_report(*found, True, console)
    if curve:
        learned = curves.curve_of(training, held_out, classifier, spec, features, console)
        curves.plot_curve(learned, curve, f"Heads fitted on {data.title}")
        console.print(curves.curve_table(learned), f"wrote {curve}")
        result["curve"] = asdict(learned)
    return result


def _fit_dense(
    training: Sequence[Sample],
    test: Sequence[Sample],
    data: DataOptions,
    options: FitOptions,
    choice: EngineOptions,
    console: Console,
) -> dict[str, Any]:
    """Fit and save a dense head, see ``fit_chosen``."""
    if options.curve or options.per_class:
        raise InputError(
            "a dense head has neither a learning curve nor layers per class: ask for a linear one",
            option=("kind", "curve", "per_class"),
        )
    choice = dense.with_input(choice)
    classifier = classifier_with_notes(choice, console)
    start = dense.start_of(options.from_head, classifier)
    spec = dense.default_spec(classifier, choice.layer)
    moves = options.move_boxes
    fitted = dense.fit_dense(
        training, classifier, spec, console, data.name, start, move_boxes=moves
    )
    console.print(dense.told(fitted))
    if fitted.is_worse and not options.even_if_worse:
        raise InputError(
            "the fitted head is worse than the one that it started from, so it was not written:"
            " label more images, or ask for it all the same",
            option="even_if_worse",
        )
    fitted.head.save(options.out)
    console.print(f"wrote {options.out}")
    result = {
        "before": None,
        **fitted.head.card,
        "worse": fitted.is_worse,
        "more": fitted.forecast.words if fitted.forecast else "",
        "head": str(options.out),
    }
    if test:
        opened = replace(choice, head=str(options.out), layer=None)
        localizer = open_with_notes(opened, console)
        found = evaluation.evaluate(test, localizer, console, baselines(localizer, None))
        result["test"] = evaluation.print_report(*found, True, console)
    return result


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of ``finetune`` besides the data's and the network's."""

    out: Annotated[Path, Option("The weights to write (.safetensors), for --weights.", OUTPUT)]
    as_published: Annotated[
        bool,
        Option(
            "Two layers of adaptation for vgg16, trained by gradient descent with a softmax, as"
            " Bency et al. do it for beam search.",
            NETWORK,
        ),
    ] = False
    hidden: Annotated[
        int, Option("With --as-published: units of the first of the two layers.", ADVANCED, min=1)
    ] = PUBLISHED.hidden
    batches: Annotated[
        int, Option("With --as-published: of 50 samples each; the paper's.", SPEED, min=1)
    ] = PUBLISHED.batches
    copies: Annotated[
        int,
        Option(
            "With --as-published: at most so many samples of an image of a rare class, turned and"
            " noisy; 1: none but itself.",
            ADVANCED,
            min=1,
        ),
    ] = PUBLISHED.copies


def finetune_chosen(
    data: DataOptions, options: FinetuneOptions, choice: EngineOptions, console: Console
) -> dict[str, Any]:
    """Fit and save a last layer for classes of one's own.

    Returns:
        The classes, how well each is found, and the file of the weights.

    Raises:
        SightlineError: the data or the network cannot be used, or the weights cannot be written.
    """
    out = options.out
    checked_output(out, finetuning.WEIGHTS_FILE, (*data.inputs, *choice.inputs))
    classifier = classifier_with_notes(replace(choice, head=None), console)
    samples = load_chosen(data, "trainval")
    found: finetuning.Finetuned | adaptation.Adapted
    if options.as_published:
        schedule = adaptation.schedule_of(options.hidden, options.batches, options.copies)
        store = adaptation.store_of(classifier, "auto")
        found = adaptation.adapt(samples, schedule, store, console)
        adaptation.save_adapted(found, classifier, out)
    else:
        found = finetuning.finetune(samples, classifier, console)
        finetuning.save_finetuned(found, classifier, out)
    console.print(
        f"{len(found.classes)} classes, mean AP {100 * found.mean_average_precision:.1f} % held"
        f" out; wrote {out}"
    )
    return {
        "classes": found.classes,
        "average_precision": found.average_precision,
        "weights": str(out),
    }


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of ``evaluate`` besides the data's and the engine's. Without ``train`` the
    constant boxes are those of the head.
    """

    single: Annotated[
        bool,
        Option(
            "Only images with exactly one labelled object, of whatever class (--classes or not).",
            LOOK_AT,
        ),
    ] = False
    limit: Annotated[int | None, Option("Only the first N images.", LOOK_AT, min=1)] = None
    train: Annotated[
        Path | None,
        Option("Where constant boxes, and which classes come together, are from.", ADVANCED),
    ] = None
    train_ids: Annotated[
        Path | None, Option("Text file naming the images of --train to keep.", ADVANCED)
    ] = None
    report: Annotated[
        Path | None, Option("Report to write, with pictures: FILE.html or FILE.md.", OUTPUT)
    ] = None


def evaluate_chosen(
    data: DataOptions,
    options: EvaluateOptions,
    choice: EngineOptions,
    console: Console,
    following: FollowOptions = WHOLE_FRAMES,
) -> dict[str, Any]:
    """Measure boxes against the truth, print the figures and write the report; of sequences, those
    that are followed.

    Returns:
        The figures, and what they are of.

    Raises:
        SightlineError: the data or the engine cannot be used, or the report cannot be written.
    """
    if options.report:
        check_report(
            options.report, (*data.inputs, *choice.inputs, options.train, options.train_ids)
        )
    following, choice = following.for_source(photos=True).beside(choice)
    if following.follow and following.objects > 1:
        raise InputError(
            "following is measured of one object in each sequence: ask for one",
            option=("follow", "objects"),
        )
    remarks = Remarks()
    several = (
        load_sequences(data.data, options.limit, remarks)
        if following.follow and data.data
        else None
    )
    samples = several or load_chosen(data, "test", remarks, options.limit)
    training = (
        load_chosen(labels_beside(data, options.train, options.train_ids), "")
        if options.train
        else None
    )
    if training:
        check_disjoint(training, samples, ("train", "train_ids"))
    localizer = open_with_notes(choice, console)
    localizer.abstain_below(
        0.0
    )  # every box is measured, and what --min-score leaves of them is counted
    engine = localizer.engine
    facts = {
        "model": choice.model,
        "method": choice.method,
        "head": choice.head or localizer.box_reader,
        "backend": engine.backend,
        "precision": engine.precision,
        "machine": machine(),
    }
    if following.follow:
        followed = _follow(
            samples,
            localizer,
            following,
            options.report,
            f"Following on {data.title}",
            facts,
            console,
        )
        return {**followed, "labels_skipped": remarks.left_out}
    given = conditional_probabilities(training) if training else None
    constants = baselines(localizer, training)
    least = following.min_score
    if least is None:
        least = localizer.limits.shown_from if localizer.limits else 0.0
    found, cases = evaluation.evaluate(
        samples, localizer, console, constants, options.single, given, least
    )
    measured = evaluation.print_report(found, cases, data.dataset is not None, console)
    if options.report:
        title = f"Localization on {data.title}"
        explain = Explainer(choice).explain
        write_report(options.report, title, found, cases, localizer, facts, explain, data.data)
        console.print(f"wrote {options.report}")
    return {**measured, "labels_skipped": remarks.left_out, **facts}


def _follow(
    samples: Sequence[Sample],
    localizer: Localizer,
    following: FollowOptions,
    report: Path | None,
    title: str,
    facts: dict[str, str],
    console: Console,
) -> dict[str, Any]:
    sequences = follow_sequences(samples, localizer, following, console)
    found = following_report(sequences)
    console.print(sequences_table(found))
    if report:
        write_sequence_report(report, title, found, sequences, facts)
        console.print(f"wrote {report}")
    return {**found, **facts}
