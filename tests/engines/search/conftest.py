"""What tests of both forms of DAM share."""

import numpy as np
import pytest

from engines.networks import vgg
from engines.networks.network import Network
from engines.networks.registry import Classifier

SIDE = 32


@pytest.fixture(scope="module")
def tiny() -> Classifier:
    """A VGG16 of 2 to 5 channels with random weights, on 32 px."""
    weights = vgg.random_weights((2, 2, 3, 4, 5), 6, hidden=0, seed=3)
    return Classifier(Network("tiny", vgg.forward, dict), SIDE, "tiny", weights)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)
