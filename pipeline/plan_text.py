"""The YAML form of a plan: `parse_plan` reads it, `format_plan` writes it, and what was written reads back equal.

Shares are decimals where a decimal is exact (0.375) and fractions otherwise (``1/3``). Reading checks form only: types,
unknown and repeated keys. `nanoflow.pipeline.validate` checks meaning.
"""

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import yaml

from nanoflow.ops.row_sharding import ALL_REDUCE, SHARDINGS
from nanoflow.pipeline.plan import FINGERPRINT_KEYS, Entry, FrozenMapping, NanoBatch, Plan, PlanError, Stage
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.strict_yaml import StrictDumper, YamlError, load_yaml

__all__ = ["format_plan", "parse_plan"]

_KEYS = (
    *("model", "gpu", "sms", "mix", "sharding", "capacity", "least_rows", "nano_batches", "partitions", "period"),
    *("kernels", "measured", "fingerprint"),
)
_SHARE = re.compile(r"\s*-?\d{1,999}([./]\d{1,999})?\s*")
_NANO_BATCH_KEYS = ("decode", "prefill", "rows")
_MIX_KEYS = ("decode", "prefill", "context")


def parse_plan(text: str) -> Plan:
    """Read the YAML form. Raises PlanError that names the key, or the line where the text is no YAML."""
    try:
        data = load_yaml(text)
    except YamlError as error:
        raise PlanError(str(error)) from None
    top = _mapping(data, "the plan")
    _check_keys(top, "", _KEYS)
    for key in ("capacity", "nano_batches", "period"):
        if key not in top:
            raise PlanError(f"{key}: missing; a plan needs capacity, nano_batches and period")
    return Plan(
        capacity=_integer(top["capacity"], "capacity"),
        nano_batches=tuple(
            _nano_batch(name, value) for name, value in _mapping(top["nano_batches"], "nano_batches").items()
        ),
        period=tuple(_stage(index, value) for index, value in enumerate(_list(top["period"], "period"))),
        partitions=FrozenMapping(
            {
                name: tuple(
                    _integer(sms, f"partitions.{name}[{i}]") for i, sms in enumerate(_list(parts, f"partitions.{name}"))
                )
                for name, parts in _mapping(top.get("partitions", {}), "partitions").items()
            }
        ),
        kernels=FrozenMapping(
            {op: _string(value, f"kernels.{op}") for op, value in _mapping(top.get("kernels", {}), "kernels").items()}
        ),
        measured=FrozenMapping(
            {key: _value(value, key) for key, value in _mapping(top.get("measured", {}), "measured").items()}
        ),
        model=_string(top.get("model", ""), "model"),
        gpu=_string(top.get("gpu", ""), "gpu"),
        sms=None if top.get("sms") is None else _integer(top["sms"], "sms"),
        least_rows=_integer(top.get("least_rows", 0), "least_rows"),
        mix=_mix(top["mix"]) if "mix" in top else None,
        fingerprint=_fingerprint(top.get("fingerprint", {})),
        sharding=_sharding(top["sharding"]) if "sharding" in top else ALL_REDUCE,
    )


def format_plan(plan: Plan) -> str:
    """The YAML form of `plan`, in a fixed order of keys; what is empty is left out."""
    data: dict[str, Any] = {}
    for key in ("model", "gpu"):
        if getattr(plan, key):
            data[key] = getattr(plan, key)
    if plan.sms is not None:
        data["sms"] = plan.sms
    if plan.mix is not None:
        data["mix"] = _Inline({key: getattr(plan.mix, key) for key in _MIX_KEYS})
    if plan.sharding != ALL_REDUCE:
        data["sharding"] = plan.sharding
    data["capacity"] = plan.capacity
    if plan.least_rows:
        data["least_rows"] = plan.least_rows
    data["nano_batches"] = {
        nano_batch.name: _Inline(
            decode=_share_text(nano_batch.decode), prefill=_share_text(nano_batch.prefill), rows=nano_batch.rows
        )
        for nano_batch in plan.nano_batches
    }
    if plan.partitions:
        data["partitions"] = {name: _InlineList(parts) for name, parts in plan.partitions.items()}
    data["period"] = [
        {stage.partition: {lane: _InlineList(map(str, entries)) for lane, entries in stage.lanes.items()}}
        for stage in plan.period
    ]
    if plan.kernels:
        data["kernels"] = _Inline(plan.kernels)
    if plan.measured:
        data["measured"] = _Inline(plan.measured)
    if plan.fingerprint:
        data["fingerprint"] = _Inline(plan.fingerprint)
    return yaml.dump(data, Dumper=_PlanDumper, sort_keys=False, width=116, allow_unicode=True)


def _nano_batch(name: str, value: object) -> NanoBatch:
    where = f"nano_batches.{name}"
    fields = _mapping(value, where)
    _check_keys(fields, f"{where}.", _NANO_BATCH_KEYS)
    for key in _NANO_BATCH_KEYS:
        if key not in fields:
            raise PlanError(f"{where}.{key}: missing; a nano-batch needs decode, prefill and rows")
    return NanoBatch(
        name,
        _share(fields["decode"], f"{where}.decode"),
        _share(fields["prefill"], f"{where}.prefill"),
        _integer(fields["rows"], f"{where}.rows"),
    )


def _sharding(value: object) -> str:
    found = _string(value, "sharding")
    if found not in SHARDINGS:
        near = get_close_matches(found, SHARDINGS, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SHARDINGS)}"
        raise PlanError(f"sharding: unknown sharding {found!r}; {mend}")
    return found


def _mix(value: object) -> PlanMix:
    fields = _mapping(value, "mix")
    _check_keys(fields, "mix.", _MIX_KEYS)
    for key in _MIX_KEYS:
        if key not in fields:
            raise PlanError(f"mix.{key}: missing; a mix needs decode, prefill and context")
    return PlanMix(**{key: _integer(fields[key], f"mix.{key}") for key in _MIX_KEYS})


def _fingerprint(value: object) -> FrozenMapping[int | str]:
    fields = _mapping(value, "fingerprint")
    _check_keys(fields, "fingerprint.", FINGERPRINT_KEYS)
    for key, found in fields.items():
        if not isinstance(found, int | str) or isinstance(found, bool):
            raise PlanError(
                f"fingerprint.{key}: expected a whole number or a word, not {found!r}; put a version in quotes"
            )
    return FrozenMapping(fields)


def _stage(index: int, value: object) -> Stage:
    where = f"period[{index}]"
    stage = _mapping(value, where)
    if len(stage) != 1:
        raise PlanError(f"{where}: a stage has one key, its partition's name, not {', '.join(stage) or 'none'}")
    ((partition, lanes),) = stage.items()
    where = f"{where}.{partition}"
    result: dict[str, tuple[Entry, ...]] = {}
    for lane, entries in _mapping(lanes, where).items():
        parsed = []
        for place, entry in enumerate(_list(entries, f"{where}.{lane}")):
            try:
                parsed.append(Entry.parse(entry))
            except PlanError as error:
                raise PlanError(f"{where}.{lane}[{place}]: {error}") from None
        result[lane] = tuple(parsed)
    return Stage(partition, FrozenMapping(result))


def _is_share_text(value: object) -> bool:
    return isinstance(value, str) and _SHARE.fullmatch(value) is not None


def _share(value: object, where: str) -> Fraction:
    # Fraction reads more than is meant here, and 1e99999999, which it does not finish.
    if (isinstance(value, int | float) and not isinstance(value, bool)) or _is_share_text(value):
        try:
            return Fraction(str(value))  # 0.1 is meant as 1/10, not as the binary number nearest to it
        except (ValueError, ZeroDivisionError):
            pass
    raise PlanError(f"{where}: {value!r:.80} is no share; write a number such as 0.5 or a fraction such as 1/3")


def _share_text(share: Fraction) -> float | int | str:
    if share.denominator == 1:
        return int(share)
    return float(share) if Fraction(str(float(share))) == share else str(share)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"{where}: expected keys and values, not {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise PlanError(f"{where}: key {key!r} is read as {type(key).__name__}; put it in quotes")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{where}: expected a list, not {value!r}")
    return value


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{where}: expected a whole number, not {value!r}")
    return value


def _string(value: object, where: str) -> str:
    if value is None:
        raise PlanError(f"{where}: expected a name; give one, or leave the key out")
    if not isinstance(value, str):
        raise PlanError(f"{where}: expected a name, not {value!r}; put it in quotes")
    return value


def _value(value: object, key: str) -> float | int | str:
    if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise PlanError(f"measured.{key}: expected a finite number or a word, not {value!r}")


def _check_keys(given: Mapping[str, object], prefix: str, known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise PlanError(f"{prefix}{key}: unknown key; {mend}")


class _Inline(dict[str, Any]):
    """A mapping that is written on one line."""


class _InlineList(list[Any]):
    """A list that is written on one line, or on a few if it is long."""


class _PlanDumper(StrictDumper):
    """Writes plans: inner mappings and lists inline, no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_PlanDumper.add_representer(
    _Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=True)
)
_PlanDumper.add_representer(
    _InlineList, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
