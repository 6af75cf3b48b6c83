"""Head and sampling of 600 rows of Llama-3-8B's vocabulary: tokens equal to PyTorch's, and timed.

Greedy sampling is one pass over the logits. The sampler with filters is timed as a whole, launches and the copy of its
parameters included, since it is not captured.
"""

import time as clock
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.common import Timing, check_row, randn, time_interleaved, time_row
from nanoflow.ops.batch import PenaltyReset, SamplingBatch
from nanoflow.ops.sampling import Sampler

VOCAB, E, ROWS = 128256, 4096, 600


@dataclass(frozen=True)
class Kind:
    """Parameters of a batch's rows."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0


KINDS = {
    "plain": Kind(),
    "top-k 50": Kind(top_k=50),
    "top-p 0.9": Kind(top_p=0.9),
    "top-k 100, top-p 0.95, T 0.7": Kind(0.7, 100, 0.95),
    "min-p 0.05": Kind(min_p=0.05),
    "greedy, penalties": Kind(0.0, repetition=1.2, frequency=0.4),
    "top-p 0.95, penalties": Kind(top_p=0.95, repetition=1.2, frequency=0.4),
}


def batch(rows: int, kind: Kind, resets: tuple[PenaltyReset, ...] = (), bias: int = 0) -> SamplingBatch:
    """`rows` rows of one kind with seeds of their own, the first `bias` of them with one biased token each."""

    def full(value: float, dtype: type) -> np.ndarray:
        return np.full(rows, value, dtype)

    return SamplingBatch(
        rows=np.arange(rows, dtype=np.int32),
        slots=np.arange(rows, dtype=np.int32),
        positions=np.arange(rows, dtype=np.int32),
        seeds=np.random.default_rng().integers(0, 2**63, rows, dtype=np.uint64),
        temperature=full(kind.temperature, np.float32),
        top_k=full(kind.top_k, np.int32),
        top_p=full(kind.top_p, np.float32),
        min_p=full(kind.min_p, np.float32),
        repetition_penalty=full(kind.repetition, np.float32),
        presence_penalty=full(0, np.float32),
        frequency_penalty=full(kind.frequency, np.float32),
        logprobs=full(-1, np.int32),
        bias_entries=np.arange(bias, dtype=np.int32),
        bias_tokens=np.arange(bias, dtype=np.int32),
        bias_values=np.full(bias, 3, np.float32),
        penalty_resets=resets,
    )


def _resets(rows: int, vocab: int, kind: Kind) -> tuple[PenaltyReset, ...]:
    if kind.repetition == 1:
        return ()
    words = np.random.default_rng().integers(0, vocab, (rows, 100)).astype(np.int32)
    return tuple(PenaltyReset(row, words[row, :50], words[row, 50:]) for row in range(rows))


def check(device: str) -> list[dict[str, Any]]:
    """Shares of tokens that differ from the PyTorch path's on the CPU: none for greedy rows, sums may round others."""
    from nanoflow.ops import sampling_triton

    table = []
    on_gpu = torch.device(device).type == "cuda"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, vocab in ((1, VOCAB), (37, 32000), (600, 151936), (5, 50257)) if on_gpu else ((3, 5000),):
            logits = randn(rows, vocab + 3, device=device, dtype=dtype)[:, :vocab]
            out = torch.full((rows,), -1, dtype=torch.int64, device=device)
            sampling_triton.argmax(logits, out)
            wrong = (out.cpu() != logits.cpu().argmax(-1)).double().mean().item()
            table.append(check_row("argmax", f"{rows} x {vocab} {dtype}", wrong, 0.0))
    rows, vocab = (48, VOCAB) if on_gpu else (4, 5000)
    for name, kind in KINDS.items():
        for spread in (1.0, 3.0):
            logits = randn(rows, vocab, device=device, dtype=torch.float32, scale=spread)
            entries = batch(rows, kind, _resets(rows, vocab, kind), bias=rows // 2)
            mine = Sampler(vocab, rows, torch.device(device), "triton")
            found = [mine.sample(logits, entries).tokens.cpu()]
            plain = Sampler(vocab, rows, torch.device("cpu"))
            wanted = [plain.sample(logits.cpu(), entries).tokens]
            entries = batch(rows, kind)  # with the token sampled last among the counts
            found.append(mine.sample(logits, entries).tokens.cpu())
            wanted.append(plain.sample(logits.cpu(), entries).tokens)
            wrong = (torch.cat(found) != torch.cat(wanted)).double().mean().item()
            limit = 0.0 if kind.temperature == 0 else 0.011  # one token of 96
            table.append(check_row(f"sample: {name}", f"{rows} x {vocab}, spread {spread:g}", wrong, limit))
    return table


def time(device: str, quick: bool) -> list[dict[str, Any]]:
    """Argmax, the head with it, and the sampler with filters."""
    from nanoflow.ops import sampling_triton

    on_gpu = torch.device(device).type == "cuda"
    rows, vocab, columns = (ROWS, VOCAB, E) if on_gpu else (4, 5000, 64)
    seconds = 0.1 if quick else 0.5
    logits = randn(rows, vocab, device=device, scale=3.0)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    hidden = randn(rows, columns, device=device)
    head = randn(vocab, columns, device=device, scale=columns**-0.5)
    shape, size = f"{rows} x {vocab}", 2 * rows * vocab
    table = []

    calls = {"torch.argmax": lambda: torch.argmax(logits, -1, out=out)}
    for parts, block, warps in ((4, 4096, 4), (4, 2048, 4), (4, 4096, 8), (8, 4096, 4), (2, 4096, 8), (1, 8192, 8)):
        config = {"parts": parts, "block": block, "warps": warps}
        calls[str(config)] = lambda c=config: sampling_triton.argmax(logits, out, **c)
    for config, timing in time_interleaved(calls, seconds, device=device).items():
        met = timing.median_ms < 0.25 if config.startswith("{") else None
        table.append(
            time_row("argmax", shape, timing, config=config, bytes=size, device=device, target="under 0.25 ms", met=met)
        )

    def head_and_argmax() -> None:
        torch.mm(hidden, head.t(), out=logits)
        sampling_triton.argmax(logits, out)

    calls = {"head, torch.mm": lambda: torch.mm(hidden, head.t(), out=logits), "head + greedy": head_and_argmax}
    for name, timing in time_interleaved(calls, seconds, device=device).items():
        goal = {"target": "1.3 ms or less", "met": timing.median_ms <= 1.3} if "greedy" in name else {}
        moved = 2 * (vocab * columns + rows * (columns + vocab))
        flops = 2 * rows * vocab * columns
        table.append(time_row(name, shape, timing, flops=flops, bytes=moved, device=device, **goal))
    return table + _time_rows(device, quick, logits) + _time_sampler(device, quick, logits)


def _time_rows(device: str, quick: bool, logits: torch.Tensor) -> list[dict[str, Any]]:
    """The kernels of rows with filters, captured, with candidate configs."""
    from nanoflow.ops import sampling_triton
    from nanoflow.ops.sampling_rows import describe

    rows, vocab = logits.shape
    entries = np.arange(rows)
    work, out = torch.empty(rows, vocab, device=device), torch.empty(rows, dtype=torch.int64, device=device)
    nothing = torch.zeros(0, vocab, dtype=torch.uint8), torch.zeros(0, vocab, dtype=torch.int32)
    tables = tuple(each.to(device) for each in nothing)
    keys = ("draw_block", "search_block", "warps", "stages")
    configs = ((4096, 2048, 16, 3), (4096, 2048, 16, 1), (4096, 1024, 8, 3), (4096, 2048, 8, 3), (2048, 1024, 4, 3))
    table = []
    for name in ("plain", "top-k 50", "top-p 0.9", "top-k 100, top-p 0.95, T 0.7")[: 2 if quick else 4]:
        words = describe(batch(rows, KINDS[name]), entries, 0, np.full(rows, -1, np.int32), np.random.rand(rows), vocab)
        about = words.to(device)
        calls = {}
        for values in configs[: 1 if quick else 5]:
            config = dict(zip(keys, values, strict=True))
            calls[str(config)] = lambda about=about, c=config: sampling_triton.sample_rows(
                logits, about, rows, *tables, out, work_RV=work, **c
            )
        for config, timing in time_interleaved(calls, 0.1 if quick else 0.4, device=device).items():
            size = 2 * rows * vocab
            shape = f"{rows} x {vocab}"
            table.append(time_row(f"sample: {name}", shape, timing, config=config, bytes=size, device=device))
    return table


def _time_sampler(device: str, quick: bool, logits: torch.Tensor) -> list[dict[str, Any]]:
    """The whole sampler, eagerly, against the PyTorch path on the same device."""
    table = []
    rows, vocab = logits.shape
    for name in ("top-p 0.9", "greedy, penalties"):
        kind = KINDS[name]
        for kernels in ("triton", "reference")[: 1 if quick else 2]:
            sampler = Sampler(vocab, rows, torch.device(device), "triton" if kernels == "triton" else "reference")
            sampler.sample(logits, batch(rows, kind, _resets(rows, vocab, kind)))
            entries = batch(rows, kind)
            samples = []
            for _ in range(5 if kernels == "reference" else 20):
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
                started = clock.perf_counter()
                sampler.sample_chunks(entries, lambda part: logits[part], 256).tokens.cpu()
                samples.append((clock.perf_counter() - started) * 1e3)
            samples.sort()
            timing = Timing(samples[len(samples) // 2], samples[0], samples[-1], None, None, len(samples))
            table.append(time_row(f"sampler: {name}", f"{rows} x {vocab}", timing, config=kernels, device=device))
    return table
