"""Independent operators at the same time, on several queues of the compute engine, where that is predicted to pay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from ...compiler.runtime.device.layout import DevicePlan
from ...compiler.simulate import simulate
from ...errors import OptionError
from ...hw_models.model import Concurrency
from .assignment import RULES
from .search import Search, with_waits

__all__ = ["CriticalPath", "StreamDecision"]


@dataclass(frozen=True)
class StreamDecision:
    """A plan with engines, times and waits; predicted seconds before and after, and a bound for every assignment.

    ``streams`` are the queues in use: 1 where more are not worth it, and the plan's order and places are those given.
    """

    device_plan: DevicePlan
    streams: int
    before_s: float
    after_s: float
    bound_s: float
    note: str


@dataclass(frozen=True)
class CriticalPath:
    """Run chains of dependent operators on queues of their own, the critical one without a break.

    *Given* a placed plan for a machine that states its concurrency. *Result*: the same steps on the machine
    ``with_streams``, with times; in another order where one queue's steps would be issued late behind another's, and
    at other addresses where sharing bytes would keep operators from running at the same time. Unchanged if less than
    ``margin`` of the seconds would be saved. At most ``streams`` queues; 0 is what the machine says.
    ``effort`` is the number of steps to time in all, for the search to end without a clock.

    Method: list scheduling by upward rank (HEFT; Topcuoglu, Hariri and Wu, IEEE TPDS 13(3), 2002), by earliest start,
    and a baseline, for each number of queues, with addresses as given and spread (``spread``), steps issued in the
    plan's order and by their start (``reissue``). Each assignment is timed with the waits it needs, operators slowing
    each other down (``fluid``); the fastest is kept.
    """

    streams: int = 0
    margin: float = 0.03
    effort: int = 60_000

    def __post_init__(self) -> None:
        if self.streams < 0 or not 0 <= self.margin < 1 or self.effort < 1:
            raise OptionError(
                f"{self.name}: options are streams={self.streams}, margin={self.margin}, effort={self.effort}; streams "
                "takes 0 or more, margin 0 to below 1, effort 1 or more"
            )

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "streams/critical_path"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Assign queues; memory apart from the scratchpad plays no part.

        Raises:
            OptionError: the plan has no addresses yet, and the machine has several queues.
        """
        concurrency = plan.machine.concurrency
        if concurrency is None or self._count(concurrency) == 1:
            return Decision(plan, None, "one queue: the machine states no more, or no more were asked for")
        if plan.residences is None or any(r.offset is None for r in plan.residences):
            raise OptionError(f"{self.name}: the plan has no addresses yet", hint="place it first: address/exact")
        arena = plan.machine.scratchpad_memory.capacity_bytes
        found = self.assign(DevicePlan(plan, arena), frozenset(), budget)
        return Decision(found.device_plan.plan if found.streams > 1 else plan, None, found.note)

    def assign(
        self, device_plan: DevicePlan, made: frozenset[str], budget: Budget, *, extra_bytes: int = 0
    ) -> StreamDecision:
        """Engines, times and waits for a program's plan; ``made`` are the buffers that calls make for themselves.

        What the arena and the pools of all queues hold at most grows by no more than ``extra_bytes``.
        """
        plan = device_plan.plan
        concurrency = plan.machine.concurrency
        if concurrency is None:
            timed = with_waits(replace(device_plan, plan=simulate(plan)), made)
            seconds = max((i.finish_s or 0.0 for i in timed.plan.instructions), default=0.0)
            return StreamDecision(timed, 1, seconds, seconds, 0.0, "the machine does not state its concurrency")
        search = Search(device_plan, made, concurrency, extra_bytes, self.effort)
        before = search.best
        for count in range(self._count(concurrency), 1, -1):
            for rule in RULES:
                if not (budget.halted() or search.is_done()):
                    search.offer(rule, count, budget)
        saved = 1 - search.best.seconds / before.seconds if before.seconds else 0.0
        chosen = search.best if saved > 0 and saved >= self.margin else before
        rest = f"at least {search.bound_s * 1e6:,.1f} on any number of queues"
        note = f"{chosen.streams} of {self._count(concurrency)} queues: {chosen.seconds * 1e6:,.1f} us predicted, "
        note += f"{before.seconds * 1e6:,.1f} on one, {rest}"
        return StreamDecision(chosen.device_plan, chosen.streams, before.seconds, chosen.seconds, search.bound_s, note)

    def _count(self, concurrency: Concurrency) -> int:
        return self.streams or concurrency.streams
