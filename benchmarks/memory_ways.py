"""The ways in which a model is run under a memory limit, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .backend_cases import EAGER, INDUCTOR, OURS, Case, Scope
from .turns import Measured, Outcome
from .worker import Failure, Provider

__all__ = ["BASE", "Result", "Unlimited", "Way", "probe", "unlimited_of", "ways"]

FRACTIONS, QUICK_FRACTIONS = (0.9, 0.75, 0.6, 0.5, 0.4), (0.75,)
STREAMED, QUICK_STREAMED = (1.0, 0.75, 0.5, 0.35, 0.25), (0.5,)
BUDGETS, QUICK_BUDGETS = (0.75, 0.5, 0.25, 0.0), (0.5,)
PROBE = 1  # bytes: a limit that nothing meets, so that opweave says which one can be met


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run a case: a provider, with the limit it has to keep to, if any."""

    provider: Provider
    limit: int | None = None

    @property
    def name(self) -> str:
        """By which rows are told apart."""
        return self.provider.name

    @property
    def line(self) -> str:
        """By which points are joined to a line."""
        return self.name.partition(" @ ")[0]


@dataclass(frozen=True)
class Unlimited:
    """A case without a limit: bytes of weights and inputs, of all of it at the peak, and the least limit if known."""

    held: int
    peak: int
    least: int | None
    device_bytes: int


#: opweave without a limit, the model on the device.
BASE = Way(Provider(OURS, OURS))


@dataclass(frozen=True)
class Result:
    """What came of one case in each way; ``BASE`` is one of them."""

    case: Case
    unlimited: Unlimited
    outcomes: Mapping[Way, Outcome]

    def peak(self, way: Way, measured: Measured) -> int:
        """Bytes on the device at the peak, weights and inputs included."""
        return measured.prepared.footprint.allocated + (0 if way.provider.on_host else self.unlimited.held)

    def slowdown(self, way: Way) -> float | None:
        """The time of ``way`` over that without a limit, in the same turns."""
        base, found = self.outcomes[BASE], self.outcomes[way]
        if not isinstance(base, Measured) or not isinstance(found, Measured) or found.alone:
            return None
        return found.spread.median / base.spread.median

    def bound_s(self, way: Way, measured: Measured) -> float | None:
        """The least time of a model on the host under a limit: that on the device, or that of what must be moved."""
        base = self.outcomes[BASE]
        if not way.provider.on_host or way.limit is None or not isinstance(base, Measured):
            return None
        moved = max(self.unlimited.held - way.limit, 0)
        return max(base.spread.median, moved / measured.prepared.device.link_bytes_per_s)


def probe(case: Case, scope: Scope) -> Way:
    """A run of opweave under a limit that nothing meets."""
    return Way(_limited(case, scope, "probe", PROBE), PROBE)


def unlimited_of(base: Outcome, probed: Outcome) -> Unlimited | None:
    """What the first two measurements say: without a limit, and under one that nothing meets."""
    if not isinstance(base, Measured):
        return None
    prepared = base.prepared
    least = probed.required_bytes if isinstance(probed, Failure) else None
    peak = prepared.held_bytes + prepared.footprint.allocated
    return Unlimited(prepared.held_bytes, peak, least, prepared.device.nbytes)


def ways(case: Case, scope: Scope, unlimited: Unlimited) -> list[Way]:
    """All that is timed in turns: opweave's under each limit, and its peers."""
    fractions = (QUICK_FRACTIONS if scope.quick else FRACTIONS) if case.training else ()
    fractions = fractions or (QUICK_STREAMED if scope.quick else STREAMED)
    limits = {f"{OURS} @ {100 * share:.0f} %": int(share * unlimited.peak) for share in fractions}
    if unlimited.least is not None:
        limits = {name: limit for name, limit in limits.items() if limit >= unlimited.least}
        limits[f"{OURS} @ least"] = unlimited.least
    ours = [BASE, *(Way(_limited(case, scope, n, limit), limit) for n, limit in limits.items())]
    return [*ours, *map(Way, _peers(case, scope))]


def _limited(case: Case, scope: Scope, name: str, limit: int) -> Provider:
    """Within ``limit`` bytes; in inference the model stays on the host."""
    if case.training:
        return Provider(name, OURS, options={"memory_limit": limit})
    return Provider(name, OURS, options={"memory_limit": limit, "device": scope.device}, on_host=True)


def _peers(case: Case, scope: Scope) -> list[Provider]:
    if not case.training:
        offloaded = Provider("accelerate", "accelerate", on_host=True)
        return [Provider(INDUCTOR, INDUCTOR), *([offloaded] if scope.on_gpu else [])]
    budgets = QUICK_BUDGETS if scope.quick else BUDGETS
    return [
        Provider(EAGER),
        Provider(INDUCTOR, INDUCTOR),
        *(Provider(f"activation budget @ {share}", INDUCTOR, activation_budget=share) for share in budgets),
        *([] if scope.quick else [Provider("checkpointed", INDUCTOR, checkpointed=True)]),
        *([] if scope.quick else [Provider("checkpointed eager", checkpointed=True)]),
    ]
