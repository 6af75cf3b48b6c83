"""`nanoflow run` with `parallel.tensor: 2`: the tokens of one GPU in float32, whatever the plan."""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.gpu.checkpoints import save_model
from tests.gpu.sharing import ROOT, environment
from tests.unit.tiny_model import VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
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
FUSED = """
sharding: fused_reduce_scatter
capacity: 64
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 32}, b: {decode: 1/2, prefill: 1/2, rows: 32}}
kernels: KERNELS
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      gate_up.a, down.a, gate_up.b, down.b]
    network: [o_add_norm.a, o_add_norm.b, down_add.a, input_layernorm_gather.a@1, down_add.b,
      input_layernorm_gather.b@1]
"""
"""The same of divided rows, in one operation between two products."""
FUSED_KERNELS = (
    "{o_add_norm: nccl_4}",
    "{o_add_norm: push, down_add: copy_engine, input_layernorm_gather: push_64}",
    "{o_add_norm: copy_engine, down_add: push_128, input_layernorm_gather: copy_engine}",
)
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return {record["custom_id"]: record["response"]["body"]["choices"] for record in records}


def plans() -> dict[str, str]:
    """Plan files by what they are."""
    found = {f"all_reduce {n}": NETWORK.replace("KERNELS", kernels) for n, kernels in enumerate(KERNELS)}
    for sharding in ("reduce_scatter", "fused_reduce_scatter", "all_gather"):
        found[f"{sharding} in sequence"] = IN_SEQUENCE.replace("reduce_scatter", sharding)
    for name, text, each in (
        ("reduce_scatter", ROWS, ROW_KERNELS),
        ("fused_reduce_scatter", FUSED, FUSED_KERNELS),
        ("all_gather", COLUMNS, COLUMN_KERNELS),
    ):
        found |= {f"{name} {n}": text.replace("KERNELS", kernels) for n, kernels in enumerate(each)}
    found["all_gather whole"] = WHOLE_COLUMNS.replace("KERNELS", COLUMN_KERNELS[1])
    for name in ("reduce_scatter 2", "fused_reduce_scatter 2"):  # beside the sequential plan's all-reduces
        found[f"{name} and all_reduce"] = found[name].replace("capacity", "least_rows: 40\ncapacity", 1)
    return found


@dataclass(frozen=True)
class Alone:
    """A model, and what one GPU answers."""

    folder: Path
    model: Path
    answers: dict[str, Any]


def alone(folder: Path, kv_heads: int) -> Alone:
    model = folder / "model"
    model.mkdir()
    save_model(model, head_dim=64, num_key_value_heads=kv_heads, vocab_size=VOCAB + 1)
    found = Alone(folder, model, answers(folder, model, "one"))
    assert len(found.answers) == 24
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return alone(tmp_path_factory.mktemp("ranks"), 2)


def check_plan(one: Alone, name: str, ranks: int = 2) -> None:
    file = one.folder / f"{name.replace(' ', '_')}.plan.yaml"
    file.write_text(plans()[name])
    changes = {"parallel": {"tensor": ranks}, "pipeline": {"plan": str(file)}}
    assert answers(one.folder, one.model, f"{ranks} {name}", **changes) == one.answers


def test_two_ranks_give_the_tokens_of_one(one: Alone) -> None:
    two = {"parallel": {"tensor": 2}}
    assert answers(one.folder, one.model, "two", **two) == one.answers
    engine = {"device": "cuda", "kv_memory": "64MiB", "max_batch_tokens": 48, "max_running": 8, "cuda_graphs": False}
    assert answers(one.folder, one.model, "launched", **two, engine=engine) == one.answers


@pytest.mark.parametrize("name", plans())
def test_whatever_the_plan(one: Alone, name: str) -> None:
    check_plan(one, name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_have_the_same_key_value_head(tmp_path: Path, ranks: int) -> None:
    if 1 < torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, or one")
    one = alone(tmp_path, ranks // 2)
    assert answers(one.folder, one.model, "ranks", parallel={"tensor": ranks}) == one.answers
    for name in ("all_reduce 1", "fused_reduce_scatter 1", "all_gather 1"):
        check_plan(one, name, ranks)
