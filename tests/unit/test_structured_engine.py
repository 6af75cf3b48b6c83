"""Structured outputs through the whole engine on a tiny model, beside every other kind of request."""

import json
import random
import re
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.config import load_config
from nanoflow.errors import InputError
from nanoflow.ops.operation import NanoContext
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.structured_outputs import StructuredOutputs
from tests.unit.test_engine import FOUR, PAGE_BYTES, REQUESTS, TWO, assert_same, make_llm, random_request
from tests.unit.tiny_model import EOS, VOCAB, save_tiny_llama

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json_schema": PERSON},
    {"json_schema": PERSON, "disable_any_whitespace": True},
    {"regex": "[a-d]{4}-[0-9]{2,6}"},
    {"choice": ["yes", "no", "perhaps"]},
    {"grammar": 'root ::= "a" root "b" | "c" [0-9] "c"'},
    {"json_object": True},
]


def constrained_request(number: int) -> tuple[list[int], SamplingParams]:
    """Any other parameters, with any form."""
    prompt, params = random_request(1000 + number)
    rng = random.Random(number)
    form = StructuredOutputs(**FORMS[number % len(FORMS)])
    limit = rng.choice([3, 20, 60, 60])
    return prompt, params.replace(structured_outputs=form, max_tokens=limit, seed=params.seed or 5, stop_token_ids=())


CONSTRAINED = [constrained_request(number) for number in range(24)]
MIXED = [pair for both in zip(CONSTRAINED, REQUESTS[:24], strict=True) for pair in both]


def seeded(pairs: list[tuple[list[int], SamplingParams]]) -> tuple[list[list[int]], list[SamplingParams]]:
    return [p for p, _ in pairs], [s if s.seed is not None else s.replace(seed=5) for _, s in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[RequestOutput]:
    """Each request of `MIXED` by itself."""
    prompts, params = seeded(MIXED)
    with make_llm(folder) as llm:
        return [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]


def check_form(text: str, form: StructuredOutputs) -> None:
    if form.json_schema is not None:
        jsonschema.validate(json.loads(text), form.json_schema)
        assert not form.disable_any_whitespace or "\n" not in text
    elif form.json_object:
        assert isinstance(json.loads(text), dict)
    elif form.regex is not None:
        assert re.fullmatch(form.regex, text)
    elif form.choice is not None:
        assert text in form.choice
    else:
        assert re.fullmatch(r"a*c[0-9]cb*", text) and text.count("a") == text.count("b")


def test_outputs_have_their_form(alone: list[RequestOutput]) -> None:
    complete: dict[str, int] = {}
    cut = 0
    for output in alone[::2]:
        form = output.params.structured_outputs
        assert form is not None and output.error is None
        for completion in output.outputs:
            assert len(completion.token_ids) <= output.params.max_tokens
            if completion.finish_reason == "length":
                assert len(completion.token_ids) == output.params.max_tokens
                cut += 1
            elif completion.text and not any(stop in completion.text for stop in output.params.stop):
                try:
                    check_form(completion.text, form)
                except (ValueError, AssertionError, jsonschema.ValidationError):
                    assert output.params.stop  # cut before a stop string
                    continue
                complete[form.kind] = complete.get(form.kind, 0) + 1
    assert set(complete) >= {"json_schema", "regex", "choice"} and sum(complete.values()) >= 8, complete
    assert cut >= 3
    penalised = [o for o in alone[::2] if o.params.uses_penalties]
    several = [o for o in alone[::2] if len(o.outputs) > 1]
    assert len(penalised) >= 2 and len(several) >= 2
    assert any(o.outputs[0].logprobs for o in alone[::2]) and any(o.params.ignore_eos for o in alone[::2])


@pytest.mark.parametrize("plan", ["sequential", TWO, FOUR], ids=["sequential", "two", "four"])
def test_everything_together_gives_what_each_gives_alone(
    folder: Path, alone: list[RequestOutput], plan: str, tmp_path: Path
) -> None:
    """With batches of 32 rows and a KV cache that forces preemptions."""
    if plan != "sequential":
        (tmp_path / "plan.yaml").write_text(plan)
        plan = str(tmp_path / "plan.yaml")
    with make_llm(folder, plan=plan, max_batch_tokens=32, kv_memory=24 * 8 * PAGE_BYTES * 2) as llm:
        assert_same(llm.generate(*seeded(MIXED)), alone)
        preempted = llm.engine.scheduler.preemptions
        assert preempted > 0 and llm.engine.scheduler.kv.used_pages == 0


def test_neighbours_with_a_form_change_nothing(folder: Path) -> None:
    """Tokens and log-probabilities of requests without one, bit for bit, in the very same batches."""
    prompts = [[5 + number, 6, 7] for number in range(6)]
    free = [SamplingParams(temperature=t, seed=3, max_tokens=24, ignore_eos=True, logprobs=2) for t in (0.0, 1.0, 1.5)]
    beside = SamplingParams(temperature=1.0, seed=4, max_tokens=24, ignore_eos=True)
    form = StructuredOutputs(regex="[a-h]{30}")

    def run(other: SamplingParams) -> list[RequestOutput]:
        with make_llm(folder) as llm:
            return llm.generate(prompts, [p for one in free for p in (one, other)])

    plain, mixed = run(beside), run(beside.replace(structured_outputs=form))
    for one, other in list(zip(plain, mixed, strict=True))[::2]:
        assert one.outputs == other.outputs
    for output in mixed[1::2]:
        assert re.fullmatch("[a-h]{24,}", output.text)


def test_a_constrained_sequence_decodes_in_every_iteration(folder: Path) -> None:
    form = StructuredOutputs(regex="[ab]{20}")
    with make_llm(folder) as llm:
        # With a fixed tokenisation of one letter a token: at most 20 tokens, one an iteration, and one late row.
        output = llm.generate([[5]], SamplingParams(structured_outputs=form, max_tokens=60))[0].outputs[0]
        assert output.finish_reason == "stop" and re.fullmatch("[ab]{20}", output.text)
        assert len(output.token_ids) <= llm.engine.stats.iterations <= len(output.token_ids) + 1


def test_an_output_that_ends_with_its_last_token_is_complete(folder: Path) -> None:
    form = StructuredOutputs(choice=["z"])
    with make_llm(folder) as llm:
        output = llm.generate([[5]], SamplingParams(structured_outputs=form, max_tokens=1))[0].outputs[0]
    assert (output.text, output.finish_reason) == ("z", "stop")


def test_ignore_eos_goes_on_as_long_as_the_grammar_can(folder: Path) -> None:
    bias = {EOS: 100.0}
    with make_llm(folder) as llm:
        open_end, closed, stopped = llm.generate(
            [[5]] * 3,
            [
                SamplingParams(structured_outputs={"regex": "[ab]+"}, max_tokens=9, ignore_eos=True, logit_bias=bias),
                SamplingParams(structured_outputs={"regex": "x[ab]?"}, max_tokens=9, ignore_eos=True, logit_bias=bias),
                SamplingParams(structured_outputs={"regex": "[ab]+"}, max_tokens=9, logit_bias=bias),
            ],
        )
    assert open_end.outputs[0].finish_reason == "length" and len(open_end.outputs[0].token_ids) == 9
    assert closed.outputs[0].finish_reason == "stop" and re.fullmatch("x[ab]", closed.text)
    assert stopped.outputs[0].finish_reason == "stop" and re.fullmatch("[ab]{1,2}", stopped.text)
    assert stopped.outputs[0].token_ids[-1] == EOS


def test_log_probabilities_are_those_without_the_form(folder: Path) -> None:
    params = SamplingParams(max_tokens=1, logprobs=5, ignore_eos=True)
    with make_llm(folder) as llm:
        free = llm.generate([[9, 9]], params)[0].outputs[0].logprobs
        bound = llm.generate([[9, 9]], params.replace(structured_outputs={"choice": ["q"]}))[0].outputs[0].logprobs
    assert free is not None and bound is not None
    assert bound[0].top == free[0].top and bound[0].token_id != free[0].token_id
    assert bound[0].logprob < free[0].logprob


def test_a_bad_form_is_refused_before_anything_runs(folder: Path) -> None:
    with make_llm(folder) as llm:
        with pytest.raises(InputError, match=r"prompt 1: structured_outputs\.regex: .*look-around"):
            llm.generate([[5], [5]], [SamplingParams(), SamplingParams(structured_outputs={"regex": "(?=a)"})])
        assert llm.engine.unfinished == 0


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(folder: Path) -> None:
    """Some limits of the library show only when a token is taken."""
    with make_llm(folder) as llm:
        bound = SamplingParams(structured_outputs={"regex": "(a{1000}){1000}"}, max_tokens=9)
        free = SamplingParams(max_tokens=9, ignore_eos=True)
        outputs = llm.generate([[5], [6]], [bound, free])
        assert outputs[0].outputs[0].finish_reason == "error"
        assert outputs[0].error is not None and outputs[0].error.startswith("structured_outputs: ")
        assert "\n" not in outputs[0].error
        assert outputs[1].error is None and len(outputs[1].outputs[0].token_ids) == 9
        assert llm.engine.scheduler.kv.used_pages == 0


def test_closing_leaves_nobody_waiting_for_masks(folder: Path) -> None:
    before = threading.active_count()
    llm = make_llm(folder)
    llm.engine.submit([5, 6], SamplingParams(structured_outputs={"regex": "[ab]+"}, max_tokens=50))
    for _ in range(4):
        llm.engine.step()
    # One iteration is launched beyond the one in flight, as in the middle of a step that is interrupted there.
    iteration = llm.engine.scheduler.form()
    assert iteration is not None and iteration.batch.sampling is not None and iteration.batch.sampling.masks is not None
    llm.engine.executor.launch(iteration.batch)
    llm.engine._in_flight.append(iteration)
    closing = threading.Thread(target=llm.close)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()
    with pytest.raises(CancelledError):
        iteration.batch.sampling.masks.ready.result()
    assert threading.active_count() <= before


def test_a_failing_kernel_ends_a_run_with_forms(folder: Path) -> None:
    with make_llm(folder) as llm:
        executor = llm.engine.executor
        assert isinstance(executor, ReferenceExecutor)
        (o,) = (key for key in executor.bound._kernels if key[:2] == (0, "o"))
        real, calls = executor.bound._kernels[o], []

        def broken(context: NanoContext) -> None:
            calls.append(None)
            if len(calls) == 6:
                raise RuntimeError("the kernel failed")
            real(context)

        executor.bound._kernels[o] = broken
        with pytest.raises(RuntimeError, match="the kernel failed"):
            llm.generate([[5, 6]], SamplingParams(structured_outputs={"regex": "[ab]{30}"}, max_tokens=50))


def test_a_run_writes_records_and_errors(folder: Path, tmp_path: Path) -> None:
    from nanoflow.runner import run

    person = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    lines = [
        {"custom_id": "person", "prompt": [5, 6], "response_format": person},
        {"custom_id": "default", "prompt": [5, 6]},
        {"custom_id": "text", "prompt": [5, 6], "response_format": {"type": "text"}},
        {"custom_id": "bad", "prompt": [5, 6], "guided_regex": "[a"},
        {"custom_id": "slow", "prompt": [5, 6], "guided_regex": "(a{1000}){1000}"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = {
        "model": {"path": str(folder), "dtype": "float32"},
        "workload": {"input": "in.jsonl"},
        "sampling": {"max_tokens": 100, "structured_outputs": {"choice": ["yes", "no"]}},
        "engine": {"device": "cpu"},
        "output": {"path": str(tmp_path / "out.jsonl")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run(load_config(tmp_path / "job.yaml"), quiet=True)
    records = {r["custom_id"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert len(records) == len(lines)
    texts = {
        name: record["response"]["body"]["choices"][0]["text"]
        for name, record in records.items()
        if record.get("error") is None
    }
    jsonschema.validate(json.loads(texts["person"]), PERSON)
    assert texts["default"] in ("yes", "no") and texts["text"] not in ("yes", "no")
    assert "structured_outputs.regex" in records["bad"]["error"]["message"]
    assert "line 4" in records["bad"]["error"]["message"]
    assert "structured_outputs" in records["slow"]["error"]["message"]
    assert VOCAB > 0 and set(texts) == {"person", "default", "text"}


def test_without_forms_nothing_is_loaded(folder: Path) -> None:
    with LLM(model=folder, dtype="float32", device="cpu", kv_memory="1MiB") as llm:
        llm.generate([[5]], SamplingParams(max_tokens=3))
        assert llm.engine._mask_maker is None
