"""Objectives by name, and what a finished plan has of each, recounted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from ...compiler.plan import Plan
from ...compiler.simulate import latency_ns
from ...compiler.verify import verify
from ...errors import OptionError
from ..latency.bound import latency_bound_s
from ..order.problem import OrderProblem
from ..residency.gaps import GapProblem

__all__ = ["Objective", "floors", "measured", "objectives"]


class Objective(StrEnum):
    """What is to be as small as possible; bytes, and nanoseconds for the latency.

    ``traffic`` is the additional traffic, ``peak`` the largest sum of resident bytes, ``arena`` the end of the
    highest region, as the verifier counts them; ``latency`` is what the simulator gives.
    """

    TRAFFIC = "traffic"
    PEAK = "peak"
    ARENA = "arena"
    LATENCY = "latency"

    @property
    def unit(self) -> str:
        """``bytes`` or ``ns``."""
        return "ns" if self is Objective.LATENCY else "bytes"


def objectives(spec: str) -> tuple[Objective, ...]:
    """The objectives that ``spec`` names, most important first: ``"traffic"``, ``"peak,traffic"``.

    Raises:
        OptionError: one is unknown or named twice, or none is named.
    """
    found: list[Objective] = []
    known = [objective.value for objective in Objective]
    for word in spec.split(","):
        name = word.strip()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise OptionError(
                f"objective is {spec!r}, where {name!r} is unknown; known are {', '.join(known)}",
                hint=f"did you mean {close[0]!r}?" if close else "write one or several, as in 'traffic,latency'",
            )
        if name in found:
            raise OptionError(f"objective is {spec!r}, which names {name!r} twice; once is enough")
        found.append(Objective(name))
    return tuple(found)


def measured(plan: Plan, wanted: Sequence[Objective]) -> tuple[int, ...]:
    """What ``plan`` has of each objective: the lexicographically smaller of two tuples is the better plan."""
    counted = verify(msgspec.structs.replace(plan, passes=()))
    values = {
        Objective.TRAFFIC: counted.additional_bytes,
        Objective.PEAK: counted.peak_bytes,
        Objective.ARENA: counted.arena_bytes,
    }
    return tuple(latency_ns(plan) if o is Objective.LATENCY else values[o] for o in wanted)


def floors(plan: Plan, wanted: Sequence[Objective]) -> tuple[int, ...]:
    """Lower bounds on each objective for every plan of ``plan``'s graph on its machine with the same streams.

    Traffic has what no residency avoids; peak and arena the largest working set; latency ``latency_bound_s``.
    """
    largest = OrderProblem.of(plan).largest_working_set()
    bounds = {
        Objective.TRAFFIC: GapProblem.of(plan).base_bytes,
        Objective.PEAK: largest,
        Objective.ARENA: largest,
    }
    # A little less than the bound: the simulator adds up in another order, and so may end a rounding error earlier.
    return tuple(
        math.ceil(latency_bound_s(plan) * 1e9 * (1 - 1e-12)) if o is Objective.LATENCY else bounds[o] for o in wanted
    )
