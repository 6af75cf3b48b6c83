"""What a run has to do: requests from input files, from a trace, or made up; and when each of them arrives."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nanoflow.arrivals import arrival_times, with_arrivals
from nanoflow.batch_file import ErrorRecord, ParsedRequest, read_requests
from nanoflow.config_schema import RunConfig
from nanoflow.input_files import InputFiles
from nanoflow.lengths import LONGEST
from nanoflow.sampling_params import SamplingParams
from nanoflow.sharegpt import read_sharegpt
from nanoflow.tokenizer import Tokenizer
from nanoflow.traces import read_lengths
from nanoflow.workload_schema import SyntheticSection

__all__ = ["read_workload"]


def read_workload(
    config: RunConfig, vocab_size: int, tokenizer: Tokenizer | None = None
) -> Iterator[ParsedRequest | ErrorRecord]:
    """The run's requests in order, arrivals never falling; an error record for each input line that is none.

    Requests of a CSV trace and synthetic ones have random token ids below `vocab_size`, those of ShareGPT's JSON their
    text through `tokenizer`. Their outputs have exactly the given length: end-of-sequence and stops are ignored.
    Raises InputError if a file cannot be read or is no trace.
    """
    workload, defaults = config.workload, config.sampling
    arrival = workload.arrival
    requests: Iterator[ParsedRequest | ErrorRecord]
    if workload.input is not None:
        requests = read_requests(InputFiles(workload.input), defaults)
    elif workload.synthetic is not None:
        spec = workload.synthetic
        requests = _requests(_random_prompts(_synthetic_lengths(spec), spec.seed, vocab_size), defaults)
    else:
        assert workload.trace is not None
        if workload.trace.sharegpt:
            requests = _requests(read_sharegpt(workload.trace, tokenizer), defaults)
        else:
            speed = arrival.trace.speed if arrival is not None and arrival.trace is not None else None
            trace = read_lengths(workload.trace, times=speed is not None)
            requests = _requests(_random_prompts(trace.lengths, workload.trace.seed, vocab_size), defaults)
            if speed is not None:
                assert trace.times is not None
                return with_arrivals(requests, iter((trace.times / speed).tolist()))
    return requests if arrival is None else with_arrivals(requests, arrival_times(arrival))


def _requests(prompts: Iterable[tuple[NDArray[np.int32], int]], defaults: SamplingParams) -> Iterator[ParsedRequest]:
    """A request for each prompt with the length of its output."""
    for number, (prompt, output_len) in enumerate(prompts, start=1):
        yield ParsedRequest(
            line=number,
            custom_id=f"request-{number}",
            kind="completion",
            params=defaults.replace(max_tokens=output_len, ignore_eos=True, stop=(), stop_token_ids=()),
            prompt=prompt,
        )


def _random_prompts(lengths: NDArray[np.int64], seed: int, vocab_size: int) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Random tokens for each row of `lengths` [requests, 2]; they depend on the seed and the row's number alone."""
    for number, (input_len, output_len) in enumerate(lengths, start=1):
        generator = np.random.default_rng((seed, number))
        yield generator.integers(0, vocab_size, input_len, dtype=np.int32), int(output_len)


def _synthetic_lengths(spec: SyntheticSection) -> NDArray[np.int64]:
    """Lengths [requests, 2] of prompts and outputs."""
    generator = np.random.default_rng(spec.seed)
    each = zip(spec.lengths, (spec.max_input, spec.max_output), strict=True)
    columns = [np.minimum(length.sample(generator, spec.requests), cap or LONGEST) for length, cap in each]
    return np.stack(columns, axis=1).astype(np.int64)
