"""The integer program of a partition, as PuLP model; docs/formulations/partition.md states it in these symbols."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pulp

from ...compiler.partition import PartitionProblem

__all__ = ["Model", "Saved"]

#: Kept and offloaded values, by index.
Saved = tuple[frozenset[int], frozenset[int]]


@dataclass(frozen=True)
class Model:
    """Variables by name: ``keep_v``, ``offload_v``, ``again_s``, and those of exposed transfers.

    One unit of the objective is ``unit_ps`` picoseconds. Loads are due when they are needed at the latest, and those
    needed before one of ``moments``, backward steps, before that: without those it is a relaxation.
    """

    problem: PartitionProblem
    limit_bytes: int
    unit_ps: int = 1
    moments: frozenset[int] = frozenset()

    @cached_property
    def repeatable(self) -> frozenset[int]:
        """Steps that may run again and make something that is needed."""
        steps, values = self.problem.steps, self.problem.values
        made = (values[v].producer for v in self.problem.needed)
        return frozenset(s for s in made if s is not None and steps[s].repeatable)

    def least_time(self) -> pulp.LpProblem:
        """Minimise the time added, within the limit; in units of ``unit_ps``."""
        model = pulp.LpProblem("least_time", pulp.LpMinimize)
        variables = self._variables(model)
        model += self._time(model, variables), "time"
        model += pulp.LpAffineExpression(self._kept_bytes(variables)) <= self.limit_bytes // self.bytes_unit, "limit"
        self._add_availability(model, variables)
        return model

    def least_bytes(self) -> pulp.LpProblem:
        """Minimise the bytes kept, whatever time it takes; in units of ``bytes_unit``."""
        model = pulp.LpProblem("least_bytes", pulp.LpMinimize)
        variables = self._variables(model)
        model += pulp.LpAffineExpression(self._kept_bytes(variables)), "bytes"
        self._add_availability(model, variables)
        return model

    def least_saved(self, at_most_ps: int) -> pulp.LpProblem:
        """Minimise the bytes kept, and twice those offloaded, adding no more than ``at_most_ps`` within the limit."""
        model = pulp.LpProblem("least_saved", pulp.LpMinimize)
        variables = self._variables(model)
        kept = self._kept_bytes(variables)
        away = {
            variables[f"offload_{v}"]: 2 * self.problem.values[v].nbytes // self.bytes_unit
            for v in self.problem.needed
            if self._may("offload", v)
        }
        model += pulp.LpAffineExpression(kept | away), "saved"
        model += self._time(model, variables) <= at_most_ps / self.unit_ps, "time"
        model += pulp.LpAffineExpression(kept) <= self.limit_bytes // self.bytes_unit, "limit"
        self._add_availability(model, variables)
        return model

    @cached_property
    def bytes_unit(self) -> int:
        """The sizes' common divisor."""
        return math.gcd(*(self.problem.values[v].nbytes for v in self.problem.needed)) or 1

    def start(self, saved: Saved, again: frozenset[int]) -> dict[str, float]:
        """The binary variables' values in an answer."""
        values = {f"{way}_{v}": 0.0 for v in self.problem.needed for way in ("keep", "offload") if self._may(way, v)}
        values.update({f"again_{s}": float(s in again) for s in self.repeatable})
        for way, chosen in zip(("keep", "offload"), saved, strict=True):
            values.update({f"{way}_{v}": 1.0 for v in chosen if f"{way}_{v}" in values})
        return values

    def saved(self, values: Mapping[str, float]) -> Saved:
        """The answer that a solution stands for."""
        kept = frozenset(v for v in self.problem.needed if values.get(f"keep_{v}", 0.0) > 0.5)
        offloaded = frozenset(v for v in self.problem.needed if values.get(f"offload_{v}", 0.0) > 0.5)
        return kept, offloaded - kept

    def _may(self, way: str, v: int) -> bool:
        value = self.problem.values[v]
        return value.can_keep if way == "keep" else value.can_offload

    def _variables(self, model: pulp.LpProblem) -> dict[str, Any]:
        names = [f"{way}_{v}" for v in self.problem.needed for way in ("keep", "offload") if self._may(way, v)]
        names += [f"again_{s}" for s in sorted(self.repeatable)]
        return {name: model.add_variable(name, 0, 1, pulp.LpInteger) for name in names}

    def _time(self, model: pulp.LpProblem, variables: Mapping[str, Any]) -> Any:
        """Steps that run again, what saving costs, and exposed transfers."""
        cost = {variables[f"again_{s}"]: self.problem.steps[s].again_ps / self.unit_ps for s in sorted(self.repeatable)}
        for v in self.problem.needed:
            for way in ("keep", "offload"):
                if f"{way}_{v}" in variables:
                    cost[variables[f"{way}_{v}"]] = self.problem.values[v].save_ps / self.unit_ps
        exposed_store, exposed_load = (
            model.add_variable(name, 0, None, pulp.LpContinuous) for name in ("exposed_store", "exposed_load")
        )
        self._add_stores(model, variables, exposed_store)
        self._add_loads(model, variables, exposed_load)
        return pulp.LpAffineExpression(cost | {exposed_store: 1.0, exposed_load: 1.0})

    def _kept_bytes(self, variables: Mapping[str, Any]) -> dict[Any, int]:
        """In units of ``bytes_unit``."""
        keepable = [v for v in self.problem.needed if self._may("keep", v)]
        return {variables[f"keep_{v}"]: self.problem.values[v].nbytes // self.bytes_unit for v in keepable}

    def _add_availability(
        self, model: pulp.LpProblem, variables: Mapping[str, Any], suffix: str = "", until: int | None = None
    ) -> None:
        """What backward steps (``until`` one of them) read is kept, offloaded, or made by a step that runs again.

        So are the operands of what runs again.
        """
        steps = self.problem.backward if until is None else self.problem.backward[: until + 1]
        needed = frozenset(self.problem.needed)
        for v in sorted(needed.intersection(v for step in steps for v in step.reads)):
            model += pulp.LpAffineExpression(self._sources(v, variables)) >= 1, f"demanded_{v}{suffix}"
        for s in sorted(self.repeatable):
            for v in sorted(needed.intersection(self.problem.steps[s].reads)):
                row = {**self._sources(v, variables), variables[f"again_{s}"]: -1}
                model += pulp.LpAffineExpression(row) >= 0, f"operand_{s}_{v}{suffix}"

    def _sources(self, v: int, variables: Mapping[str, Any]) -> dict[Any, int]:
        names = (f"keep_{v}", f"offload_{v}", f"again_{self.problem.values[v].producer}")
        return {variables[name]: 1 for name in names if name in variables}

    def _add_stores(self, model: pulp.LpProblem, variables: Mapping[str, Any], exposed: Any) -> None:
        """What is stored from each moment on does not end before all of it has passed the link."""
        problem = self.problem
        released = sorted(
            (v for v in self.problem.needed if self._may("offload", v)), key=lambda v: -problem.released_ps[v]
        )
        later: Any = None
        for ps, group in groupby(released, key=lambda v: problem.released_ps[v]):
            now = model.add_variable(f"stored_from_{ps}", 0, None, pulp.LpContinuous)
            row = {variables[f"offload_{v}"]: (problem.values[v].store_ps or 0) / self.unit_ps for v in group}
            row |= {now: -1.0} | ({} if later is None else {later: 1.0})
            model += pulp.LpAffineExpression(row) == 0, f"stored_from_{ps}"
            left = (problem.forward_ps - ps) / self.unit_ps
            model += pulp.LpAffineExpression({exposed: 1, now: -1}) >= -left, f"exposed_store_{ps}"
            later = now

    def _add_loads(self, model: pulp.LpProblem, variables: Mapping[str, Any], exposed: Any) -> None:
        """What is needed by each moment at the latest has passed the link, or the backward half waits for it."""
        problem = self.problem
        due = sorted((v for v in problem.needed if self._may("offload", v)), key=lambda v: problem.latest[v])
        earlier: Any = None
        for b, group in groupby(due, key=lambda v: problem.latest[v]):
            now = model.add_variable(f"loaded_by_{b}", 0, None, pulp.LpContinuous)
            row = {variables[f"offload_{v}"]: (problem.values[v].load_ps or 0) / self.unit_ps for v in group}
            row |= {now: -1.0} | ({} if earlier is None else {earlier: 1.0})
            model += pulp.LpAffineExpression(row) == 0, f"loaded_by_{b}"
            begin = problem.begins_ps[b] / self.unit_ps
            model += pulp.LpAffineExpression({exposed: 1, now: -1}) >= -begin, f"exposed_load_{b}"
            earlier = now
        for b in sorted(self.moments):
            self._add_moment(model, variables, exposed, b)

    def _add_moment(self, model: pulp.LpProblem, variables: Mapping[str, Any], exposed: Any, moment: int) -> None:
        """Availability of what backward steps up to ``moment`` need: ``load_v_b`` and ``run_s_b`` are by then."""
        early: dict[str, Any] = dict(variables)
        load: dict[Any, float] = {exposed: -1.0}
        for name in variables:
            way, index = name.split("_")
            if way != "keep":
                early[name] = now = model.add_variable(f"{name}_by_{moment}", 0, 1, pulp.LpContinuous)
                model += pulp.LpAffineExpression({variables[name]: 1, now: -1}) >= 0, f"{name}_by_{moment}"
                if way == "offload":
                    load[now] = (self.problem.values[int(index)].load_ps or 0) / self.unit_ps
        begin = self.problem.begins_ps[moment] / self.unit_ps
        model += pulp.LpAffineExpression(load) <= begin, f"exposed_by_{moment}"
        self._add_availability(model, early, f"_by_{moment}", until=moment)
