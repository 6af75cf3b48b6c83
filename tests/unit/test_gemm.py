"""GEMM's interface without a GPU: what it computes, what it refuses, how it cuts tiles, and the stored choices."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nanoflow.ops.gemm import matmul, unavailable
from nanoflow.ops.gemm_choice import Choice, Choices, choice_file, choose, stored_choices
from nanoflow.ops.gemm_config import SILU_TILES, TILES, GemmConfig, Split, candidates, default_config
from nanoflow.ops.linear import Linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "sms": 132, "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_the_library_path_computes_the_formula(bias: bool, silu: bool, rows: int) -> None:
    x, w = torch.randn(rows, 40), torch.randn(24, 40)
    b = torch.randn(24) if bias else None
    out = matmul(x, w, torch.full((rows, 12 if silu else 24), torch.nan), bias=b, silu=silu)
    expected = functional.linear(x, w, b)
    if silu:
        expected = functional.silu(expected[:, :12]) * expected[:, 12:]
    torch.testing.assert_close(out, expected)


def test_a_kernel_that_cannot_run_says_why() -> None:
    x, w, out = torch.randn(4, 8), torch.randn(16, 8), torch.empty(4, 16)
    assert unavailable("cublas", x, w, out) is None
    assert "rows must be contiguous" in str(unavailable("triton", x, w.t().contiguous().t(), out))
    assert "float64" in str(unavailable("triton", x.double(), w.double(), out.double()))
    assert "there are cublas, triton, deep_gemm" in str(unavailable("cutlass", x, w, out))
    with pytest.raises(ValueError, match="deep_gemm"):
        matmul(x, w, out, kernel="deep_gemm")


def test_the_linear_names_its_kernels() -> None:
    linear = Linear("o", "attention", "o", 8, [16], ["o_proj"])
    assert set(linear.kernels) == {"reference", "onednn", "measured", "cublas", "triton", "deep_gemm"}
    assert linear.preferred_kernel(CPU, torch.float32) == "onednn"


@pytest.mark.parametrize("config", TILES + SILU_TILES, ids=str)
def test_a_config_reads_back_and_names_itself(config: GemmConfig) -> None:
    assert GemmConfig(**config.to_dict()) == config
    assert len({str(other) for other in TILES}) == len(TILES)


@pytest.mark.parametrize("silu", [False, True])
def test_every_shape_has_candidates_and_a_default(silu: bool) -> None:
    sizes = itertools.product([1, 64, 640, 1280, 2048], [(6144, 4096), (4096, 14336), (128256, 4096)], [32, 100, 132])
    for rows, (columns, inputs), sms in sizes:
        found = candidates(rows, columns, inputs, sms, silu=silu)
        assert found and len(set(found)) == len(found)
        for dtype in (torch.bfloat16, torch.float32):
            for tma in (True, False):
                config = default_config(rows, columns, inputs, sms, dtype, tma=tma)
                assert config.tiles(rows, columns) > (0, 0)


def test_tiles_cover() -> None:
    config = GemmConfig(128, 256)
    assert config.tiles(640, 6144) == (5, 24) and config.tiles(641, 6145) == (6, 25)
    assert GemmConfig(128, 128, 32).tiles(640, 4096) == (5, 26)
    assert GemmConfig(128, 128).tiles(640, 28672, silu=True) == (5, 112)


def test_only_the_tiles_of_an_unfilled_round_are_split() -> None:
    config = GemmConfig(128, 256, split=True)
    assert config.split_tiles(264, 64, 132) is None
    assert GemmConfig(128, 256).split_tiles(120, 64, 132) is None
    assert config.split_tiles(80, 4, 132) is None  # nothing to gain from less than a pipeline's depth
    assert config.split_tiles(119, 64, 132) is None  # nearly full: handing sums over costs more than it gains
    fits = config.split_tiles(33, 240, 132)
    assert fits == Split(tiles=33, pieces=4, length=60, tail=0, helpers=0)
    assert config.split_tiles(560, 64, 132) == Split(tiles=560 - 4 * 132, pieces=2, length=32, tail=0, helpers=0)
    helped = config.split_tiles(80, 224, 132)
    assert helped is not None and helped.helpers == 52 and helped.pieces == 1
    assert 140 < helped.length < 170 and helped.length + helped.tail == 224


@pytest.mark.parametrize("sms", [1, 7, 100, 132])
@pytest.mark.parametrize("ctas_per_sm", [1, 2])
def test_the_pieces_of_a_split_cover_every_step_once(sms: int, ctas_per_sm: int) -> None:
    config = GemmConfig(128, 256, split=True, ctas_per_sm=ctas_per_sm)
    for tiles in range(1, 400):
        for steps in (1, 4, 9, 64, 224):
            split = config.split_tiles(tiles, steps, sms)
            if split is None:
                continue
            assert split.programs <= sms * ctas_per_sm
            assert split.tiles * split.pieces <= sms * ctas_per_sm  # slots of the workspace
            assert (split.pieces - 1) * split.length < steps  # no CTA that its owner waits for has nothing to do
            assert split.partials
            if split.helpers:
                assert split.pieces * split.length + split.tail == steps and 1 <= split.helpers <= split.tiles
            else:
                assert split.pieces * split.length >= steps and not split.tail


def make_choices() -> Choices:
    choices = Choices(H100)
    stream = Choice("triton", GemmConfig(128, 256, stages=4, split=True), 0.03, 0.04)
    choices.add(640, 4096, 4096, 100, torch.bfloat16, stream)
    choices.add(1280, 4096, 4096, 100, torch.bfloat16, Choice("cublas", None, 0.06, 0.06))
    choices.add(640, 28672, 4096, 132, torch.bfloat16, stream, silu=True)
    return choices


def test_choices_read_back(tmp_path: Path) -> None:
    path = choice_file(tmp_path / "gemm", str(H100["gpu"]))
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    make_choices().save(path)
    assert Choices.load(path, H100) == make_choices()


def test_a_choice_is_found_by_the_next_larger_number_of_rows() -> None:
    choices, bf16 = make_choices(), torch.bfloat16
    small, large = (choices.find(rows, 4096, 4096, 100, bf16) for rows in (640, 1280))
    assert small != large
    assert choices.find(321, 4096, 4096, 100, bf16) == small
    assert choices.find(320, 4096, 4096, 100, bf16) is None
    assert choices.find(641, 4096, 4096, 100, bf16) == choices.find(9999, 4096, 4096, 100, bf16) == large
    assert choices.find(640, 4096, 4096, 132, bf16) is None
    assert choices.find(640, 4096, 4096, 100, torch.float16) is None
    assert choices.find(640, 28672, 4096, 132, bf16) is None
    assert choices.find(640, 28672, 4096, 132, bf16, silu=True) is not None
    assert choices.knows(4096, 4096, bf16) and not choices.knows(4096, 14336, bf16)


def test_a_part_without_a_choice_takes_the_nearest_that_is_still_right() -> None:
    choices, bf16 = Choices(H100), torch.bfloat16
    shape = (6144, 4096)
    deep, library = Choice("deep_gemm", None, 1.0, 1.0), Choice("cublas", None, 1.0, 1.0)
    own = Choice("triton", GemmConfig(128, 256), 1.0, 1.0)  # of 640 rows: 5 x 24 tiles
    choices.add(640, *shape, 132, bf16, library)
    choices.add(640, *shape, 100, bf16, own)
    assert choices.find(640, *shape, 92, bf16) == own  # two rounds on either
    assert choices.find(640, *shape, 60, bf16) == own
    assert choices.find(640, *shape, 56, bf16) is None  # three
    assert choices.find(640, *shape, 120, bf16) is None  # one, and cuBLAS is not confined
    assert choices.find(640, *shape, 132, bf16) == library
    choices.add(640, *shape, 84, bf16, deep)
    assert choices.find(640, *shape, 96, bf16) == own and choices.find(640, *shape, 88, bf16) == deep
    assert choices.find(640, *shape, 24, bf16) == deep
    choices.add(1280, *shape, 116, bf16, deep)
    assert choices.find(1280, *shape, 116, bf16) == deep
    assert choices.find(640, *shape, 116, bf16) == own  # nothing was measured there for so few rows


@pytest.mark.parametrize("name", ["gpu", "sms", "torch", "cuda", "triton"])
def test_choices_of_another_machine_are_refused(tmp_path: Path, name: str) -> None:
    make_choices().save(tmp_path / "a.json")
    with pytest.raises(ValueError, match=f"measured with {name} .* here it is 'other'; measure again"):
        Choices.load(tmp_path / "a.json", {**H100, name: "other"})


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 9, "machine": {}}'])
def test_damaged_choices_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"a\.json"):
        Choices.load(path, H100)
    make_choices().save(path)
    content = json.loads(path.read_text())
    content["choices"][0]["config"] = {"block_q": 3}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        Choices.load(path, H100)


def test_a_cpu_has_no_stored_choices() -> None:
    assert stored_choices(CPU).find(1, 1, 1, 1, torch.float32) is None


def test_the_fastest_of_the_finalists_is_chosen() -> None:
    times = {"cublas": 4.0, "a": 2.0, "b": 3.0, "c": 5.0}
    asked: list[set[str]] = []

    def timer(calls, seconds):  # type: ignore[no-untyped-def]
        asked.append(set(calls))
        return {name: times[name] - (1.5 if name == "b" and len(asked) == 2 else 0) for name in calls}

    kernels = {
        name: (Choice("cublas" if name == "cublas" else "triton", None, 0.0, 0.0), lambda: None) for name in times
    }
    assert choose(kernels, timer, finalists=2) == Choice("triton", None, 1.5, 4.0)
    assert asked == [set(times), {"a", "b", "cublas"}]
    times["cublas"] = 0.5
    asked.clear()
    assert choose(kernels, timer, finalists=2, part=True) == Choice("triton", None, 2.0, 0.5)
