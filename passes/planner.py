"""Order, residency and addresses in turn, with addresses that answer back.

Given a plan of a graph on a machine, the order pass decides first. Residency and addresses are then solved as a
logic-based Benders decomposition (Hooker & Ottosson, 2003): the residency pass is the master and counts bytes only;
the address pass either places its residences or proves that some of them cannot lie together, which comes back to the
master as a cut. Every cut holds for each placeable residency of the order, so the master's bound stays a bound.

When placing neither succeeds nor fails within the time, the master is asked again with a little of the capacity held
in reserve for fragmentation, then with more; in the end every operator fetches its operands afresh, which always fits
when each operator alone does. Those plans are valid and keep the bound proven before, so their gap is honest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from ..compiler.pipeline import Budget, Pass, confirm, run_pass
from ..compiler.plan import Certificate, PassRecord, Plan
from ..compiler.verify import verify
from ..errors import OptionError
from .address.banks import require_places
from .address.exact import ExactPlacement
from .address.placement import PlacementError
from .joint.best_first import BestFirstJoint
from .objective.claims import for_recomputation, restated
from .registry import make, names
from .residency.gaps import Cut, gaps_of_residences
from .residency.ilp import IlpResidency
from .residency.recompute import RecomputeResidency
from .residency.refetch import RefetchResidency
from .residency.workset import require_fit

__all__ = ["Planner", "place"]

#: The folders of the passes that take each decision.
DECIDED_BY = {
    "order": ("order", "joint"),
    "residency": ("residency",),
    "address": ("address",),
    "inplace": ("inplace",),
}
MAX_CUTS = 50  # conflicts beyond this many are fragmentation in general: a reserve settles it sooner
PATIENCE_S = 1.5  # that placements get at least, where they are hard
RESERVES = (256, 64, 32, 16, 8, 4)  # the capacity's n-th parts held back for fragmentation, one after the other


@dataclass(frozen=True)
class Planner:
    """Plans with one pass for each decision, named as the registry names them, options in parentheses.

    ``inplace`` names the pass that rewrites the graph before; "" for none.

    Raises:
        OptionError: a pass is unknown, an option of it is, or it takes another decision.
    """

    order: str = "joint/best_first"
    residency: str = "residency/ilp"
    address: str = "address/exact"
    inplace: str = ""

    def __post_init__(self) -> None:
        for decision, folders in DECIDED_BY.items():
            if decision == "inplace" and not self.inplace:
                continue
            name = make(getattr(self, decision)).name
            if name.partition("/")[0] not in folders:
                known = ", ".join(known for known in names() if known.partition("/")[0] in folders)
                raise OptionError(f"pass {name!r} does not decide {decision}", hint=f"those that do are {known}")

    def rewritten(self, plan: Plan, budget: Budget) -> Plan:
        """``plan`` of the graph that its ``inplace`` pass makes: what ``plan`` and ``place`` take, and pins name."""
        return run_pass(make(self.inplace), plan, budget.share(0.3)) if self.inplace else plan

    def plan(self, plan: Plan, budget: Budget) -> Plan:
        """Decide order, residency and addresses of ``plan``.

        Raises:
            Infeasible: some operator's working set alone exceeds the scratchpad, or cannot be divided among its banks
                and beside what is pinned; names it and what would work.
        """
        order, residency, address = make(self.order), make(self.residency), make(self.address)
        require_fit(plan)
        require_places(plan, budget)
        if order.name.startswith("joint/"):
            return _place_joint(order, residency, address, plan, budget)
        return place(run_pass(order, plan, budget.share(0.3)), residency, address, budget)

    def placed(self, plan: Plan, budget: Budget) -> Plan:
        """Decide residency and addresses of ``plan`` in the order it has. Raises Infeasible."""
        return place(plan, make(self.residency), make(self.address), budget)


def _place_joint(joint: Pass, residency: Pass, address: Pass, plan: Plan, budget: Budget) -> Plan:
    """Place what ``joint`` decided; where addresses refuse, the best of what its order allows and of tighter plans.

    A plan made for a smaller scratchpad leaves room for fragmentation. The bound over every order stays.
    """
    decided = run_pass(joint, plan, budget.share(0.6))
    if decided.residences is None:  # it minimises the peak, and leaves the residency to others
        return place(decided, residency, address, budget)
    ordered = decided.with_order(decided.order)
    if isinstance(residency, RecomputeResidency):
        ordered = for_recomputation(ordered)
    if residency != IlpResidency():
        return restated(place(ordered, residency, address, budget))
    if decided.residences and all(residence.offset is not None for residence in decided.residences):
        return decided
    try:
        return run_pass(address, decided, _patient(budget.share(0.5)))
    except PlacementError as failure:
        cut = gaps_of_residences(decided, failure.conflict)
        if failure.proven and cut.gaps:
            placed = restated(place(ordered, residency, address, budget.share(0.5), (cut,)))
        else:
            placed = restated(_place_with_room(ordered, residency, address, budget.share(0.5), None, ()))
    if not isinstance(joint, BestFirstJoint):
        return placed
    return min((placed, *_tighter(joint, address, decided, budget)), key=_traffic)


def _tighter(joint: BestFirstJoint, address: Pass, decided: Plan, budget: Budget) -> Iterator[Plan]:
    """Placed plans that ``joint`` makes with some of the capacity in reserve, until they must move more."""
    capacity = decided.machine.scratchpad_memory.capacity_bytes
    for part in RESERVES:
        if not budget.remaining_s:
            return
        reserve = capacity // part
        tight = run_pass(replace(joint, reserve_bytes=reserve), decided.with_order(decided.order), budget.share(0.3))
        kept = [*decided.passes, msgspec.structs.replace(tight.passes[-1], certificate=None)]
        try:
            placed = run_pass(address, msgspec.structs.replace(tight, passes=tuple(kept)), budget.share(0.3))
        except PlacementError:
            continue
        yield restated(placed)
        return


def _traffic(plan: Plan) -> int:
    return verify(msgspec.structs.replace(plan, passes=())).additional_bytes


def place(plan: Plan, residency: Pass, address: Pass, budget: Budget, cuts: tuple[Cut, ...] = ()) -> Plan:
    """Decide residency and addresses of an ordered ``plan`` together; see the module's text. Raises Infeasible.

    ``cuts`` are known to hold for each placeable residency of the order.
    """
    proven: Certificate | None = None
    while len(cuts) <= MAX_CUTS:
        step = replace(residency, cuts=cuts) if isinstance(residency, IlpResidency) else residency
        note = f"{len(cuts)} placement cuts" if cuts else ""
        resident, proven = _reside(step, plan, budget.share(0.6), proven, note)
        try:
            return run_pass(address, resident, budget.share(0.6))
        except PlacementError as failure:
            if not failure.proven or not isinstance(step, IlpResidency) or not budget.remaining_s:
                break
            cut = gaps_of_residences(resident, failure.conflict)
            if not cut.gaps or cut in cuts:
                break
            cuts += (cut,)
    return _place_with_room(plan, residency, address, budget, proven, cuts)


def _patient(budget: Budget) -> Budget:
    """``budget`` with ``PATIENCE_S`` at least, even after a stop: the best plan so far is none until it is placed."""
    deadline = time.monotonic() + PATIENCE_S
    if budget.stop.is_set():
        return replace(budget, deadline=deadline, stop=threading.Event())
    return replace(budget, deadline=max(budget.deadline, deadline))


def _place_with_room(
    plan: Plan, residency: Pass, address: Pass, budget: Budget, proven: Certificate | None, cuts: tuple[Cut, ...]
) -> Plan:
    """``cuts`` stay in force: without them the master may move less than what they have proven it must.

    Where no placement is found, next to nothing is kept, and a hundred times as much may move.
    """
    budget = _patient(budget)
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    for part in RESERVES:
        reserve = capacity // part
        note = f"{reserve:,} bytes held back for fragmentation"
        step: Pass = IlpResidency(cuts, reserve)
        if isinstance(residency, RecomputeResidency):
            step = replace(residency, reserve_bytes=reserve)
        resident, _ = _reside(step, plan, budget.share(0.3), proven, note)
        try:
            return run_pass(address, resident, budget.share(0.3))
        except PlacementError:
            continue
    resident, _ = _reside(RefetchResidency(), plan, budget, proven, "nothing that keeps more could be placed in time")
    try:
        return run_pass(address, resident, budget)
    except PlacementError:
        return run_pass(ExactPlacement(), resident, budget)  # a capacity between two multiples of the alignment


def _reside(
    step: Pass, plan: Plan, budget: Budget, proven: Certificate | None, note: str
) -> tuple[Plan, Certificate | None]:
    """Run a residency pass; its record and the certificate returned carry the best bound proven so far."""
    begin = time.monotonic()
    decision = step.apply(plan, budget)
    certificate = decision.certificate
    if certificate is not None and proven is not None and proven.bound > certificate.bound:
        certificate = msgspec.structs.replace(certificate, bound=proven.bound, proved_by=proven.proved_by)
    confirm(step.name, decision.plan, certificate)
    remark = "; ".join(filter(None, (decision.note, note)))
    record = PassRecord(step.name, time.monotonic() - begin, certificate, remark)
    return decision.plan.with_record(record), certificate
