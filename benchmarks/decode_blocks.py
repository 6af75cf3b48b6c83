"""Which blocks of keys decode attention reads fastest when contexts end anywhere: the choice in `decode_config`.

    python -m benchmarks.decode_blocks                       # benchmarks/results/decode_blocks.json
    python -m benchmarks.decode_blocks --trace sharegpt.csv  # with the contexts of that trace's running requests
    python -m benchmarks.decode_blocks --sms 24 32 40 48     # benchmarks/results/decode_partitions.json

One layer of Llama-3-8B's shape in bfloat16, pages of 128 tokens. A TMA load always reads a whole block, so that of the
last block of a request some part is read in vain: the larger the block, the more. Candidates run in turn, hot.

With --sms, each runs on parts of so many SMs, the others idle, and is compared with float32 before. There the memory
does not limit, but how much an SM has under way, and what its programs do between two loads:

    bytes under way    programs an SM * (stages - 1) buffers * keys and values of a block
    a block takes      the longer of its chain (wait, scores, softmax, product: about 1,000 cycles for 32 tokens with
                       two warps) and (latency + chain) / (stages - 1)

A program with two stages waits out a whole latency a block; one with three has the next block there in time if the
chain is half the latency. So candidates are those that fill the shared memory, or the registers, in different ways.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.__main__ import machine
from benchmarks.kernels.common import on_sms, relative_error, time_interleaved
from benchmarks.kernels.decode_attention import Case, Shape, name_of
from nanoflow.ops.decode_attention_triton import DecodeConfig

RESULTS = Path(__file__).parent / "results"
HEADS = (32, 8, 128)
"""Query heads, key/value heads, head size."""
LIMIT = 1e-2
SLICE_SECONDS = 0.05
"""Of a candidate's turn in a partition: short, since there are many, and nobody asks for their energy."""
CANDIDATES = (
    DecodeConfig(64, stages=3, warps=4, programs_per_sm=3, tma=True, max_registers=168),
    DecodeConfig(64, stages=3, warps=2, programs_per_sm=3, tma=True),
    DecodeConfig(64, stages=2, warps=4, programs_per_sm=4, tma=True, max_registers=128),
    DecodeConfig(64, stages=2, warps=2, programs_per_sm=4, tma=True),
    DecodeConfig(32, stages=3, warps=1, programs_per_sm=5, tma=True),
    DecodeConfig(32, stages=3, warps=1, programs_per_sm=6, tma=True),
    DecodeConfig(32, stages=4, warps=1, programs_per_sm=5, tma=True),
    DecodeConfig(32, stages=3, warps=2, programs_per_sm=3, tma=True),
    DecodeConfig(32, stages=3, warps=2, programs_per_sm=4, tma=True),
    DecodeConfig(32, stages=4, warps=2, programs_per_sm=3, tma=True),
    DecodeConfig(32, stages=3, warps=4, programs_per_sm=4, tma=True, max_registers=128),
    DecodeConfig(16, stages=4, warps=1, programs_per_sm=6, tma=True),
    DecodeConfig(16, stages=6, warps=1, programs_per_sm=6, tma=True),
)
PART_CANDIDATES = (
    DecodeConfig(64, stages=3, warps=2, programs_per_sm=3, tma=True),
    DecodeConfig(64, stages=3, warps=4, programs_per_sm=3, tma=True, max_registers=168),
    DecodeConfig(64, stages=2, warps=2, programs_per_sm=5, tma=True),
    DecodeConfig(32, stages=3, warps=1, programs_per_sm=5, tma=True),
    DecodeConfig(16, stages=4, warps=1, programs_per_sm=6, tma=True),
    DecodeConfig(16, stages=5, warps=1, programs_per_sm=5, tma=True),
    DecodeConfig(32, stages=2, warps=1, programs_per_sm=8, tma=True),
    DecodeConfig(32, stages=3, warps=2, programs_per_sm=4, tma=True),
    DecodeConfig(32, stages=3, warps=2, programs_per_sm=5, tma=True, max_registers=168),
    DecodeConfig(64, stages=3, warps=4, programs_per_sm=2, tma=False),
)
"""Of those that spill no registers for sm_90 and whose programs fit an SM side by side."""


def running_of(trace: Path, count: int) -> np.ndarray:
    """Contexts of `count` requests of a trace at random moments of their lives."""
    with trace.open(encoding="utf-8", newline="") as file:
        rows = [row for _, row in zip(range(2000), csv.DictReader(file), strict=False)]
    prompts = np.array([min(int(row["ContextTokens"]), 3000) for row in rows])
    outputs = np.array([max(1, min(int(row["GeneratedTokens"]), 1024)) for row in rows])
    random = np.random.default_rng(0)
    chosen = random.choice(len(rows), count, p=outputs / outputs.sum())
    return np.asarray(prompts[chosen] + (random.random(count) * outputs[chosen]).astype(int) + 1)


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Every candidate on one case; each one's output is compared with the first one's."""
    calls, first = {}, None
    for config in CANDIDATES:
        call = calls[name_of(config)] = case.bound(config)
        call()
        first = case.out_THD.float().clone() if first is None else first
        assert (case.out_THD.float() - first).abs().max() < 2e-2, name_of(config)
    return [
        {
            "config": name,
            "microseconds": timing.median_ms * 1e3,
            "gbytes_per_second": case.shape.kv_bytes / timing.median_ms / 1e6,
            "watts": timing.watts,
            "millijoules": timing.joules and timing.joules * 1e3,
        }
        for name, timing in time_interleaved(calls, seconds, device=case.device).items()
    ]


def measure_parts(case: Case, parts: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Every candidate on parts of the SMs, checked against float32 first; a row for each, best first."""
    expected, rows = case.expected(), []
    with ThreadPoolExecutor(12 if case.device.type == "cuda" else 1) as pool:  # compiles several at a time
        list(pool.map(lambda config: case.bound(config)(), PART_CANDIDATES))
    for sms in parts:
        with on_sms(sms, case.device) as stream:
            calls = {name_of(config): case.bound(config, sms) for config in PART_CANDIDATES}
            for name, call in calls.items():
                case.out_THD.fill_(torch.nan)
                call()
                error = relative_error(case.out_THD, expected)
                assert error < LIMIT, f"{name} on {sms} SMs: {error}"
            timings = time_interleaved(
                calls, seconds, warmup_seconds=0.2, slice_seconds=SLICE_SECONDS, device=case.device, stream=stream
            )
        for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
            rate = case.shape.kv_bytes / timing.median_ms / 1e6
            microseconds = timing.median_ms * 1e3
            rows.append({"sms": sms, "config": name, "microseconds": microseconds, "gbytes_per_second": rate})
            print(f"  {sms:3d} SMs: {name:22} {microseconds:7.1f} us, {rate:5,.0f} GB/s", flush=True)
    return rows


def partitions(args: argparse.Namespace, random: np.random.Generator) -> dict[str, Any]:
    """What is recorded with --sms."""
    lengths = tuple(random.integers(512, 1025, args.requests).tolist())
    dtype = torch.float16 if args.device == "cpu" else torch.bfloat16  # Triton's interpreter has no right bfloat16
    shape = Shape(f"{args.requests} ragged, 512 to 1,024 tokens", *HEADS, 128, lengths, dtype=dtype)
    print(shape)
    case = Case(shape, args.device)
    chosen = {str(sms): name_of(case.default(sms)) for sms in args.sms}
    return {"shape": str(shape), "chosen": chosen, "parts": measure_parts(case, args.sms, args.seconds or 0.2)}


def whole(args: argparse.Namespace, random: np.random.Generator) -> dict[str, Any]:
    """What is recorded of the whole device."""
    mixes = {
        "560 requests of 512 to 1,023 tokens": random.integers(512, 1024, 560),
        "60 requests of 512 to 1,535 tokens": random.integers(512, 1536, 60),
    }
    if args.trace is not None:
        mixes[f"700 running requests of {args.trace.stem}"] = running_of(args.trace, 700)
    result: dict[str, Any] = {"mixes": {}}
    for name, context in mixes.items():
        case = Case(Shape(name, *HEADS, 128, tuple(context.tolist())), args.device)
        result["chosen"] = name_of(case.default())
        rows = result["mixes"][name] = measure(case, args.seconds or 0.5)
        print(name)
        for row in rows:
            rate, watts = row["gbytes_per_second"], row["watts"] or 0
            print(f"  {row['config']:22} {row['microseconds']:7.1f} us, {rate:5,.0f} GB/s, {watts:3.0f} W")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="CSV")
    parser.add_argument("--sms", type=int, nargs="+", default=None, help="measure on parts of so many SMs")
    parser.add_argument("--requests", type=int, default=600, help="with --sms")
    parser.add_argument("--seconds", type=float, default=None, help="of each candidate: 0.5, or 0.2 with --sms")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    record, path = (whole, "decode_blocks.json") if args.sms is None else (partitions, "decode_partitions.json")
    result = {**machine(args.device), **record(args, np.random.default_rng(0))}
    (args.out or RESULTS / path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
