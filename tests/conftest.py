"""What tests share: where the real data lies, small real videos, a compiled engine."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.downloads import cache_dir
from engines.localizer import Localizer
from engines.networks.registry import load_classifier

# Before PyTorch is loaded: its threads would spin for want of work, on the processors that
# OpenVINO's threads are waiting for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As in a terminal: a test command that runs in the background may be started with Ctrl-C ignored,
# and so are its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SIGHTLINE_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photos, videos and weights that tests may use."""
    if not DATA.is_dir():
        pytest.skip(f"real data is absent: put it at {DATA} or point SIGHTLINE_DATA at it")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache; nor do fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGHTLINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert "cache" in str(cache_dir())
        yield


@pytest.fixture(scope="session")
def photos(data: Path) -> list[np.ndarray]:
    """Twelve real photos of the training split, flat and busy ones among them."""
    from calib.data.datasets import load_dataset

    return [sample.read() for sample in load_dataset(data / "animal_pose_voc" / "train.csv")[:12]]


@pytest.fixture(scope="session")
def squeezenet(data: Path) -> str:
    """The path of trained SqueezeNet weights."""
    return str(data / "squeezenet_v1.0_imagenet" / "compressed_SqueezeNet.net")


@pytest.fixture(scope="session")
def tiny_localizer() -> Localizer:
    """The compact network with random weights at 64 px: fast, and no shipped file is needed."""
    return Localizer(OpenVinoEngine(build_graph(load_classifier("compact", "random", 64)), "fp32"))


@pytest.fixture
def labelled_photo(tmp_path: Path) -> Path:
    """A label file of one photo."""
    from tests.realtime.media import write_images

    write_images(tmp_path / "photos", 1)
    (tmp_path / "photos.csv").write_text("file,class,x0,y0,x1,y1\nshot 8.png,cat,4,30,28,54\n")
    return tmp_path / "photos.csv"
