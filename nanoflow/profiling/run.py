"""One profiling run: from a job's configuration to a profile file that holds all that there was time for."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from nanoflow.config_schema import RunConfig
from nanoflow.loading import Model, here_kv_tokens, open_model, run_fingerprint, shard_model
from nanoflow.parallel.group import TensorGroup, check_ranks
from nanoflow.parallel.messages import Profiling
from nanoflow.pipeline.cuda_executor import buckets
from nanoflow.plan_choice import asked_layout
from nanoflow.plans.job_mixes import JobMixes, job_mixes
from nanoflow.plans.running import job_on, lane_sms
from nanoflow.power import EnergyMeter
from nanoflow.profiling.cases import job_cases, nano_rows
from nanoflow.profiling.device_bench import DeviceBench, few_layers
from nanoflow.profiling.gemm_choices import ChoiceRun, measure_choices
from nanoflow.profiling.ranks import GroupBench
from nanoflow.search.ceilings import measure_ceilings
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.profile import Profile, ProfileError, layer_shape, profile_file
from nanoflow.search.profiler import Profiled, close, fill_profile, network_splits, splits

__all__ = ["ProfileRun", "profile_job"]

CHOICE_SHARE = 0.5
"""Of the time, what measuring kernels of products may take."""
GOES_ON = "what was measured is in the profile, and the same command goes on"
IDLE_SECONDS = 1.5
"""Of nothing, to see what the card draws: some ten steps of its energy counter."""

Progress = Callable[[str, int], None]
"""Told what is measured next, and how many cases are still to come, that one included."""


@dataclass(frozen=True)
class ProfileRun:
    """What a run has measured, and where it is."""

    path: Path
    profile: Profile
    mixes: JobMixes
    measured: int
    """Cases that were measured now."""
    left: int
    """Cases, kernels to choose among them, that the time was too short for."""
    notes: tuple[str, ...]
    """What could not be measured, and why."""
    stopped: bool
    """Whether Ctrl-C ended it."""


def profile_job(
    config: RunConfig,
    *,
    out: Path | None = None,
    minutes: float,
    device: str | None = None,
    progress: Progress = lambda what, left: None,
) -> ProfileRun:
    """Profile the model of `config` at the sizes of its job, or go on with it.

    Of ranks whose weights the job's plan lays out otherwise than usual, that layout.

    Args:
        out: the file; None: that of the user's store for this model and machine.
        minutes: after which no case is begun; what is missing then is measured by the same call, made again.
        device: in place of the configuration's.

    Raises UserError, PlanError and ProfileError. Every case that was measured before is in the file.
    """
    until = time.monotonic() + 60 * minutes
    config = job_on(config, device)
    ranks = config.parallel.tensor
    check_ranks(config.engine, ranks)
    # Of several ranks that share the model, this is one: their shares are alike.
    layout = asked_layout(config.pipeline.plan)
    model = shard_model(open_model(config.model, config.engine), 0, ranks, layout)
    stamp = replace(run_fingerprint(model, config.engine), shape=layer_shape(model.graph))
    path = out or profile_file(stamp)
    profile = _begun(path, stamp)
    if profile is None:
        profile = Profile(stamp, *_measured_device(model))
        profile.save(path)  # before minutes of measuring: whether it can be written
    mixes = _mixes(config, model, stamp, profile.ceilings)
    sms = lane_sms(model.device) or None
    cases = job_cases(
        model.graph,
        mixes.mixes,
        max_model_len=model.max_model_len,
        kv_tokens=here_kv_tokens(model, config.engine),
        sms=sms,
        streams=model.device.type == "cuda",
        itemsize=model.dtype.itemsize,
    )
    choices = ChoiceRun(0, frozenset(), ())
    if sms is not None and model.dtype.itemsize == 2:
        lanes = {compute for compute, memory in splits(sms) if close(memory, sms)}
        lanes |= {compute for compute, _ in network_splits(sms) if ranks > 1}
        ordered = dict.fromkeys(case.sms for case in cases if case.sms in lanes)
        try:
            choices = measure_choices(
                model.graph,
                nano_rows(mixes.mixes),
                [budget for budget in ordered if budget is not None],
                device=model.device,
                dtype=model.dtype,
                until=until - 60 * minutes * (1 - CHOICE_SHARE),
                progress=lambda case, more: progress(f"kernel of {case}", more),
            )
        except KeyboardInterrupt:
            return ProfileRun(path, profile, mixes, 0, len(cases), (), stopped=True)
    # Where kernels are still to be chosen, products would be profiled with others than those that runs will take.
    later = [case for case in cases if case.sms in choices.unfinished]
    cases = [case for case in cases if case.sms not in choices.unfinished]
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        bench: DeviceBench | GroupBench
        if ranks == 1:
            own = bench = DeviceBench(few_layers(model), cases, _page_size(stamp), EnergyMeter(model.device).joules)
        else:
            group = TensorGroup(config.model, config.engine, ranks, then=GOES_ON)
            stack.enter_context(group).load(Profiling(layout=layout))
            profile = _with_link(profile, group.link_bytes_per_second)
            bench = GroupBench(group, model, cases, _page_size(stamp))
            own = bench.own
        stack.callback(bench.close)
        missing.update(own.missing)
        done: Profiled = fill_profile(
            profile,
            [case for case in cases if own.can(case)],
            bench,
            path,
            until=until,
            progress=lambda case, more: progress(str(case), more),
        )
    left = choices.left + len(later) + done.left
    forms = (f"collectives by {form}: {why}" for form, why in missing.items())
    notes = (*choices.notes, *forms, *done.notes)
    return ProfileRun(path, done.profile, mixes, done.measured, left, notes, done.stopped)


def _with_link(profile: Profile, link: float | None) -> Profile:
    """With the link as it was just measured, unless it is in it already."""
    known = profile.ceilings.link_bytes_per_second or link
    return replace(profile, ceilings=replace(profile.ceilings, link_bytes_per_second=known))


def _begun(path: Path, stamp: Fingerprint) -> Profile | None:
    """What was measured before; None if there is no file."""
    if not path.exists():
        return None
    profile = Profile.load(path)
    profile.refuse(path, stamp)
    return profile


def _measured_device(model: Model) -> tuple[Ceilings, float | None]:
    """Ceilings, and the watts of a card that is hot and has nothing to do."""
    ceilings = measure_ceilings(str(model.device), model.dtype)
    meter = EnergyMeter(model.device)
    ceilings = replace(ceilings, power_limit_watts=meter.power_limit_watts())
    first, begun = meter.joules(), time.perf_counter()
    if first is None:
        return ceilings, None
    time.sleep(IDLE_SECONDS)
    last = meter.joules()
    watts = None if last is None else (last - first) / (time.perf_counter() - begun)
    return ceilings, watts or None


def _mixes(config: RunConfig, model: Model, stamp: Fingerprint, ceilings: Ceilings) -> JobMixes:
    on_gpu = model.device.type == "cuda"
    return job_mixes(
        config,
        model,
        kv_tokens=here_kv_tokens(model, config.engine),
        page_size=_page_size(stamp),
        row_buckets=buckets(config.engine.max_batch_tokens) if on_gpu else (),
        ceilings=ceilings,
        itemsize=model.dtype.itemsize,
    )


def _page_size(stamp: Fingerprint) -> int:
    if stamp.page_size is None:
        raise ProfileError("a run's fingerprint has no page size")
    return stamp.page_size
