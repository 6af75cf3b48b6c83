"""The kernels of the all-gather of columns compile for sm_80, sm_90 and sm_100, without a GPU and without spills: flags
are released and acquired as `test_all_reduce_compile` has them of the others, and accesses are wide whatever the
rows."""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nanoflow.ops import columns_triton as kernels  # noqa: E402
from nanoflow.ops.peer_memory import data_begin  # noqa: E402

GATHER = {"source": "*T", "blocks": "*i64", "places": "*i64", "counters": "*i32", "rows": "i32", "first": "i32"}
BESIDE = {"source": "*T", "gathered": "*T", "target": "*T", "rows": "i32"}
KERNELS = {
    "gather": (kernels.all_gather_kernel, GATHER, {"LIMIT": 180 * 10**9, "BLOCK": 16384}, 16),
    "gather_small": (kernels.all_gather_kernel, GATHER, {"LIMIT": 180 * 10**9, "BLOCK": 2048}, 8),
    "side_by_side": (kernels.side_by_side_kernel, BESIDE, {"BLOCK": kernels.ADD_BLOCK}, kernels.ADD_WARPS),
}
COLUMNS = (4096, 8 * 157)
"""The second is 8 times a prime, so that neither rows nor shares begin at a multiple of 16 elements."""


def ptx(name: str, ranks: int, columns: int, capability: int = 90, dtype: str = "bf16") -> str:
    kernel, arguments, constants, warps = KERNELS[name]
    known = {"COLUMNS": columns, "RANK": ranks - 1, "RANKS": ranks, "BEGIN": data_begin(ranks), **constants}
    known = {key: value for key, value in known.items() if key in kernel.arg_names}
    signature = {argument: kind.replace("T", dtype) for argument, kind in arguments.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(kernel, signature | dict.fromkeys(known, "constexpr"), known, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 48 * 1024
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, ranks: int, columns: int) -> None:
    text = ptx(name, ranks, columns)
    assert ".local" not in text, "an array went to local memory"
    assert re.search(r"ld\.global[\w.:]*\.v4\.b32", text) and re.search(r"st\.global[\w.:]*\.v4\.b32", text)
    assert not re.search(r"(ld|st)\.global[\w.:]*\.b16", text), "an access is not 16 bytes wide"
    flags = 0 if name == "side_by_side" else 2 * (ranks - 1)
    assert text.count("atom.global.sys.release.exch.b32") == text.count("trap;") == flags
    # Once when it comes, and in the loop. An addition of zero is a load.
    assert text.count("ld.global.sys.acquire.b32") == 2 * flags
    if flags:
        # Nothing is written before the others have come, and a flag is raised behind what all threads have written.
        before = text[: text.index("st.global.v4")]
        assert before.count("atom.global.sys.release.exch") == before.count("ld.global.sys.acquire") == ranks - 1
        assert "bar.sync" in before[before.rindex("ld.global.sys.acquire") :]
        last = text.rindex("atom.global.sys.release.exch")
        assert "st.global.v4" not in text[text.rindex("bar.sync", 0, last) : last]


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_other_devices_compile(name: str, capability: int) -> None:
    assert ptx(name, 2, COLUMNS[0], capability)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["gather", "side_by_side"])
def test_other_types_and_any_columns_compile(name: str, dtype: str) -> None:
    assert ptx(name, 4, 37, dtype=dtype)
