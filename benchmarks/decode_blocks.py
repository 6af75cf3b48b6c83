"""Which blocks of keys decode attention reads fastest when contexts end anywhere: the choice in `decode_config`.

    python -m benchmarks.decode_blocks                       # benchmarks/results/decode_blocks.json
    python -m benchmarks.decode_blocks --trace sharegpt.csv  # with the contexts of that trace's running requests

One layer of Llama-3-8B's shape in bfloat16, pages of 128 tokens. A TMA load always reads a whole block, so that of the
last block of a request some part is read in vain: the larger the block, the more. Candidates run in turn, hot.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernels.__main__ import machine
from benchmarks.kernels.common import time_interleaved
from benchmarks.kernels.decode_attention import Case, Shape, name_of
from nanoflow.ops.decode_attention_triton import DecodeConfig

RESULTS = Path(__file__).parent / "results" / "decode_blocks.json"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="CSV")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each candidate")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    mixes = {
        "560 requests of 512 to 1,023 tokens": random.integers(512, 1024, 560),
        "60 requests of 512 to 1,535 tokens": random.integers(512, 1536, 60),
    }
    if args.trace is not None:
        mixes[f"700 running requests of {args.trace.stem}"] = running_of(args.trace, 700)
    result: dict[str, Any] = {**machine("cuda"), "mixes": {}}
    for name, context in mixes.items():
        case = Case(Shape(name, 32, 8, 128, 128, tuple(context.tolist())), "cuda")
        result["chosen"] = name_of(case.default())
        rows = result["mixes"][name] = measure(case, args.seconds)
        print(name)
        for row in rows:
            rate, watts = row["gbytes_per_second"], row["watts"] or 0
            print(f"  {row['config']:22} {row['microseconds']:7.1f} us, {rate:5,.0f} GB/s, {watts:3.0f} W")
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
