"""What the page of methods counts and says."""

from dataclasses import asdict

import numpy as np
import pytest

from calib.bench.machine import count_work
from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.methods import CROPS, Row, both_found, flop_of, rendered, timing
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from engines.search.beam import BeamEngine, beam_settings
from engines.search.dam import DamEngine, build_scores_graph, dam_settings


@pytest.mark.parametrize("model", ["compact", "squeezenet"])
def test_searches_cost_what_was_promised(model):
    """In FLOP beside one forward pass: DAM at most 25, beam search at most 120, at the usual
    size.
    """
    classifier = load_classifier(model, "random")
    one = count_work(build_scores_graph(classifier, 1)).flop
    assert 10 < flop_of("dam", classifier) / one <= 25
    assert 1 < flop_of("beam", classifier) / one <= 120


def test_a_search_over_crops_costs_what_was_promised():
    classifier = load_classifier("compact")
    one = count_work(build_scores_graph(classifier, 1)).flop
    assert 60 < flop_of(CROPS, classifier) / one <= 120


def test_the_page_has_a_row_for_each_method_and_a_second_table_for_searches():
    plain = Row(
        "compact",
        "heuristic",
        "heuristic: x",
        {"animals": (0.5, 0.25, 0.75), "raccoon": (0.1, 0.2, 0.3)},
        9.5,
        1,
        2,
        3,
    )
    several = {"both": 0.25} | {
        f"{s} {k}": 0.5
        for s in ("more animals", "coco128")
        for k in ("localization_ap", "detection_ap")
    }
    dam = Row(
        "compact",
        "dam",
        "dam: x",
        plain.sets,
        9.5,
        2,
        20.5,
        21.5,
        {**several, "coco128 classes": 51},
    )
    counts = {"animals": 10, "raccoon": 5, "two animals": 3, "more animals": 4, "coco128": 6}
    crops = Row("compact", CROPS, "crops: x", {}, 9.5, 6, 75.9, 60.0, dam.several)
    text = rendered({"compact": [asdict(plain), asdict(dam), asdict(crops)]}, counts, 2)
    rows = [line for line in text.splitlines() if line.startswith("| compact")]
    assert len(rows) == 4
    assert (
        rows[0]
        == "| compact | heuristic | heuristic: x | 50.0 % / 0.250 / 75.0 % | 10.0 % / 0.200 / 30.0 % | 9.5 | 1 | 2.0 | 3.0 |"
    )
    assert rows[2].startswith(
        "| compact | dam | 25 % | 50.0 % / 50.0 % | 50.0 % / 50.0 % (51) | as above"
    )
    assert rows[3].endswith("| 50.0 % / 50.0 % (51) | 6 / 75.9 / 60.0 |")
    assert "--every 2" in text


def test_calls_and_pairs_are_counted():
    from engines.backends.openvino import OpenVinoEngine

    classifier = load_classifier("compact", "random", 64)
    localizer = Localizer(
        BeamEngine(classifier, beam_settings(2), lambda graph: OpenVinoEngine(graph, "fp32"))
    )
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    ms, calls = timing(
        Localizer(
            DamEngine(
                classifier,
                dam_settings(classifier.network),
                lambda graph: OpenVinoEngine(graph, "fp32"),
            )
        ),
        [image] * 3,
    )
    assert calls == 2
    assert ms > 0
    found = localizer.localize([image])[0].detections
    mine = Sample("a", lambda: image, tuple(Truth("x", each.box_xyxy_px) for each in found))
    assert both_found(mine, localizer)
    missed = Sample(
        "a",
        lambda: image,
        (*mine.truths, Truth("x", (0.0, 0.0, 2.0, 2.0)), Truth("x", (0.0, 0.0, 1.0, 1.0))),
    )
    assert not both_found(missed, localizer)
