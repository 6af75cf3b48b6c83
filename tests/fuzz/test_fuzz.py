"""A few hundred inputs of each kind, the same ones each time; ``python -m tests.fuzz`` runs any number of others."""

import pytest

from tests.fuzz.harness import Hang, fuzz, time_limit
from tests.fuzz.targets import TARGETS

EXAMPLES = 300


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_answered_or_ends_in_one_message(name: str) -> None:
    fuzz(TARGETS[name], EXAMPLES // TARGETS[name].share)


def test_a_hang_is_noticed() -> None:
    with pytest.raises(Hang), time_limit(0.05):
        while True:
            pass
