"""The text grid of a schedule: golden pictures, and what holds for any."""

from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.pipeline.grid import CUT, FILLS, Block, Cell, Name, plain, render_grid, render_order
from nanoflow.pipeline.period import render_period
from nanoflow.pipeline.plan import Entry
from nanoflow.pipeline.plan_text import parse_plan

US = 1e-6

LANES = {
    "compute": [
        Cell(Name("o", ".a"), "compute", 0, 30 * US, waits=(Name("decode_attention", ".a"),)),
        Cell(Name("add_norm", ".a"), "memory", 30 * US, 32 * US),
        Cell(Name("down", ".a"), "compute", 32 * US, 90 * US),
        Cell(Name("qkv", ".a@1"), "compute", 90 * US, 100 * US),
    ],
    "memory": [
        Cell(Name("decode_attention", ".b"), "memory", -10 * US, 60 * US),
        Cell(Name("decode_attention", ".a@1"), "memory", 70 * US, 130 * US, waits=(Name("down", ".a"),)),
    ],
}
WIDE = """\
split
  compute |o.a=====================|add_norm.a|down.a=========================================|qkv.a@1=|
          <- decode_attention.a
  memory  …decode_attention.b~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~|       |decode_attention.a@1~~~~~…
                                                                             <- down.a
  us      0                        30         32                     60      70               90     100
blank idle  = compute  ~ memory  <- waits for
"""
NARROW = """\
split
  compute |o.a======|add_norm.a|down.a=============|qkv.a@1|
          <- da.a
  memory  …da.b~~~~~~~~~~~~~~~~~~~~~~~~~|   |da.a@1~~~~~~~~…
                                            <- down.a
  us      0         30         32       60  70     90    100
blank idle  = compute  ~ memory  <- waits for
da decode_attention
"""


@pytest.mark.parametrize(("width", "expected"), [(104, WIDE), (60, NARROW)])
def test_a_period_as_a_grid(width: int, expected: str) -> None:
    drawn = plain(render_grid([Block("split", LANES, 100 * US)], width))
    assert drawn == expected.rstrip("\n"), f"\n{drawn}"


def test_a_marked_cell_stands_out_in_text_and_in_kind() -> None:
    cells = [Cell(Name("o"), "compute", 0, 5 * US, marked=True), Cell(Name("down"), "compute", 5 * US, 10 * US)]
    lines = render_grid([Block("whole", {"main": cells}, 10 * US)], 60)
    assert ">>o<<" in plain(lines)
    assert next(text for line in lines for text, kind in line if kind == "marked").startswith(">>o<<")


def test_a_lane_that_is_too_long_goes_on_below() -> None:
    cells = [Cell(Name("gate_up", f".{n}"), "compute", n * US, (n + 1) * US) for n in range(40)]
    lines = plain(render_grid([Block("whole", {"main": cells}, 40 * US)], 100)).splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line for line in lines if line.startswith("  main")]
    assert len(rows) > 1
    shown = [name for row in rows for name in row.removeprefix("  main").strip().strip("|").split("|")]
    assert [name.rstrip("=") for name in shown] == [f"gu.{n}" for n in range(40)]


def test_a_schedule_without_times() -> None:
    plan = parse_plan(
        "capacity: 8\nnano_batches: {a: {decode: 1, prefill: 1, rows: 8}}\nperiod:\n"
        "- whole: {compute: [o, add_norm], memory: [decode_attention@1]}\n"
    )
    assert render_period(plan.period, {Entry("o")}) == (
        "  whole:\n    compute |>>o<<|add_norm|\n    memory  |decode_attention@1|"
    )
    long = [Cell(Name("rope_append", f".{n}")) for n in range(20)]
    drawn = plain(render_order([Block("whole", {"main": long, "none": []})], 80)).splitlines()
    assert max(map(len, drawn)) <= 80 and len(drawn) > 4
    assert "".join(line[9:].strip("|") + "|" for line in drawn[1:-1]).count("|") == 20


times = st.floats(0.0, 1.0)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """A block of lanes in which no two cells meet, and some reach over the edges."""
    ops = ("o", "qkv", "add_norm", "decode_attention", "input_layernorm", "prefill_attention")
    lanes = {}
    for lane in ("compute", "memory")[: draw(st.integers(1, 2))]:
        edges = sorted(draw(st.lists(times, min_size=2, max_size=8, unique=True)))
        pairs = [(a, b) for a, b in pairwise(edges) if b - a > 1e-3 and draw(st.integers(0, 3))]
        lanes[lane] = [
            Cell(
                Name(draw(st.sampled_from(ops)), ".a"), draw(st.sampled_from(list(FILLS))), 1.4 * a - 0.2, 1.4 * b - 0.2
            )
            for a, b in pairs
            if 1.4 * b - 0.2 > 1e-3 and 1.4 * a - 0.2 < 1 - 1e-3
        ]
    return Block("any", lanes, 1.0)


@settings(max_examples=60, deadline=None)
@given(blocks(), st.integers(60, 160))
def test_any_block_fits_and_keeps_names_and_order(block: Block, width: int) -> None:
    text = plain(render_grid([block], width))
    lines = text.splitlines()
    assert max(map(len, lines)) <= width + 24  # the legend is as long as it is, and so is a note behind a late cell
    legend = {
        letters: op
        for letters, op in (entry.split(" ") for entry in lines[-1].split("  ") if entry.count(" ") == 1)
        if "_" in op
    }
    for lane, cells in block.lanes.items():
        rows = "".join(line.removeprefix(f"  {lane}") for line in lines if line.startswith(f"  {lane}"))
        pieces = [piece.strip(" " + "".join(FILLS.values())) for piece in rows.replace(CUT, "|").split("|")]
        names = [legend.get(name, name) for name in (piece.removesuffix(".a") for piece in pieces) if name]
        # A cell that is cut by a band shows its name in each.
        order = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
        expected = [cell.name.op for cell in cells]
        assert order == [op for op, before in zip(expected, ["", *expected], strict=False) if op != before]
