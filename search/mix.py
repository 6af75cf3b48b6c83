"""What a dense batch holds, and what a plan's nano-batches get of it."""

from dataclasses import dataclass

from nanoflow.ops.operation import Work
from nanoflow.pipeline.plan import NanoBatch, Plan
from nanoflow.pipeline.split import split_rows

__all__ = ["Mix", "mix_works", "shared_works"]


@dataclass(frozen=True)
class Mix:
    """What a dense batch holds: decode rows, the tokens that each attends to, and the tokens of each prompt."""

    decode: int
    context: int
    prompts: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    """For each prompt, its tokens that earlier batches have computed; empty: all prompts begin here."""

    def __post_init__(self) -> None:
        if self.before and len(self.before) != len(self.prompts):
            raise ValueError(f"before must have a number for each of {len(self.prompts)} prompts, not {self.before}")

    @property
    def starts(self) -> tuple[int, ...]:
        """`before`, with a number for each prompt."""
        return self.before or (0,) * len(self.prompts)

    @property
    def rows(self) -> int:
        return self.decode + sum(self.prompts)

    def __str__(self) -> str:
        parts = [f"{self.decode:,} decode rows of context {self.context:,}"] if self.decode else []
        if self.prompts:
            behind = f" behind {', '.join(f'{tokens:,}' for tokens in self.before)}" if any(self.before) else ""
            parts.append(f"prompts of {', '.join(f'{tokens:,}' for tokens in self.prompts)} tokens{behind}")
        return " and ".join(parts) or "nothing"


def mix_works(plan: Plan, mix: Mix) -> tuple[Work, ...]:
    """What `mix` asks of each nano-batch: prompts lie behind one another, and are cut where a nano-batch is full."""
    decode, prefill = split_rows(plan, mix.decode, sum(mix.prompts))
    works = []
    left = [*zip(mix.prompts, mix.starts, strict=True)][::-1]  # tokens to come, tokens before them
    for rows, room in zip(decode, prefill, strict=True):
        work = Work(decode_rows=rows, decode_context=rows * mix.context)
        while room:
            tokens, before = left.pop()
            taken = min(tokens, room)
            if taken < tokens:
                left.append((tokens - taken, before + taken))
            pairs = taken * before + taken * (taken + 1) // 2
            work += Work(prefill_rows=taken, prefill_context=before + taken, prefill_pairs=pairs)
            room -= taken
        works.append(work)
    return tuple(works)


def shared_works(plan: Plan, work: Work) -> tuple[Work, ...]:
    """`work` of a whole iteration among the nano-batches, by their shares of decode rows and of prefill rows."""

    def part(nano_batch: NanoBatch) -> Work:
        decode, prefill = float(nano_batch.decode), float(nano_batch.prefill)
        return Work(
            decode_rows=round(work.decode_rows * decode),
            prefill_rows=round(work.prefill_rows * prefill),
            decode_context=round(work.decode_context * decode),
            prefill_context=round(work.prefill_context * prefill),
            prefill_pairs=round(work.prefill_pairs * prefill),
        )

    return tuple(map(part, plan.nano_batches))
