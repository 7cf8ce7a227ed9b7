"""Cuts into several stages a rank that give the rank with most work the least, by constraint programming."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ortools.sat.python import cp_model

from ...compiler.pipeline import Budget
from ._cp_sat import Reader, minimised
from .partition_layers import Cuts, Line
from .solution import Objective

__all__ = ["balanced_chunks"]

EFFORT = 5.0  # deterministic seconds, where clocks may not decide


def balanced_chunks(
    line: Line, objective: Objective, budget: Budget, *, hint: Cuts | None = None
) -> tuple[Cuts | None, int | None]:
    """Cuts with the least rank bound found, and the least that any cuts can have; ``None`` of both if there are none.

    A rank's bound is what comes before its first stage in the model, and the work of its stages for all microbatches:
    no schedule is faster. A rank that cannot hold what is resident and one microbatch of each of its stages, all of
    which are held when the microbatch turns round, has none, nor have cuts between what must be on one rank.
    """
    model = _Model(line, objective)
    for cut, place in zip(model.cuts[1:-1], hint or (), strict=False):
        model.model.add_hint(cut, place)
    found: list[Cuts] = []
    lock = threading.Lock()

    def keep(read: Reader) -> None:
        with lock:
            found.append(tuple(read(cut) for cut in model.cuts[1:-1]))

    outcome = minimised(model.model, budget, effort=EFFORT, found=keep, bounded=lambda _: None)
    if outcome.status == "none":
        return None, None
    return (found[-1] if found else None), max(0, round(outcome.bound))


class _Model:
    """``cuts`` are the first layers of all stages, and the number of layers; ``worst`` is the largest rank bound."""

    def __init__(self, line: Line, objective: Objective) -> None:
        self.line, self.model = line, cp_model.CpModel()
        stages, layers = len(line.placement), len(line.layers)
        self.cuts = [
            self.model.new_int_var(stage, layers - (stages - stage), f"cut {stage}") for stage in range(stages)
        ]
        self.cuts.append(self.model.new_constant(layers))
        self.model.add(self.cuts[0] == 0)
        for first, end in zip(self.cuts, self.cuts[1:], strict=False):
            self.model.add(first < end)
        self.worst = self.model.new_int_var(0, 1 << 55, "worst")
        for rank in range(line.ranks):
            self.load(rank, objective)
        for name, tied in line.ties.items():
            self.tie(name, tied)
        self.model.minimize(self.worst)

    def load(self, rank: int, objective: Objective) -> None:
        line, slow = self.line, self.line.slow(rank)
        own = [stage for stage, where in enumerate(line.placement) if where == rank]
        shards = 0 if line.vocabulary is None else line.vocabulary.output_ns[rank] + line.vocabulary.gradient_ns[rank]
        work = [sum(layer.work_ns for layer in line.layers[:n]) for n in range(len(line.layers) + 1)]
        slowed = [int(done * slow) for done in work]
        rounded = 0 if slow == 1.0 else 4 * len(own)  # each of F, I and W of a stage may be rounded down
        load = cp_model.LinearExpr.sum([self.between(slowed, stage) * line.microbatches for stage in own])
        if objective == "makespan":
            fastest = min(line.slowness, default=1.0)
            before = [max(0, int(done * fastest) - len(line.placement)) for done in line.sums["forward_ns"].tolist()]
            load += self.at(line.sums["forward_ns"].tolist() if fastest == 1.0 else before, self.cuts[own[0]])
        self.model.add(self.worst >= load + line.microbatches * (shards - rounded))
        if line.memory_limit is not None:
            names = ("parameter_bytes", "until_input_gradient_bytes", "until_weight_gradient_bytes")
            held = [sum(column) for column in zip(*(line.sums[name].tolist() for name in names), strict=True)]
            self.model.add(sum(self.between(held, stage) for stage in own) <= line.memory_limit[rank])

    def tie(self, name: str, tied: Sequence[int]) -> None:
        """The stages that have the tied layers are on one rank."""
        ranks = []
        for layer in tied:
            has = [self.model.new_bool_var(f"{name} {layer} {stage}") for stage in range(len(self.line.placement))]
            self.model.add_exactly_one(has)
            for stage, own in enumerate(has):
                self.model.add(self.cuts[stage] <= layer).only_enforce_if(own)
                self.model.add(self.cuts[stage + 1] > layer).only_enforce_if(own)
            ranks.append(sum(rank * own for rank, own in zip(self.line.placement, has, strict=True)))
        for other in ranks[1:]:
            self.model.add(other == ranks[0])

    def between(self, sums: Sequence[int], stage: int) -> cp_model.LinearExprT:
        return self.at(sums, self.cuts[stage + 1]) - self.at(sums, self.cuts[stage])

    def at(self, sums: Sequence[int], cut: cp_model.IntVar) -> cp_model.IntVar:
        value = self.model.new_int_var(min(sums), max(sums), "")
        self.model.add_element(cut, list(sums), value)
        return value
