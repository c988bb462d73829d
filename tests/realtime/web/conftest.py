"""What tests of the page share."""

import pytest

from realtime.connection import Connection
from realtime.hub import Hub
from realtime.ledger import Ledger


@pytest.fixture
def hub():
    with Hub([Connection("cam", "0"), Connection("door", "1")], Ledger(["cam", "door"]), ("cat", "dog")) as found:
        yield found
