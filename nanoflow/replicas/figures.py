"""What one replica did, as the report has it."""

from dataclasses import dataclass

__all__ = ["ReplicaFigures"]


@dataclass(frozen=True)
class ReplicaFigures:
    """One replica's part of a run."""

    replica: int
    """From 0."""
    completed: int
    errors: int
    output_tokens: int
    """That its iterations made, those of requests that it did not finish included."""
    iterations: int
    rows: int
    """Of all its dense batches, padding left out."""
    busy_share: float
    """Share of the run's time in which its executor ran an iteration."""
    load_seconds: float | None
    """None if it never came to be."""
    steady: dict[str, float | None] | None
    """Its steady state, with the names that `nanoflow bench` gives the figures; None if it had none."""
    lost: str | None
    """How it was lost; None if it went on to the end."""

    def text(self) -> str:
        """A line of it, for people."""
        errors = f" and {self.errors:,} with errors" if self.errors else ""
        tokens = f"{self.output_tokens:,} output tokens in {self.iterations:,} iterations"
        lost = f"; lost: {self.lost}" if self.lost is not None else ""
        return f"{self.completed:,} requests{errors}, {tokens}, {self.busy_share:.0%} of the time busy{lost}"
