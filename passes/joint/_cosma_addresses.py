"""Eq. 9 to 11: an address for every buffer and step, and an order of height for every two that meet.

A big-M model in floating point proves nothing about disjoint regions: what is taken from its solution is only how
high each residence lies. Offsets are computed from that in integers (``restacked``), and the verifier has the last
word.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import msgspec
import pulp

from ...compiler.plan import Plan, Residence, Run
from ._cosma_model import CosmaModel

__all__ = ["Addresses", "Heights", "heights_of", "restacked"]

Heights = Mapping[tuple[str, int], int]  # offset, in units of the alignment, by buffer and step of the order


class Addresses:
    """The address variables of a model: ``address_<b>_<step>`` in units, ``above``/``below_<a>_<b>_<step>``."""

    def __init__(self, model: CosmaModel, plan: Plan) -> None:
        memory = plan.machine.scratchpad_memory
        self.model = model
        self.alignment = memory.alignment_bytes
        self.units = [-(-nbytes // self.alignment) for nbytes in model.of.nbytes]
        self.highest = [(memory.capacity_bytes - nbytes) // self.alignment for nbytes in model.of.nbytes]
        self.address: dict[tuple[int, int], Any] = {}
        self.pairs: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        for step, live in enumerate(model.of.live):
            for buffer in live:
                self._add_address(buffer, step)
            for a, b in combinations(live, 2):
                self._add_pair(a, b, step)

    @property
    def columns(self) -> int:
        """Number of variables."""
        return len(self.address) + 2 * len(self.pairs)

    def _add_address(self, buffer: int, step: int) -> None:
        program, highest = self.model.program, self.highest[buffer]
        here = program.add_variable(f"address_{buffer}_{step}", 0, highest, pulp.LpInteger)  # Eq. 9
        self.address[buffer, step] = here
        before = self.address.get((buffer, step - 1))
        kept, _ = self.model.residents(buffer, step)
        if before is None or not kept:
            return
        slack = highest * (1 - pulp.LpAffineExpression([(variable, 1) for variable in kept]))
        program += here - before <= slack, f"stays_up_{buffer}_{step}"  # Eq. 11
        program += before - here <= slack, f"stays_down_{buffer}_{step}"

    def _add_pair(self, a: int, b: int, step: int) -> None:
        """Eq. 10: where both are resident, one lies above the other."""
        program, name = self.model.program, f"{a}_{b}_{step}"
        above = program.add_variable(f"above_{name}", 0, 1, pulp.LpBinary)
        below = program.add_variable(f"below_{name}", 0, 1, pulp.LpBinary)
        self.pairs[a, b, step] = above, below
        first, second = self.address[a, step], self.address[b, step]
        reach_b, reach_a = self.highest[b] + self.units[b], self.highest[a] + self.units[a]
        program += first >= second + self.units[b] - reach_b * (1 - above), f"is_above_{name}"
        program += second >= first + self.units[a] - reach_a * (1 - below), f"is_below_{name}"
        there = [variable for buffer in (a, b) for variable in self.model.residents(buffer, step)[1]]
        counted: dict[Any, int] = {}
        for variable in there:  # sibling outputs share their create event
            counted[variable] = counted.get(variable, 0) + 1
        both = pulp.LpAffineExpression(counted)
        program += above + below >= both - 1, f"apart_{name}"

    def start(self, heights: Heights, values: Mapping[str, float]) -> dict[str, float]:
        """Values of the address variables for placed residences, given those of the model's other ``values``."""
        buffers = self.model.of.buffers
        found: dict[str, float] = {}
        lies: dict[tuple[int, int], int] = {}
        for (buffer, step), variable in self.address.items():
            lies[buffer, step] = heights.get((buffers[buffer], step), lies.get((buffer, step - 1), 0))
            found[variable.name] = float(lies[buffer, step])
        there = {
            (buffer, step): any(values[x.name] > 0.5 for x in self.model.residents(buffer, step)[1])
            for buffer, step in self.address
        }
        for (a, b, step), (above, below) in self.pairs.items():
            both = there[a, step] and there[b, step]
            found[above.name] = float(both and lies[a, step] > lies[b, step])
            found[below.name] = float(both and lies[a, step] <= lies[b, step])
        return found

    def heights(self, values: Mapping[str, float]) -> Heights:
        """What a solution says about how high each buffer lies at each step."""
        buffers = self.model.of.buffers
        return {(buffers[b], step): round(values[x.name]) for (b, step), x in self.address.items()}


def heights_of(plan: Plan) -> Heights:
    """Offsets of a placed plan in units of the alignment, by buffer and step of the order."""
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    runs = _runs(plan)
    return {
        (residence.buffer, step): (residence.offset or 0) // alignment
        for residence in plan.residences or ()
        for step in range(bisect.bisect_left(runs, residence.begin), bisect.bisect_left(runs, residence.end))
    }


def restacked(plan: Plan, heights: Heights) -> Plan:
    """Residences of ``plan`` in the order of their ``heights``, each at the top of those below it that it meets.

    That is the longest path in the graph of who lies below whom, so if the heights are those of a placement, no
    residence ends higher than there. The solver's rounding can only change who is below whom, never let two overlap;
    it may make the result end above the capacity.
    """
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    runs = _runs(plan)
    residences = list(plan.residences or ())
    rank = {i: heights.get((r.buffer, bisect.bisect_left(runs, r.begin)), 0) for i, r in enumerate(residences)}
    done: list[Residence] = []
    for i in sorted(rank, key=lambda i: (rank[i], i)):
        this = residences[i]
        tops = (
            (other.offset or 0) + -(-plan.graph.buffers[other.buffer].nbytes // alignment) * alignment
            for other in done
            if other.begin < this.end and this.begin < other.end
        )
        residences[i] = msgspec.structs.replace(this, offset=max(tops, default=0))
        done.append(residences[i])
    return msgspec.structs.replace(plan, residences=tuple(residences))


def _runs(plan: Plan) -> list[int]:
    """The step in the plan's instructions of each step of the order."""
    return [index for index, instruction in enumerate(plan.instructions) if isinstance(instruction, Run)]
