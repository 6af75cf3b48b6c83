"""Element-wise operations, norms, rotary embedding and sampling on a GPU, as the kernel benchmark checks them."""

import pytest
import torch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("section", ["elementwise", "sampling"])
def test_against_wider_references(section: str) -> None:
    import importlib

    rows = importlib.import_module(f"benchmarks.kernels.{section}").check("cuda")
    assert rows and not [row for row in rows if not row["ok"]]


def test_offsets_past_two_to_the_31() -> None:
    from nanoflow.ops import elementwise_triton, rope_triton, sampling_triton

    table = torch.empty(2**31 // 4096 + 9, 4096, dtype=torch.bfloat16, device=CUDA)
    table[-3:].normal_()
    out = torch.full((2, 4096), torch.nan, dtype=torch.bfloat16, device=CUDA)
    last = len(table) - 1
    elementwise_triton.gather_rows(table, torch.tensor([last, last - 2], device=CUDA), out)
    assert torch.equal(out, table[[last, last - 2]])
    logits = table.flatten()[: 2**31 + 4096 * 8].view(-1, 4096 * 8)
    logits[-1].normal_()
    tokens = torch.full((len(logits),), -1, device=CUDA)
    sampling_triton.argmax(logits, tokens)
    assert tokens[-1] == logits[-1].argmax()
    kv = table.flatten()[: 2**31 + 2 * 128 * 128].view(-1, 2, 1, 128, 128)
    qkv = torch.randn(2, 3 * 128, dtype=torch.bfloat16, device=CUDA)
    index = torch.tensor([len(kv) * 128 - 1, len(kv) * 128 - 7], device=CUDA)
    rope_triton.append(qkv, kv, index, 1, 1, 128)
    assert torch.equal(kv[-1, 0, 0, [127, 121]], qkv[:, 128:256])
    assert torch.equal(kv[-1, 1, 0, [127, 121]], qkv[:, 256:])


def test_the_sampler_waits_for_nothing() -> None:
    """With filters, penalties and bias: no synchronisation but the caller's."""
    import numpy as np

    from benchmarks.kernels.sampling import KINDS, batch
    from nanoflow.ops.batch import PenaltyReset
    from nanoflow.ops.sampling import Sampler

    words = np.arange(5, dtype=np.int32)
    sampler = Sampler(5000, 8, CUDA)
    logits = torch.randn(8, 5000, device=CUDA)
    for name, kind in KINDS.items():
        resets = tuple(PenaltyReset(slot, words, words) for slot in range(8)) if "penalties" in name else ()
        entries = batch(8, kind, resets, bias=4)
        sampler.sample(logits, entries)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler.sample(logits, batch(8, kind, resets, bias=4))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_masked_rows_get_allowed_tokens() -> None:
    """The best allowed one if greedy; rows without a mask get what they get without masks beside them."""
    import numpy as np

    from nanoflow.ops.sampling import Sampler
    from tests.unit.test_sampling import batch, packed

    rng = np.random.default_rng(0)
    rows, vocab = 64, 128256
    logits = torch.randn(rows, vocab, device=CUDA)
    masked = np.arange(0, rows, 2)
    allowed = rng.random((len(masked), vocab)) < rng.choice([1e-4, 0.5], (len(masked), 1))
    allowed[:, -1] = True
    options = {"temperature": np.where(np.arange(rows) % 4 < 2, 0, 1), "top_k": np.where(np.arange(rows) % 8 < 4, 0, 9)}
    sampler = Sampler(vocab, rows, CUDA)
    found = sampler.sample(logits, batch(rows, masks=packed(masked, allowed), **options)).tokens.cpu()
    free = sampler.sample(logits, batch(rows, **options)).tokens.cpu()
    assert torch.equal(found[1::2], free[1::2])
    assert allowed[np.arange(len(masked)), found[masked].numpy()].all()
    best = logits[masked].masked_fill(~torch.from_numpy(allowed).to(CUDA), -torch.inf).argmax(-1).cpu()
    assert torch.equal(found[masked][::2], best[::2])
