"""The pages and pictures of what was measured say what the records say, and a recorded timeline is read right."""

from typing import Any

import pytest
from PIL import Image

from benchmarks import performance, plots, timeline, whole_tables

KERNELS = [  # of an iteration with two layers: name, microseconds
    ("Memcpy HtoD (Pinned -> Device)", 6),
    ("void where_kernel", 1),
    ("gather_kernel", 5),
    ("norm_kernel", 5),
    ("nvjet_a", 80),
    ("void sin_kernel", 1),
    ("qkv_kernel", 8),
    ("_list_kernel", 2),
    ("_decode_kernel", 600),
    ("prefill_attention_kernel", 15),
    ("nvjet_b", 50),
    ("norm_kernel", 10),
    ("Memset (Unknown)", 1),
    ("nvjet_b", 400),
    ("silu_mul_kernel", 30),
    ("nvjet_b", 200),
    ("add_kernel", 8),
    ("norm_kernel", 5),
    ("_tile_gemm", 90),
    ("qkv_kernel", 8),
    ("_decode_kernel", 620),
    ("_tile_gemm", 50),
    ("norm_kernel", 10),
    ("_tile_gemm", 410),
    ("silu_mul_kernel", 30),
    ("nvjet_b", 200),
    ("add_kernel", 8),
    ("Memcpy DtoD (Device -> Device)", 1),
    ("vectorized_gather_kernel", 3),
    ("norm_kernel", 4),
    ("_tile_gemm", 1000),
    ("argmax_kernel", 60),
    ("index_kernel", 4),
    ("Memcpy DtoH (Device -> Pinned)", 2),
]


@pytest.fixture
def recorded() -> dict[str, Any]:
    """Five such iterations. A gap of 1 us is before each kernel, of 4 behind the memset, of 10 before each iteration;
    300 stand before the first kernel."""
    names = sorted({name for name, _ in KERNELS})
    spans, now, before = [], 0.0, ""
    for number in range(5):
        for name, length in KERNELS:
            first = number == 0 and name == "void where_kernel"
            now += 300 if first else 10 if "HtoD" in name else 4 if "Memset" in before else 1
            spans.append([names.index(name), now, length])
            now, before = now + length, name
    return {"names": names, "spans": spans}


def test_the_pages_are_what_the_records_say() -> None:
    records, used = performance.Records.load(), set()
    for page in performance.PAGES:
        text = page.read_text()
        assert performance.render(text, records) == text, "run python -m benchmarks.performance"
        used |= {match[2] for match in performance.MARKED.finditer(text)}
    assert used == set(performance.PARTS)


def test_an_empty_part_is_filled_and_nothing_else_is_touched() -> None:
    text = "a\n<!-- runs -->\n<!-- end -->\nb\n<!-- claims -->\nold\n<!-- end -->\nc\n"
    made = performance.render(text, performance.Records())
    none = whole_tables.NO_RUNS
    assert made == f"a\n<!-- runs -->\n{none}\n<!-- end -->\nb\n<!-- claims -->\n{none}\n<!-- end -->\nc\n"
    with pytest.raises(KeyError, match="rums"):
        performance.render(text.replace("runs", "rums"), performance.Records())


@pytest.mark.parametrize("name", plots.sources())
def test_pictures_are_drawn_from_the_records(name: str) -> None:
    path = plots.ROOT / "docs" / name
    with Image.open(path) as picture:
        assert picture.info["Source"] == plots.digest(plots.sources()[name][0]), "run python -m benchmarks.plots"
        assert picture.width <= 1100
    assert path.stat().st_size < 150_000
    assert f"]({name})" in performance.PAGE.read_text()


def test_kernels_are_told_apart_by_what_is_before_them(recorded: dict[str, Any]) -> None:
    middle = timeline.iterations(recorded)
    assert len(middle) == 3 and all(len(part) == len(KERNELS) for part in middle)
    assert timeline.microseconds(middle) == pytest.approx(
        {
            "copies": 9, "tables": 2, "embed": 5, "input_layernorm": 10, "qkv": 170, "rope_append": 16,
            "decode_attention": 1222, "prefill_attention": 15, "o": 100, "add_norm": 20, "gate_up": 871, "down": 400,
            "add": 16, "final_norm, lm_head": 1007, "sampling": 64,
        }
    )  # fmt: skip
    kinds = {kind: sum(span.kind == kind for span in middle[0]) for kind in timeline.KINDS}
    assert kinds == {
        "GEMM": 8, "decode attention": 3, "prefill attention": 1, "element-wise": 13, "head, sampling": 5, "copies": 4,
    }  # fmt: skip


def test_gaps_are_counted_between_the_iterations_in_the_middle(recorded: dict[str, Any]) -> None:
    middle = timeline.iterations(recorded)
    inside = len(KERNELS) - 1 + 3  # of an iteration: one before each kernel, three more behind the memset
    found = list(timeline.gaps(middle))
    assert sum(gap.length for gap in found) == pytest.approx(3 * inside + 2 * 10)
    # A kernel that begins while another runs leaves no gap, and one that ends within it ends nothing.
    first = middle[0][0]
    long = timeline.Span(0, 100, "long", "o", "GEMM")
    spans = [long, timeline.Span(10, 20, "short", "o", "GEMM"), timeline.Span(103, 110, "late", "o", "GEMM")]
    assert [(gap.length, gap.before.kernel) for gap in timeline.gaps([spans])] == [(3, "long")]
    assert first.kernel.startswith("Memcpy HtoD")

    said = "\n".join(whole_tables.timeline({"timeline": recorded}))
    iteration = sum(length for _, length in KERNELS) + inside
    share = (3 * inside + 20) / (3 * iteration + 20)
    assert f"idles **{share:.2%}** of the time" in said
    assert "| before and behind a memset | 2 | 5 |" in said
    # index_kernel, 1, tokens 2, 10, metadata 6, 1, where_kernel
    assert "it takes 20 and 20 us" in said and "for 12 and 12 us of it nothing runs" in said


def test_an_iteration_has_its_table(recorded: dict[str, Any]) -> None:
    whole = {
        "iterations": 60, "milliseconds": 2.0, "p10": 1.9, "p90": 2.1, "rows_per_second": 640_000.0, "watts": 690.0,
        "joules": 1.28, "launch_milliseconds": 0.5,
    }  # fmt: skip
    row = {
        "name": "gate_up", "calls": 2, "flops": 3e11, "bytes": 2.8e8, "milliseconds": 0.5, "watts": None,
        "floor_ms": 0.4,
    }  # fmt: skip
    record = {
        "hardware": "a GPU", "rows": 1280, "ceilings": {"tflops": 750.0, "read_gbytes_per_second": 3000.0},
        "timeline": recorded, "operations": [row], "whole": whole,
    }  # fmt: skip
    said = list(whole_tables.iteration(record))
    assert "| gate_up | 2 | 300.00 | 280.0 | 400.0 | 500.0 | 80% | - | 435.5 | 92% | 1.00 | 0.87 |" in said
    assert "| sampling | | | | | | | | | | | 0.06 |" in said
    assert any("640,000 rows/s over 60 iterations, 690 W, 1.3 J, 1.0 mJ a row" in line for line in said)
    del record["timeline"]
    assert "| gate_up | 2 | 300.00 | 280.0 | 400.0 | 500.0 | 80% | - | - | - | 1.00 | - |" in list(
        whole_tables.iteration(record)
    )


def test_runs_are_told_in_their_order_with_what_was_missed() -> None:
    def run(finished: str, met: bool | None, **figures: float) -> dict[str, Any]:
        vllm = {"version": "0.23.0", "total_tokens_per_second": 20_000, "note": ""}
        made = {key: {"median": value} for key, value in figures.items()}
        lengths = {"input_len": {"constant": 512}, "output_len": {"constant": 1}}
        return {
            "finished_at": finished, "requests": 1000, "total_tokens_per_second": 21_000.0, "target": 22_000,
            "target_met": met, "vllm": vllm, "ratio_to_vllm": None if met is None else 1.05, "figures": made,
            "steady_figures": {}, "config": {"workload": {"synthetic": lengths}, "engine": {"order": "input"}},
        }  # fmt: skip

    late = run(
        "2026-11-22T23:00:00+00:00", False, padding_share=0.012, watts=690.0, joules_per_token=0.0284, host_ms=3.3
    )
    early = run("2026-11-22T22:00:00+00:00", None, padding_share=0.0)
    told = list(whole_tables.runs({"late": late, "early": early}))
    assert told[2] == "| early | 11-22 22:00 | 1,000 | 21,000 | 22,000  | 20,000 | - | - | 0.0% | - | - | - | - |"
    assert told[3] == (
        "| late | 11-22 23:00 | 1,000 | 21,000 | 22,000 (missed) | 20,000 | 1.05 | - | 1.2% | - | 690 | 28.4 | 3.3 |"
    )
    claims = list(whole_tables.claims({"late": late}))
    assert claims[2] == "| 1,000: 512 tokens in, 1 out | **21,000** | 20,000 | 1.05 times | 22,000 (missed) |"
