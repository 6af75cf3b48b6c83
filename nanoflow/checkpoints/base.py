"""What every checkpoint offers, whatever its format: a configuration, tensors by name, end tokens and a tokenizer."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanoflow.errors import CheckpointError
from nanoflow.tokenizer import Tokenizer

__all__ = ["Checkpoint", "FileReader", "Region", "check_shape"]


@dataclass(frozen=True)
class Region:
    """Entries `begin` to `end` - 1 of dimension `dim` (0 or 1) of a tensor, and all of the other dimension."""

    dim: int
    begin: int
    end: int


class Checkpoint(ABC):
    """A model on disk. Opening one reads headers only; tensors are read one by one with `read`."""

    path: str
    """The folder or file, for messages."""
    name: str
    """A short name, for reports."""
    config: dict[str, Any]
    """The keys of a Hugging Face ``config.json``, whatever the format."""
    tensors: Mapping[str, tuple[int, ...]]
    """Shape of every tensor, by its Hugging Face parameter name. Empty if the checkpoint has no weights."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion."""

    @abstractmethod
    def read(self, name: str, out: torch.Tensor, region: Region | None = None) -> None:
        """Fill the contiguous tensor `out` with tensor `name`, converted to the dtype and the device of `out`.

        With `region` only that is read, and `out` has its shape. The file is read in pieces of a few MiB, so that
        memory in use stays near that of `out`. Raises CheckpointError if the tensor is missing, has another shape, or
        cannot be read.
        """

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if the checkpoint has none."""


def check_shape(checkpoint: Checkpoint, name: str, out: torch.Tensor, region: Region | None = None) -> None:
    """Raise CheckpointError unless the checkpoint has tensor `name`, or `region` of it, in the shape of `out`."""
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path}: tensor {name!r} is missing. Use a complete checkpoint.")
    shape = checkpoint.tensors[name]
    has = list(shape)
    if region is not None:
        inside = region.dim < len(shape) and 0 <= region.begin <= region.end <= shape[region.dim]
        has = [region.end - region.begin if dim == region.dim else n for dim, n in enumerate(shape)] if inside else []
    if has != list(out.shape):
        part = "" if region is None else f" for its {region.begin} to {region.end} of dimension {region.dim}"
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} has shape {list(shape)}, expected "
            f"{list(out.shape)}{part}. The weights do not belong to this configuration."
        )
    if not out.is_contiguous():
        raise ValueError(f"the destination of {name!r} must be contiguous")


class FileReader:
    """Reads ranges of a file without mapping it: pages of a mapped file would count as memory of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        self.size = os.fstat(self._file).st_size

    def read_into(self, buffer: memoryview, offset: int, tensor: str) -> None:
        """Fill `buffer` from byte `offset`; `tensor` is named in the CheckpointError if the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._file, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: tensor {tensor!r} cannot be read ({error.strerror})") from None
            if got == 0:
                raise CheckpointError(
                    f"{self.path}: the file ends inside tensor {tensor!r}, at byte {offset + done}. Fetch it again."
                )
            done += got

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()
