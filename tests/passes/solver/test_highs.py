"""The HiGHS adapter: same answers as PuLP's own, and limits, warm starts, bounds and stops besides."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading

import pulp
import pytest

from opweave.compiler.pipeline import Budget
from opweave.errors import InternalError
from opweave.passes._solver.highs import solve


def covering(columns: int, rows: int, seed: int = 0, *, sense: int = pulp.LpMinimize) -> pulp.LpProblem:
    """A random covering problem (or, maximised, packing problem) in binary variables ``x0`` and up."""
    draw = random.Random(seed)
    problem = pulp.LpProblem("covering", sense)
    x = [problem.add_variable(f"x{i}", 0, 1, pulp.LpBinary) for i in range(columns)]
    problem += pulp.LpAffineExpression([(v, draw.randint(5, 100)) for v in x], 7), "cost"
    for row in range(rows):
        terms = pulp.LpAffineExpression([(v, draw.randint(5, 100)) for v in x])
        problem += (terms >= 10 * columns if sense == pulp.LpMinimize else terms <= 10 * columns), f"row{row}"
    return problem


def budget(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, workers=1)


@pytest.mark.parametrize("sense", [pulp.LpMinimize, pulp.LpMaximize])
@pytest.mark.parametrize("seed", range(3))
def test_optimum_equals_that_of_pulps_own_adapter(seed: int, sense: int) -> None:
    problem = covering(25, 8, seed, sense=sense)
    solution = solve(problem, budget())
    problem.solve(pulp.HiGHS(msg=False))
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(problem.objective.value())
    assert solution.bound == pytest.approx(solution.objective)
    cost = sum(c * solution.values[v.name] for v, c in problem.objective.items()) + problem.objective.constant
    assert cost == pytest.approx(solution.objective)


def test_equations_bounds_and_continuous_variables_pass_through() -> None:
    problem = pulp.LpProblem("mixed", pulp.LpMinimize)
    x, y = problem.add_variable("x", -5, None), problem.add_variable("y", None, 10, pulp.LpInteger)
    problem += 2 * x - y, "cost"
    problem += (x + 2 * y == 10, "sum")
    problem += (x - y <= 2.5, "difference")
    solution = solve(problem, budget())
    assert solution.values == pytest.approx({"x": -4, "y": 7})
    assert solution.objective == pytest.approx(-15)


def test_relaxation_bounds_the_integer_optimum() -> None:
    problem = covering(25, 8)
    relaxed, exact = solve(problem, budget(), relax=True), solve(problem, budget())
    assert exact.objective is not None
    assert relaxed.bound < exact.objective
    assert any(0.01 < value < 0.99 for value in relaxed.values.values())


def test_infeasible_is_said() -> None:
    problem = covering(5, 1)
    problem += (pulp.lpSum(problem.variables()) <= -1, "never")
    solution = solve(problem, budget())
    assert (solution.status, solution.objective, solution.bound) == ("infeasible", None, math.inf)


def test_warm_start_is_kept_when_nothing_better_is_found() -> None:
    problem = covering(200, 60)
    solution = solve(problem, budget(), start={f"x{i}": 1.0 for i in range(200)}, max_nodes=0)
    assert solution.status in ("feasible", "optimal")
    assert solution.objective is not None
    assert solution.objective <= sum(problem.objective.values()) + 7
    assert solution.bound <= solution.objective


def test_no_time_is_an_answer_without_solution() -> None:
    solution = solve(covering(50, 10), budget(0.0))
    assert (solution.status, solution.values, solution.objective, solution.bound) == ("unknown", {}, None, -math.inf)


def test_stop_ends_the_search_and_progress_is_told_in_the_callers_thread() -> None:
    """A search that would take hours ends at the first report."""
    stop, threads = threading.Event(), set[threading.Thread]()

    def listen(incumbent: float | None, bound: float | None) -> None:
        threads.add(threading.current_thread())
        if incumbent is not None and bound is not None:
            stop.set()

    begun = Budget.of_seconds(3600.0, stop=stop, workers=1)
    solution = solve(covering(300, 100), begun, start={f"x{i}": 1.0 for i in range(300)}, listen=listen)
    assert solution.status == "feasible"
    assert solution.objective is not None
    assert -math.inf < solution.bound <= solution.objective
    assert threads == {threading.current_thread()}


def test_a_model_without_variables_is_its_constant() -> None:
    problem = pulp.LpProblem("empty", pulp.LpMinimize)
    problem += pulp.LpAffineExpression([], 3), "cost"
    assert solve(problem, budget()).objective == 3


def test_same_model_same_answer_with_other_numbers_of_workers_in_one_process() -> None:
    """HiGHS refuses another number of threads in the thread that once ran it; the adapter must not."""
    problem = covering(25, 8)
    solutions = [solve(problem, Budget.of_seconds(60.0, workers=workers)) for workers in (1, 2, 1)]
    assert len({solution.objective for solution in solutions}) == 1
    assert solutions[0] == solutions[2]


def test_a_model_that_makes_no_sense_is_an_internal_error() -> None:
    problem = covering(5, 1)
    problem.variables()[0].lowBound = math.nan
    with pytest.raises(InternalError, match="rejects"):
        solve(problem, budget())


@pytest.mark.parametrize("first", ["highspy", "ortools.sat.python.cp_model"])
def test_highs_and_ortools_share_a_process_in_either_order(first: str) -> None:
    script = f"""
import {first}
import highspy
from ortools.sat.python import cp_model
model = cp_model.CpModel()
x = model.new_bool_var("x")
model.maximize(x)
solver = cp_model.CpSolver()
solver.parameters.num_workers = 1
assert solver.solve(model) == cp_model.OPTIMAL and solver.value(x) == 1
import pulp
from opweave.compiler.pipeline import Budget
from opweave.passes._solver.highs import solve
problem = pulp.LpProblem("one", pulp.LpMinimize)
y = problem.add_variable("y", 0, 5, pulp.LpInteger)
problem += 3 * y, "cost"
problem += (2 * y >= 3, "row")
print(solve(problem, Budget.of_seconds(60.0, workers=1)).objective)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["6.0"], "")
