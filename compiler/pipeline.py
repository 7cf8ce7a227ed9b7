"""Passes and how they are run: verified after every one, each with its seconds and its certificate.

A pass is a frozen dataclass whose fields are its options. It takes a plan and returns a plan that has decided one
thing more. ``run_pass`` times it, lets the verifier recount the result, and refuses a pass whose reported objective
the recount does not confirm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from ..errors import InternalError
from .plan import Certificate, PassRecord, Plan, relative_gap
from .simulate import latency_ns
from .verify import Verification, verify

__all__ = ["Budget", "Decision", "Pass", "Progress", "confirm", "run_pass"]


@dataclass(frozen=True)
class Progress:
    """Where a running pass stands; ``incumbent`` and ``bound`` are in bytes or nanoseconds, as its objective is."""

    pass_name: str
    elapsed_s: float
    incumbent: int | None = None
    bound: int | None = None

    @property
    def gap(self) -> float | None:
        """Relative distance between incumbent and bound, ``None`` while either is unknown."""
        if self.incumbent is None or self.bound is None:
            return None
        return relative_gap(self.incumbent, self.bound)


def _ignore(_: Progress) -> None:
    """The listener of those who do not listen."""


@dataclass(frozen=True)
class Budget:
    """How long a pass may take, who listens, and whether it has been told to stop.

    ``deadline`` is on ``time.monotonic``'s clock. ``stop`` is set by Ctrl-C: a pass then returns its best plan so far.
    ``deterministic`` asks for the same plan every time: one worker, fixed seeds, and work limits instead of clocks
    wherever a clock would decide the result.
    """

    deadline: float
    listen: Callable[[Progress], None] = _ignore
    stop: threading.Event = field(default_factory=threading.Event)
    workers: int = 2
    seed: int = 0
    deterministic: bool = False

    @classmethod
    def of_seconds(cls, seconds: float, **fields: object) -> Budget:
        """A budget that ends ``seconds`` from now."""
        return replace(cls(time.monotonic() + seconds), **fields)  # type: ignore[arg-type]

    @property
    def remaining_s(self) -> float:
        """Seconds left, never below 0; 0 once told to stop."""
        return 0.0 if self.stop.is_set() else max(0.0, self.deadline - time.monotonic())

    def halted(self) -> bool:
        """Whether to end now: told to stop, or out of time where clocks may decide."""
        return self.stop.is_set() or (not self.deterministic and self.remaining_s <= 0)

    def share(self, fraction: float) -> Budget:
        """A budget of the same kind over ``fraction`` of what remains."""
        return replace(self, deadline=time.monotonic() + self.remaining_s * fraction)


@dataclass(frozen=True)
class Decision:
    """What a pass returns: the plan with one thing more decided, what was proven about it, and a remark."""

    plan: Plan
    certificate: Certificate | None = None
    note: str = ""


class Pass(Protocol):
    """One decision by one method, named by its path under ``passes/``, such as ``residency/ilp``."""

    @property
    def name(self) -> str:
        """Path name of the pass."""

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide; never fails because time ran out.

        Raises:
            Infeasible: no decision exists within the machine's capacity.
        """


def run_pass(step: Pass, plan: Plan, budget: Budget) -> Plan:
    """Run one pass, verify what it made, and record its seconds and certificate.

    Raises:
        Infeasible: the pass found that nothing fits.
        InternalError: it made a plan that does not verify, or reported an objective that the recount refutes.
    """
    begin = time.monotonic()
    decision = step.apply(plan, budget)
    record = PassRecord(step.name, time.monotonic() - begin, decision.certificate, decision.note)
    confirm(step.name, decision.plan, decision.certificate)
    return decision.plan.with_record(record)


def confirm(name: str, plan: Plan, certificate: Certificate | None) -> None:
    """Let the verifier recount ``plan``; raises InternalError when it finds a fault or another objective."""
    # Without the records: a pass that decides something again has not replaced the old certificate yet.
    verification = verify(msgspec.structs.replace(plan, passes=()))
    if verification.faults:
        listed = "; ".join(str(fault) for fault in verification.faults[:3])
        raise InternalError(f"pass {name} made a plan that does not verify: {listed}", hint="please report this")
    if certificate is None:
        return
    recount = _recounted(plan, verification, certificate)
    if recount != certificate.value or certificate.bound > certificate.value:
        raise InternalError(
            f"pass {name} reports {certificate.objective} = {certificate.value} with bound {certificate.bound}, "
            f"the verifier counts {recount}",
            hint="please report this",
        )


def _recounted(plan: Plan, verification: Verification, certificate: Certificate) -> int:
    if certificate.objective == "peak_bytes":
        return verification.peak_bytes
    if certificate.objective == "arena_bytes":
        return verification.arena_bytes
    if certificate.objective == "latency_ns":
        return latency_ns(plan)
    return verification.additional_bytes
