"""The presets that a latency budget steps through."""

from dataclasses import replace

import numpy as np
import pytest

from engines import head as shipped
from engines import presets as ladder
from engines.backends import openvino as backend
from engines.backends.openvino import best_precision
from engines.choose import open_localizer
from engines.errors import EngineError, ModelError
from engines.head import load_head
from engines.networks.registry import load_classifier
from engines.networks.weights import ASSETS
from engines.options import EngineOptions
from engines.presets import backward_shares, presets

NATIVE = ["fp32", "bf16"] if best_precision() == "bf16" else ["fp32"]


def test_every_rung_is_cheaper_than_the_one_before_but_for_the_heat_map():
    found = presets(EngineOptions("compact", "random", size_px=64))
    costs = [preset.cost for preset in found]
    assert costs[:-1] == sorted(set(costs[:-1]), reverse=True)
    assert costs[-1] == costs[-2]
    assert [preset.heat_map_every > 1 for preset in found] == [False] * (len(found) - 1) + [True]
    assert len({preset.name for preset in found}) == len(found)


def test_precision_comes_first_then_depth_and_size():
    found = presets(EngineOptions("compact", "random", precision="fp32"))
    assert [preset.choice.precision for preset in found[: len(NATIVE)]] == NATIVE
    assert all(preset.choice.size_px == 128 for preset in found[: len(NATIVE)])
    assert {preset.choice.precision for preset in found[len(NATIVE) :]} == {NATIVE[-1]}
    assert {preset.choice.size_px for preset in found} == {128, 96, 64}
    assert {preset.choice.layer for preset in found} == {None, "pool3"}, (
        "pool3 has a value for 8 x 8 pixels"
    )


def test_every_rung_can_be_opened_and_finds_something():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    for preset in presets(EngineOptions("compact", "random", size_px=64)):
        localizer = open_localizer(preset.choice)
        found = localizer.localize([image])[0]
        assert localizer.size_px == preset.choice.size_px
        assert found.box_xyxy_px is not None
        assert found.map_hw.shape[0] == localizer.size_px // (8 if preset.choice.layer else 1)


def test_heads_of_another_network_or_objective_are_no_rungs(tmp_path, monkeypatch):
    small = load_head(ASSETS / "compact_sensitivity_96_head.safetensors")
    small.save(tmp_path / "compact_mine_head.safetensors")
    replace(small, network="f" * 64).save(tmp_path / "compact_foreign_head.safetensors")
    replace(small, spec=replace(small.spec, objective="gestalt")).save(
        tmp_path / "compact_other_head.safetensors"
    )
    replace(small, size_px=320).save(tmp_path / "compact_large_head.safetensors")
    load_head(ASSETS / "compact_sensitivity_head.safetensors").save(
        tmp_path / "compact_sensitivity_head.safetensors"
    )
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    assert {preset.choice.head for preset in presets(EngineOptions())} == {None, "compact_mine"}


def test_a_head_that_the_user_named_is_not_replaced():
    found = presets(EngineOptions(method="gestalt", head="compact_gestalt"))
    assert {preset.choice.head for preset in found} == {"compact_gestalt"}


def test_the_shipped_ladder_goes_from_what_was_chosen_to_the_smallest_head():
    fine, usual = presets(EngineOptions(layer="pixels", precision="fp32")), presets(EngineOptions())
    assert [preset.choice.precision for preset in fine[: len(NATIVE)]] == NATIVE
    assert all("back to pixels" in preset.name for preset in fine[: len(NATIVE)])
    assert any("128 px, back to conv4_3" in preset.name for preset in fine)
    assert all("back to conv4_3" in preset.name for preset in usual)
    assert fine[-1].choice.head == usual[-1].choice.head == "compact_sensitivity_96"


def test_without_a_box_only_precision_and_size_change():
    assert {
        preset.choice.layer for preset in presets(EngineOptions("compact", "random", head="none"))
    } == {None}


def test_how_much_of_the_work_lies_behind_a_layer():
    """By hand for the compact network at 32 px: products of each convolution, channels 16 32 64 128
    256, and 200 classes or so.
    """
    classifier = load_classifier("compact", "random", 32)
    shares = backward_shares(classifier)
    sides, widths, repeats = (32, 16, 8, 4, 2), (16, 32, 64, 128, 256), (2, 2, 3, 3, 3)
    products, width_in = [], 3
    for side, width, count in zip(sides, widths, repeats, strict=True):
        for _ in range(count):
            products.append(side * side * width * width_in * 9)
            width_in = width
    products.append(256 * classifier.weights["classifier.bias"].size)
    whole = sum(products)
    assert shares["pixels"] == 1
    assert shares["conv1_1"] == pytest.approx(1 - products[0] / whole)
    assert shares["pool3"] == pytest.approx(sum(products[7:]) / whole)
    assert shares["conv5_3"] == pytest.approx(products[-1] / whole)


def test_int8_is_a_rung_where_it_is_calibrated_and_other_sizes_keep_what_they_have(monkeypatch):
    def only_at_64(choice, classifier, spec):
        return "scales" if classifier.size_px == 64 else None

    monkeypatch.setattr(ladder, "choose_quantization", only_at_64)
    found = presets(EngineOptions("compact", "random", size_px=64, precision="fp32"))
    by_size = {
        size: {r.choice.precision for r in found if r.choice.size_px == size} for size in (64, 32)
    }
    assert by_size == {64: {*NATIVE, "int8"}, 32: {NATIVE[-1]}}
    for vnni, expected in ((True, "int8"), (False, NATIVE[-1])):
        monkeypatch.setattr(backend, "has_vnni", lambda vnni=vnni: vnni)
        first = presets(EngineOptions("compact", "random", size_px=64))[0]
        assert first.choice.precision == expected, "the best default, as without a budget"


def test_int8_without_a_calibration_is_refused():
    with pytest.raises(ModelError, match="no int8 calibration"):
        presets(EngineOptions("compact", "random", size_px=64, precision="int8"))


def test_a_precision_that_is_not_there_is_refused():
    with pytest.raises(EngineError, match="not int3"):
        presets(EngineOptions(precision="int3"))
