"""Errors that a user can mend. Each carries one message that names the file, the key or line, the value and the mend.

The command line prints the message alone and exits with status 2; any other exception is a bug and keeps its traceback.
The parts below the engine (`nanoflow.ops`, `nanoflow.pipeline`, `nanoflow.models`) know nothing of this module: they
raise subclasses of ValueError of their own.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "InputError",
    "OutOfMemoryError",
    "OutputError",
    "ParallelError",
    "ParameterError",
    "UserError",
]


class UserError(Exception):
    """A mistake in what the user gave, or a limit of the machine. `str(error)` is the whole message."""


class ConfigError(UserError):
    """A run's YAML, or a `--set` override, is wrong."""


class InputError(UserError, ValueError):
    """A request, a workload file or an argument of the Python API is wrong."""


class ParameterError(InputError):
    """A sampling parameter is wrong: `key` is its name (empty: all of them), `problem` names the value and the mend."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not what the model needs."""


class OutOfMemoryError(UserError):
    """The weights, or the KV pages of a single request, do not fit in memory."""


class OutputError(UserError):
    """A result cannot be written."""


class ParallelError(UserError):
    """A process of the run has ended or hangs, and the run cannot go on without it."""

    mistake: Exception | None = None
    """What that process has raised, if the user can mend it: who hides that there are processes raises this instead."""
