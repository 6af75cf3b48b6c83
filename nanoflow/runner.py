"""A run from configuration to report: read the workload, build the engine, write each result as it is finished.

Order matters for people: what can be wrong with the configuration, the output folder and the model is found before any
weights are read; what is wrong with one line becomes that line's error record.
"""

import time
from dataclasses import dataclass

import numpy as np

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.batch_output import error_line, response_line
from nanoflow.config import RunConfig, save_config
from nanoflow.errors import InputError
from nanoflow.ledger import Ledger
from nanoflow.loading import Model, build_engine, open_model
from nanoflow.monitoring import Monitoring
from nanoflow.progress import RunProgress
from nanoflow.recording import Recorder
from nanoflow.report import RunReport, make_report
from nanoflow.search.ceilings import measure_ceilings
from nanoflow.workload import read_workload
from nanoflow.writer import OutputWriter

__all__ = ["run"]


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A request with its prompt as tokens."""

    request: ParsedRequest
    text: str | None
    token_ids: list[int]


def run(config: RunConfig, *, restart: bool = False, quiet: bool = False) -> RunReport:
    """Run the job; results, report and the resolved configuration are in the output's folder when this returns.

    Args:
        restart: replace the output of an earlier run.
        quiet: show no progress.

    Raises:
        UserError: the run could not start, or not go on; what was finished is in the output.
    """
    started = time.perf_counter()
    with Monitoring(config, quiet=quiet) as monitoring, OutputWriter(config.output.path, restart=restart) as writer:
        model = open_model(config.model, config.engine)
        prompts, errors = _read(config, model)
        job = [
            len(p.token_ids) + p.request.params.max_tokens
            for p in prompts
            if len(p.token_ids) < model.max_model_len  # the others become error records
            for _ in range(p.request.params.n)
        ]
        engine = build_engine(model, config.engine, config.pipeline, weights=config.model.weights, job=job)
        try:
            save_config(config)
            for prompt in prompts:
                try:
                    engine.submit(prompt.token_ids, prompt.request.params, prompt=prompt.text, key=prompt.request)
                except InputError as error:
                    errors.append(prompt.request.error(str(error)))
            for record in sorted(errors, key=lambda record: record.line):
                writer.write(error_line(record))
            began = time.perf_counter()
            recorder = Recorder()
            monitoring.watch(model, engine, recorder, fresh=True)
            for _ in errors:
                recorder.error()
            with RunProgress(len(prompts) + len(errors), quiet=quiet) as progress:
                progress.advance(len(errors), 0)
                for output in engine.run():
                    writer.write(
                        response_line(
                            output.key,
                            output,
                            model=model.checkpoint.name,
                            created=int(time.time()),
                            tokenizer=model.tokenizer,
                        )
                    )
                    recorder.add(output)
                    progress.advance(1, sum(len(completion.token_ids) for completion in output.outputs))
            ended = time.perf_counter()
            energy = monitoring.energy()
        finally:
            engine.close()
    report = make_report(
        config=config,
        model=model,
        engine=engine,
        recorder=recorder,
        ceilings=measure_ceilings(str(model.device), model.dtype),
        seconds=ended - began,
        load_seconds=began - started,
        energy=energy,
    )
    report.save(config.output.report_path)
    return report


def _read(config: RunConfig, model: Model) -> tuple[list[_Prompt], list[ErrorRecord]]:
    """The workload's requests as tokens, and a record for each that cannot run."""
    prompts: list[_Prompt] = []
    errors: list[ErrorRecord] = []
    ledger = Ledger()
    for item in read_workload(config, model.graph.vocab_size):
        parsed = ledger.take(item)
        assert parsed is not None
        if isinstance(parsed, ErrorRecord):
            errors.append(parsed)
            continue
        try:
            prompts.append(_tokenise(parsed, model))
        except InputError as error:
            errors.append(parsed.error(str(error)))
    return prompts, errors


def _tokenise(request: ParsedRequest, model: Model) -> _Prompt:
    """Text through the tokenizer, a conversation through the chat template, token ids as they are."""
    if isinstance(request.prompt, np.ndarray):
        return _Prompt(request, None, request.prompt.tolist())
    if model.tokenizer is None:
        raise InputError(f"prompt: {model.checkpoint.path} has no tokenizer; give token ids")
    if request.prompt is not None:
        return _Prompt(request, request.prompt, model.tokenizer.encode(request.prompt))
    text = model.tokenizer.apply_chat_template(request.messages)
    return _Prompt(request, text, model.tokenizer.encode(text, add_special_tokens=False))
