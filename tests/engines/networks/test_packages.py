"""Networks of packages by their names: exported once, the same each time, and never by halves."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from engines.downloads import cache_dir
from engines.errors import ModelError
from engines.networks import packages
from engines.networks.packages import Built, Package, exported
from engines.networks.registry import load_classifier

SIDE = 32


class Blocks(nn.Module):
    """A block that begins switched off, as those of many networks do."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.scale, self.fc = nn.Parameter(torch.full((8, 1, 1), 1e-6)), nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(x + self.scale * self.block(x)).mean((2, 3)))


def build_toy(wanted):
    if wanted.is_pretrained:
        raise ModelError("offline")
    side, classes = wanted.size_px or SIDE, wanted.classes or 3
    names = [] if wanted.classes else ["cat", "dog", "bird"]
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, side, side]}
    said = {"architecture": "toy", "pretrained_cfg": config, "label_names": names}
    return Built(Blocks(classes), side, {"config.json": said})


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    built = []

    def build(wanted):
        built.append(wanted)
        return build_toy(wanted)

    known = {**packages.PACKAGES, "toy": Package({"torch": "torch"}, build)}
    monkeypatch.setattr(packages, "PACKAGES", known)
    return built


def test_it_is_built_once_and_read_with_what_comes_with_it(toy):
    first = load_classifier("toy:net", "random")
    again = load_classifier("toy:net", "random")
    assert len(toy) == 1
    assert (first.name, first.size_px, first.digest) == ("toy:net", SIDE, again.digest)
    assert first.class_names == ("cat", "dog", "bird")
    assert first.preprocessing.mean == (127.5, 127.5, 127.5)
    assert first.network.notes[0].startswith("toy:net: its input: 32 px")


def test_random_weights_are_the_same_each_time_and_no_block_is_switched_off(toy):
    path = exported("toy:net", "random")
    before = path.read_bytes()
    path.unlink()
    assert exported("toy:net", "random").read_bytes() == before
    module = packages.build("toy:net", "random").module
    assert 0.4 < float(module.scale.detach().min()) < float(module.scale.detach().max()) < 1.1


def test_another_size_is_another_file(toy):
    assert exported("toy:net", "random", 48) != exported("toy:net", "random")
    assert load_classifier("toy:net", "random", 48).size_px == 48
    assert exported("toy:net", "random", SIDE) == exported("toy:net", "random"), "its own size"


def test_weights_of_a_file_with_other_classes(toy, tmp_path):
    torch.manual_seed(1)
    state = {f"module.{name}": value.numpy() for name, value in Blocks(5).state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    classifier = load_classifier("toy:net", str(tmp_path / "mine.safetensors"))
    graph, forward = classifier.forward_graph()
    assert graph.shape(forward.scores) == (1, 5)
    del state["module.fc.bias"]
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        ModelError, match=r"other\.safetensors are not those of toy:net: 'fc\.bias'"
    ):
        load_classifier("toy:net", str(tmp_path / "other.safetensors"))


def test_an_exporter_whose_file_scores_otherwise_is_passed_over(toy, monkeypatch):
    used = []

    def wrong(module, image, path):
        used.append("wrong")
        packages.export_by_tracing(nn.Sequential(module, nn.ReLU()), image, path)

    known = {"wrong": wrong, "TorchScript": packages.export_by_tracing}
    monkeypatch.setattr(packages, "EXPORTERS", known)
    assert exported("toy:net", "random").is_file()
    assert used
    monkeypatch.setattr(packages, "EXPORTERS", {"wrong": wrong})
    with pytest.raises(ModelError, match=r"cannot be exported to ONNX .wrong: its scores differ"):
        exported("toy:net", "random", 48)
    assert not list(cache_dir().rglob("*.part"))


def test_a_missing_package_is_one_line_with_its_command(monkeypatch):
    gone = Package({"no_such_package": "no-such-package"}, build_toy)
    monkeypatch.setattr(packages, "PACKAGES", {"gone": gone})
    with pytest.raises(
        ModelError, match=r"gone:net needs no-such-package .* install.*no-such-package"
    ):
        load_classifier("gone:net")


def test_a_kept_network_needs_neither_torch_nor_its_package(toy, tmp_path):
    exported("toy:net", "random")
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from engines.networks import packages\n"
        "packages.PACKAGES = {'toy': packages.Package({'torch': 'torch'}, None)}\n"
        "from engines.networks.registry import load_classifier\n"
        "print(load_classifier('toy:net', 'random').class_names[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "cat", done.stderr


def test_an_unknown_package_is_named_with_those_that_there_are():
    with pytest.raises(ModelError, match="timm:NAME, torchvision:NAME, hf:NAME"):
        load_classifier("timn:resnet50")


def test_what_is_written_beside_the_file_is_json(toy):
    path = exported("toy:net", "random")
    assert json.loads((path.parent / "config.json").read_text())["architecture"] == "toy"
