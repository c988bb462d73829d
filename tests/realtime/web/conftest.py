"""What tests of the page share."""

import pytest

from realtime.capture import Connection
from realtime.session import Hub
from realtime.statistics import Ledger


@pytest.fixture
def hub():
    with Hub([Connection("cam", "0"), Connection("door", "1")], Ledger(["cam", "door"]), ("cat", "dog")) as found:
        yield found
