"""COSMA's integer program without addresses, in PuLP: which operator runs when, and what is preserved or moved.

Variables are named after the paper's; ``v`` is an index into ``CosmaProblem.versions``. The paper's create event of a
tensor is that of its operator here, ``create_<op>_<step>``, so that sibling outputs are created together (Eq. 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pulp

from ._cosma_problem import CosmaProblem, Version

__all__ = ["CosmaModel", "Decided", "Key"]

Term = tuple[Any, int]  # a variable and its coefficient
Key = tuple[int, int]  # operator or version, and step
Decided = tuple[tuple[int, ...], frozenset[Key]]  # the order; and version and step of every retrieval


class CosmaModel:
    """The model and its variables by index and step; ``peak`` minimises peak memory instead of traffic (Eq. 13-15).

    ``least_bytes`` is additional traffic proven to be unavoidable; it bounds the objective from below.
    """

    def __init__(self, of: CosmaProblem, *, least_bytes: int = 0, peak: bool = False) -> None:
        self.of = of
        self.peak = peak
        self.program = pulp.LpProblem("cosma", pulp.LpMinimize)
        self.create: dict[Key, Any] = {}
        self.begun: dict[Key, Any] = {}
        self.preserve: dict[Key, Any] = {}
        self.retrieve: dict[Key, Any] = {}
        self.spill: dict[Key, Any] = {}
        self.spilled: dict[Key, Any] = {}
        self._at_step: list[list[tuple[int, Version]]] = [[] for _ in range(of.steps)]
        for v, version in enumerate(of.versions):
            for step in range(version.window[0], version.window[1] + 1):
                self._at_step[step].append((v, version))
        self._add_variables()
        self._add_objective(least_bytes)
        self._add_order()
        for v, version in enumerate(of.versions):
            self._add_moves(v, version)
        self._add_capacity()

    @property
    def columns(self) -> int:
        """Number of variables."""
        groups = (self.create, self.begun, self.preserve, self.retrieve, self.spill, self.spilled)
        return sum(map(len, groups)) + self.peak

    # -- variables ----------------------------------------------------------------------------------------------------

    def _add_variables(self) -> None:
        for op, (first, last) in enumerate(self.of.windows):
            for step in range(first, last + 1):
                self.create[op, step] = self._binary(f"create_{op}_{step}")
                if step < last:
                    self.begun[op, step] = self.program.add_variable(f"begun_{op}_{step}", 0, 1)
        for v, version in enumerate(self.of.versions):
            later = range(version.window[0] + 1, version.window[1] + 1 if version.users else 0)
            for step in later:
                self.preserve[v, step] = self._binary(f"preserve_{v}_{step}")
            for step in self._retrieve_steps(version):
                self.retrieve[v, step] = self._binary(f"retrieve_{v}_{step}")
            for step in () if version.backed or self._stays(version) else later:
                self.spill[v, step] = self._binary(f"spill_{v}_{step}")
                self.spilled[v, step] = self.program.add_variable(f"spilled_{v}_{step}", 0, 1)

    def _binary(self, name: str) -> Any:
        return self.program.add_variable(name, 0, 1, pulp.LpBinary)

    def _stays(self, version: Version) -> bool:
        """Whether the version may not leave between its uses: all in peak mode, else those pinned as resident."""
        return self.peak or version.buffer in self.of.staying

    def _retrieve_steps(self, version: Version) -> list[int]:
        """Steps at which a user may run and the version may have been away before; of what stays, sources only."""
        if self._stays(version) and version.creator is not None:
            return []
        begin = version.window[0] + (version.creator is not None)
        windows = (self.of.windows[user] for user in version.users)
        steps = {step for first, last in windows for step in range(max(begin, first), last + 1)}
        return sorted(steps)

    def _begun(self, op: int, step: int, sign: int = 1) -> tuple[list[Term], int]:
        """``sign`` times "``op`` runs at ``step`` or before" as terms and a constant."""
        first, last = self.of.windows[op]
        if step < first or step >= last:
            return [], sign * int(step >= last)
        return [(self.begun[op, step], sign)], 0

    # -- objective and constraints ------------------------------------------------------------------------------------

    def _add_objective(self, least_bytes: int) -> None:
        """Eq. 12, in units; Eq. 15 in peak mode."""
        if self.peak:
            self.peak_units = self.program.add_variable("peak", 0)
            self.program += pulp.LpAffineExpression([(self.peak_units, 1)]), "peak"
            return
        units = [nbytes // self.of.unit for nbytes in self.of.nbytes]
        moves = (*self.retrieve.items(), *self.spill.items())
        terms = [(variable, units[self.of.versions[v].buffer]) for (v, _), variable in moves]
        self.program += pulp.LpAffineExpression(terms), "moved"
        least_units = (least_bytes - self.of.constant_bytes) // self.of.unit
        if terms and least_units > 0:
            self.program += pulp.LpAffineExpression(terms) >= least_units, "unavoidable"

    def _add_order(self) -> None:
        """Eq. 7, and what the paper leaves out: one operator at each step, and dependencies that hold no bytes."""
        running: list[list[Term]] = [[] for _ in range(self.of.steps)]
        for (op, step), variable in self.create.items():
            running[step].append((variable, 1))
            before, low = self._begun(op, step - 1, -1)
            now, high = self._begun(op, step)
            self._row([*now, *before, (variable, -1)], "==", -low - high, f"once_{op}_{step}")
        for step, terms in enumerate(running):
            self._row(terms, "==", 1, f"one_operator_{step}")
        for op, before_op in enumerate(self.of.predecessors):
            first, last = self.of.windows[op]
            for p in before_op:
                for step in range(first, min(last, self.of.windows[p][1]) + 1):
                    later, high = self._begun(op, step)
                    earlier, low = self._begun(p, step - 1, -1)
                    self._row([*later, *earlier], "<=", -low - high, f"precedes_{p}_{op}_{step}")

    def _add_moves(self, v: int, version: Version) -> None:
        first, last = version.window
        for user in version.users:  # Eq. 5: operands are resident
            for step in range(self.of.windows[user][0], self.of.windows[user][1] + 1):
                terms = [(self.create[user, step], 1), *self._resident(v, step, -1)]
                self._row(terms, "<=", 0, f"operand_{v}_{user}_{step}")
        if self._stays(version) and version.creator is None:  # fetched once, and never again
            self._row([(self.retrieve[v, s], 1) for s in self._retrieve_steps(version)], "==", 1, f"fetched_{v}")
        for step in range(first, last + 1):
            self._add_step(v, version, step)

    def _add_step(self, v: int, version: Version, step: int) -> None:
        created = self._created(version, step)
        before = self._created(version, step - 1, -1)
        preserve = self._of(self.preserve, v, step)
        self._row([*created, *self._resident(v, step)], "<=", 1, f"one_action_{v}_{step}")  # Eq. 1
        if preserve:  # Eq. 2; nothing is preserved into step 0
            terms = [*preserve, *before, *self._resident(v, step - 1, -1)]
            self._row(terms, "<=", 0, f"preserve_{v}_{step}")
            self._add_death(v, version, step)
        if (v, step) in self.retrieve:
            users = [(self.create[u, step], -1) for u in version.users if (u, step) in self.create]
            self._row([(self.retrieve[v, step], 1), *users], "<=", 0, f"in_time_{v}_{step}")
        if (v, step) in self.spill:
            spill = self._of(self.spill, v, step)
            self._row([*spill, *preserve], "<=", 1, f"spill_leaves_{v}_{step}")  # Eq. 1
            terms = [*spill, *before, *self._of(self.preserve, v, step - 1, -1)]
            self._row(terms, "<=", 0, f"spill_{v}_{step}")  # Eq. 3
            total = [*self._of(self.spilled, v, step - 1), *spill, *self._of(self.spilled, v, step, -1)]
            self._row(total, "==", 0, f"spilled_{v}_{step}")  # Eq. 8, by the bound of 1
        self._add_copy(v, version, step)

    def _add_copy(self, v: int, version: Version, step: int) -> None:
        """Eq. 4: what is retrieved has been spilled, or backing memory has held it since it was made."""
        if (v, step) not in self.retrieve or version.creator is None:
            return
        terms, constant = self._of(self.spilled, v, step, -1), 0
        if version.backed:
            terms, constant = self._begun(version.creator, step - 1, -1)
        self._row([(self.retrieve[v, step], 1), *terms], "<=", -constant, f"copy_{v}_{step}")

    def _add_death(self, v: int, version: Version, step: int) -> None:
        """Nothing is preserved or fetched after the last use: the paper prunes as if that followed."""
        users = version.users if version.overwriter is None else (version.overwriter,)
        terms: list[Term] = []
        room = len(users)
        for user in users:
            done, constant = self._begun(user, step - 1)
            terms += done
            room -= constant
        if terms:
            self._row([*self._resident(v, step), *terms], "<=", room, f"dead_{v}_{step}")

    def _add_capacity(self) -> None:
        """Resident bytes fit (Eq. 9 and 10 imply it, but their relaxation does not); Eq. 14 in peak mode."""
        if self.peak:
            units = [nbytes // self.of.unit for nbytes in self.of.nbytes]
            for step in range(self.of.steps):
                terms = [*self.occupied(step, units), (self.peak_units, -1)]
                self._row(terms, "<=", 0, f"peak_{step}")
            return
        for d, (sizes, capacity) in enumerate(zip(self.of.sizes, self.of.capacities, strict=True)):
            unit = max(1, math.gcd(*sizes))
            for step, live in enumerate(self.of.live):
                if sum(sizes[b] for b in live) > capacity:
                    terms = self.occupied(step, [size // unit for size in sizes])
                    self._row(terms, "<=", capacity // unit, f"capacity_{d}_{step}")

    def occupied(self, step: int, sizes: Sequence[int]) -> list[Term]:
        """What buffers take at ``step``; an update in place takes no more than the version it overwrites."""
        terms: list[Term] = []
        for v, version in self._at_step[step]:
            size = sizes[version.buffer]
            terms += self._resident(v, step, size)
            if not version.in_place:
                terms += self._created(version, step, size)
        return terms

    def residents(self, buffer: int, step: int) -> tuple[list[Any], list[Any]]:
        """Variables that say ``buffer`` is preserved into ``step``, and all that say it is resident during it."""
        kept: list[Any] = []
        there: list[Any] = []
        for v, version in self._at_step[step]:
            if version.buffer == buffer:
                kept += [variable for variable, _ in self._of(self.preserve, v, step)]
                there += [variable for variable, _ in self._resident(v, step)]
                if not version.in_place:
                    there += [variable for variable, _ in self._created(version, step)]
        return kept, there

    def _resident(self, v: int, step: int, sign: int = 1) -> list[Term]:
        return self._of(self.preserve, v, step, sign) + self._of(self.retrieve, v, step, sign)

    def _created(self, version: Version, step: int, sign: int = 1) -> list[Term]:
        if version.creator is None:
            return []
        return self._of(self.create, version.creator, step, sign)

    @staticmethod
    def _of(variables: Mapping[Key, Any], index: int, step: int, sign: int = 1) -> list[Term]:
        variable = variables.get((index, step))
        return [] if variable is None else [(variable, sign)]

    def _row(self, terms: Iterable[Term], sense: str, rhs: int, name: str) -> None:
        total: dict[Any, int] = {}
        for variable, coefficient in terms:  # sibling outputs share their create event
            total[variable] = total.get(variable, 0) + coefficient
        expression = pulp.LpAffineExpression(total)
        if total:
            self.program += (expression <= rhs if sense == "<=" else expression == rhs), name

    # -- in and out ---------------------------------------------------------------------------------------------------

    def start(self, decided: Decided) -> dict[str, float]:
        """Values of all variables for an order and its retrievals, each version spilled when it is first away."""
        order, retrieved = decided
        position = {op: step for step, op in enumerate(order)}
        values = {variable.name: 0.0 for variable in self.program.variables()}
        for op, step in position.items():
            values[self.create[op, step].name] = 1.0
            values.update((self.begun[op, s].name, 1.0) for s in range(step, self.of.windows[op][1]))
        for v, version in enumerate(self.of.versions):
            values.update(self._start_of(v, version, position, retrieved))
        if self.peak:
            units = [nbytes // self.of.unit for nbytes in self.of.nbytes]
            loads = (sum(values[x.name] * n for x, n in self.occupied(s, units)) for s in range(self.of.steps))
            values[self.peak_units.name] = max(loads, default=0.0)
        return values

    def _start_of(
        self, v: int, version: Version, position: Mapping[int, int], retrieved: frozenset[Key]
    ) -> Iterator[tuple[str, float]]:
        uses = sorted(position[user] for user in version.users)
        at = None if version.creator is None else position[version.creator]
        is_spilled = False
        for use in uses:
            if (v, use) in retrieved:
                yield self.retrieve[v, use].name, 1.0
                if (v, use) in self.spill and not is_spilled and at is not None:
                    is_spilled = True
                    yield self.spill[v, at + 1].name, 1.0
                    for step in range(at + 1, version.window[1] + 1):
                        yield self.spilled[v, step].name, 1.0
            elif at is not None:
                for step in range(at + 1, use + 1):
                    yield self.preserve[v, step].name, 1.0
            at = use

    def decided(self, values: Mapping[str, float]) -> Decided | None:
        """Order and retrievals of a solution; ``None`` where the solver's tolerances left no order."""
        chosen = sorted((step, op) for (op, step), x in self.create.items() if values[x.name] > 0.5)
        order = tuple(op for _, op in chosen)
        if [step for step, _ in chosen] != list(range(self.of.steps)) or len(set(order)) < len(order):
            return None
        position = {op: step for step, op in chosen}
        if any(position[p] >= position[op] for op, before in enumerate(self.of.predecessors) for p in before):
            return None
        return order, frozenset(key for key, x in self.retrieve.items() if values[x.name] > 0.5)
