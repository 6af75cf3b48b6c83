"""Attention over the paged KV cache, as two operations that write disjoint rows of one value.

`DecodeAttention` is bound by memory (one query row a request, its whole context read); `PrefillAttention` by compute (a
piece of a prompt attends to what came before it and, causally, to itself). With a sliding window of W, a query sees its
own position and the W - 1 before it. Scores are scaled by ``head_dim ** -0.5`` and softmax is computed in float32 or
wider.

Shape legend: T rows, H query heads, K key/value heads, G query heads a key/value head, D head size, L context tokens.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from nanoflow.ops.attention_cpu import decode_blocks, paged_decode, segment_mask, segment_prefill
from nanoflow.ops.operation import KV, Access, Cost, Kernel, NanoContext, Operation, RowClass, Work

__all__ = ["LANE_PROGRAMS", "OTHER_PROGRAMS", "DecodeAttention", "PrefillAttention"]

LANE_PROGRAMS = 5
"""Programs of decode attention on each SM of a lane on sm_90, unless the plan's kernel has another number."""
OTHER_PROGRAMS = {f"triton_{count}": count for count in (2, 3, 6, 8, 4, 7)}
"""Decode attention with so many programs an SM, by the kernel's name, those that have won last. In a lane they leave
memory bandwidth to the products beside it, which the measured choice, nearly the fastest alone, does not. Fewer than
`LANE_PROGRAMS` have two buffers each under way, as those have; more have one each."""


class _Attention(Operation):
    """What both operations share: `windows` holds each layer's sliding window, None for full attention."""

    def __init__(
        self,
        name: str,
        qkv: str,
        target: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        windows: Sequence[int | None],
    ) -> None:
        super().__init__(name)
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads do not divide over {kv_heads} key/value heads")
        self.qkv = qkv
        self.target = target
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.windows = tuple(windows)

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def queries(self, context: NanoContext) -> torch.Tensor:
        """View of the whole batch's queries, [rows, H, D]; the segments' rows are numbered over the whole batch."""
        buffer = context.buffers[self.qkv]
        return torch.unflatten(buffer[:, : self.heads * self.head_dim], -1, (self.heads, self.head_dim))

    def output(self, context: NanoContext) -> torch.Tensor:
        """View of the whole batch's output, [rows, H, D]."""
        return torch.unflatten(context.buffers[self.target], -1, (self.heads, self.head_dim))

    def attend(
        self, q_THD: torch.Tensor, pages: torch.Tensor, length: int, window: int | None, kv: torch.Tensor
    ) -> torch.Tensor:
        """Plain attention of one request: the last T of its `length` tokens are the queries. Returns [T, H, D]."""
        rows, wide = q_THD.shape[0], torch.promote_types(q_THD.dtype, torch.float32)
        used = pages[: -(-length // kv.shape[3])]
        k_KLD, v_KLD = kv[used].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].to(wide)
        q_KGTD = torch.unflatten(q_THD.to(wide), 1, (self.kv_heads, -1)).permute(1, 2, 0, 3)
        scores_KGTL = torch.einsum("kgtd,kld->kgtl", q_KGTD, k_KLD) * self.scale
        query_T1 = torch.arange(length - rows, length, device=kv.device).unsqueeze(-1)
        key_L = torch.arange(length, device=kv.device)
        hidden_TL = key_L > query_T1
        if window is not None:
            hidden_TL |= key_L <= query_T1 - window
        weights_KGTL = scores_KGTL.masked_fill_(hidden_TL, -torch.inf).softmax(-1)
        out_KGTD = torch.einsum("kgtl,kld->kgtd", weights_KGTL, v_KLD)
        return out_KGTD.permute(2, 0, 1, 3).flatten(1, 2)


class DecodeAttention(_Attention):
    """One query row a request over its whole context."""

    resource = "memory"

    @property
    def accesses(self) -> tuple[Access, ...]:
        decode = RowClass.DECODE
        return (Access(self.qkv, decode), Access(KV, decode), Access(self.target, decode, write=True))

    @property
    def row_class(self) -> RowClass:
        return RowClass.DECODE

    def cost(self, work: Work, itemsize: int) -> Cost:
        row = self.heads * self.head_dim
        kv_row = self.kv_heads * self.head_dim
        elements = 2 * work.decode_rows * row + 2 * work.decode_context * kv_row
        return Cost(flops=4.0 * work.decode_context * row, bytes=float(elements * itemsize))

    def reference(self, context: NanoContext) -> None:
        host, part = context.batch.host, context.part
        queries, output = self.queries(context), self.output(context)
        window = self.windows[context.layer]
        for segment in range(part.decode.start, part.decode.stop):
            row, length = int(host.decode_rows[segment]), int(host.decode_context[segment])
            pages = torch.from_numpy(host.decode_pages[segment]).to(context.kv.device, torch.int64)
            output[row] = self.attend(queries[row : row + 1], pages, length, window, context.kv)[0]

    def paged(self, context: NanoContext) -> None:
        """CPU: blocks of pages side by side, joined by their log-sum-exp; see `attention_cpu`."""
        paged_decode(
            context, self.queries(context), self.output(context), self.kv_heads, self.scale, self.windows[context.layer]
        )

    def triton(self, context: NanoContext, programs_per_sm: int | None = None) -> None:
        """GPU: equal stretches of blocks a program; see `decode_attention_triton`."""
        from nanoflow.ops.decode_attention_triton import paged_decode_triton

        paged_decode_triton(
            context,
            self.queries(context),
            self.output(context),
            self.scale,
            self.windows[context.layer],
            programs_per_sm=programs_per_sm,
        )

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        kernels: dict[str, Kernel] = {"reference": self.reference, "paged": self.paged, "triton": self.triton}
        return kernels | {name: partial(self.triton, programs_per_sm=count) for name, count in OTHER_PROGRAMS.items()}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        return ("reference", "paged")

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return {"cpu": "paged", "cuda": "triton"}.get(device.type, "reference")

    def prepare(self, context: NanoContext, kernel: str) -> None:
        """The lists of what is read, one for every window that layers have."""
        if kernel == "triton" or kernel in OTHER_PROGRAMS:
            from nanoflow.ops.decode_attention_triton import prepare_decode

            prepare_decode(context, self.heads, self.windows, programs_per_sm=OTHER_PROGRAMS.get(kernel))
        elif kernel == "paged":
            for window in dict.fromkeys(self.windows):
                decode_blocks(context, self.heads, window)


class PrefillAttention(_Attention):
    """Pieces of prompts, each over the context before it and causally over itself."""

    resource = "compute"

    @property
    def accesses(self) -> tuple[Access, ...]:
        prefill = RowClass.PREFILL
        return (
            Access(self.qkv, prefill),
            Access(KV, prefill, prefix=True),
            Access(self.target, prefill, write=True),
        )

    @property
    def row_class(self) -> RowClass:
        return RowClass.PREFILL

    def cost(self, work: Work, itemsize: int) -> Cost:
        row = self.heads * self.head_dim
        kv_row = self.kv_heads * self.head_dim
        elements = 2 * work.prefill_rows * row + 2 * work.prefill_context * kv_row
        return Cost(flops=4.0 * work.prefill_pairs * row, bytes=float(elements * itemsize))

    def reference(self, context: NanoContext) -> None:
        host, part = context.batch.host, context.part
        queries, output = self.queries(context), self.output(context)
        window = self.windows[context.layer]
        for segment in range(part.prefill.start, part.prefill.stop):
            start, length = int(host.prefill_rows[segment]), int(host.prefill_context[segment])
            rows = slice(start, start + int(host.prefill_lengths[segment]))
            pages = torch.from_numpy(host.prefill_pages[segment]).to(context.kv.device, torch.int64)
            output[rows] = self.attend(queries[rows], pages, length, window, context.kv)

    def gathered(self, context: NanoContext) -> None:
        """Each segment's keys and values gathered, then torch's fused attention; see `attention_cpu`."""
        segment_prefill(
            context, self.queries(context), self.output(context), self.kv_heads, self.scale, self.windows[context.layer]
        )

    def triton(self, context: NanoContext) -> None:
        """GPU: blocks of queries over pages in place; see `prefill_attention_triton`."""
        from nanoflow.ops.prefill_attention_triton import run_prefill_attention

        queries, output = self.queries(context), self.output(context)
        run_prefill_attention(context, queries, output, self.scale, self.windows[context.layer])

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "gathered": self.gathered, "triton": self.triton}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        return ("reference", "gathered")

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        if device.type == "cuda" and dtype.itemsize <= 4 and self.head_dim <= 256:
            return "triton"
        return "gathered" if device.type == "cpu" else "reference"

    def prepare(self, context: NanoContext, kernel: str) -> None:
        """The list of blocks of queries or the masks, for every window that layers have."""
        if kernel == "triton":
            from nanoflow.ops.prefill_attention_triton import prepare_prefill

            prepare_prefill(context, self.heads, self.windows)
        elif kernel == "gathered":
            for window in dict.fromkeys(self.windows):
                for segment in range(context.part.prefill.start, context.part.prefill.stop):
                    segment_mask(context, segment, window)
