"""NanoFlow: the most tokens out of one GPU when it runs large language models offline.

Importing the package is cheap: the names below are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoflow.llm import LLM, Completion, RequestOutput
    from nanoflow.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "RequestOutput", "SamplingParams"]

_HOME = {
    "LLM": "nanoflow.llm",
    "Completion": "nanoflow.llm",
    "RequestOutput": "nanoflow.llm",
    "SamplingParams": "nanoflow.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nanoflow' has no attribute {name!r}")
