"""The pipeline records what passes do and refuses what the verifier's recount does not confirm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest

from opweave.compiler.pipeline import Budget, Decision, Progress, run_pass
from opweave.compiler.plan import Certificate, PassRecord, Plan
from opweave.errors import InternalError
from tests.graphs.build import all_graphs, machine
from tests.graphs.plans import keep_everything, keep_nothing

GRAPH = all_graphs()["chain"]
DAY_S = 86_400.0  # so long that no delay of this process matters
EMPTY = Plan.of_order(GRAPH, machine())


@dataclass(frozen=True)
class Step:
    """A pass that does what it is given."""

    name: str
    decide: Callable[[Plan, Budget], Decision]

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        return self.decide(plan, budget)


def traffic(value: int, bound: int) -> Certificate:
    return Certificate("additional_traffic_bytes", value, bound, "exhaustive", "residency")


def run(*steps: Step, plan: Plan = EMPTY) -> Plan:
    for step in steps:
        plan = run_pass(step, plan, Budget.of_seconds(DAY_S))
    return plan


def test_passes_run_in_turn_and_are_recorded() -> None:
    def keep(plan: Plan, _: Budget) -> Decision:
        return Decision(msgspec.structs.replace(keep_everything(GRAPH), passes=plan.passes), traffic(0, 0), "kept")

    backwards = Step("order/twice", lambda plan, _: Decision(plan.with_order(plan.order)))
    plan = run(backwards, Step("residency/keep", keep))
    assert [(r.name, r.certificate, r.note) for r in plan.passes] == [
        ("order/twice", None, ""),
        ("residency/keep", traffic(0, 0), "kept"),
    ]
    assert all(record.seconds >= 0 for record in plan.passes)


def test_a_plan_that_does_not_verify_is_refused() -> None:
    wrong = Step("order/wrong", lambda plan, _: Decision(plan.with_order((1, 0, 2, 3))))
    with pytest.raises(InternalError, match="pass order/wrong made a plan that does not verify: dependency violated"):
        run(wrong)


SPILLED = keep_nothing(GRAPH)
SPILLED_BYTES = 2 * 1024 + 2 * 1024 + 2 * 256  # a, b and c are stored and fetched


@pytest.mark.parametrize(
    ("certificate", "message"),
    [
        (traffic(0, 0), f"reports additional_traffic_bytes = 0 with bound 0, the verifier counts {SPILLED_BYTES}"),
        (traffic(SPILLED_BYTES, SPILLED_BYTES + 1), "with bound"),
        (Certificate("peak_bytes", 1, 0, "analytic", "residency"), "reports peak_bytes = 1"),
        (Certificate("arena_bytes", 1, 0, "analytic", "address"), "reports arena_bytes = 1"),
    ],
)
def test_a_certificate_the_recount_refutes_is_refused(certificate: Certificate, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        run(Step("residency/claims", lambda *_: Decision(SPILLED, certificate)))


def test_a_decision_may_be_taken_again() -> None:
    """The certificate of the first decision is no fault of the second."""
    stale = keep_everything(GRAPH).with_record(PassRecord("residency/keep", 0.0, traffic(0, 0)))
    again = msgspec.structs.replace(SPILLED, passes=stale.passes)
    plan = run(Step("residency/spill", lambda *_: Decision(again, traffic(SPILLED_BYTES, 0))), plan=stale)
    assert plan.certificates == (traffic(0, 0), traffic(SPILLED_BYTES, 0))


def test_a_budget_that_is_told_to_stop_has_no_time_left() -> None:
    budget = Budget.of_seconds(1000, deterministic=True, seed=3)
    part = budget.share(0.5)
    assert 0 < part.remaining_s <= 500
    assert (part.deterministic, part.seed) == (True, 3)
    budget.stop.set()
    assert budget.remaining_s == part.remaining_s == 0
    assert Budget(time.monotonic() - 1).remaining_s == 0


def test_progress_knows_its_gap_once_both_ends_are_known() -> None:
    assert Progress("p", 0.1).gap is None
    assert Progress("p", 0.1, incumbent=10).gap is None
    assert Progress("p", 0.1, incumbent=10, bound=8).gap == 0.2
    assert Progress("p", 0.1, incumbent=0, bound=0).gap == 0
