"""Sampling with several ranks: rank 0 samples, and every rank gets its tokens.

All ranks compute the head (each its part of the vocabulary). Rank 0 alone has masks, penalties and log-probabilities;
its tokens are broadcast, and the others put them where the next iteration's rows look for them. So the ranks go on with
the same tokens even if a rounding made their logits differ.
"""

from collections.abc import Callable

import torch

from nanoflow.ops.batch import SamplingBatch
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.sampling import Sampler, StepTensors

__all__ = ["sample_on_rank"]


def sample_on_rank(
    sampler: Sampler,
    communicator: Communicator | None,
    batch: SamplingBatch,
    logits: Callable[[slice], torch.Tensor],
    chunk: int,
    slots_S: torch.Tensor,
) -> StepTensors:
    """What `Sampler.sample_chunks` gives, on the only rank or on rank 0; on the others the tokens alone.

    Args:
        logits: of a slice of entries, computed by all ranks together: every rank asks for the same slices in turn.
        chunk: the most entries of a slice.
        slots_S: ``batch.slots`` on the device, int64.
    """
    if communicator is None:
        return sampler.sample_chunks(batch, logits, chunk, slots_S)
    if communicator.rank == 0:
        sampled = sampler.sample_chunks(batch, logits, chunk, slots_S)
        communicator.broadcast(sampled.tokens)
        return sampled
    for start in range(0, len(batch), chunk):
        logits(slice(start, min(start + chunk, len(batch))))
    tokens_S = torch.empty(len(batch), dtype=torch.int64, device=sampler.device)
    communicator.broadcast(tokens_S)
    sampler.last_tokens.index_copy_(0, slots_S, tokens_S)
    return StepTensors(tokens_S)
