"""`nanoflow run` with `parallel.tensor: 2` on two GPUs: the tokens of one GPU in float32, whatever the plan."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.gpu.checkpoints import save_model
from tests.unit.tiny_model import VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SECONDS = 300
"""A run compiles its kernels and captures its graphs on both ranks."""

NETWORK = """
capacity: 64
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 32}, b: {decode: 1/2, prefill: 1/2, rows: 32}}
kernels: KERNELS
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b]
    network: [o_all_reduce.a, o_all_reduce.b, down_all_reduce.a, down_all_reduce.b]
"""
"""Sums of one nano-batch beside the products of the other, on a stream of their own."""
KERNELS = (
    "{down_all_reduce: nccl_4}",
    "{o_all_reduce: copy_engine, down_all_reduce: two_shot}",
    "{o_all_reduce: one_shot, down_all_reduce: copy_engine}",
)

ROWS = """
sharding: reduce_scatter
capacity: 64
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 32}, b: {decode: 1/2, prefill: 1/2, rows: 32}}
kernels: KERNELS
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      gate_up.a, down.a, gate_up.b, down.b]
    network: [o_reduce_scatter.a, add_norm.a, add_norm_all_gather.a, o_reduce_scatter.b, add_norm.b,
      add_norm_all_gather.b, down_reduce_scatter.a, add.a, input_layernorm.a@1, input_layernorm_all_gather.a@1,
      down_reduce_scatter.b, add.b, input_layernorm.b@1, input_layernorm_all_gather.b@1]
"""
"""The same of a residual whose rows are divided: what works on a rank's rows is in the network's lane too."""
ROW_KERNELS = (
    "{o_reduce_scatter: nccl_4}",
    "{o_reduce_scatter: push, add_norm_all_gather: copy_engine, down_reduce_scatter: copy_engine,"
    " input_layernorm_all_gather: push}",
    "{o_reduce_scatter: copy_engine, add_norm_all_gather: push}",
)
COLUMNS = """
sharding: all_gather
capacity: 64
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 32}, b: {decode: 1/2, prefill: 1/2, rows: 32}}
kernels: KERNELS
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, qkv.b, decode_attention.b, prefill_attention.b, o.a, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b]
    network: [attention_all_gather.a, attention_all_gather.b, o_all_gather.a, o_all_gather.b, down_all_reduce.a,
      down_all_reduce.b]
"""
"""The same of an `o` that is split by output columns."""
COLUMN_KERNELS = (
    "{attention_all_gather: nccl_4}",
    "{attention_all_gather: push, o_all_gather: copy_engine, down_all_reduce: two_shot}",
    "{attention_all_gather: copy_engine, o_all_gather: push, down_all_reduce: copy_engine}",
)
WHOLE_COLUMNS = COLUMNS.replace("attention_all_gather.a, attention_all_gather.b", "attention_all_gather").replace(
    "o_all_gather.a, o_all_gather.b", "o_all_gather"
)
"""With all-gathers of both nano-batches at once."""
IN_SEQUENCE = """
sharding: reduce_scatter
capacity: 64
nano_batches: {a: {decode: 1, prefill: 1, rows: 64}}
period: [whole: {main: [qkv, decode_attention, prefill_attention, o, gate_up, down]}]
"""


def answers(folder: Path, model: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The choices of every request, by its id."""
    rng = random.Random(3)
    lines = []
    for number in range(24):
        line = {"custom_id": str(number), "prompt": [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 50))]}
        kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": number}, {"repetition_penalty": 1.3}]
        lines.append(json.dumps(line | kinds[number % 3]))
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    output = folder / f"{name}.jsonl"
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "workload": {"input": str(folder / "in.jsonl")},
        "sampling": {"max_tokens": 24},
        "engine": {"device": "cuda", "kv_memory": "64MiB", "page_size": 16, "max_batch_tokens": 64, "max_running": 16},
        "output": {"path": str(output)},
        **changes,
    }
    job = folder / f"{name}.yaml"
    job.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nanoflow", "run", str(job), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return {record["custom_id"]: record["response"]["body"]["choices"] for record in records}


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path, kv_heads: int) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_model(model, head_dim=64, num_key_value_heads=kv_heads, vocab_size=VOCAB + 1)
    one = answers(tmp_path, model, "one")
    assert len(one) == 24
    two = {"parallel": {"tensor": 2}}
    assert answers(tmp_path, model, "two", **two) == one
    plans = [NETWORK.replace("KERNELS", kernels) for kernels in KERNELS]
    plans += [
        IN_SEQUENCE,
        IN_SEQUENCE.replace("reduce_scatter", "all_gather"),
        *(ROWS.replace("KERNELS", kernels) for kernels in ROW_KERNELS),
    ]
    plans += [COLUMNS.replace("KERNELS", kernels) for kernels in COLUMN_KERNELS]
    plans.append(WHOLE_COLUMNS.replace("KERNELS", COLUMN_KERNELS[1]))
    rows = ROWS.replace("KERNELS", ROW_KERNELS[-1])
    plans.append(rows.replace("capacity", "least_rows: 40\ncapacity"))  # beside the sequential plan's all-reduces
    for number, text in enumerate(plans):
        (tmp_path / "network.plan.yaml").write_text(text)
        plan = {"pipeline": {"plan": str(tmp_path / "network.plan.yaml")}}
        assert answers(tmp_path, model, f"lanes {number}", **two, **plan) == one
    engine = {"device": "cuda", "kv_memory": "64MiB", "max_batch_tokens": 48, "max_running": 8, "cuda_graphs": False}
    assert answers(tmp_path, model, "launched", **two, engine=engine) == one
