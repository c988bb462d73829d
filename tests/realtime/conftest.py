"""What tests of the loop share: a localizer that knows no network, and a camera that can fail."""

from pathlib import Path

import pytest

from engines.localizer import Localizer
from tests.engines.mock import MockEngine
from tests.realtime.cameras import NEEDS, PYTHON, RtspCamera


@pytest.fixture
def localizer():
    return Localizer(MockEngine(96))


@pytest.fixture
def rtsp_camera():
    if not Path(PYTHON).exists():
        pytest.skip(f"no {PYTHON}: {NEEDS}")
    camera = RtspCamera()
    yield camera
    camera.kill()
