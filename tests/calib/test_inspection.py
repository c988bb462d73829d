"""What ``inspect`` says of a classifier, and the picture that it draws."""

import json
import warnings

import cv2
import numpy as np
import torch
from torch import nn

from tests.command_line import command


class Flipped(nn.Module):
    """A network with an operator that has no rule."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.fc(torch.cumsum(x, dim=2).mean((2, 3)))


def test_a_network_is_described_and_its_maps_are_drawn(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    out = tmp_path / "maps.png"
    done = command(
        "inspect", "compact", "--image", str(tmp_path / "photo.png"), "--out", str(out), "--json"
    )
    found = json.loads(done.stdout)
    assert found["size_px"] == 128
    assert found["missing_rules"] == {}
    assert found["gflop"]["pixels"] > found["gflop"]["forward"] > 0
    assert [stage["cells"][0] for stage in found["stages"]] == sorted(
        (stage["cells"][0] for stage in found["stages"]), reverse=True
    )
    picture = cv2.imread(str(out))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000


def test_what_has_no_rule_is_named(tmp_path):
    path = tmp_path / "flipped.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Flipped().eval(), torch.zeros(1, 3, 32, 32), path, dynamo=False, opset_version=17
        )
    done = command("inspect", str(path), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["missing_rules"] == {"CumSum": 1}
    assert "missing for CumSum (1)" in done.stderr
