"""The heads that come along."""

from dataclasses import replace

from engines.head import shipped_head_names, shipped_head_path, shipped_heads
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import load_classifier


def test_the_usual_heads_come_first_and_all_can_be_read():
    names = shipped_head_names()
    assert names.index("compact_sensitivity") < names.index("compact_sensitivity_pixels")
    assert all(shipped_head_path(name).exists() for name in names)
    for network in ("compact", "lite0"):
        found = shipped_heads(load_classifier(network))
        mine = [name for name in names if name.startswith(f"{network}_")]
        assert list(found) == [name for name in mine if name != "lite0_dense"]
    letterboxed = load_classifier("lite0", None, 320, GivenInput(resize="letterbox"))
    assert list(shipped_heads(letterboxed)) == ["lite0_dense"]
    compact = load_classifier("compact")
    assert shipped_heads(compact)["compact_gestalt"].spec.objective == "gestalt"
    assert shipped_heads(replace(compact, digest="0" * 64)) == {}
