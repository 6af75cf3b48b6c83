"""The kernels of collectives between peers compile for sm_80, sm_90 and sm_100, without a GPU and without spills.

What orders the ranks must be in what comes out: releases and acquires at the scope of the system, between barriers.
"""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nanoflow.ops import all_reduce_triton as kernels, fused_rows_triton as fused, rows_triton as rows  # noqa: E402
from nanoflow.ops.peer_memory import data_begin  # noqa: E402

BLOCK = {"blocks": "*i64", "counters": "*i32"}
SIZES = {"x": "*T", **BLOCK, "n": "i32"}
SCATTER = {**SIZES, "share": "i32", "stride": "i32", "half": "i32"}
GATHER = {"x": "*T", "blocks": "*i64", "places": "*i64", "counters": "*i32", "n": "i32", "share": "i32", "first": "i32"}
FUSED = {"branch": "*T", "residual": "*T", "weight": "*T", "out": "*T", "blocks": "*i64", "places": "*i64"}
FUSED |= {"counters": "*i32", "rows": "i32", "share": "i32", "each": "i32", "first": "i32", "stride": "i32"}
FUSED |= {"half": "i32", "eps": "fp32"}
FEW = {"SUM": True, "GATHER": True, "TILE": 16384, "STAGES": fused.STAGES}
OWN = {key: kind for key, kind in FUSED.items() if key not in ("places", "share", "each", "first", "half")}
ANY = ("rows", "share", "each", "first", "eps")
"""Of these, others than multiples of 16 are usual."""
LIMIT = 180 * 10**9
KERNELS = {
    "one_shot": (kernels.one_shot_kernel, {**SIZES, "stride": "i32", "half": "i32"}, {"BLOCK": 16384}, 16),
    "one_shot_small": (kernels.one_shot_kernel, {**SIZES, "stride": "i32", "half": "i32"}, {"BLOCK": 2048}, 8),
    "two_shot": (kernels.two_shot_kernel, {**SIZES, "share": "i32", "half": "i32"}, {"BLOCK": 16384}, 16),
    "two_shot_small": (kernels.two_shot_kernel, {**SIZES, "share": "i32", "half": "i32"}, {"BLOCK": 2048}, 8),
    "scatter": (rows.reduce_scatter_kernel, SCATTER, {"BLOCK": 16384}, 16),
    "scatter_small": (rows.reduce_scatter_kernel, SCATTER, {"BLOCK": 2048}, 8),
    "gather": (rows.all_gather_kernel, GATHER, {"BLOCK": 16384}, 16),
    "gather_small": (rows.all_gather_kernel, GATHER, {"BLOCK": 2048}, 8),
    "sum": (fused.fused_rows_kernel, FUSED, {"SUM": True, "GATHER": False, "TILE": 16384}, 8),
    "gather_norm": (fused.fused_rows_kernel, FUSED, {"SUM": False, "GATHER": True, "TILE": 16384}, 8),
    "sum_gather_norm": (fused.fused_rows_kernel, FUSED, {"SUM": True, "GATHER": True, "TILE": 16384}, 8),
    "sum_gather_norm_small": (fused.fused_rows_kernel, FUSED, {"SUM": True, "GATHER": True, "TILE": 8192}, 8),
    "sum_gather_norm_few": (fused.fused_rows_kernel, FUSED, FEW, 8),
    "own_sum": (fused.own_rows_kernel, OWN, {"SUM": True, "NORM": False}, 8),
    "own_norm": (fused.own_rows_kernel, OWN, {"SUM": False, "NORM": True}, 8),
    "own_sum_norm": (fused.own_rows_kernel, OWN, {"SUM": True, "NORM": True}, 8),
    "meet": (kernels.meet_kernel, BLOCK, {}, 1),
    "readers": (kernels.readers_kernel, BLOCK, {}, 1),
    "add_arrived": (kernels.add_arrived_kernel, {**SIZES, "stride": "i32"}, {"TELL": True, "BLOCK": 2048}, 8),
}


def ptx(name: str, ranks: int, capability: int = 90, dtype: str = "bf16") -> str:
    kernel, arguments, constants, warps = KERNELS[name]
    known = {"RANK": ranks - 1, "RANKS": ranks, "BEGIN": data_begin(ranks), "LIMIT": LIMIT, **constants}
    known |= {"COLUMNS": 8192, "BLOCK": 8192, "STAGES": 1, **known}
    known = {key: value for key, value in known.items() if key in kernel.arg_names}
    signature = {argument: kind.replace("T", dtype) for argument, kind in arguments.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(signature)
        if not ("COLUMNS" in kernel.arg_names and argument in ANY)
    }
    source = ASTSource(kernel, signature | dict.fromkeys(known, "constexpr"), known, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= (2 * (ranks + 2) * 16 + 1 if constants.get("STAGES", 1) > 1 else 48) * 1024
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, ranks: int) -> None:
    text = ptx(name, ranks)
    assert ".local" not in text, "an array went to local memory"
    others = ranks - 1
    phases = 2 if name.startswith(("two_shot", "gather", "sum_gather")) else 1
    raised = 0 if name in ("readers", "own_norm") else phases * others
    awaited = 0 if name == "add_arrived" or name.startswith("own") else phases * others
    assert text.count("atom.global.sys.release.exch.b32") == raised
    # Once when it comes, and in the loop; each wait can end in a trap. An addition of zero is a load.
    assert text.count("ld.global.sys.acquire.b32") == 2 * awaited and text.count("trap;") == awaited
    if raised:
        for flag in (text.index("atom.global.sys.release.exch"), text.rindex("atom.global.sys.release.exch")):
            after = text[text.rindex("bar.sync", 0, flag) : flag]
            assert "st.global" not in after, "a flag is raised before all threads have written"
    if name not in ("meet", "readers"):
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", text) and re.search(r"st\.global[\w.:]*\.v4\.b32", text)
    if name not in ("meet", "readers", "gather", "gather_small", "gather_norm", "own_norm"):
        assert re.search(r"ld\.global\.cg[\w.:]*\.v4\.b32|cp\.async\.cg\.shared", text), (
            "what has arrived is read past the first-level cache"
        )


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_other_devices_compile(name: str, capability: int) -> None:
    assert ptx(name, 2, capability)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["one_shot", "two_shot", "scatter", "gather", "sum_gather_norm", "add_arrived"])
def test_other_types_compile(name: str, dtype: str) -> None:
    assert ptx(name, 4, dtype=dtype)
