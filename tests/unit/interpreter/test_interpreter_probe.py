"""The interpreter itself: a loop over a run-time value, as every kernel here has one."""

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_kernel(x, out, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        total += tl.load(x + start + offsets, mask=start + offsets < count, other=0.0)
    tl.store(out, tl.sum(total))


def test_a_loop_over_a_run_time_value() -> None:
    x = torch.randn(1000)
    out = torch.full((1,), torch.nan)
    _sum_kernel[(1,)](x, out, 1000, BLOCK=64)
    torch.testing.assert_close(out[0], x.sum(), rtol=1e-4, atol=1e-4)
