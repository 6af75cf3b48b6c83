"""What is tuned for: the mixes of a job, its model and its device, and where the search of each mix is kept."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanoflow.config_schema import RunConfig
from nanoflow.devices import device_sms
from nanoflow.errors import OutputError
from nanoflow.loading import Model, device_name, here_kv_tokens, open_model, run_fingerprint, shard_model
from nanoflow.ops.attention import OTHER_PROGRAMS
from nanoflow.pipeline.cuda_executor import buckets
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.plans.case import DEVICES, known_device
from nanoflow.plans.job_mixes import UNBUCKETED, JobMixes, WeightedMix, job_mixes
from nanoflow.plans.running import job_on, lane_sms
from nanoflow.search.ceilings import measure_ceilings
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.files import replace_file, slug
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.mix import Mix
from nanoflow.search.rates import CeilingRates, Rates
from nanoflow.search.space import collective_forms
from nanoflow.search.store import plan_folders
from nanoflow.search.tuner import Target

__all__ = ["TuningJob", "open_job", "plan_mix", "tuning_folder"]


@dataclass(frozen=True, eq=False)
class TuningJob:
    """A job on a device."""

    config: RunConfig
    """With the device that was asked for."""
    model: Model
    here: Fingerprint
    mixes: JobMixes
    rates: Rates
    """Of the simulator."""
    sms: int
    """SMs that lanes can be confined to parts of; 0 if they cannot."""
    row_buckets: tuple[int, ...]
    """To which batches are padded; none: they are not."""

    def rows(self, mix: WeightedMix) -> tuple[int, int]:
        """The fewest and the most rows of batches that run a plan for `mix`: those that are padded as it is. What is
        padded to fewer rows was not measured."""
        if self.row_buckets:
            below = max((rows for rows in self.row_buckets if rows < mix.bucket), default=0)
            return below + 1, mix.bucket
        most = min(self.config.engine.max_batch_tokens, -(-mix.bucket // UNBUCKETED) * UNBUCKETED)
        return max(1, most - UNBUCKETED + 1), most

    def target(self, mix: WeightedMix) -> Target:
        """What the search is asked for."""
        # With fewer programs attention leaves the products beside it more bandwidth; only measuring tells what is best.
        kernels = (*OTHER_PROGRAMS, *collective_forms(self.model.graph)) if self.sms else ()
        return Target(self.model.graph, mix.mix, self.rows(mix)[1], self.rates, self.sms, kernels)

    def journal(self, mix: WeightedMix, folder: Path) -> Path:
        """The file that keeps the search for `mix`: another one for whatever changes what is measured."""
        engine = self.config.engine
        limits = engine.max_batch_tokens, engine.max_running, engine.max_model_len, engine.kv_memory, engine.page_size
        known = json.dumps([asdict(self.here), limits, asdict(mix.mix), self.rows(mix)], sort_keys=True)
        digest = hashlib.sha256(known.encode()).hexdigest()[:12]
        return folder / f"{slug(str(self.here.model))}--{slug(str(self.here.gpu))}--{digest}.journal"


def tuning_folder() -> Path:
    """Where searches are kept: beside the user's plans."""
    return plan_folders()[0].parent / "tuning"


def plan_mix(mix: Mix) -> PlanMix:
    """`mix` as plans name it."""
    return PlanMix(mix.decode, sum(mix.prompts), mix.context)


def open_job(config: RunConfig, device: str | None, folder: Path) -> TuningJob:
    """The job of `config` on `device`, by default the one that its engine section names; no weights are read.

    Args:
        folder: where measured ceilings are kept.

    Raises UserError.
    """
    config = job_on(config, device)
    # Of several ranks that share the model, this is one: their shares are alike.
    model = shard_model(open_model(config.model, config.engine), 0, config.parallel.tensor)
    here = run_fingerprint(model, config.engine)
    on_gpu = model.device.type == "cuda"
    row_buckets = buckets(config.engine.max_batch_tokens) if on_gpu and config.engine.cuda_graphs else ()
    rates, ceilings = rates_of(model, folder)
    assert here.page_size is not None
    mixes = job_mixes(
        config,
        model,
        kv_tokens=here_kv_tokens(model, config.engine),
        page_size=here.page_size,
        row_buckets=row_buckets,
        ceilings=ceilings,
        itemsize=model.dtype.itemsize,
    )
    return TuningJob(config, model, here, mixes, rates, lane_sms(model.device), row_buckets)


def rates_of(model: Model, folder: Path) -> tuple[Rates, Ceilings]:
    """Estimates for the model's device: what is known of its kind, else its own ceilings.

    These are measured once and kept: the mixes of a job depend on them, and a search could not go on with others.
    Raises OutputError if they cannot be.
    """
    name, dtype = device_name(model.device), str(model.dtype).removeprefix("torch.")
    on_gpu = model.device.type == "cuda"
    sms = device_sms(model.device)
    known = known_device(Plan(1, (), (), gpu=name, sms=sms if on_gpu else None), model.graph, dtype)
    if name in DEVICES:
        return known.rates, known.ceilings
    path = folder / f"{slug(name)}--{dtype}.ceilings.json"
    try:
        ceilings = Ceilings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        ceilings = measure_ceilings(str(model.device), model.dtype)
        try:
            replace_file(path, json.dumps(asdict(ceilings)) + "\n")
        except OSError as error:
            raise OutputError(f"--out {folder}: {path.name} cannot be written: {error.strerror}") from None
    if known.profile is not None:
        return known.rates, ceilings
    tiles = on_gpu and model.dtype.itemsize == 2 and torch.cuda.get_device_capability(model.device)[0] == 9
    return CeilingRates(ceilings, sms, model.dtype.itemsize, tiles=tiles, waits=on_gpu), ceilings


def deal(seconds: float, mixes: Sequence[WeightedMix], least_seconds: float) -> list[float]:
    """Seconds for each of `mixes`, heaviest first: by weight, but nothing for those that would get fewer than
    `least_seconds`; the heaviest always gets some."""
    count = len(mixes)
    while count > 1:
        total = sum(mix.weight for mix in mixes[:count])
        if seconds * mixes[count - 1].weight / total >= least_seconds:
            break
        count -= 1
    total = sum(mix.weight for mix in mixes[:count])
    return [seconds * mix.weight / total if place < count else 0.0 for place, mix in enumerate(mixes)]
