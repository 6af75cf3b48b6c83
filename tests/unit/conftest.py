"""What several files of these tests start from."""

from collections.abc import Iterator

import pytest

from tests.unit.forks import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts runs of the command line."""
    with ForkServer() as server:
        yield server
