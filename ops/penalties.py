"""Penalty counts of the slots that use penalties; they live on the device, beside the tokens that they count.

Shape legend: R rows, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.ops.batch import PenaltyReset
from nanoflow.ops.device_arrays import to_device

__all__ = ["PenaltyCounts"]


class PenaltyCounts:
    """How often each token stands in a request's output, and whether in its prompt, for the slots that use
    penalties."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._place: dict[int, int] = {}
        self._free: list[int] = []
        self._output = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def reset(self, resets: tuple[PenaltyReset, ...]) -> None:
        """Rebuilds the counts of the slots named."""
        for reset in resets:
            place = self._place.get(reset.slot)
            if place is None:
                place = self._place[reset.slot] = self._take()
            prompt = to_device(reset.prompt, self._device, torch.int64)
            output = to_device(reset.output, self._device, torch.int64)
            self._prompt[place].zero_().index_fill_(0, prompt, True)
            self._output[place].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def release(self, slots: NDArray[np.int32]) -> None:
        """Frees the counts of slots whose request uses no penalties: their former owner is gone."""
        if self._place:
            for slot in slots.tolist():
                place = self._place.pop(slot, None)
                if place is not None:
                    self._free.append(place)

    def apply(
        self,
        logits_RV: torch.Tensor,
        slots: NDArray[np.int32],
        repetition_R1: torch.Tensor,
        frequency_R1: torch.Tensor,
        presence_R1: torch.Tensor,
    ) -> torch.Tensor:
        """Penalised logits of rows that belong to `slots`."""
        places = self._places(slots)
        output_RV = self._output.index_select(0, places)
        in_output_RV = output_RV > 0
        seen_RV = self._prompt.index_select(0, places) | in_output_RV
        repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
        penalised_RV = torch.where(seen_RV, repeated_RV, logits_RV)
        return penalised_RV - frequency_R1 * output_RV - presence_R1 * in_output_RV

    def count(self, slots: NDArray[np.int32], tokens_R: torch.Tensor) -> None:
        """Adds one sampled token to each slot's output."""
        ones = torch.ones_like(tokens_R, dtype=torch.int32)
        self._output.index_put_((self._places(slots), tokens_R), ones, accumulate=True)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[places, V] uint8, whether a token stands in the prompt; [places, V] int32, how often in the output."""
        return self._prompt.view(torch.uint8), self._output

    def places(self, slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """Row of each slot's counts in `tables`."""
        missing = [slot for slot in slots.tolist() if slot not in self._place]
        if missing:
            raise ValueError(f"slot {missing[0]} uses penalties but no PenaltyReset named it")
        return np.array([self._place[slot] for slot in slots.tolist()], np.int32)

    def _places(self, slots: NDArray[np.int32]) -> torch.Tensor:
        return to_device(self.places(slots), self._device, torch.int64)

    def _take(self) -> int:
        if not self._free:
            have = len(self._output)
            more = max(4, have)
            self._output = torch.cat([self._output, self._output.new_zeros(more, self._vocab_size)])
            self._prompt = torch.cat([self._prompt, self._prompt.new_zeros(more, self._vocab_size)])
            self._free = list(range(have + more - 1, have - 1, -1))
        return self._free.pop()
