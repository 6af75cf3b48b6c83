"""The sampling kernels through the interpreter: the sampler's own tests, and the PyTorch path's tokens."""

from functools import partial

import numpy as np
import pytest
import torch

from nanoflow.ops import sampling_triton
from nanoflow.ops.batch import PenaltyReset
from nanoflow.ops.sampling import Sampler
from tests.unit import test_sampling as cases
from tests.unit.test_sampling import (  # noqa: F401
    test_extreme_parameters_give_a_possible_token,
    test_logprobs_are_of_the_raw_logits,
    test_masked_rows_get_allowed_tokens_and_the_others_what_they_had,
    test_masks_may_come_after_the_logits,
    test_penalty_counts_follow_the_sampled_tokens,
    test_random_rows_match_the_plain_sampler,
    test_rebuilt_counts_equal_counts_kept_on_the_device,
    test_slots_share_counts_with_nobody_and_are_reused,
    test_tokens_do_not_depend_on_the_rest_of_the_batch,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "Sampler", partial(Sampler, kernels="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 5000, 16384])
@pytest.mark.parametrize("parts", [1, 3, None])
def test_argmax_is_torchs(vocab: int, parts: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab + 5).to(dtype)[:, :vocab]
    logits[1] = 0.5  # all equal
    logits[2] = -torch.inf
    logits[3, vocab // 2 :] = 9.0  # ties over many parts
    logits[4, vocab // 3] = torch.nan
    out = torch.full((6,), -7)
    sampling_triton.argmax(logits, out, parts=parts, block=1024)
    assert torch.equal(out, logits.argmax(-1))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in ("top_p", "top_k", "both", "min_p", "plain")] + [("both", torch.float16)],
)
def test_tokens_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(len(kind))
    rows, vocab = 12, 6000
    logits = torch.from_numpy(rng.normal(0, rng.choice([0.1, 1, 3], (rows, 1)), (rows, vocab))).to(dtype)
    history = rng.integers(0, vocab, (rows, 40)).astype(np.int32)
    penalised = np.arange(rows) % 3 == 0
    options = {
        "temperature": rng.choice([0.2, 1, 1.5], rows),
        "seeds": rng.integers(0, 2**63, rows),
        "positions": rng.integers(0, 99, rows),
        "repetition_penalty": np.where(penalised, 1.3, 1),
        "frequency_penalty": np.where(penalised, 0.3, 0),
        "top_p": rng.choice([0.3, 0.9, 0.99], rows) if kind in ("top_p", "both") else 1,
        "top_k": rng.choice([2, 40, 1500], rows) if kind in ("top_k", "both") else 0,
        "min_p": rng.choice([0.01, 0.5], rows) if kind == "min_p" else 0,
    }
    resets = tuple(PenaltyReset(slot, history[slot, :20], history[slot, 20:]) for slot in np.flatnonzero(penalised))
    entries = cases.batch(rows, ((0, 5, 4.0), (0, 5, -1.0), (3, 9, -100.0), (7, 1, 2.0)), resets, **options)
    found, wanted = (
        Sampler(vocab, rows, CPU, kernels).sample_chunks(entries, lambda part: logits[part], 5).tokens
        for kernels in ("triton", "reference")
    )
    assert torch.equal(found, wanted)
    assert len(wanted.unique()) > rows // 3


def test_rows_that_are_left_out() -> None:
    """A captured graph has room for more rows than it is given: an entry of -1 is skipped."""
    logits, out = torch.randn(3, 50), torch.full((3,), -7)
    rows = torch.zeros(2, 16, dtype=torch.int32)
    rows[:, 0] = torch.tensor([2, -1])
    rows[:, 1] = -1
    nothing = torch.zeros(0, 50, dtype=torch.uint8), torch.zeros(0, 50, dtype=torch.int32)
    sampling_triton.sample_rows(logits, rows, 2, *nothing, out)
    assert out.tolist() == [-7, -7, int(logits[2].argmax())]
