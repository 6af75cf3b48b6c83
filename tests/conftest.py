"""What all tests share: GPU tests are skipped without a GPU; hypothesis does not fail for a slow machine; what the user
has stored, plans above all, does not take part."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="nanoflow-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: torch must not take all cores for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("nanoflow", deadline=None)
settings.load_profile("nanoflow")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """What is there before a file's tests, modules above all, is not looked through at each of their collections."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
