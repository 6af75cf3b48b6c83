"""A plan file with all that is needed to show it: the model's graph, a mix of requests, and the device's ceilings."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nanoflow.checkpoints import open_checkpoint
from nanoflow.checkpoints.hub import is_hub_id
from nanoflow.errors import CheckpointError, InputError
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Work
from nanoflow.ops.row_sharding import layout_of
from nanoflow.ops.sharding import ShardError, shard_graph
from nanoflow.pipeline.plan import Plan, blamed_on
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.pipeline.validate import validate
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.fingerprint import ranks_of
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.profile import Profile, find_profile, layer_shape
from nanoflow.search.profile_rates import profile_rates
from nanoflow.search.rates import H100_ENERGY, H200_ENERGY, CeilingRates, Energy, Rates
from nanoflow.search.simulate import Simulation, simulate
from nanoflow.search.timeline import Timeline

__all__ = ["Device", "MixOptions", "PlanCase", "known_device", "open_case"]

DECODE, CONTEXT, PROMPT = 600, 768, 512
"""The mix where neither the plan nor the user says one: decode rows, their context, and the longest prompt."""
ITEMSIZE, DTYPE = 2, "bfloat16"
"""Bytes of an element where nothing says another data type than this."""
ITEMSIZES = {"float32": 4}


@dataclass(frozen=True)
class Device:
    """A device for estimates. Ceilings as `benchmarks/kernels` recorded them, or else those of its profile."""

    name: str
    sms: int
    ceilings: Ceilings
    energy: Energy | None
    profile: Profile | None = None
    """What was measured of the model's operations there."""
    profile_file: Path | None = None

    @property
    def rates(self) -> Rates:
        """By the profile; without one, by the ceilings of sm_90 in bfloat16."""
        if self.profile is None:
            return CeilingRates(self.ceilings, self.sms, ITEMSIZE, tiles=True, waits=True, energy=self.energy)
        itemsize = ITEMSIZES.get(str(self.profile.fingerprint.dtype), ITEMSIZE)
        return profile_rates(replace(self.profile, ceilings=self.rates_ceilings), itemsize, self.energy)

    @property
    def rates_ceilings(self) -> Ceilings:
        """Those that the rates stand on: the profile's, if there is one, with what is known of the link besides."""
        if self.profile is None:
            return self.ceilings
        own = self.profile.ceilings
        return replace(own, link_bytes_per_second=own.link_bytes_per_second or self.ceilings.link_bytes_per_second)


NVLINK4 = 265e9
"""Bytes that a rank sends in each second that a larger all-reduce takes longer, over the 18 NVLink 4 links of an H100
or H200, by NCCL without multicast: two H200s (NV18, torch 2.11), bfloat16, 1 to 64 MiB
(benchmarks/results/collectives.json; 230 GB/s of 32 MiB, what ranks wait included). The links' own rate is 450 GB/s in
each direction (NVIDIA, "H100 Tensor Core GPU Architecture": 900 GB/s in both)."""
H100 = Device(
    "NVIDIA H100 80GB HBM3",
    132,
    Ceilings(flops=717e12, bytes_per_second=3081e9, link_bytes_per_second=NVLINK4, power_limit_watts=700.0),
    H100_ENERGY,
)
H200 = Device(
    "NVIDIA H200",
    132,
    # Of a layer of Llama-3-70B on two of them: the products of 2,048 rows took 2.57 ms, which is what 746 TFLOP/s give
    # with their tiles, and decode attention of 1,024 requests of 768 tokens 0.39 ms.
    Ceilings(flops=746e12, bytes_per_second=4130e9, link_bytes_per_second=NVLINK4, power_limit_watts=700.0),
    H200_ENERGY,
)
DEVICES = {H100.name: H100, H200.name: H200}


@dataclass(frozen=True, eq=False)
class PlanCase:
    """One plan on one model, mix and device."""

    file: str
    plan: Plan
    model: str
    model_path: str
    graph: Graph
    mix: Mix
    device: Device

    @cached_property
    def program(self) -> Program:
        return compile_program(self.plan, self.graph)

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Of each nano-batch."""
        return mix_works(self.plan, self.mix)

    @cached_property
    def simulation(self) -> Simulation:
        """All layers of an iteration, estimated."""
        return simulate(self.program, self.works, self.device.rates)

    @property
    def timeline(self) -> Timeline:
        """Of the simulation."""
        return self.simulation.timeline

    def with_layers(self, layers: int) -> "PlanCase":
        """The same with so many layers."""
        return replace(self, graph=replace(self.graph, layers=layers))

    def sequential(self) -> "PlanCase":
        """The same with the plan that runs all in sequence."""
        return replace(self, plan=Plan.sequential(self.graph, self.plan.capacity))

    @property
    def ceilings_text(self) -> str:
        """The ceilings that estimates stand on, and whose they are."""
        device, ceilings = self.device, self.device.ceilings
        own = self.plan.gpu in ("", device.name)
        return (
            f"{device.name}: {ceilings.flops / 1e12:,.0f} TFLOP/s, {ceilings.bytes_per_second / 1e9:,.0f} GB/s, "
            f"{self.link_text}{device.sms} SMs{'' if own else f' (none are known of {self.plan.gpu})'}"
        )

    @property
    def link_text(self) -> str:
        """Of several ranks: what is known of the link between them, with a comma behind it."""
        link = self.device.rates_ceilings.link_bytes_per_second
        if self.graph.ranks == 1:
            return ""
        return "link not known, " if link is None else f"{link / 1e9:,.0f} GB/s on the wire, "


@dataclass(frozen=True)
class MixOptions:
    """What the user says of the mix; None: what the plan says, or what is usual."""

    decode: int | None = None
    context: int | None = None
    prompts: tuple[int, ...] | None = None


def open_case(
    file: str | Path,
    model: str | None = None,
    mix: MixOptions | None = None,
    *,
    layers: int | None = None,
    tensor: int | None = None,
) -> PlanCase:
    """Read the plan of `file`, and validate it against the model.

    Args:
        model: a folder, a GGUF file or the name of a shipped shape; by default the shipped one that the plan names.
        layers: only so many of the model's; by default all.
        tensor: ranks that share the model; the graph is then one of theirs. By default as many as the plan was tuned
            for.

    Raises:
        UserError, PlanError: one message that names what is wrong, and the mend.
    """
    plan = Plan.load(file)
    tensor = tensor or ranks_of(str(plan.fingerprint.get("shape", "")))
    name, path, graph = open_graph(model, plan, str(file))
    if layers is not None:
        if not 1 <= layers <= graph.layers:
            raise InputError(f"--layers {layers}: {name} has {graph.layers}; give a number from 1 to {graph.layers}")
        graph = replace(graph, layers=layers)  # its windows, if any, are those of the first layers
    try:
        graph = shard_graph(graph, 0, tensor, layout_of(plan.sharding))
    except ShardError as error:
        raise InputError(f"--tensor {tensor}: {error}") from None
    with blamed_on(file):
        validate(plan, graph)
    return PlanCase(
        str(file), plan, name, path, graph, choose_mix(plan, mix or MixOptions()), known_device(plan, graph)
    )


def open_graph(model: str | None, plan: Plan, file: str) -> tuple[str, str, Graph]:
    """Name, path and graph of the model; no weights are read."""
    shapes = shipped_shapes()
    known = f"a folder, a .gguf file or one of {', '.join(shapes)}"
    if model is None:
        if not plan.model:
            raise InputError(f"{file}: model: the plan names none; give one with --model: {known}")
        if plan.model not in shapes:
            raise InputError(f"{file}: model: no shape of {plan.model!r} comes with NanoFlow; give --model: {known}")
        model = plan.model
    path = model
    if not Path(model).expanduser().exists():
        if model in shapes:
            path = str(shapes[model])
        elif not (model.startswith("package:") or is_hub_id(model)):
            raise InputError(f"--model {model}: there is no such folder or file; give {known}")
    try:
        checkpoint = open_checkpoint(path, need_weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"--model {model}: {error}") from None
    return checkpoint.name, path, build_graph(ModelConfig.from_dict(checkpoint.config))


def shipped_shapes() -> dict[str, Path]:
    """Folders of the model shapes that come with the package, by name."""
    folder = Path(__file__).parents[1] / "configs" / "models"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()}


def known_device(plan: Plan, graph: Graph | None = None, dtype: str | None = None) -> Device:
    """The device that the plan was tuned for, if its ceilings are known or it was profiled, else an H100.

    With a `graph`, and a profile of that model's layer on the device, it has that profile. The plan's SMs must be the
    profile's, and so must `dtype`, by default what the plan was measured in, else bfloat16.
    """
    known = DEVICES.get(plan.gpu)
    if graph is not None:
        gpu, kind = plan.gpu or H100.name, dtype or str(plan.fingerprint.get("dtype") or DTYPE)
        found = find_profile(gpu, layer_shape(graph), kind, sms=plan.sms)
        if found is not None:
            file, profile = found
            base = DEVICES.get(gpu) or Device(gpu, 1, profile.ceilings, None)
            return replace(base, sms=profile.fingerprint.sms or 1, profile=profile, profile_file=file)
    device = known or H100
    return device if plan.sms is None else replace(device, sms=plan.sms)


def choose_mix(plan: Plan, options: MixOptions) -> Mix:
    """The mix that was asked for. Raises InputError if it holds nothing, or does not fit the plan."""

    own = plan.mix or PlanMix(min(DECODE, (plan.capacity + 1) // 2), plan.capacity, CONTEXT)
    capacity, decode, context, prompts = plan.capacity, options.decode, options.context, options.prompts
    if decode is None:
        decode = max(0, min(own.decode, capacity - sum(prompts or ())))
    if context is None:
        context = own.context or CONTEXT
    if prompts is None:
        tokens = min(max(0, capacity - decode), own.prefill)
        prompts = (PROMPT,) * (tokens // PROMPT) + ((tokens % PROMPT,) if tokens % PROMPT else ())
    mix = Mix(decode, context, prompts)
    for key, value, least in (("decode", decode, 0), ("context", context, 1), *(("prompts", p, 1) for p in prompts)):
        if value < least:
            raise InputError(f"--{key} {value}: must be {least} or more")
    if not mix.rows:
        raise InputError("--decode 0 without --prompts is an empty batch; give some of either")
    if mix.rows > capacity:
        raise InputError(
            f"--decode, --prompts: {decode:,} decode rows and {sum(prompts):,} prompt tokens are {mix.rows:,} rows, "
            f"more than the plan's capacity of {capacity:,}; give fewer"
        )
    return mix
