"""One safetensors file: its header checked against its size, its tensors read piece by piece.

Format: 8 bytes little-endian length of the header, the header as JSON (name -> dtype, shape, data_offsets), the data.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nanoflow.checkpoints.base import FileReader, Region
from nanoflow.errors import CheckpointError

__all__ = ["SafetensorsFile"]

_MAX_HEADER = 100 * 2**20
_PIECE = 8 * 2**20
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""


class SafetensorsFile:
    """An open safetensors file. Raises CheckpointError for a file that is truncated or not safetensors at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FileReader(path)
        self._entries = self._header()
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def _header(self) -> dict[str, _Entry]:
        size = self._file.size
        if size < 8:
            raise self._corrupt(f"it has {size} bytes, too few for a header")
        prefix = bytearray(8)
        self._file.read_into(memoryview(prefix), 0, "header")
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER:
            raise self._corrupt(f"its header would take {length} bytes, so it is no safetensors file")
        if 8 + length > size:
            raise self._corrupt(f"its header takes {8 + length} bytes and the file has {size}: it is truncated")
        text = bytearray(length)
        self._file.read_into(memoryview(text), 8, "header")
        try:
            header = json.loads(text)
            if not isinstance(header, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise self._corrupt(f"its header is not JSON ({error})") from None
        header.pop("__metadata__", None)
        return {name: self._entry(name, value, 8 + length) for name, value in header.items()}

    def _entry(self, name: str, value: object, data: int) -> _Entry:
        try:
            if not isinstance(value, dict):
                raise TypeError
            dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
            begin, end = (int(n) for n in value["data_offsets"])
            bits = _BITS[dtype]
        except (KeyError, TypeError, ValueError):
            raise self._corrupt(f"its header describes tensor {name!r} as {value!r}") from None
        if min(shape, default=0) < 0 or begin < 0 or (end - begin) * 8 != prod(shape) * bits:
            raise self._corrupt(
                f"tensor {name!r} of shape {list(shape)} and type {dtype} should take {prod(shape) * bits // 8} bytes, "
                f"its header says {end - begin}"
            )
        if data + end > self._file.size:
            raise self._corrupt(
                f"tensor {name!r} ends at byte {data + end} and the file has {self._file.size}: it is truncated"
            )
        return _Entry(dtype, shape, data + begin)

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}. Fetch the file again.")

    def read(self, name: str, out: torch.Tensor, region: Region | None = None) -> None:
        """Fill `out` (contiguous, of the tensor's shape, or of that of `region`) piece by piece; nothing else is read.

        A region of columns is read row by row: the bytes between them are another rank's.
        """
        entry = self._entries[name]
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {entry.dtype}; only {', '.join(_FLOATS)} can be read. "
                "Use an unquantised checkpoint, or a GGUF file."
            )
        dtype = _FLOATS[entry.dtype]
        if not out.numel():
            return
        whole_row = prod(entry.shape[1:])
        flat = out.view(-1)
        step = _PIECE // dtype.itemsize
        # A row is here what lies in one stretch in the file, and `stride` how far the next one is: all is one row,
        # unless columns are wanted.
        first, row, stride = 0, out.numel(), out.numel()
        if region is not None and region.dim == 0:
            first = region.begin * whole_row
        elif region is not None:
            first, row, stride = region.begin, region.end - region.begin, whole_row
            step = max(1, step // row) * row
        # Pinned memory makes the copy to a GPU several times faster.
        piece = torch.empty(min(step, flat.numel()), dtype=dtype, pin_memory=out.is_cuda)
        buffer = memoryview(piece.view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, flat.numel(), step):
            count = min(step, flat.numel() - start)
            for at in range(0, count, row):
                place = first + (start + at) // row * stride + (start + at) % row
                length = min(row, count - at)
                into = buffer[at * dtype.itemsize : (at + length) * dtype.itemsize]
                self._file.read_into(into, entry.start + place * dtype.itemsize, name)
            flat[start : start + count].copy_(piece[:count])
