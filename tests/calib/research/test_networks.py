"""What decides whether a foreign network's gradient is right."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from calib.research.networks import (
    Trial,
    autograd,
    decided_by,
    differences,
    page,
    runs,
    try_network,
)
from engines.networks import packages
from engines.networks.packages import Built, Package

RIGHT = Trial("net", "TorchScript", is_same_class=True, is_mapped=True)


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


class Misled(nn.Module):
    """A value whose autograd is wrong: the backward pass knows nothing of a part."""

    def __init__(self):
        super().__init__()
        self.inner = Smooth()

    def forward(self, x):
        return self.inner(x + 0.5 * torch.sin(x).detach())


def test_the_first_that_is_right_decides():
    off = replace(RIGHT, gradient_off=1e-2, torch_off=1e-4)
    assert decided_by(RIGHT) == "autograd"
    assert decided_by(replace(off, torch_off=2e-3)) == "autograd"
    assert decided_by(off) == ""
    assert not runs(off)
    exact = replace(off, exact_off=1e-8)
    assert decided_by(exact) == "autograd in float64"
    assert runs(exact)
    apart = replace(off, exact_off=1.0, differences_off=1e-7, autograd_off=1.0)
    assert decided_by(apart) == "differences"
    assert runs(apart)
    wrong = replace(apart, differences_off=1.0, autograd_off=1e-7)
    assert not runs(wrong)
    assert not runs(replace(apart, why="refused"))
    text = page([exact, replace(apart, network="other"), replace(wrong, network="bad")])
    assert "2 of 3 networks run" in text
    assert "| autograd in float64: 1e-08 |" in text
    assert "| differences: ours 1e-07 off, autograd 1e+00 |" in text


def test_differences_are_the_slopes():
    torch.manual_seed(0)
    module = Smooth().double()
    photo = np.random.default_rng(0).standard_normal((1, 3, 16, 16))
    best, _, gradient = autograd(module, photo)
    places = np.argsort(np.abs(gradient).ravel())[-5:]
    found = differences(module, photo, best, places)
    np.testing.assert_allclose(found, gradient.ravel()[places], rtol=1e-8)


def test_where_autograd_is_wrong_differences_decide(monkeypatch, tmp_path):
    def build(_):
        torch.manual_seed(0)
        return Built(Misled().eval(), 16, {"config.json": {}})

    toy = {"toy": Package({"torch": "torch"}, build)}
    monkeypatch.setattr(packages, "PACKAGES", {**packages.PACKAGES, **toy})
    photos = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    found = try_network("toy:net#16", "TorchScript", tmp_path, photos)
    assert not found.why
    assert found.exact_off > 0.1
    assert found.autograd_off > 0.1
    assert decided_by(found) == "differences"
    assert runs(found)
