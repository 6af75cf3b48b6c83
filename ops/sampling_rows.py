"""What the sampling kernels are told about each row that needs more than an argmax, packed into one copy.

Shape legend: S rows to sample, R rows described, M masks, W words of a mask, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.ops.batch import SamplingBatch

__all__ = ["ROW", "describe", "mask_of", "unpack_masks"]

ROW = np.dtype(
    [
        ("entry", np.int32),
        ("place", np.int32),
        ("bias_start", np.int32),
        ("bias_stop", np.int32),
        ("top_k", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("floor", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("mask", np.int32),
        ("uniform", np.float64),
        ("unused", np.int64),
    ]
)
"""One row, 16 words: the entry of the chunk whose logits it takes; the place of its penalty counts or -1; its bias
pairs, as positions in pairs of words; top-k or 0; temperature, 0 for greedy; top-p; log of min-p; penalties; the row of
its mask or -1; the random number."""


def describe(
    batch: SamplingBatch,
    entries: NDArray[np.int64],
    first: int,
    places: NDArray[np.int32],
    uniform: NDArray[np.float64],
    vocab: int,
) -> torch.Tensor:
    """Int32 words on the host: a `ROW` for each of `entries` (of the batch, ascending), then their bias pairs.

    Args:
        first: the entry that stands first in the chunk of logits.
        places: of the penalty counts, one each of `entries`, -1 without penalties.
        uniform: one random number each of `entries`.
    """
    rows = np.zeros(len(entries), ROW)
    rows["entry"] = entries - first
    rows["place"] = places
    rows["uniform"] = uniform
    rows["mask"] = -1
    if batch.masks is not None and len(entries):
        rows["mask"] = mask_of(batch, first, int(entries[-1]) + 1)[entries - first]
    rows["temperature"] = batch.temperature[entries]
    rows["top_p"] = batch.top_p[entries]
    top_k = batch.top_k[entries]
    rows["top_k"] = np.where((top_k <= 0) | (top_k >= vocab), 0, top_k)
    rows["floor"] = torch.from_numpy(batch.min_p[entries]).log().numpy()  # log 0 = -inf: off
    rows["repetition"] = batch.repetition_penalty[entries]
    rows["frequency"] = batch.frequency_penalty[entries]
    rows["presence"] = batch.presence_penalty[entries]
    order = np.argsort(batch.bias_entries, kind="stable")
    owners = batch.bias_entries[order]
    start, stop = np.searchsorted(owners, entries), np.searchsorted(owners, entries, side="right")
    lowest = int(start[0]) if len(entries) else 0
    highest = int(stop[-1]) if len(entries) else 0
    base = len(entries) * ROW.itemsize // 8 - lowest
    rows["bias_start"], rows["bias_stop"] = start + base, stop + base
    pairs = np.empty((highest - lowest, 2), np.int32)
    pairs[:, 0] = batch.bias_tokens[order[lowest:highest]]
    pairs[:, 1] = batch.bias_values[order[lowest:highest]].view(np.int32)
    return torch.from_numpy(np.concatenate([rows.view(np.int32), pairs.reshape(-1)]))


def mask_of(batch: SamplingBatch, first: int, stop: int) -> NDArray[np.int32]:
    """For each entry from `first` to `stop`: the row of its mask in `batch.masks`, or -1."""
    rows = np.full(stop - first, -1, np.int32)
    if batch.masks is not None:
        low, high = np.searchsorted(batch.masks.entries, (first, stop))
        rows[batch.masks.entries[low:high] - first] = np.arange(low, high)
    return rows


def unpack_masks(masks_MW: torch.Tensor, vocab: int) -> torch.Tensor:
    """[M, V] bool, whether each token is allowed, of masks with one bit a token."""
    # Byte by byte, the lowest first: the unpacked form never takes more than a byte a token.
    bytes_MB = masks_MW.contiguous().view(torch.uint8).unsqueeze(-1)
    places = torch.arange(8, dtype=torch.uint8, device=masks_MW.device)
    return ((bytes_MB >> places) & 1).flatten(1)[:, :vocab].bool()
