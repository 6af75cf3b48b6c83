"""The Python API: a model that completes prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from nanoflow.config_schema import EngineSection, ModelSection, PipelineSection
from nanoflow.errors import InputError
from nanoflow.loading import build_engine, open_model
from nanoflow.outputs import Completion, RequestOutput, TokenLogprobs
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer
from nanoflow.validation import checked

__all__ = ["LLM", "Completion", "RequestOutput", "SamplingParams", "TokenLogprobs"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A loaded model. Prompts given together share the device, so give as many at a time as you have.

    Args:
        model: a Hugging Face folder, a .gguf file, ``package:IMPORT_NAME/FILE``, or a Hub id.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16`` or ``float16``.
        weights: ``load``, or ``random`` for a model of which only config.json is there.
        plan: ``auto`` (stored plans that were measured to win here, else sequential), which is the default,
            ``sequential``, or a plan's YAML file.
        engine: any key of the YAML's ``engine`` section, such as ``max_running=64`` or ``kv_memory="4GiB"``.

    Raises:
        UserError: the model or an option is not usable; the message says why and what would be.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        weights: str = "load",
        plan: str | Path | None = None,
        **engine: Any,
    ) -> None:
        section = checked(ModelSection, {"path": str(model), "dtype": dtype, "weights": weights})
        sizes = checked(EngineSection, engine)
        self.model = open_model(section, sizes)
        self.engine = build_engine(
            self.model,
            sizes,
            checked(PipelineSection, {} if plan is None else {"plan": str(plan)}),
            weights=section.weights,
        )
        self.tokenizer = self.model.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a string or a list of token ids; outputs come in the order of the prompts.

        `params` is for all prompts, or a list with one entry a prompt; left out, it is ``SamplingParams()``.

        Raises:
            InputError: a prompt is empty or too long, or has unknown token ids; nothing has run then.
        """
        if isinstance(prompts, str) or _is_token_ids(prompts):
            prompts = cast("list[Prompt]", [prompts])
        several = cast("Sequence[Prompt]", prompts)
        return self._run(
            [(p, self._need_tokenizer().encode(p)) if isinstance(p, str) else (None, list(p)) for p in several], params
        )

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of ``{"role": ..., "content": ...}``, through the model's chat template."""
        tokenizer = self._need_tokenizer()
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        several = cast("Sequence[Sequence[Message]]", [conversations] if one else conversations)
        texts = [tokenizer.apply_chat_template(messages) for messages in several]
        return self._run([(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts], params)

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
                self.engine.check(token_ids, one)
            except InputError as error:
                raise InputError(f"prompt {number}: {error}") from None
        for number, ((text, token_ids), one) in enumerate(zip(prompts, each, strict=True)):
            self.engine.submit(token_ids, one, prompt=text, key=number)
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        for output in self.engine.run():
            outputs[output.key] = output
        return [output for output in outputs if output is not None]

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self.model.checkpoint.path} has no tokenizer: give prompts as lists of token ids")
        return self.tokenizer

    def close(self) -> None:
        """Release the engine; the object cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_token_ids(prompts: Sequence[Any]) -> bool:
    """Whether this is one prompt as token ids, not a list of prompts."""
    return len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
