"""How fast operations run: alone, on a part of the SMs, and beside each other.

Contract: `Rates` answers for one device and one dtype, from the operation and its work alone; it knows no plan. The
simulator and the search take any. `CeilingRates` computes them from a few measured ceilings; a profile, which has them
measured, is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanoflow.ops.collectives import CTAS, Collective
from nanoflow.ops.gemm_waves import waves
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import Cost, Operation, Work
from nanoflow.ops.peer_all_reduce import PEER_FORMS, UNCONFINED
from nanoflow.ops.peer_rows import PUSH
from nanoflow.search.cost_model import Ceilings

__all__ = [
    "H100_ENERGY",
    "H200_ENERGY",
    "CeilingRates",
    "Energy",
    "Rates",
    "Running",
    "bandwidth_on",
    "collective_sms",
    "shared_sms",
    "waiting_seconds",
    "wire_share",
]

LINK_SMS = 24
"""SMs that a collective takes where neither the lane nor the kernel has fewer. NCCL chooses: more than 16 on NVLink 4,
where it is an eighth faster than on 16 (`wire_share`)."""


@dataclass(frozen=True)
class Running:
    """An operation at work."""

    op: Operation
    work: Work
    sms: int | None
    """SMs of its lane; None: the lane is not confined."""
    kernel: str = ""
    """Of a collective, whose forms differ in what they take; empty: the preferred one."""

    @property
    def taken(self) -> int | None:
        """SMs that it takes from the others; None: it shares what they leave."""
        return collective_sms(self.kernel, self.sms) if isinstance(self.op, Collective) else self.sms


def collective_sms(kernel: str, lane: int | None) -> int:
    """SMs that a collective takes with `kernel` (empty: the preferred one): as many as it has thread blocks, and none
    where copy engines do the work. `lane`: SMs of its lane; None: it is not confined."""
    if kernel == "copy_engine":
        return 0
    if lane is None:
        return {**CTAS, **dict.fromkeys(PEER_FORMS, UNCONFINED), **PUSH}.get(kernel, LINK_SMS)
    return min(CTAS.get(kernel, LINK_SMS), lane)


def wire_share(sms: int) -> float:
    """The share of a link that collectives fill with so many SMs; all of it with none, which is what copy engines do.

    With x = sms / 11.6::

        share = x / (1 + x ** 3) ** (1 / 3)

    and all of it from `LINK_SMS` on. Fitted to all-reduces in bfloat16 between two H200s (NV18, torch 2.11, NCCL): the
    bytes by which they grow in a second, from 1 to 64 MiB, are 46, 90, 167 and 240 GB on at most 2, 4, 8 and 16 thread
    blocks, and 265 on as many as NCCL likes, which it meets within 2% (benchmarks/results/collectives.json). A profile
    has them measured.
    """
    if not sms or sms >= LINK_SMS:
        return 1.0
    x = sms / 11.6
    return float(x / (1 + x**3) ** (1 / 3))


def waiting_seconds(op: Collective, kernel: str) -> float:
    """What a collective takes between GPUs of one host beyond what its bytes take; `kernel` as in `Running`.

    All-reduces of 1 to 64 MiB between two H200s (benchmarks/results/collectives.json) take so long and what their bytes
    take at one rate, within a few per cent for own forms and a sixth for NCCL: 17 us with NCCL, 20 with copy engines, 4
    in one shot and 8 in two. Halves of them are taken to wait half as long, but with NCCL.
    """
    if kernel in CTAS or kernel in ("", "nccl", "reference"):
        return 17e-6
    return op.ways(kernel) * (10e-6 if kernel == "copy_engine" else 4e-6)


def shared_sms(device_sms: int, taken: Sequence[int | None]) -> float:
    """SMs of each lane that is not confined (None in `taken`), where the others take so many: they share the rest."""
    free = sum(sms is None for sms in taken)
    return max(1.0, device_sms - sum(sms or 0 for sms in taken)) / free if free else 0.0


class Rates(Protocol):
    """Of one device, for one dtype."""

    @property
    def device_sms(self) -> int:
        """SMs of the device."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element of weights and activations."""

    @property
    def idle_watts(self) -> float | None:
        """What the device draws whatever runs; None: joules are not known, and `joules` means nothing."""

    @property
    def limit_watts(self) -> float | None:
        """What the device may draw; None: no limit is known."""

    def seconds(self, op: Operation, work: Work, sms: int | None, kernel: str = "") -> float:
        """What `work` takes with nothing beside it, on `sms` SMs or, for None, on the whole device; of a collective,
        with `kernel` (empty: the preferred one)."""

    def kept(self, running: Running, beside: Sequence[Running]) -> float:
        """The share of its solo speed, above 0 and up to 1, that `running` keeps while `beside` run in other lanes."""

    def joules(self, op: Operation, work: Work, sms: int | None) -> float:
        """What `work` takes beyond what the device draws whatever runs."""


@dataclass(frozen=True)
class Energy:
    """Where the joules of a device go."""

    joules_per_flop: float
    joules_per_byte: float
    """Of main memory, read or written."""
    watts: float
    """Drawn whatever runs."""


H100_ENERGY = Energy(joules_per_flop=0.67e-12, joules_per_byte=138e-12, watts=200.0)
"""Of an H100 80GB HBM3 in bfloat16.

The watts are what is left of one layer's power when its products and its decode attention were measured alone and
together: of 950 mJ in 1.41 ms about 650 mJ went with the work, and the rest, 200 W, with time. Given those, the two
others are solved from the joules, FLOPs and bytes of the steady state of two recorded runs
(benchmarks/results/offline_throughput.json): 512-512, 29,766 J in 43.0 s, 692 W and 30.6 J an iteration, and 512-1024,
21,659 J in 31.4 s. The other runs come out within 2%. Idle moments and lower clocks are in these figures as they were
there.
"""

H200_ENERGY = Energy(joules_per_flop=0.82e-12, joules_per_byte=51e-12, watts=200.0)
"""Of an H200 in bfloat16: least squares over what a card drew in 33 plans of Llama-3-70B on two of them
(benchmarks/results/network_lanes.json), all under the power limit; they come out within 5%. The watts are an H100's.
Its memory takes fewer joules a byte: plans that read all weights twice draw hardly more than those that read them once.
"""


def bandwidth_on(sms: float, device_sms: int, ceiling: float) -> float:
    """Bytes/s that `sms` of a device's `device_sms` SMs read, if all of them read `ceiling`.

    Few SMs have too few loads in flight: the rate grows with them and then saturates.
    With x = 3.7 * sms / device_sms::

        rate = ceiling * x / (1 + x ** 8) ** (1 / 8)

    fitted to decode attention on an H100 (132 SMs): 45, 67, 86, 95 and 98% of the rate of all SMs on 16, 24, 32, 40 and
    48, which it meets within 2% (benchmarks/results/profile_parts.json). Parts of other sizes, which have SMs of no
    group of 8, read less. A measured profile of the device may take its place.
    """

    def saturating(share: float) -> float:
        x = 3.7 * share
        return float(x / (1 + x**8) ** (1 / 8))

    return ceiling * min(1.0, saturating(sms / device_sms) / saturating(1.0))


@dataclass(frozen=True)
class CeilingRates:
    """Rates at best, by a device's ceilings.

    An operation takes the longest of: its FLOPs at its SMs' share of the FLOP/s ceiling, its bytes at what so many SMs
    read (`bandwidth_on`). A collective takes the longer of: its bytes on the wire at the share of the link's ceiling
    that its SMs fill (`wire_share`), all of it for copy engines, and its bytes at what memory gives; where the link is
    not known, only its bytes. Side by side, lanes that are not confined share the SMs that collectives leave, evenly;
    where all together would move more bytes than memory or the link gives, each gets an even share, and what one leaves
    over goes to the others. Launching costs nothing, but for what collectives wait, with `waits`. Joules are
    ``joules_per_flop * FLOPs + joules_per_byte * bytes``, whatever the SMs.
    """

    ceilings: Ceilings
    device_sms: int
    itemsize: int
    tiles: bool = False
    """Lengthen products by the share of the tensor cores' cycles that their tiles leave unused; only for devices that
    `nanoflow.ops.gemm_waves` counts for: sm_90 in 16-bit types."""
    waits: bool = False
    """Add what ranks wait for each other in a collective; for GPUs of one host (`waiting_seconds`)."""
    energy: Energy | None = None
    _costs: dict[tuple[Operation, Work, str], Cost] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def idle_watts(self) -> float | None:
        return None if self.energy is None else self.energy.watts

    @property
    def limit_watts(self) -> float | None:
        return self.ceilings.power_limit_watts

    def seconds(self, op: Operation, work: Work, sms: int | None, kernel: str = "") -> float:
        taken = Running(op, work, sms, kernel).taken
        return self._seconds(op, work, self.device_sms if taken is None else taken, kernel)

    def joules(self, op: Operation, work: Work, sms: int | None) -> float:
        if self.energy is None:
            return 0.0
        cost = self._cost(op, work)
        return self.energy.joules_per_flop * cost.flops + self.energy.joules_per_byte * cost.bytes

    def kept(self, running: Running, beside: Sequence[Running]) -> float:
        together = [running, *beside]
        free = shared_sms(self.device_sms, [each.taken for each in together])
        speeds, moved, sent = [], [], []
        for each in together:
            sms = free if each.taken is None else each.taken
            speeds.append(1 / self._seconds(each.op, each.work, sms, each.kernel))
            cost = self._cost(each.op, each.work, each.kernel)
            moved.append(cost.bytes * speeds[-1])
            sent.append(cost.wire_bytes * speeds[-1])
        speed = speeds[0] * _granted(moved, self.ceilings.bytes_per_second)
        if sent[0] and self.ceilings.link_bytes_per_second:
            speed = min(speed, speeds[0] * _granted(sent, self.ceilings.link_bytes_per_second))
        return min(1.0, speed * self.seconds(running.op, running.work, running.sms, running.kernel))

    def _seconds(self, op: Operation, work: Work, sms: float, kernel: str) -> float:
        cost, ceilings = self._cost(op, work, kernel), self.ceilings
        if isinstance(op, Collective):
            link = ceilings.link_bytes_per_second
            wire = cost.wire_bytes / (link * wire_share(int(sms))) if link else 0.0
            waited = waiting_seconds(op, kernel) if self.waits and link else 0.0
            return max(wire, cost.bytes / ceilings.bytes_per_second, 1e-12) + waited
        used = 1.0
        if self.tiles and work.rows and isinstance(op, Linear | LinearSilu):
            linear = op.linear if isinstance(op, LinearSilu) else op
            silu = isinstance(op, LinearSilu)
            used = waves(sum(linear.outputs), linear.inputs, work.rows, max(1, int(sms)), silu=silu).used
        needed = [
            cost.flops / (ceilings.flops * used * sms / self.device_sms),
            cost.bytes / bandwidth_on(sms, self.device_sms, ceilings.bytes_per_second),
        ]
        return max(*needed, 1e-12)

    def _cost(self, op: Operation, work: Work, kernel: str = "") -> Cost:
        """Kept: a simulation asks for the same again and again."""
        key = op, work, kernel
        if key not in self._costs:
            if isinstance(op, Collective):
                self._costs[key] = op.cost_with(kernel, work, self.itemsize)
            else:
                self._costs[key] = op.cost(work, self.itemsize)
        return self._costs[key]


def _granted(wanted: Sequence[float], room: float) -> float:
    """The share of what it wants that the first gets of `room`: all get an even share, and what one leaves over goes to
    the others."""
    left = len(wanted)
    for place in sorted(range(len(wanted)), key=lambda place: wanted[place]):
        share = min(wanted[place], room / left)
        room, left = room - share, left - 1
        if place == 0:
            return share / wanted[0] if wanted[0] else 1.0
    raise AssertionError("the first is one of all")
