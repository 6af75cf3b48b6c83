"""Checkpoints by Hub id: looked up in the local cache, else downloaded if huggingface_hub is installed."""

import os
import re
from pathlib import Path

from nanoflow.errors import CheckpointError

__all__ = ["find_on_hub", "is_hub_id"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIGURATION = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like ``organisation/name``."""
    return _ID.fullmatch(text) is not None


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if "HF_HOME" in os.environ:
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface" / "hub"


def _cached(name: str, need_weights: bool) -> Path | None:
    """The cached snapshot of the model's main revision, if it holds what is needed."""
    home = cache_folder() / ("models--" + name.replace("/", "--"))
    reference = home / "refs" / "main"
    if not reference.is_file():
        return None
    folder = home / "snapshots" / reference.read_text().strip()
    if not (folder / "config.json").is_file():
        return None
    # A snapshot may hold the configuration and the tokenizer only.
    return folder if not need_weights or any(folder.glob("*.safetensors")) else None


def find_on_hub(name: str, need_weights: bool) -> Path:
    """A folder with the model `name`. Raises CheckpointError if it is neither cached nor can be fetched."""
    folder = _cached(name, need_weights)
    if folder is not None:
        return folder
    missing = f"model.path {name!r}: no such file or folder, and no such model in {cache_folder()}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}. Give an existing path, or install huggingface_hub to download the model."
        ) from None
    try:
        patterns = _CONFIGURATION + (_WEIGHTS if need_weights else [])
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_folder()))
    except Exception as error:
        # The library raises many kinds: no network, no such model, no permission, offline mode, a full disk.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{missing}; downloading it failed: {reason}") from None
