"""What tests of the page share."""

import pytest

from realtime.capture import Connection
from realtime.session import Session
from realtime.statistics import LiveRun


@pytest.fixture
def session():
    with Session(
        [Connection("cam", "0"), Connection("door", "1")], LiveRun(["cam", "door"]), ("cat", "dog")
    ) as found:
        yield found
