"""Whether a plan can run: one that passes covers every row of every operation once, fits its device and ends.

Contract: `validate` is the only judge of plans, for those read from files and for those that a search proposes alike.
It looks at the plan's own numbers first, then compiles it, which finds missing rows and deadlocks.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from fractions import Fraction

from nanoflow.ops.graph import Graph
from nanoflow.pipeline.period import ranks_hint
from nanoflow.pipeline.plan import WHOLE, Plan, PlanError
from nanoflow.pipeline.program import compile_program

__all__ = ["validate"]


def validate(plan: Plan, graph: Graph, *, sms: int | None = None) -> None:
    """Raise PlanError if `plan` cannot run `graph`, with its own sharding where ranks share the model.

    `sms` are those of the device, where it is known and has any. What the plan was tuned for beyond that,
    `nanoflow.search.fingerprint` compares.
    """
    if sms is not None and plan.sms is not None and plan.sms != sms:
        raise PlanError(f"sms: the plan was tuned for {plan.sms} SMs, but this device has {sms}: use another plan")
    _check_nano_batches(plan)
    _check_mix(plan)
    _check_partitions(plan)
    graph = plan.graph(graph)
    _check_kernels(plan, graph)
    program = compile_program(plan, graph)
    whole = {step.nano_op.op for step in program.steps if step.nano_op.nano_batch is None}
    whole |= {op.name for op in (*graph.prologue, *graph.epilogue)}
    for key in plan.kernels:
        name, *nano_batch = key.split(".")
        if nano_batch and name in whole:
            raise PlanError(f"kernels.{key}: {name} runs on all rows at once here: write kernels.{name}")


def _check_mix(plan: Plan) -> None:
    mix = plan.mix
    if mix is None:
        return
    for key, value in (("decode", mix.decode), ("prefill", mix.prefill), ("context", mix.context)):
        if value < 0:
            raise PlanError(f"mix.{key}: {value} is less than nothing; it must be at least 0")
    if not max(1, plan.least_rows) <= mix.decode + mix.prefill <= plan.capacity:
        raise PlanError(
            f"mix: {mix.decode} decode and {mix.prefill} prefill rows are no batch of {max(1, plan.least_rows)} to "
            f"{plan.capacity} rows, which the plan is for; change them, or `least_rows` and `capacity`"
        )
    if mix.decode and not mix.context:
        raise PlanError("mix.context: decode rows attend to 1 token or more; give the mean of them")


def _check_nano_batches(plan: Plan) -> None:
    if plan.capacity < 1:
        raise PlanError(f"capacity: {plan.capacity} rows hold no batch; it must be at least 1")
    if not 0 <= plan.least_rows <= plan.capacity:
        raise PlanError(f"least_rows: {plan.least_rows} is not between 0 and the capacity of {plan.capacity} rows")
    if not plan.nano_batches:
        raise PlanError("nano_batches: a plan needs at least one")
    names = [nano_batch.name for nano_batch in plan.nano_batches]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"nano_batches: two are named {name!r}; rename one")
    for nano_batch in plan.nano_batches:
        where = f"nano_batches.{nano_batch.name}"
        if not (nano_batch.name.isidentifier() and nano_batch.name.isascii()):
            raise PlanError(f"{where}: {nano_batch.name!r} cannot name a nano-batch; use letters, digits and _")
        for key, share in (("decode", nano_batch.decode), ("prefill", nano_batch.prefill)):
            if not 0 <= share <= 1:
                raise PlanError(f"{where}.{key}: a share is between 0 and 1, not {share}")
        if nano_batch.rows < 1:
            raise PlanError(f"{where}.rows: {nano_batch.rows} rows hold nothing; it must be at least 1")
    decode = sum((nano_batch.decode for nano_batch in plan.nano_batches), Fraction(0))
    prefill = sum((nano_batch.prefill for nano_batch in plan.nano_batches), Fraction(0))
    for key, total in (("decode", decode), ("prefill", prefill)):
        if total != 1:
            raise PlanError(
                f"nano_batches: the {key} shares add up to {total}, not to 1; "
                "write shares that decimals cannot hold as fractions, such as 1/3"
            )
    if plan.rows < plan.capacity:
        raise PlanError(
            f"nano_batches: their rows add up to {plan.rows}, which does not cover the capacity of {plan.capacity}; "
            "raise some `rows`"
        )


def _check_partitions(plan: Plan) -> None:
    for name, parts in plan.partitions.items():
        where = f"partitions.{name}"
        if not parts or min(parts) < 1:
            raise PlanError(f"{where}: every part needs at least 1 SM, not {list(parts)}")
        if plan.sms is None:
            raise PlanError(f"{where}: give the device's number of SMs as `sms`, so that the parts can be checked")
        if sum(parts) > plan.sms:
            raise PlanError(f"{where}: {list(parts)} takes {sum(parts)} SMs, but `sms` is {plan.sms}; take fewer")
    if not plan.period:
        raise PlanError("period: a plan needs at least one stage")
    for index, stage in enumerate(plan.period):
        where = f"period[{index}].{stage.partition}"
        if not stage.lanes:
            raise PlanError(f"{where}: a stage needs at least one lane")
        if stage.partition not in plan.partitions:
            if stage.partition != WHOLE:
                known = [*plan.partitions, WHOLE]
                raise PlanError(f"{where}: unknown partition {stage.partition!r}{_hint(stage.partition, known)}")
        elif len(stage.lanes) != len(plan.partitions[stage.partition]):
            raise PlanError(
                f"{where}: {len(stage.lanes)} lanes ({', '.join(stage.lanes)}) cannot share the "
                f"{len(plan.partitions[stage.partition])} parts of partition {stage.partition}; it needs one a lane"
            )


def _check_kernels(plan: Plan, graph: Graph) -> None:
    operations = {op.name: op for op in (*graph.layer, *graph.prologue, *graph.epilogue)}
    nano_batches = [nano_batch.name for nano_batch in plan.nano_batches]
    for key, kernel in plan.kernels.items():
        name, _, nano_batch = key.partition(".")
        if name not in operations:
            hint = ranks_hint(name, graph) or _hint(name, operations)
            raise PlanError(f"kernels.{key}: unknown operation {name!r}{hint}")
        if key != name and nano_batch not in nano_batches:
            raise PlanError(f"kernels.{key}: unknown nano-batch {nano_batch!r}{_hint(nano_batch, nano_batches)}")
        known = operations[name].kernels
        if kernel not in known:
            # No nearest one: of names such as nccl_4 and nccl_8 any may be meant.
            raise PlanError(f"kernels.{key}: unknown kernel {kernel!r}; known: {', '.join(known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
