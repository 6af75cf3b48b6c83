"""What several files of these tests start from."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.forks import ForkServer

if TYPE_CHECKING:
    from nanoflow import RequestOutput


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts runs of the command line."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def rank_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `rank_jobs`, by its name."""
    from tests.unit.rank_jobs import BASE, MODELS
    from tests.unit.rank_models import save

    return functools.cache(lambda name: save(tmp_path_factory.mktemp(name), **BASE, **MODELS[name]))


@pytest.fixture(scope="session")
def of_one_rank(rank_model: Callable[[str], Path]) -> "Callable[[str], list[RequestOutput]]":
    """What one rank generates for the mix of `rank_jobs`, by the model's name."""
    from tests.unit.rank_jobs import MIX, generate

    return functools.cache(lambda name: generate(rank_model(name), MIX))
