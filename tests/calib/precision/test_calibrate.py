"""Calibration from start to end on real frames: what is measured, which layers are spared, what is
refused.
"""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from calib.precision.calibrate import (
    CalibrateOptions,
    Calibrator,
    Harm,
    _counts,
    always_kept,
    calibrate,
    calibrate_chosen,
    plot_layers,
    rough_quantization,
)
from engines.backends.openvino import has_vnni
from engines.build import assemble, build_graph
from engines.choose import (
    calibration_paths,
    choose_head,
    choose_quantization,
    open_localizer,
)
from engines.errors import EngineError, ModelError, SourceError
from engines.int8 import load_quantization
from engines.maps import MapSpec
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from tests.engines.foreign import Transformer, export
from tests.processors import NORMALIZES
from tests.virtual_camera import DemoCamera

QUIET = Console(quiet=True)
FRAMES = [DemoCamera(300).shoot(i * 14)[0] for i in range(20)]
SPEC = MapSpec(layer="conv4_3")


@pytest.fixture
def outlier(tmp_path):
    """The shipped network with one channel of conv3_2 so large that 127 steps leave nothing of the
    others.
    """
    weights = {
        name: value.copy() for name, value in load_classifier("compact", None, 64).weights.items()
    }
    weights["features.12.bias"][0] += 3000.0  # always on ...
    weights["features.14.weight"][:, 0] = 0  # ... and never read
    np.savez(tmp_path / "outlier.npz", **weights)
    return load_classifier("compact", str(tmp_path / "outlier.npz"), 64)


def test_a_layer_that_does_not_bear_8_bits_is_found_and_spared(outlier):
    found = calibrate(Calibrator(outlier, SPEC, None, FRAMES, QUIET), "minmax")
    worst = max(found.by_layer, key=lambda name: found.by_layer[name].total)
    assert worst == "conv3_3_linear"  # the one that reads the spoiled tensor
    assert worst in found.quantization.kept
    assert found.certificate.passed
    assert len(found.quantization.kept) < 8


def test_of_many_layers_groups_are_halved_and_the_same_one_is_spared(
    outlier, monkeypatch, tmp_path
):
    monkeypatch.setattr("calib.precision.calibrate.MOST_ALONE", 3)
    monkeypatch.setattr("calib.precision.calibrate.MOST_TRIALS", 8)
    found = calibrate(Calibrator(outlier, SPEC, None, FRAMES, QUIET), "minmax")
    assert len(found.by_layer) == 5, "four groups were halved"
    assert max(found.by_layer, key=lambda name: found.by_layer[name].total) == "conv3_3_linear"
    assert "conv3_3_linear" in found.quantization.kept
    assert found.certificate.passed
    plot_layers(found, tmp_path / "layers.png", "compact")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


class Remembering(Calibrator):
    """Each trial is a compilation: what was tried in one test is not tried again in another."""

    def harm(self, quantization):
        tried = self.__dict__.setdefault("tried", {})
        key = tuple(quantization.ranges.items()), quantization.kept
        return tried[key] if key in tried else tried.setdefault(key, super().harm(quantization))


@pytest.fixture(scope="module")
def calibrator():
    return Remembering(load_classifier("compact", None, 64), SPEC, None, FRAMES, QUIET)


def test_auto_takes_the_ranges_that_harm_least_and_the_card_tells_all(calibrator):
    found = calibrate(calibrator)
    card = found.quantization.card
    assert set(found.by_method) == {"minmax", "percentile", "entropy", "mse"}
    assert found.by_method[card["ranges"]].total == min(
        harm.total for harm in found.by_method.values()
    )
    assert card["certificate"]["passed"]
    assert set(card["by_layer"]) == set(found.by_layer)
    forward = [
        f"conv{block}_{i}_linear"
        for block, count in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))
        for i in range(1, count + 1)
    ]
    assert list(found.by_layer)[:12] == forward[1:]  # the first stays in floating point
    assert len(found.by_layer) == 12 + 3  # and the map at conv4_3 needs three convolutions backward
    assert found.quantization.layer == "conv4_3"


def test_first_and_last_layers_always_stay_in_floating_point():
    classifier = load_classifier("compact", "random", 64)
    assert always_kept(assemble(classifier, MapSpec()).graph) == (
        "conv1_1_linear",
        "classifier_linear",
        "grad_conv_12",
    )


def test_trials_grow_until_one_layer_is_left():
    assert _counts(13) == [0, 1, 2, 3, 4, 6, 9, 12]
    assert _counts(0) == [0]


def test_harm_is_nothing_for_equal_results():
    assert Harm(1.0, 1.0, 1.0).total == 0


def test_too_few_images_are_refused():
    with pytest.raises(
        SourceError, match="15 images are too few to calibrate on: give at least 16"
    ):
        Calibrator(load_classifier("compact", "random", 64), SPEC, None, FRAMES[:15], QUIET)


def test_what_cannot_be_certified_is_not_written(calibrator, monkeypatch):
    monkeypatch.setattr(
        "calib.precision.calibrate.certify",
        lambda *_: replace(real, failures=("box IoU 0.1 is below 0.85",)),
    )
    real = calibrate_certificate(calibrator)
    with pytest.raises(
        EngineError, match="no mix of 8-bit and floating-point layers meets the certificate"
    ):
        calibrate(calibrator)


def calibrate_certificate(calibrator):
    from engines.certificate import certify

    return certify(calibrator.reference, calibrator.reference, calibrator.held_out)


def test_rough_ranges_know_every_tensor_of_a_network_down_to_the_pixels():
    classifier = load_classifier("compact", "random", 64)
    build_graph(classifier, quantization=rough_quantization(classifier, "class"))
    build_graph(
        classifier, MapSpec("gestalt"), quantization=rough_quantization(classifier, "gestalt")
    )


def test_a_dense_head_computes_exactly_in_a_graph_in_8_bits():
    choice = EngineOptions("lite0", size_px=96)
    classifier = choice.classifier()
    head = choose_head(choice, classifier)
    graph = build_graph(classifier, head=head, quantization=rough_quantization(classifier, "class"))
    rounded = {node.name for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    layers = {name.partition("_weight_rounded")[0] for name in rounded if "_weight_r" in name}
    assert "block3.expand_linear" in layers
    assert not {name for name in layers if name.startswith(("components", "cells"))}


def test_calibrate_puts_the_file_where_int8_finds_it(tmp_path):
    choice = EngineOptions(size_px=64, layer="conv4_3", precision="int8")
    classifier = load_classifier("compact", None, 64)
    with pytest.raises(
        ModelError, match="no int8 calibration of these compact weights at 64 px: make one with"
    ):
        open_localizer(replace(choice, precision="int8"))
    found = calibrate_chosen(
        CalibrateOptions("demo:64", ranges="percentile", limit=32),
        replace(choice, precision="auto"),
        QUIET,
    )
    assert found.path == calibration_paths(classifier, "class")[0]
    localizer = open_localizer(choice)
    assert localizer.engine.precision == "int8"
    assert localizer.description["quantization"] == found.quantization.digest
    assert (
        open_localizer(replace(choice, precision="auto")).engine.precision == "int8"
    ) == has_vnni()
    deeper = replace(choice, precision="auto", layer="pixels")  # not certified there
    assert choose_quantization(deeper, classifier, MapSpec()) is None
    plot_layers(found, tmp_path / "layers.png", "compact")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    found.path.unlink()


def test_labelled_images_give_corloc_before_and_after(data, tmp_path):
    options = CalibrateOptions(
        str(data / "animal_pose_voc" / "train.csv"),
        out=tmp_path / "c.int8.json",
        ranges="percentile",
        limit=40,
    )
    found = calibrate_chosen(options, EngineOptions(), QUIET)
    card = load_quantization(tmp_path / "c.int8.json").card
    assert card["data"] == "train.csv"
    assert 0.5 < card["corloc_int8"] <= 1
    assert abs(card["corloc_int8"] - card["corloc_fp32"]) <= 0.1  # 20 images
    assert found.report()["corloc_fp32"] == card["corloc_fp32"]


def test_the_shipped_calibrations_fit_the_shipped_network():
    for size_px, method in ((None, "sensitivity"), (None, "gestalt"), (96, "sensitivity")):
        localizer = open_localizer(EngineOptions(size_px=size_px, method=method, precision="int8"))
        assert localizer.engine.precision == "int8"
        assert localizer.box_reader == "fitted head"
        assert localizer.localize(FRAMES[:1])[0].map_hw.shape == ((size_px or 128) // 8,) * 2


def test_int8_and_fp32_agree_on_real_photos(data):
    """CorLoc within a point on the whole test split is measured in docs/benchmarks.md; here, on 60
    photos, within two photos.
    """
    from calib.data.datasets import load_dataset
    from calib.evaluation.evaluate import evaluate

    samples = [
        sample for sample in load_dataset(data / "animal_pose_voc" / "test.csv") if sample.single
    ][:60]
    found = {
        p: evaluate(samples, open_localizer(EngineOptions(precision=p)), QUIET, None)[0]
        for p in ("fp32", "int8")
    }
    assert abs(found["fp32"]["corloc"] - found["int8"]["corloc"]) < 2.5 / 60
    assert found["int8"]["mean_iou"] == pytest.approx(found["fp32"]["mean_iou"], abs=0.015)
    assert np.isfinite(found["int8"]["mean_iou"])


@NORMALIZES
def test_a_network_whose_products_are_of_tokens_is_refused_in_words(tmp_path):
    export(Transformer, tmp_path / "net.onnx")
    classifier = load_classifier(str(tmp_path / "net.onnx"))
    with pytest.raises(EngineError, match=r"nothing of net\.onnx can run in 8 bits"):
        calibrate(Calibrator(classifier, MapSpec(), None, FRAMES, QUIET), "minmax")
