"""One GGUF file: its metadata and its tensors, read piece by piece and dequantised.

The `gguf` package knows the quantised types. Its reader maps the file and makes several arrays for every string of the
vocabulary, which takes seconds; the header is read here in one pass instead.

Format: magic, version, counts of tensors and of metadata; metadata as (key, type, value); for each tensor its name,
dimensions (fastest first), type and offset; padding to the alignment; the data.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from nanoflow.checkpoints.base import FileReader, Region
from nanoflow.errors import CheckpointError

__all__ = ["GgufFile"]

_PIECE = 2**16
"""Elements that are dequantised at a time: with all that comes in between they fit in a core's cache."""

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_NUMPY: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.F32: np.dtype("<f4"),
}

_Dequantise = Callable[[NDArray[np.uint8]], NDArray[Any]]


@dataclass(frozen=True)
class _Entry:
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""


class _Cursor:
    """Walks over the header. The file is read in growing pieces, since nothing says how long the header is."""

    def __init__(self, file: FileReader) -> None:
        self._file = file
        self._data = bytearray()
        self.at = 0

    def take(self, count: int) -> memoryview:
        end = self.at + count
        if end > self._file.size:
            raise CheckpointError(
                f"{self._file.path}: the header goes on to byte {end} and the file has {self._file.size}: it is "
                "truncated or damaged. Fetch it again."
            )
        if end > len(self._data):
            more = min(self._file.size, max(end, 2 * len(self._data), 2**20))
            data = bytearray(more)
            self._file.read_into(memoryview(data), 0, "header")
            self._data = data
        view = memoryview(self._data)[self.at : end]
        self.at = end
        return view

    def number(self, form: str) -> int:
        return int(struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0])

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.text()
        if kind is GGUFValueType.ARRAY:
            of, count = GGUFValueType(self.number("I")), self.number("Q")
            if of in _SCALARS:
                return np.frombuffer(self.take(count * _SCALARS[of].itemsize), dtype=_SCALARS[of]).tolist()
            return [self.value(of) for _ in range(count)]
        return np.frombuffer(self.take(_SCALARS[kind].itemsize), dtype=_SCALARS[kind])[0].item()


class GgufFile:
    """An open GGUF file. Raises CheckpointError for one that is truncated, damaged or of an unknown version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FileReader(path)
        self.metadata: dict[str, Any] = {}
        try:
            self._entries = self._header(_Cursor(self._file))
        except (ValueError, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path}: the GGUF header is damaged ({error}). Fetch the file again.") from None
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        """Shape of every tensor by its GGUF name, slowest dimension first."""

    def _header(self, cursor: _Cursor) -> dict[str, _Entry]:
        if self._file.size < 4 or bytes(cursor.take(4)) != b"GGUF":
            raise CheckpointError(f"{self.path}: this is no GGUF file (it does not begin with 'GGUF').")
        version = cursor.number("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported (2 and 3 are, little-endian). Convert it again."
            )
        tensors, fields = cursor.number("Q"), cursor.number("Q")
        for _ in range(fields):
            key = cursor.text()
            self.metadata[key] = cursor.value(GGUFValueType(cursor.number("I")))
        raw = []
        for _ in range(tensors):
            name = cursor.text()
            shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
            raw.append((name, shape, cursor.number("I"), cursor.number("Q")))
        alignment = int(self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
        if alignment <= 0:
            raise ValueError(f"general.alignment is {alignment}")
        data = -(-cursor.at // alignment) * alignment
        return {name: self._entry(name, shape, kind, data + offset) for name, shape, kind, offset in raw}

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> _Entry:
        quantised = GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        if prod(shape) % block or (shape and shape[-1] % block):
            raise ValueError(f"tensor {name!r} of shape {list(shape)} does not divide into blocks of {block}")
        end = start + prod(shape) // block * size
        if end > self._file.size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} ends at byte {end} and the file has {self._file.size}: it is truncated. "
                "Fetch it again."
            )
        return _Entry(quantised, shape, start)

    def read(
        self,
        name: str,
        out: torch.Tensor,
        tensor: str | None = None,
        unit: int = 1,
        reorder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        region: Region | None = None,
    ) -> None:
        """Fill `out` (contiguous, as many elements as the tensor, or as `region` of it) piece by piece.

        `tensor` is the name for messages. `reorder`, if given, maps pieces of a multiple of `unit` elements to as many
        elements in the order wanted. Of columns, the blocks that they lie in are read and dequantised.
        """
        entry = self._entries[name]
        tensor = tensor or name
        dequantise = self._dequantiser(entry.type, tensor)
        block, size = gguf.GGML_QUANT_SIZES[entry.type]
        if region is not None and region.dim == 1:
            self._read_columns(entry, out, tensor, dequantise, region)
            return
        first = 0 if region is None else region.begin * prod(entry.shape[1:]) // block * size
        step = int(np.lcm(block, unit))
        step *= max(1, _PIECE // step)
        flat = out.view(-1)
        buffer = bytearray(min(step, flat.numel()) // block * size)
        for start in range(0, flat.numel(), step):
            count = min(step, flat.numel() - start)
            raw = memoryview(buffer)[: count // block * size]
            self._file.read_into(raw, entry.start + first + start // block * size, tensor)
            piece = torch.from_numpy(dequantise(np.frombuffer(raw, dtype=np.uint8)))
            flat[start : start + count].copy_(piece if reorder is None else reorder(piece).reshape(-1))

    def _read_columns(
        self, entry: _Entry, out: torch.Tensor, tensor: str, dequantise: _Dequantise, region: Region
    ) -> None:
        block, size = gguf.GGML_QUANT_SIZES[entry.type]
        first, last = region.begin // block, -(-region.end // block)
        row, stride = (last - first) * size, entry.shape[1] // block * size
        rows = max(1, _PIECE // ((last - first) * block))
        buffer = bytearray(min(rows, out.shape[0]) * row)
        for start in range(0, out.shape[0], rows):
            count = min(rows, out.shape[0] - start)
            raw = memoryview(buffer)[: count * row]
            for n in range(count):
                place = entry.start + (start + n) * stride + first * size
                self._file.read_into(raw[n * row : (n + 1) * row], place, tensor)
            piece = torch.from_numpy(dequantise(np.frombuffer(raw, dtype=np.uint8))).view(count, -1)
            skipped = region.begin - first * block
            out[start : start + count].copy_(piece[:, skipped : skipped + out.shape[1]])

    def _dequantiser(self, kind: GGMLQuantizationType, tensor: str) -> _Dequantise:
        if kind in _NUMPY:
            return lambda raw: raw.view(_NUMPY[kind])
        if kind is GGMLQuantizationType.F16:
            return lambda raw: raw.view(np.dtype("<f2"))

        def dequantise(raw: NDArray[np.uint8]) -> NDArray[Any]:
            # One row: the package works on groups of 16 rows, and a few large groups are faster than many small ones.
            try:
                return gguf.dequantize(raw.reshape(1, -1), kind).reshape(-1)
            except NotImplementedError:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor!r} is of type {kind.name}, which the installed gguf package cannot "
                    "dequantise. Use another quantisation."
                ) from None

        return dequantise
