"""Sampling: from logits to tokens, on the device that holds them.

Contract: a row's token depends on its logits, its parameters, its seed and its output position, and on nothing else of
the batch. Nothing here waits for the device on a GPU; the only arrays that travel are the batch's own, from host to
device. A batch with masks is waited for on the host (`TokenMasks.ready`), after the first logits are on their way.

Order of steps for a row (vLLM's): log-probabilities of the raw logits if asked; logit bias; repetition, frequency and
presence penalties; the mask of allowed tokens, if it has one (the others become -inf); then for temperature 0 the
argmax, else temperature, min-p, top-k, top-p, and one draw.

- Repetition penalty (Keskar et al. 2019, arXiv 1909.05858) counts prompt and output, the other two the output only.
- Top-p (Holtzman et al. 2019, arXiv 1904.09751) takes its mass over what min-p and top-k left. Tokens tied with the
  last one kept are kept too, so that the result does not depend on how ties are sorted.
- The draw inverts the cumulative distribution in the order of token ids, at one uniform number a row from
  Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key = the request's seed, counter =
  output position.

Shape legend: S rows to sample, R some of those rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.ops.batch import SamplingBatch, StepOutput
from nanoflow.ops.device_arrays import to_device
from nanoflow.ops.penalties import PenaltyCounts
from nanoflow.ops.sampling_rows import describe, mask_of, unpack_masks

__all__ = ["NOTHING_SAMPLED", "Sampler", "StepTensors", "philox_uniform"]


@dataclass(frozen=True, eq=False)
class StepTensors:
    """What was sampled, on the device; fields as in `StepOutput`. Rows that asked for no log-probabilities hold NaN."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def start_copy(self) -> "StepTensors":
        """The same in the host's pinned memory: there once the device has come so far on the current stream."""

        def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None or tensor.device.type != "cuda":
                return tensor
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

        tokens = copy(self.tokens)
        assert tokens is not None
        return StepTensors(tokens, copy(self.logprobs), copy(self.top_tokens), copy(self.top_logprobs))

    def to_host(self) -> StepOutput:
        """Waits for the device and copies."""

        def array(tensor: torch.Tensor | None, dtype: type[np.generic]) -> NDArray | None:  # type: ignore[type-arg]
            return None if tensor is None else tensor.cpu().numpy().astype(dtype)

        return StepOutput(
            tokens=self.tokens.cpu().numpy().astype(np.int32),
            logprobs=array(self.logprobs, np.float32),
            top_tokens=array(self.top_tokens, np.int32),
            top_logprobs=array(self.top_logprobs, np.float32),
        )


NOTHING_SAMPLED = StepTensors(torch.zeros(0, dtype=torch.int64))


def philox_uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int32]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): the first 53 bits of Philox4x32-10's block."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    zeros = np.zeros(len(seeds), np.uint64)
    words = [positions.astype(np.uint64) & low, zeros, zeros, zeros]
    key = [seeds.astype(np.uint64) & low, seeds.astype(np.uint64) >> half]
    for _ in range(10):
        first = words[0] * np.uint64(0xD2511F53)
        second = words[2] * np.uint64(0xCD9E8D57)
        words = [(second >> half) ^ words[1] ^ key[0], second & low, (first >> half) ^ words[3] ^ key[1], first & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    bits = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


class Sampler:
    """Samples batches and keeps what the next one needs: each slot's last token, and penalty counts where in use.

    Args:
        kernels: `reference` is plain PyTorch, `triton` the kernels of `sampling_triton`; by default the latter on a
            CUDA device. Log-probabilities are PyTorch in both.
    """

    def __init__(
        self,
        vocab_size: int,
        slots: int,
        device: torch.device,
        kernels: Literal["reference", "triton"] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.kernels = kernels or ("triton" if device.type == "cuda" else "reference")
        self.last_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        """[slots] the token that each slot sampled last."""
        self._penalties = PenaltyCounts(vocab_size, device)

    def sample(self, logits_SV: torch.Tensor, batch: SamplingBatch) -> StepTensors:
        """Samples every entry of `batch` from its row of `logits_SV`, which stays as it is."""
        return self.sample_chunks(batch, lambda rows: logits_SV[rows], max(len(batch), 1))

    def sample_chunks(
        self,
        batch: SamplingBatch,
        logits: Callable[[slice], torch.Tensor],
        chunk: int,
        slots_S: torch.Tensor | None = None,
    ) -> StepTensors:
        """As `sample`, with at most `chunk` rows of logits at a time.

        Args:
            logits: gives those of a slice of entries; the next call may overwrite them.
            slots_S: ``batch.slots`` on the device, int64, if it is there already.
        """
        self._penalties.reset(batch.penalty_resets)
        widest = int(batch.logprobs.max(initial=-1))
        parts = []
        masks_MW = None
        for start in range(0, len(batch), chunk):
            rows = slice(start, min(start + chunk, len(batch)))
            logits_SV = logits(rows)
            if batch.masks is not None and masks_MW is None:
                masks_MW = self._tensor(batch.masks.ready.result(), torch.int32)
            parts.append(self._sample(logits_SV, batch, rows, widest, masks_MW))
        if not parts:
            return StepTensors(torch.zeros(0, dtype=torch.int64, device=self.device))
        tokens = torch.cat([part.tokens for part in parts]) if len(parts) > 1 else parts[0].tokens
        slots_S = self._tensor(batch.slots, torch.int64) if slots_S is None else slots_S
        self.last_tokens.index_copy_(0, slots_S, tokens)
        if widest < 0:
            return StepTensors(tokens)
        return StepTensors(
            tokens,
            torch.cat([part.logprobs for part in parts if part.logprobs is not None]),
            torch.cat([part.top_tokens for part in parts if part.top_tokens is not None]),
            torch.cat([part.top_logprobs for part in parts if part.top_logprobs is not None]),
        )

    def _tensor(self, array: NDArray, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[type-arg]
        return to_device(array, self.device, dtype)

    def _sample(
        self,
        logits_SV: torch.Tensor,
        batch: SamplingBatch,
        rows: slice,
        widest: int,
        masks_MW: torch.Tensor | None,
    ) -> StepTensors:
        """One chunk: entries `rows` of the batch; `logits_SV` holds their logits only."""
        penalised = (
            (batch.repetition_penalty[rows] != 1)
            | (batch.presence_penalty[rows] != 0)
            | (batch.frequency_penalty[rows] != 0)
        )
        random = batch.temperature[rows] > 0
        changed = random | penalised
        biased = (batch.bias_entries >= rows.start) & (batch.bias_entries < rows.stop)
        changed[batch.bias_entries[biased] - rows.start] = True
        changed[mask_of(batch, rows.start, rows.stop) >= 0] = True
        self._penalties.release(batch.slots[rows][~penalised])

        if self.kernels == "triton" and logits_SV.dtype != torch.float64:
            tokens_S = self._sample_triton(logits_SV, batch, rows, changed, penalised, masks_MW)
        elif not changed.any():
            tokens_S = logits_SV.argmax(-1)
        else:
            tokens_S = self._sample_changed(logits_SV, batch, rows, changed, penalised, biased, masks_MW)
        if widest < 0:
            return StepTensors(tokens_S)
        return self._log_probabilities(logits_SV, tokens_S, batch.logprobs[rows], widest)

    def _sample_triton(
        self,
        logits_SV: torch.Tensor,
        batch: SamplingBatch,
        rows: slice,
        changed: NDArray[np.bool_],
        penalised: NDArray[np.bool_],
        masks_MW: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens of a chunk: an argmax of every row, then the rows in which something else was asked."""
        from nanoflow.ops import sampling_triton

        tokens_S = torch.empty(len(logits_SV), dtype=torch.int64, device=self.device)
        if not changed.all():
            sampling_triton.argmax(logits_SV, tokens_S)
        if changed.any():
            index = np.flatnonzero(changed)
            entries = index + rows.start
            places = np.full(len(index), -1, np.int32)
            places[penalised[index]] = self._penalties.places(batch.slots[entries[penalised[index]]])
            uniform = philox_uniform(batch.seeds[entries], batch.positions[entries])
            words = describe(batch, entries, rows.start, places, uniform, self.vocab_size)
            about = self._tensor(words.numpy(), torch.int32)
            sampling_triton.sample_rows(logits_SV, about, len(index), *self._penalties.tables, tokens_S, masks=masks_MW)
        return tokens_S

    def _sample_changed(
        self,
        logits_SV: torch.Tensor,
        batch: SamplingBatch,
        rows: slice,
        changed: NDArray[np.bool_],
        penalised: NDArray[np.bool_],
        biased: NDArray[np.bool_],
        masks_MW: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens of a chunk in which some rows are more than an argmax."""
        index = np.flatnonzero(changed)
        index_R = self._tensor(index, torch.int64)
        work_RV = logits_SV.index_select(0, index_R).float()
        place = np.cumsum(changed) - 1
        if biased.any():
            entries = self._tensor(place[batch.bias_entries[biased] - rows.start], torch.int64)
            tokens = self._tensor(batch.bias_tokens[biased], torch.int64)
            work_RV.index_put_((entries, tokens), self._tensor(batch.bias_values[biased], torch.float32), True)
        penalty_index = index[penalised[index]] + rows.start
        where = self._tensor(place[penalty_index - rows.start], torch.int64)
        if len(penalty_index):
            values = (batch.repetition_penalty, batch.frequency_penalty, batch.presence_penalty)
            strengths = [self._tensor(value[penalty_index], torch.float32).unsqueeze(-1) for value in values]
            chosen = work_RV.index_select(0, where)
            work_RV.index_copy_(0, where, self._penalties.apply(chosen, batch.slots[penalty_index], *strengths))

        if masks_MW is not None:
            mask = mask_of(batch, rows.start, rows.stop)[index]
            masked = np.flatnonzero(mask >= 0)
            where_masked = self._tensor(masked, torch.int64)
            allowed = unpack_masks(masks_MW.index_select(0, self._tensor(mask[masked], torch.int64)), self.vocab_size)
            kept = work_RV.index_select(0, where_masked).masked_fill_(~allowed, -torch.inf)
            work_RV.index_copy_(0, where_masked, kept)

        random = batch.temperature[rows][index] > 0
        if not random.all():
            tokens_R = work_RV.argmax(-1)
            if random.any():
                draw = self._tensor(np.flatnonzero(random), torch.int64)
                tokens_R.index_copy_(
                    0, draw, self._draw(work_RV.index_select(0, draw), batch, index[random] + rows.start)
                )
        else:
            tokens_R = self._draw(work_RV, batch, index + rows.start)
        if len(penalty_index):
            self._penalties.count(batch.slots[penalty_index], tokens_R.index_select(0, where))
        if len(index) == len(changed):
            return tokens_R
        return logits_SV.argmax(-1).index_copy_(0, index_R, tokens_R)

    def _draw(self, logits_RV: torch.Tensor, batch: SamplingBatch, entries: NDArray[np.int64]) -> torch.Tensor:
        """One random token a row; `logits_RV` is overwritten."""

        def column(array: NDArray[np.float32]) -> torch.Tensor:
            return self._tensor(array[entries], torch.float32).unsqueeze(-1)

        # The largest becomes 0 before the division, so that no temperature, however low, overflows.
        scaled_RV = logits_RV.sub_(logits_RV.amax(-1, keepdim=True)).div_(column(batch.temperature))
        if (batch.min_p[entries] > 0).any():
            scaled_RV.masked_fill_(scaled_RV < column(batch.min_p).log(), -torch.inf)
        top_k, top_p = batch.top_k[entries].astype(np.int64), batch.top_p[entries]
        top_k = np.where((top_k <= 0) | (top_k > self.vocab_size), self.vocab_size, top_k)
        filtered = np.flatnonzero((top_k < self.vocab_size) | (top_p < 1))
        if len(filtered):
            index = self._tensor(filtered, torch.int64)
            chosen = scaled_RV.index_select(0, index)
            lowest = self._lowest_kept(chosen, top_k[filtered], top_p[filtered])
            scaled_RV.index_copy_(0, index, chosen.masked_fill_(chosen < lowest, -torch.inf))
        cumulative_RV = scaled_RV.exp_().cumsum(-1, dtype=torch.float64)
        uniform = philox_uniform(batch.seeds[entries], batch.positions[entries])
        target_R1 = self._tensor(uniform, torch.float64).unsqueeze(-1) * cumulative_RV[:, -1:]
        # The first token whose cumulative mass passes the target: never one without mass of its own.
        return torch.searchsorted(cumulative_RV, target_R1, right=True).squeeze(-1).clamp_(max=self.vocab_size - 1)

    def _lowest_kept(
        self, scaled_RV: torch.Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float32]
    ) -> torch.Tensor:
        """[R, 1] the smallest value that top-k, then top-p, keep; the largest value of each row is 0."""
        vocab = self.vocab_size
        limited = top_k < vocab
        k_R1 = self._tensor(top_k, torch.int64).unsqueeze(-1)
        p_R1 = self._tensor(top_p, torch.float64).unsqueeze(-1)
        whole_R1 = None if limited.all() else scaled_RV.exp().sum(-1, keepdim=True, dtype=torch.float64)
        # A row without top-k may need many of the largest values before they hold its mass. On a CPU a few are sorted,
        # and more only if they do not suffice; on a GPU looking would mean waiting, so all are sorted at once.
        width = int(top_k[limited].max(initial=0))
        if not limited.all():
            width = max(width, min(vocab, 256)) if self.device.type == "cpu" else vocab
        while True:
            values = scaled_RV.topk(width, dim=-1, sorted=True).values
            place = torch.arange(width, device=self.device)
            mass = values.exp().to(torch.float64).masked_fill_(place >= k_R1, 0.0)
            cumulative = mass.cumsum(-1)
            total_R1 = cumulative[:, -1:]
            if whole_R1 is not None:
                total_R1 = torch.where(k_R1 < vocab, total_R1, whole_R1)
            if width == vocab or self.device.type != "cpu" or limited.all():
                break
            if bool(((cumulative[:, -1:] >= p_R1 * total_R1) | (k_R1 < vocab)).all()):
                break
            width = min(vocab, width * 8)
        kept_R1 = ((cumulative - mass < p_R1 * total_R1) & (place < k_R1)).sum(-1, keepdim=True).clamp_(min=1)
        return values.gather(-1, kept_R1 - 1)

    def _log_probabilities(
        self, logits_SV: torch.Tensor, tokens_S: torch.Tensor, wanted: NDArray[np.int32], widest: int
    ) -> StepTensors:
        """Log-probabilities of the sampled tokens and the `widest` most likely ones, for the rows that want them."""
        rows = len(wanted)
        logprobs_S = torch.full((rows,), torch.nan, device=self.device)
        top_tokens = torch.full((rows, widest), -1, dtype=torch.int64, device=self.device)
        top_logprobs = torch.full((rows, widest), torch.nan, device=self.device)
        index = np.flatnonzero(wanted >= 0)
        if len(index):
            index_R = self._tensor(index, torch.int64)
            raw_RV = logits_SV.index_select(0, index_R).float()
            normaliser_R1 = raw_RV.logsumexp(-1, keepdim=True)
            sampled_R1 = raw_RV.gather(-1, tokens_S.index_select(0, index_R).unsqueeze(-1)) - normaliser_R1
            logprobs_S.index_copy_(0, index_R, sampled_R1.squeeze(-1))
            if widest:
                values, tokens = raw_RV.topk(min(widest, self.vocab_size), dim=-1)
                top_tokens[index_R, : tokens.shape[-1]] = tokens
                top_logprobs[index_R, : tokens.shape[-1]] = values - normaliser_R1
        return StepTensors(tokens_S, logprobs_S, top_tokens, top_logprobs)
