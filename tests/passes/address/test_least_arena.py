"""The least arena of given residences, and the race that looks for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec
import pytest

from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Certificate, Pin, Plan
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.passes.address.exact import ExactPlacement
from opweave.passes.address.no_overlap import Answer, Verdict
from opweave.passes.address.packing import Packing
from opweave.passes.address.repair import Ask, race
from opweave.passes.residency.belady import BeladyResidency
from tests.graphs.build import all_graphs, machine

from .packings import plan_of


def budget() -> Budget:
    return Budget.of_seconds(60, deterministic=True)


def resident(name: str, capacity: int = 1 << 22) -> Plan:
    return run_pass(BeladyResidency(), Plan.of_order(all_graphs()[name], machine(capacity)), budget())


def least_arena(plan: Plan) -> tuple[Plan, Certificate]:
    placed = run_pass(ExactPlacement(minimize=True), plan, budget())
    return placed, placed.certificates[-1]


@pytest.mark.parametrize("name", ["chain", "diamond", "residual"])
def test_a_plan_fits_just_its_arena(name: str) -> None:
    """With room for everything, the arena is as small as where it is all there is."""
    plan, certificate = least_arena(resident(name))
    assert certificate.gap == 0
    assert certificate.value == verify(plan).arena_bytes
    small = msgspec.structs.replace(plan, machine=machine(certificate.value))
    assert verify(small).ok
    assert least_arena(msgspec.structs.replace(resident(name), machine=small.machine))[1].value == certificate.value


def test_banks_stay() -> None:
    """The arena ends where the highest region does; banks are not moved together."""
    plan = msgspec.structs.replace(resident("chain"), machine=machine(1).with_banks(1 << 10, 1 << 20))
    placed, certificate = least_arena(plan)
    assert placed.machine == plan.machine
    assert certificate.value == verify(placed).arena_bytes
    assert verify(placed).ok


def test_a_pin_bounds_the_arena() -> None:
    """What is pinned far up lies far up, and the bound says so."""
    plan = msgspec.structs.replace(resident("chain"), pins=(Pin("x", offset=1 << 21),))
    placed, certificate = least_arena(plan)
    nbytes = plan.graph.buffers["x"].nbytes
    assert (certificate.value, certificate.bound) == ((1 << 21) + nbytes, (1 << 21) + nbytes)
    assert verify(placed).ok


def test_it_needs_residences() -> None:
    with pytest.raises(OptionError, match="residency"):
        least_arena(Plan.of_order(all_graphs()["chain"], machine()))


def knows(verdict: Verdict) -> Ask:
    """Answers at once."""
    return lambda packing, items, capacity, budget, *, seconds: Answer(verdict)


def thinks(packing: Packing, items: Sequence[int], capacity: int, budget: Budget, *, seconds: float) -> Answer:
    """Answers nothing until told to stop."""
    assert budget.workers == 1
    assert budget.stop.wait(60)
    return Answer(Verdict.UNKNOWN)


PACKING = Packing.of(plan_of([(0, 1, 1)], 1), "test")


@pytest.mark.parametrize("verdict", [Verdict.PLACED, Verdict.IMPOSSIBLE])
def test_the_first_to_know_is_heard(verdict: Verdict) -> None:
    """And the other is told to stop, while the caller's own event stays as it was."""
    allowed = Budget.of_seconds(60, workers=2)
    for asked in ((thinks, knows(verdict)), (knows(verdict), thinks), (knows(verdict), knows(Verdict.UNKNOWN))):
        assert race(asked, PACKING, [0], 1, allowed, seconds=30.0).verdict is verdict
    assert not allowed.stop.is_set()


def test_told_to_stop_all_stop() -> None:
    stop = threading.Event()
    stop.set()
    allowed = Budget.of_seconds(60, workers=2, stop=stop)
    assert race((thinks, thinks), PACKING, [0], 1, allowed, seconds=30.0).verdict is Verdict.UNKNOWN


def test_nobody_knows() -> None:
    asked = (knows(Verdict.UNKNOWN), knows(Verdict.UNKNOWN))
    assert race(asked, PACKING, [0], 1, Budget.of_seconds(60), seconds=30.0).verdict is Verdict.UNKNOWN
