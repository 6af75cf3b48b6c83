"""The search for the plan that is fastest on one mix: Optuna proposes, a simulator filters, measuring decides.

Contract: the value of a plan is how many times as fast as in sequence it was measured to be; the sampler is told
measured values only. A plan is measured once, also over several starts (`Journal`). The sequential plan is trial 0,
with the value 1. Which plans are measured in what rounds depends on the seed and on what was measured alone.

Pseudo-code::

    until there is no time left, or enough was measured, or nothing new is proposed:
        ask for several times as many plans as a round has: first those that are likely good, then the sampler's
            a plan that was measured before is told its value
        simulate the new ones; the round is those that are predicted to be fastest, and one of the others at random
        measure the round; tell what was measured, and write it to the journal

Trials that the simulator rejects end as FAIL, without a value: the sampler looks at COMPLETE and PRUNED ones only, so
it never takes a prediction for a measurement, nor a plan for bad that nobody has tried. So do plans that gave
wrong outputs or did not fit the device; those are kept, and not tried again.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import optuna
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState

from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import with_sharding
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.search.favourites import favourites
from nanoflow.search.journal import Journal, quiet_optuna
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.rates import Rates
from nanoflow.search.simulate import Simulation, seconds_under_limit, simulate
from nanoflow.search.space import build_plan, suggest

__all__ = ["ROUND", "Candidate", "Outcome", "PlanSearch", "Step", "Target", "Tried", "search"]

ROUND = 6
"""Plans that are measured beside each other: more take longer until anything is known, fewer measure the sequential
plan more often."""
ASKED = 4
"""Plans that are proposed for each one that is measured."""
MOST_ASKED = 200
"""Trials without a new plan, after which the space counts as exhausted."""
STARTUP = 12
"""Measured plans before the sampler's model is used: the likely good ones are as many."""
SHORT, LONG = 2, 5
"""Layers of the two simulations whose difference is steady state; what stands at either end of a model is in both."""


@dataclass(frozen=True, eq=False)
class Target:
    """What a plan is searched for."""

    graph: Graph
    mix: Mix
    rows: int
    """Most rows of the dense batches, padding included: the capacity of the plans."""
    rates: Rates
    """Of the simulator."""
    sms: int
    """SMs that can be set apart for lanes; 0 if none can."""
    kernels: tuple[str, ...] = ()
    """What else products and decode attention may run on than the device's own choice."""
    _graphs: dict[int, Graph] = field(default_factory=dict, init=False, repr=False)
    """Of so many layers: the same objects for each plan, since rates keep what they know of operations."""

    def plan(self, trial: Trial) -> Plan:
        """Ask `trial` for a plan."""
        choice = suggest(trial, self.graph, self.rows, self.sms, self.kernels)
        if len(choice.decode) == 1:  # products as the sequential plan has them, which all others are compared with
            graph = with_sharding(self.graph, choice.sharding) if choice.sharding else self.graph
            forms = {op.name: choice.kernels.get(op.name, "") for op in graph.layer if isinstance(op, Collective)}
            choice = replace(choice, kernels=FrozenMapping({name: form for name, form in forms.items() if form}))
        return build_plan(choice, self.graph, self.mix, self.rows, self.rates)

    def predict(self, plan: Plan) -> float:
        """Seconds of a layer in steady state, under the power limit."""
        short, long = (self.simulate(plan, layers) for layers in (SHORT, LONG))
        seconds = long.seconds - short.seconds
        if long.work_joules is not None and short.work_joules is not None:
            seconds = seconds_under_limit(seconds, long.work_joules - short.work_joules, self.rates)
        return seconds / (LONG - SHORT)

    def simulate(self, plan: Plan, layers: int | None = None) -> Simulation:
        """All layers of an iteration, or so many."""
        graph = self.graph if layers is None else self._graphs.setdefault(layers, replace(self.graph, layers=layers))
        return simulate(compile_program(plan, graph), mix_works(plan, self.mix), self.rates)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan that is to be measured."""

    trial: Trial
    plan: Plan
    predicted: float
    """How many times as fast as in sequence the simulator takes it to be."""


@dataclass(frozen=True)
class Outcome:
    """What came of measuring a plan."""

    ratio: float | None
    """How many times as fast as in sequence; None if it gave wrong outputs, or did not run."""
    why: str = ""
    """It did not; one line."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else was measured, by name."""


@dataclass(frozen=True)
class Tried:
    """A plan that was measured."""

    plan: Plan
    ratio: float
    predicted: float


@dataclass(frozen=True)
class Step:
    """One plan of a search, in the order in which they were told; the sequential one is left out."""

    plan: str
    """As text."""
    ratio: float | None
    """How many times as fast as in sequence; None if it gave wrong outputs, or did not run."""
    predicted: float
    """What the simulator took it for when it was proposed."""
    why: str
    figures: Mapping[str, float]
    """What else was measured, by name."""


class PlanSearch:
    """Proposals for one target, and what was measured of them.

    Args:
        journal: keeps what is told, and has what was told before; None: nothing is kept.
        seed: of the sampler. A search that goes on does not repeat its first proposals.

    Raises PlanError if the journal has a plan that cannot be read.
    """

    def __init__(self, target: Target, journal: Journal | None = None, *, seed: int = 0) -> None:
        quiet_optuna()
        self.target = target
        self.failures: list[str] = []
        """Why plans were given up, one line each."""
        self._journal = journal
        self._known: dict[str, float | None] = {}
        """Values of the plans that were measured, by their text; None: they failed."""
        self._tried: list[Tried] = []
        earlier = [] if journal is None else journal.trials
        self._random = random.Random(seed + len(earlier))
        # Multivariate, since the shares, the split and the skew only mean something together; by groups, since most
        # parameters exist for some values of others only. A liar, since a round is asked for before any is told.
        sampler = TPESampler(
            seed=seed + len(earlier), multivariate=True, group=True, constant_liar=True, n_startup_trials=STARTUP
        )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        for finished in earlier:
            self._study.add_trial(finished)
            notes = finished.user_attrs
            self._remember(notes["plan"], finished.value, notes["predicted"])
        self.sequential = Plan.sequential(target.graph, target.rows)
        self._sequential_seconds = target.predict(self.sequential)
        compared = {"nano_batches": 1, "sharding": self.sequential.sharding}
        compared |= {f"kernel_{op.name}": "" for op in self.sequential.graph(target.graph).layer}
        self._first = [compared, *favourites(target.graph, target.rows, target.sms, target.kernels)]
        for parameters in self._first:
            self._study.enqueue_trial(parameters)
        if self.sequential.dumps() not in self._known:
            trial = self._study.ask()
            self._first.pop(0)
            self.tell(Candidate(trial, target.plan(trial), 1.0), Outcome(1.0))

    @property
    def measured(self) -> int:
        """Plans that were measured, without the sequential one; those that failed count too."""
        return len(self._known) - 1

    @property
    def steps(self) -> tuple[Step, ...]:
        """All plans that were told, those of earlier starts included."""
        told = [trial for trial in self._study.get_trials(deepcopy=False) if "plan" in trial.user_attrs]
        found: dict[str, Step] = {}
        for trial in told:
            notes = dict(trial.user_attrs)
            plan, predicted, why = notes.pop("plan"), notes.pop("predicted"), notes.pop("why", "")
            if plan != self.sequential.dumps():
                found.setdefault(plan, Step(plan, trial.value, predicted, why, notes))
        return tuple(found.values())

    def best(self, count: int) -> list[Tried]:
        """The fastest of the plans that were measured, without the sequential one."""
        return sorted(self._tried, key=lambda tried: -tried.ratio)[:count]

    def propose(self, count: int = ROUND) -> list[Candidate]:
        """Up to `count` plans that were not measured yet; none if no new one is found."""
        fresh: dict[str, Candidate] = {}
        certain: list[Candidate] = []
        asked = 0
        while len(certain) < count and len(fresh) + len(certain) < ASKED * count and asked < MOST_ASKED:
            likely = bool(self._first)
            trial = self._study.ask()
            asked += 1
            if likely:
                self._first.pop(0)
            plan = self.target.plan(trial)
            text = plan.dumps()
            if text in self._known:
                self._finish(trial, self._known[text])
            elif text in fresh or any(plan == candidate.plan for candidate in certain):
                self._finish(trial, None)
            else:
                candidate = Candidate(trial, plan, self._sequential_seconds / self.target.predict(plan))
                if likely:
                    certain.append(candidate)
                else:
                    fresh[text] = candidate
        ranked = sorted(fresh.values(), key=lambda candidate: -candidate.predicted)
        room = count - len(certain)
        chosen = ranked[: max(0, room - 1)]
        rest = ranked[len(chosen) :]
        if room > 0 and rest:
            # The simulator can be wrong about a whole family: some of what it thinks little of is tried all the same.
            chosen.append(rest.pop(self._random.randrange(len(rest))))
        for candidate in rest:
            self._finish(candidate.trial, None)
        return certain + chosen

    def tell(self, candidate: Candidate, outcome: Outcome) -> None:
        """Note what was measured, and keep it. Raises PlanError if the journal cannot be written."""
        trial, text = candidate.trial, candidate.plan.dumps()
        trial.set_user_attr("plan", text)
        trial.set_user_attr("predicted", candidate.predicted)
        for key, value in outcome.figures.items():
            trial.set_user_attr(key, value)
        if outcome.ratio is None:
            trial.set_user_attr("why", outcome.why)
            self.failures.append(outcome.why)
        finished = self._finish(trial, outcome.ratio)
        self._remember(text, outcome.ratio, candidate.predicted)
        if self._journal is not None:
            self._journal.add(finished)

    def _finish(self, trial: Trial, value: float | None) -> optuna.trial.FrozenTrial:
        if value is None:
            return self._study.tell(trial, state=TrialState.FAIL)
        return self._study.tell(trial, value)

    def _remember(self, text: str, value: float | None, predicted: float) -> None:
        if text in self._known:
            return
        plan = Plan.loads(text)
        self._known[text] = value
        if value is not None and not plan.is_sequential(self.target.graph):
            self._tried.append(Tried(plan, value, predicted))


def search(
    plans: PlanSearch,
    measure: Callable[[Sequence[Plan]], Sequence[Outcome]],
    *,
    trials: int | None = None,
    goes_on: Callable[[], bool] = lambda: True,
    told: Callable[[], None] = lambda: None,
    size: int = ROUND,
) -> None:
    """Search until nothing new is proposed.

    Args:
        measure: runs some plans beside the sequential one.
        trials: most plans that are measured, those of earlier starts included.
        goes_on: asked before every round.
        told: called after every round.
        size: of a round.
    """
    while goes_on() and (trials is None or plans.measured < trials):
        count = size if trials is None else min(size, trials - plans.measured)
        candidates = plans.propose(count)
        if not candidates:
            return
        for candidate, outcome in zip(candidates, measure([each.plan for each in candidates]), strict=True):
            plans.tell(candidate, outcome)
        told()
