"""What all tests share: GPU tests are skipped without a GPU; hypothesis does not fail for a slow machine; what the user
has stored, plans above all, does not take part."""

import os
import tempfile

import pytest
from hypothesis import settings

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="nanoflow-tests-")

settings.register_profile("nanoflow", deadline=None)
settings.load_profile("nanoflow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
