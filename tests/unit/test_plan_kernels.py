"""Plans that name kernels which cannot run on the device at hand are refused when the executor is built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanoflow import LLM, loading
from nanoflow.cli import app
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import REDUCE_SCATTER, with_sharding
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import FrozenMapping, Plan, PlanError
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.validate import validate
from tests.unit.rank_models import graph_of
from tests.unit.rank_threads import CPU, connect
from tests.unit.tiny_model import save_tiny_llama

GRAPH = graph_of()
TWO = """
capacity: 32
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
kernels: KERNELS
period: [whole: {main: [qkv.a, qkv.b]}]
"""
PRODUCTS = "reference, onednn"
SIZES: dict[str, Any] = {"kv_memory": "1MiB", "page_size": 8, "max_batch_tokens": 32, "device": "cpu"}


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels are not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def plan_of(kernels: str) -> Plan:
    return Plan.loads(TWO.replace("KERNELS", kernels), GRAPH)


def bind(plan: Plan, graph: Graph = GRAPH, communicator: Any = None) -> BoundPrograms:
    validate(plan, graph)
    nothing: Any = None
    return BoundPrograms(
        [compile_program(plan, graph)], nothing, KVLayout(2, 8), dtype=loading.DTYPES["float32"], device=CPU,
        sampled_rows=8, communicator=communicator,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "kernel", "can"),
    [
        ("gate_up", "triton", PRODUCTS),
        ("gate_up.b", "triton", PRODUCTS),
        ("qkv", "cublas", PRODUCTS),
        ("o", "measured", PRODUCTS),
        ("down.a", "deep_gemm", PRODUCTS),
        ("lm_head", "triton", PRODUCTS),
        ("embed", "triton", "reference"),
        ("add_norm", "triton", "reference"),
        ("rope_append.b", "triton", "reference"),
        ("decode_attention", "triton_3", "reference, paged"),
        ("prefill_attention", "triton", "reference, gathered"),
    ],
)
def test_a_kernel_of_a_gpu_is_refused_on_a_cpu(key: str, kernel: str, can: str) -> None:
    with pytest.raises(PlanError) as error:
        bind(plan_of(f"{{{key}: {kernel}}}"))
    assert str(error.value) == f"kernels.{key}: {kernel!r} cannot run on cpu: it needs a GPU; what can: {can}"


def test_kernels_of_a_cpu_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (*GRAPH.prologue, *GRAPH.layer, *GRAPH.epilogue):
        assert op.preferred_kernel(CPU, loading.DTYPES["float32"]) in op.cpu_kernels
        for kernel in op.cpu_kernels:
            bind(plan_of(f"{{{op.name}: {kernel}}}"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bind(plan_of("{gate_up: triton, add_norm.a: triton}"))


def test_operations_on_own_rows_have_the_kernels_of_whole_ones() -> None:
    group = connect(2)
    graph = shard_graph(GRAPH, 0, 2)
    plan = Plan.sequential(graph, 32, sharding=REDUCE_SCATTER)
    for op in with_sharding(graph, REDUCE_SCATTER).layer:
        if "triton" in op.kernels:
            with pytest.raises(PlanError, match=rf"^kernels\.{op.name}: 'triton' cannot run on cpu: .*what can: refer"):
                bind(replace(plan, kernels=FrozenMapping({op.name: "triton"})), graph, group[0])
    for communicator in group:
        communicator.close()


def test_all_forms_are_told_for_one_that_is_not_there() -> None:
    graph = shard_graph(GRAPH, 0, 2)
    plan = replace(Plan.sequential(graph, 32), kernels=FrozenMapping({"o_all_reduce": "nccl_3"}))
    with pytest.raises(PlanError, match=r"^kernels\.o_all_reduce: unknown kernel 'nccl_3'; known: ") as error:
        validate(plan, graph)
    assert str(error.value).endswith(f"known: {', '.join(graph.operation('o_all_reduce').kernels)}")


def test_a_run_names_the_plan_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(TWO.replace("KERNELS", "{add_norm.a: triton}"))
    with pytest.raises(PlanError) as error:
        LLM(save_tiny_llama(tmp_path), plan=file, **SIZES)
    assert str(error.value) == (
        f"{file}: kernels.add_norm.a: 'triton' cannot run on cpu: it needs a GPU; what can: reference"
    )


@pytest.mark.parametrize("command", ["trace", "ablate"])
def test_plan_commands_name_the_file(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(TWO.replace("KERNELS", "{gate_up: triton}"))
    mix = ["--decode", "4", "--context", "8", "--prompts", "5"]
    options = ["--model", "tiny-llama", "--layers", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, ["plan", command, "plan.yaml", *options, *mix])
    assert result.exit_code == 2
    expected = (
        "error: plan.yaml: kernels.gate_up: 'triton' cannot run on cpu: it needs a GPU; what can: reference, onednn"
    )
    assert result.output.strip() == expected


def test_the_file_of_a_collective_that_cannot_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(TWO.replace("KERNELS", "{o_all_reduce: copy_engine}"))
    options = ["--model", "tiny-llama", "--layers", "2", "--device", "cpu", "--tensor", "2"]
    result = CliRunner().invoke(app, ["plan", "trace", "plan.yaml", *options, "--decode", "4", "--context", "8"])
    assert result.exit_code == 2
    assert "error: plan.yaml: kernels.o_all_reduce: 'copy_engine' cannot run here: ranks on a CPU" in result.output
