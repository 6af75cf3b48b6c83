"""Decode attention beside products: on SMs of its own, or in small programs on the same SMs.

    python -m benchmarks.shared_sms        # benchmarks/results/shared_sms.json; on a Hopper GPU

Layers of Llama-3-8B's shape in bfloat16, 1,024 rows of which 551 decode with contexts of 768 tokens, in nano-batches
of 512 rows: the decode attention of one beside the four products of the other, and nothing else. Nothing depends on
what is computed. An SM has room for one CTA of a product and one program of attention if the product's tiles are small
and its pipeline short: those are the ways called "shared", which launch one program of attention an SM on a stream of
the highest priority. The ways called "parts" have green contexts. All run in turn, hot, in CUDA graphs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.__main__ import machine
from benchmarks.kernels.common import randn, time_interleaved
from benchmarks.kernels.decode_attention import Case, Shape, name_of
from nanoflow.ops.decode_attention_triton import DecodeConfig
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.gemm import matmul
from nanoflow.ops.gemm_config import GemmConfig
from nanoflow.pipeline.partitions import Partition

RESULTS = Path(__file__).parent / "results" / "shared_sms.json"
SHAPES = {"o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096)}
"""Output and input columns, in the order that a nano-batch runs them behind its attention."""
LAYERS, ROWS, DECODE, CONTEXT = 6, 1024, 551, 768
HALF = ROWS // 2
PARTS = ((108, 24), (100, 32), (92, 40))

SILU = GemmConfig(128, 128, 0, 64, 8, 3, epilogue_parts=4, split=True)
NARROW = GemmConfig(128, 128, 0, 64, 8, 4, epilogue_parts=2)
NARROW_QKV = GemmConfig(128, 128, 64, 64, 8, 3, epilogue_parts=2)
WIDE = GemmConfig(128, 256, 0, 64, 8, 3, epilogue_parts=4, split=True)
TILES = {
    "narrow": {"qkv": NARROW_QKV, "o": NARROW, "gate_up": SILU, "down": NARROW},
    "wide": {"qkv": WIDE, "o": WIDE, "gate_up": SILU, "down": WIDE},
}
"""Of products that leave 80 KiB of an SM's shared memory and a quarter of its registers to others."""
PROGRAMS = (
    DecodeConfig(32, stages=3, warps=1, programs_per_sm=1, tma=True),
    DecodeConfig(32, stages=4, warps=1, programs_per_sm=1, tma=True),
    DecodeConfig(64, stages=3, warps=2, programs_per_sm=1, tma=True),
)


class Layers:
    """Weights, rows and KV caches of some layers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights = [
            {name: randn(*shape, device=device) / shape[1] ** 0.5 for name, shape in SHAPES.items()}
            for _ in range(LAYERS)
        ]
        self.rows = {name: randn(ROWS, inputs, device=device) for name, (_, inputs) in SHAPES.items()}
        self.outputs = {name: randn(ROWS, columns, device=device) for name, (columns, _) in SHAPES.items()}
        self.activated = randn(ROWS, SHAPES["gate_up"][0] // 2, device=device)
        self.whole, self.first, self.second = (
            [Case(Shape("", 32, 8, 128, 128, (CONTEXT,) * count), str(device)) for _ in range(LAYERS)]
            for count in (DECODE, DECODE // 2, DECODE - DECODE // 2)
        )
        self.scratch = {key: DeviceArrays(device) for key in ("main", "lane")}

    def product(
        self, layer: int, name: str, rows: int, sms: int | None = None, config: GemmConfig | None = None
    ) -> None:
        silu = name == "gate_up"
        out = self.activated if silu else self.outputs[name]
        matmul(
            self.rows[name][:rows], self.weights[layer][name], out[:rows], silu=silu, sms=sms,
            kernel="triton" if config else "measured", config=config,
            scratch=self.scratch["lane" if sms else "main"].kept, intermediate=self.outputs[name][:rows],
        )  # fmt: skip

    def in_sequence(self, cuts: Sequence[int]) -> Callable[[], None]:
        """Attention of all rows, then the products of each cut."""
        attention = [case.bound(case.default()) for case in self.whole]

        def run() -> None:
            for layer in range(LAYERS):
                attention[layer]()
                for name in SHAPES:
                    for rows in cuts:
                        self.product(layer, name, rows)

        return run

    def side_by_side(
        self,
        streams: Sequence[torch.cuda.Stream],
        program: DecodeConfig | None,
        tiles: Mapping[str, GemmConfig] | None,
        parts: tuple[int, int] | tuple[None, None] = (None, None),
    ) -> Callable[[], None]:
        """One nano-batch's attention beside the other's products, in turn."""
        sms, few = parts
        halves = [
            [case.bound(program or case.default(few), few) for case in half] for half in (self.second, self.first)
        ]
        compute, memory = streams

        def run() -> None:
            here = torch.cuda.current_stream()
            compute.wait_stream(here)
            for layer in range(LAYERS):
                for attention in halves:
                    memory.wait_stream(compute)
                    with torch.cuda.stream(memory):
                        attention[layer]()
                    with torch.cuda.stream(compute):
                        for name in SHAPES:
                            self.product(layer, name, HALF, sms, tiles and tiles[name])
                    compute.wait_stream(memory)
            here.wait_stream(compute)

        return run


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layers = Layers(device)
    partitions = [Partition(sizes, device) for sizes in PARTS]
    streams = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    ways: dict[str, Callable[[], None]] = {
        "in sequence": layers.in_sequence((ROWS,)),
        "in sequence, cut": layers.in_sequence((HALF, HALF)),
        "two streams": layers.side_by_side(streams, None, None),
    }
    for sizes, partition in zip(PARTS, partitions, strict=True):
        ways[f"parts {sizes[0]}/{sizes[1]}"] = layers.side_by_side(partition.streams, None, None, sizes)
    for name, tiles in TILES.items():
        for program in PROGRAMS:
            ways[f"shared, {name} tiles, {name_of(program)}"] = layers.side_by_side(streams, program, tiles)
    found = time_interleaved(ways, 2.0, slice_seconds=0.5, device=device)
    base = found["in sequence"].median_ms
    record: dict[str, Any] = {**machine("cuda"), "layers": LAYERS, "ways": {}}
    for name, timing in sorted(found.items(), key=lambda item: item[1].median_ms):
        record["ways"][name] = {**asdict(timing), "ratio": base / timing.median_ms}
        print(f"{name:44} {timing.median_ms / LAYERS:.4f} ms a layer, {base / timing.median_ms:.3f}")
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    del ways
    for partition in partitions:
        partition.close()


if __name__ == "__main__":
    main()
