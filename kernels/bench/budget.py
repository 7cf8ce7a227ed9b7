"""Shares the time of a run over its cases, so that one command ends in time and every kernel is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["FIRST_GUESS_S", "Budget"]

#: Seconds that the providers of a tier are thought to take of one case before any has been measured: our kernel, the
#: eager one and libraries together; Inductor with its compilation; and with its search for the fastest products.
FIRST_GUESS_S: Mapping[int, float] = MappingProxyType({0: 1.0, 1: 4.0, 2: 25.0})
GUESS_COUNTS = 4  # as so many measured cases: the first of all pays for what all need


@dataclass
class Budget:
    """``seconds`` from now on. A provider runs where all cases behind it can still have what is more important.

    Tier 0 is what every case should have. A provider of tier 1 runs as long as what is left covers tier 0 of the cases
    to come, one of tier 2 as long as it covers tiers 0 and 1.
    """

    seconds: float
    now: Callable[[], float]
    _begin: float = field(init=False)
    _spent: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = self.now()

    @property
    def left_s(self) -> float:
        """Seconds that remain; below zero when it is over."""
        return self.seconds - (self.now() - self._begin)

    def spent(self, tier: int, seconds: float) -> None:
        """Learn what the providers of a tier took of one case."""
        self._spent.setdefault(tier, []).append(seconds)

    def expected_s(self, tier: int) -> float:
        """What they take on average, the guess counted in."""
        known = self._spent.get(tier, [])
        return (GUESS_COUNTS * FIRST_GUESS_S[tier] + sum(known)) / (GUESS_COUNTS + len(known))

    def affords(self, tier: int, cases_to_come: int) -> bool:
        """Whether a provider of ``tier`` may run, with so many cases behind this one."""
        reserved = cases_to_come * sum(self.expected_s(lower) for lower in range(tier))
        return self.left_s >= reserved + (self.expected_s(tier) if tier else 0.0)

    def share_s(self, cases_to_come: int) -> float:
        """Seconds that timing one case may take: what is left, in equal parts."""
        return max(self.left_s, 0.0) / (cases_to_come + 1)
