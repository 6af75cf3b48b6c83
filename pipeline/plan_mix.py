"""The mix of requests that a plan was tuned for, and how far a dense batch is from it."""

from dataclasses import dataclass

__all__ = ["NEAR_MIX", "PlanMix"]

NEAR_MIX = 0.25
"""The largest distance of a dense batch from the mix of a plan that it may take.

As the scheduler forms them for prompts and outputs of one length (512 and 512 tokens, 1,024 and 512, 512 and 1,024; on
an H100 with Llama-3-8B), all batches of the steady state are within 0.21 of their mean, and half of them within 0.06.
The typical batch of another of these jobs is 0.30 away or more. So a job's own plan takes its steady state, and neither
its ramp and tail nor another job's batches run a plan that was not measured on them.
"""


@dataclass(frozen=True)
class PlanMix:
    """What a dense batch holds that the plan was measured on."""

    decode: int
    """Decode rows."""
    prefill: int
    """Prefill rows."""
    context: int
    """Tokens that each decode row attends to, on average."""

    def distance(self, decode: int, prefill: int, tokens: int) -> float:
        """How far a batch is from this, whose decode rows attend to `tokens` tokens in all; 0 is the mix itself.

        The sum of three relative differences: of decode rows and of prefill rows, each over the mix's rows, and of the
        tokens attended to, over the larger of both. Products see no difference between rows of the two kinds, so these
        count alike; tokens are summed, since that is what decode attention reads.
        """
        own = self.decode * self.context
        most = max(own, tokens)
        moved = abs(decode - self.decode) + abs(prefill - self.prefill)
        return moved / max(1, self.decode + self.prefill) + (abs(tokens - own) / most if most else 0.0)

    def __str__(self) -> str:
        decode = f"{self.decode:,} decode rows of context {self.context:,}"
        return f"{decode} and {self.prefill:,} prefill rows" if self.decode else f"{self.prefill:,} prefill rows"
