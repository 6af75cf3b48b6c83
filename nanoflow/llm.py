"""The Python API: a model that completes prompts, on a device in this process, or on several in processes of their own.

With several, this process computes nothing: it keeps the queue, and touches no GPU. So whatever becomes of a rank or a
replica, the caller gets an exception, and a notebook lives on.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from nanoflow.config_schema import EngineSection, ModelSection, ParallelSection, PipelineSection
from nanoflow.engine import Engine
from nanoflow.errors import ConfigError, InputError, ParallelError
from nanoflow.grammars import Grammars
from nanoflow.loading import Model, build_engine, open_model
from nanoflow.outputs import Completion, RequestOutput, TokenLogprobs
from nanoflow.parallel.group import check_ranks
from nanoflow.parallel.torchrun import place
from nanoflow.replicas.pool import Pool
from nanoflow.replicas.start import check_replicas, start_replicas
from nanoflow.request_check import RequestCheck
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer
from nanoflow.validation import checked

__all__ = ["LLM", "Completion", "RequestOutput", "SamplingParams", "TokenLogprobs"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

OTHER_NAMES = {"tensor_parallel_size": "tensor", "tp_size": "tensor", "data_parallel_size": "data", "dp_size": "data"}
"""What other engines call arguments of `LLM`."""
CLOSED = "the model is closed, or a call was interrupted; make it anew"


@dataclass(frozen=True)
class _Parts:
    """What processes of their own need to know; see `nanoflow.replicas.start.Parts`."""

    model: ModelSection
    engine: EngineSection
    pipeline: PipelineSection
    parallel: ParallelSection


class LLM:
    """A loaded model. Prompts given together share the device, so give as many at a time as you have.

    Args:
        model: a Hugging Face folder, a .gguf file, ``package:IMPORT_NAME/FILE``, or a Hub id.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16`` or ``float16``.
        weights: ``load``, or ``random`` for a model of which only config.json is there.
        plan: ``auto`` (stored plans that were measured to win here, else sequential), which is the default,
            ``sequential``, or a plan's YAML file.
        tensor: GPUs that share every layer, from the engine's device on: for a model that one does not hold. On a CPU,
            processes.
        data: replicas of the model, on `tensor` GPUs each, which share the prompts.
        engine: any key of the YAML's ``engine`` section, such as ``max_running=64`` or ``kv_memory="4GiB"``.

    With `tensor` or `data` above 1, processes are started for the model, which end with `close`, with this object, or
    with this process, however that ends.

    Threads may share the object: their calls run one after the other. Prompts of one call share the device, those of
    several calls do not.

    Attributes:
        model: opened; without weights.
        tokenizer: None if the model came without one.
        engine: of one device alone; with several, each has its own, in a process of its own.

    Raises:
        UserError: the model or an option is not usable; the message says why and what would be. The class is the same
            on one device and on several.
        PlanError: the plan is not usable.
        ParallelError: a process of the model could not start, or was lost while it did.
    """

    engine: Engine

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        weights: str = "load",
        plan: str | Path | None = None,
        tensor: int = 1,
        data: int = 1,
        **engine: Any,
    ) -> None:
        for name in OTHER_NAMES.keys() & engine.keys():
            raise InputError(f"{name}: unknown key; did you mean {OTHER_NAMES[name]}?")
        parts = _Parts(
            checked(ModelSection, {"path": str(model), "dtype": dtype, "weights": weights}),
            checked(EngineSection, engine),
            checked(PipelineSection, {} if plan is None else {"plan": str(plan)}),
            checked(ParallelSection, {"tensor": tensor, "data": data}),
        )
        several = tensor * data > 1
        if several:
            _check_several(parts)
        self.model = open_model(parts.model, parts.engine, use=not several)
        self.tokenizer = self.model.tokenizer
        self._calls = 0
        self._submitted = 0
        """Completions, as an engine counts them: what seeds are made of."""
        self._lock = threading.RLock()
        """Held by a call from its beginning to its end, and by `close`."""
        self._calling = False
        """Whether a call is going on; who holds the lock and sees it is in a signal handler inside of that call."""
        self._closed = False
        """Whether calls are refused."""
        self._stopped = False
        """Whether the call that is going on is to end and to release the model."""
        self._pool: Pool | None = None
        if several:
            try:
                self._pool = start_replicas(parts, self.model, None, more=False, quiet=False)
            except ParallelError as error:
                raise (error.mistake or error) from None
            self._check: Callable[[Sequence[int], SamplingParams], None] = _check_of(self.model, self._pool)
            self._end = weakref.finalize(self, self._pool.kill)  # nobody may have closed it
        else:
            self.engine = build_engine(self.model, parts.engine, parts.pipeline, weights=parts.model.weights)
            self._check = self.engine.check

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a string or a list of token ids; outputs come in the order of the prompts.

        `params` is for all prompts, or a list with one entry a prompt; left out, it is ``SamplingParams()``.

        Another thread's call, if one is going on, is waited for.

        Raises:
            InputError: a prompt is empty or too long, or has unknown token ids, or the model is closed; nothing has run
                then. Or a signal handler has closed the model inside of this call.
            ParallelError: with several devices, a process of the model was lost, and no replica is left.
        """
        if isinstance(prompts, str) or _is_token_ids(prompts):
            prompts = cast("list[Prompt]", [prompts])
        several = cast("Sequence[Prompt]", prompts)
        with self._call():
            return self._run(
                [(p, self._need_tokenizer().encode(p)) if isinstance(p, str) else (None, list(p)) for p in several],
                params,
            )

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of ``{"role": ..., "content": ...}``, through the model's chat template.

        All else as `generate` has it.
        """
        tokenizer = self._need_tokenizer()
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        several = cast("Sequence[Sequence[Message]]", [conversations] if one else conversations)
        with self._call():
            texts = [tokenizer.apply_chat_template(messages) for messages in several]
            return self._run([(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts], params)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call at a time. Raises InputError if the model is closed, or inside of another call of this thread."""
        with self._lock:
            if self._calling:
                raise InputError(
                    "a call is going on in this thread; a signal handler cannot begin another inside of it"
                )
            self._calling = True
            try:
                if self._closed or (self._pool is not None and not self._end.alive):
                    raise InputError(CLOSED)
                yield
            finally:
                self._calling = False
                if self._stopped:
                    self._release()

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts came with {len(each)} SamplingParams; give one, or one a prompt")
        for number, ((_, token_ids), one) in enumerate(zip(prompts, each, strict=True)):
            try:
                self._check(token_ids, one)
            except InputError as error:
                raise InputError(f"prompt {number}: {error}") from None
        self._calls += 1
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        for output in self._outputs(prompts, each):
            call, number = output.key
            if call == self._calls:  # an earlier call may have been interrupted
                outputs[number] = replace(output, prompt=prompts[number][0], key=number)
        return [output for output in outputs if output is not None]

    def _outputs(
        self, prompts: Sequence[tuple[str | None, list[int]]], each: Sequence[SamplingParams]
    ) -> Iterator[RequestOutput]:
        """Run them, each with this call's number and its own as its key."""
        keyed = [((self._calls, number), token_ids) for number, (_, token_ids) in enumerate(prompts)]
        pool = self._pool
        if pool is None:
            for (key, token_ids), params in zip(keyed, each, strict=True):
                self.engine.submit(token_ids, params, key=key)
            yield from self.engine.run(self._go_on)
            return
        try:
            for (key, token_ids), params in zip(keyed, each, strict=True):
                place, self._submitted = self._submitted, self._submitted + params.n
                pool.submit(np.array(token_ids, np.int32), params, key=key, place=place, arrived=time.perf_counter())
            while pool.unfinished:
                self._go_on()
                yield from pool.step()
        except KeyboardInterrupt:
            self._end()  # half a message may have been read
            raise

    def _go_on(self) -> None:
        """Raises InputError if a signal handler has closed the model inside of this call."""
        if self._stopped:
            raise InputError(CLOSED)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self.model.checkpoint.path} has no tokenizer: give prompts as lists of token ids")
        return self.tokenizer

    def close(self) -> None:
        """Release the engine, or end the processes of the model; the object cannot be used afterwards.

        Another thread's call, if one is going on, is waited for; calls that wait for that one are refused. Inside of a
        call, from a signal handler, this returns at once: the call then ends with InputError and releases the model.
        """
        self._closed = True
        with self._lock:
            if self._calling:
                self._stopped = True
            else:
                self._release()

    def _release(self) -> None:
        if self._pool is None:
            self.engine.close()
        elif self._end.detach():
            self._pool.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_several(parts: _Parts) -> None:
    """Refuse what this machine cannot do, before anything slow is done. Raises ConfigError."""
    if place() is not None:
        raise ConfigError("tensor, data: LLM starts the processes of a model itself; start the script without torchrun")
    check_replicas(parts.engine, parts.parallel)
    if parts.parallel.data == 1:
        check_ranks(parts.engine, parts.parallel.tensor, use=False)


def _check_of(model: Model, pool: Pool) -> RequestCheck:
    """What an engine would ask of a request, asked in this process: nothing has run if one cannot."""
    grammars = Grammars(model.tokenizer, model.graph.vocab_size, sorted(model.checkpoint.eos_token_ids))
    return RequestCheck(model.graph.vocab_size, model.tokenizer, pool.lengths.check, grammars)


def _is_token_ids(prompts: Sequence[Any]) -> bool:
    """Whether this is one prompt as token ids, not a list of prompts."""
    return len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
