"""`Operation.prepare` makes all that the layers of an iteration share: nothing is left to be made inside a lane."""

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.ops.device_arrays import DeviceArrays, MakeArray
from nanoflow.ops.device_batch import BatchPart, DeviceBatch
from nanoflow.ops.operation import NanoContext, Operation
from nanoflow.ops.rope import Append, Rope, RopeAppend
from tests.unit.ops_harness import CPU, Pages, Piece, dense_batch

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 11,
    "max_window_layers": 1,
}
"""The first layer sees everything, the others have a window."""

SHARING = (DecodeAttention, PrefillAttention, Rope, Append, RopeAppend)
"""Operations whose layers share something."""


class Noted(DeviceArrays):
    """Notes under which keys something was made."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.made: list[Hashable] = []

    def from_host(self, key: Hashable, part: BatchPart, make: MakeArray, most: tuple[int, ...]) -> torch.Tensor:
        self.made.append((part.number, key))
        return super().from_host(key, part, make, most)

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self.made.append(key)
        return super().kept(key, make)


def made_by(kernel_of: Callable[[Operation], str], *, fused: bool, whole: bool) -> tuple[set[Any], set[Any]]:
    """What `prepare` of all operations makes, and what the layers make after it; two nano-batches, two lanes."""
    pages = Pages(16, 5, 4)
    pieces = [
        [Piece(0, 40, [1], decode=True), Piece(1, 0, [2] * 9), Piece(2, 30, [3] * 7)],
        [Piece(3, 5, [1], decode=True), Piece(2, 37, [3] * 5), Piece(4, 0, [4] * 20)],
    ]
    arrays = Noted()
    host = dense_batch(pieces, pages, padding=1)
    batch = DeviceBatch(host, CPU, 16, arrays)
    graph = build_graph(ModelConfig.from_dict(CONFIG), fused=fused)
    assert {None, 11} == {w for op in graph.layer if isinstance(op, DecodeAttention) for w in op.windows}
    torch.manual_seed(0)
    buffers = {name: torch.randn(host.rows, columns) for name, columns in graph.values.items()}
    kv = torch.zeros(pages.pool, 2, graph.kv_heads, 16, graph.head_dim)
    parts = (batch.whole,) if whole else batch.parts

    def contexts(layer: int) -> list[tuple[Operation, NanoContext]]:
        found = []
        for op in graph.layer:
            weights = {weight.name: torch.randn(weight.shape) for weight in op.weights}
            for number, part in enumerate(parts):
                found.append((op, NanoContext(batch, part, layer, buffers, weights, kv, None, f"lane {number}")))
        return found

    def known() -> set[Any]:
        cached = {(part.number, key) for part in (*batch.parts, batch.whole) for key in part._cache}
        return cached | set(arrays.made)

    for op, context in contexts(0):
        op.prepare(context, kernel_of(op))
    before = known()
    for layer in range(graph.layers):
        for op, context in contexts(layer):
            if isinstance(op, SHARING):
                op.kernels[kernel_of(op)](context)
    return before, known() - before


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kernel", ["preferred", "reference"])
def test_layers_make_nothing_that_they_share(kernel: str, fused: bool, whole: bool) -> None:
    def kernel_of(op: Operation) -> str:
        return "reference" if kernel == "reference" else op.preferred_kernel(CPU, torch.float32)

    with torch.inference_mode():
        prepared, late = made_by(kernel_of, fused=fused, whole=whole)
    names = {key[0] if isinstance(key, tuple) else key for _, key in prepared}
    assert names >= {"rope", "kv_write"} | ({"paged_decode", "prefill_mask"} if kernel == "preferred" else set())
    assert not late
