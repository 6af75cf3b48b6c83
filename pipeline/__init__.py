"""From nano-batches to a plan, its validation and its execution."""
