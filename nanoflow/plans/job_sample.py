"""The requests that stand for a job where its scheduler is rehearsed: lengths and arrivals, no text.

Contract: the sample is the beginning of the workload, so much of it as keeps the scheduler busy for `iterations`, at
most `MOST_REQUESTS`. These are `LEAST_ITERATIONS`, or `GENERATIONS` times the mean output if that is more: the KV cache
is in full use after about one, since prompts are paced. Where long requests are admitted first, what runs depends on
all that wait: there the sample is so small that it is admitted within these iterations, from its longest to its
shortest.

    for each request, in order:
        tokens of the prompt; tokens of the output, at most; whether it may stop before
        leave it out if it can never fit, as the engine would
        stop once `least_iterations` of what was taken are enough
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass

from nanoflow.batch_file import ErrorRecord
from nanoflow.config_schema import RunConfig
from nanoflow.errors import ConfigError, InputError
from nanoflow.feed import Feed, Prompt
from nanoflow.input_files import once_only
from nanoflow.ledger import Ledger
from nanoflow.loading import Model
from nanoflow.rehearsal import least_iterations
from nanoflow.scheduler import Scheduler
from nanoflow.workload import read_workload

__all__ = ["JobRequest", "JobSample", "job_requests", "take_sample"]

LEAST_ITERATIONS, MOST_ITERATIONS = 3000, 12_000
"""Of a rehearsal; a thousand take a second of one CPU core, with a thousand sequences running."""
GENERATIONS = 3
MOST_REQUESTS = 16_384
"""Sequences of a sample: that many short requests are read, tokenised and queued in seconds."""
LONGEST_FIRST_SHARE = 2 / 3
"""Of the iterations, what a sample with long requests first may need at least: the ramp takes more."""
_PORTION = 256
"""Requests between two looks at whether the sample is large enough."""
_WAIT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One completion, as far as the scheduler cares."""

    prompt: int
    """Tokens."""
    output: int
    """Most tokens of the output."""
    certain: bool = True
    """Whether the output has exactly so many."""
    arrival: float = 0.0
    """Seconds after the start of the run."""


@dataclass(frozen=True)
class JobSample:
    """Requests in the order of the workload."""

    requests: tuple[JobRequest, ...]
    whole: bool
    """Whether they are all that the job has."""
    iterations: int
    """Of the rehearsal, at most."""


def job_requests(config: RunConfig, model: Model) -> Generator[JobRequest]:
    """The workload's completions, in order; lines that would become error records are left out.

    Read and tokenised as a run does it, a little ahead; close the iterator if it is not read to its end. Raises
    ConfigError for an input that can be read only once, InputError for one that cannot be read.
    """
    if once := once_only(config.workload.input or ()):
        raise ConfigError(
            f"workload.input: {once} can be read only once, and it is read before the job, for what the scheduler "
            "would form; save it to a file"
        )
    items = read_workload(config, model.graph.vocab_size, model.tokenizer)
    with Feed(items, Ledger(), model.tokenizer, model.checkpoint.path) as feed:
        while not feed.exhausted:
            item = feed.take()
            if item is None:
                feed.wait(_WAIT_SECONDS)
            elif isinstance(item, Prompt):
                yield from _completions(item)
            else:
                assert isinstance(item, ErrorRecord)
        feed.check()


def _completions(prompt: Prompt) -> list[JobRequest]:
    params = prompt.request.params
    certain = params.ignore_eos and not (params.stop or params.stop_token_ids or params.structured_outputs)
    each = JobRequest(len(prompt.token_ids), params.max_tokens, certain, prompt.request.arrival or 0.0)
    return [each] * params.n


def take_sample(requests: Iterable[JobRequest], scheduler: Scheduler, mean_output: float | None = None) -> JobSample:
    """Requests that keep `scheduler` busy long enough, or all there are.

    Args:
        mean_output: tokens of outputs that may stop, on average; None: they go on to their limit.

    Raises InputError if none of the requests can run.
    """
    taken: list[JobRequest] = []
    outputs: list[float] = []
    whole = True
    for request in requests:
        limit = _limit(scheduler, request)
        if limit is None:
            continue
        if len(taken) == MOST_REQUESTS or (taken and len(taken) % _PORTION == 0 and _enough(taken, outputs, scheduler)):
            whole = False
            break
        taken.append(request)
        outputs.append(limit if request.certain or mean_output is None else min(limit, max(1.0, mean_output)))
    if not taken:
        raise InputError("workload: it has no request that can run; there is nothing to tune for")
    return JobSample(tuple(taken), whole, _iterations(outputs))


def _limit(scheduler: Scheduler, request: JobRequest) -> int | None:
    """Output tokens that it may have; None if it can never fit."""
    try:
        return scheduler.check(request.prompt, request.output)
    except ValueError:
        return None


def _iterations(outputs: list[float]) -> int:
    return min(MOST_ITERATIONS, max(LEAST_ITERATIONS, round(GENERATIONS * sum(outputs) / len(outputs))))


def _enough(taken: list[JobRequest], outputs: list[float], scheduler: Scheduler) -> bool:
    lengths = [(request.prompt, output) for request, output in zip(taken, outputs, strict=True)]
    needed = least_iterations(lengths, scheduler.kv, scheduler.max_batch_tokens, scheduler.max_running)
    return needed >= _iterations(outputs) * (LONGEST_FIRST_SHARE if scheduler.longest_first else 1.0)
