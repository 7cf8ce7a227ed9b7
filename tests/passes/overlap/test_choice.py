"""The choice among cuts and orders: what pays is taken, what does not is left alone with a reason; plans verify."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opweave.compiler.overlap import exposed_seconds, lines_of
from opweave.compiler.plan import CollectiveStart, CollectiveWait, Plan, Run
from opweave.compiler.verify import verify
from opweave.errors import Infeasible, OptionError, SplitRefused
from opweave.hw_models.registry import load
from opweave.passes.overlap.choice import Alternative, Choice, Overlap, restricted
from opweave.passes.overlap.lines import reasons_of
from opweave.passes.overlap.plan import issue_order, to_plan
from opweave.passes.overlap.points import points, products_of, seconds_of_parts
from opweave.passes.overlap.tasks import problem_of
from tests.passes.overlap.small_graphs import cut, dense

MACHINE = load("8xh100-nvlink")
assert MACHINE.concurrency is not None
MACHINE_EVENT_S = MACHINE.concurrency.event_s
QUICK = Overlap(effort=20_000, solver_effort=0.05, algorithms=("nccl",))


def plans(choice: Choice, program: Alternative) -> tuple[Plan, Plan]:
    before = to_plan(program.graph, MACHINE, choice.before)
    after = to_plan(choice.alternative.graph, MACHINE, choice.schedule)
    for plan in (before, after):
        assert verify(plan).ok
    return before, after


def test_cut_hides_what_an_order_cannot() -> None:
    """At 4,096 tokens, NCCL alone: at least 60 % of what was exposed is hidden, and the report says by what."""
    program = dense((4096,))
    choice = QUICK.choose(program, MACHINE, cut, [(2048, 2048), (2304, 1792)])
    assert (choice.reason, len(choice.alternative.sizes)) == ("", 2)
    assert choice.schedule.makespan_s < 0.97 * choice.before.makespan_s
    before, after = plans(choice, program)
    was, now = exposed_seconds(before), exposed_seconds(after)
    idle = choice.before.makespan_s - _computing(before)
    assert sum(was.values()) == pytest.approx(idle, abs=8 * MACHINE_EVENT_S)  # but for events between lanes
    assert sum(now.values()) < 0.4 * sum(was.values())
    lines = lines_of(before, after, choice.alternative.origin, reasons_of(choice, before, after))
    assert [line.op for line in lines] == ["all_reduce0", "all_reduce1"]
    assert any("mm" in name for name in lines[0].hidden_by)
    assert lines[0].reason == ""


def _computing(plan: Plan) -> float:
    return sum((i.finish_s or 0) - (i.start_s or 0) for i in plan.instructions if isinstance(i, Run))


def test_small_gain_is_left_alone_and_says_so() -> None:
    program = dense((64,))
    choice = QUICK.choose(program, MACHINE, cut, [(32, 32)])
    assert choice.alternative is program
    assert "is below the margin of 3 %" in choice.reason
    assert choice.schedule == choice.before
    before, after = plans(choice, program)
    assert set(reasons_of(choice, before, after).values()) == {choice.reason}


def test_margin_decides() -> None:
    program = dense((4096,))
    never = replace(QUICK, margin=0.9).choose(program, MACHINE, cut, [(2048, 2048)])
    assert never.reason
    assert never.alternative is program
    faster = Overlap(margin=0.9, effort=0, solver_effort=0.05).choose(program, MACHINE)  # by other algorithms
    assert faster.tried[0][1] < 0.97 * faster.before.makespan_s  # type: ignore[operator]
    assert faster.reason
    assert faster.schedule == faster.before


def test_sizes_that_are_forced_are_taken_whatever_they_cost() -> None:
    choice = QUICK.choose(dense((64,)), MACHINE, cut, [(32, 32)], forced=True)
    assert (choice.alternative.sizes, choice.reason) == ((32, 32), "")


def test_refused_cuts_are_passed_over_or_raised_where_forced() -> None:
    def refusing(sizes: tuple[int, ...]) -> Alternative:
        if sizes[0] == 2048:
            raise SplitRefused("topk", "aten.topk.default", "rows compete")
        return dense(sizes)

    choice = QUICK.choose(dense((4096,)), MACHINE, refusing, [(2048, 2048), (2304, 1792)])
    assert choice.alternative.sizes == (2304, 1792)
    assert any(sizes == (2048, 2048) and "topk" in str(why) for sizes, why in choice.tried)
    with pytest.raises(SplitRefused):
        QUICK.choose(dense((4096,)), MACHINE, refusing, [(2048, 2048)], forced=True)


def test_memory_limit_is_kept_or_refused() -> None:
    """A limit between what the program needs and what the cut would like: kept. One below any: refused."""
    program = dense((4096,))
    free = QUICK.choose(program, MACHINE, cut, [(2048, 2048)])
    limit = min(free.before.peak_bytes, free.schedule.peak_bytes)
    held = replace(QUICK, memory_limit_bytes=limit).choose(program, MACHINE, cut, [(2048, 2048)])
    assert held.schedule.peak_bytes <= limit
    with pytest.raises(Infeasible) as refusal:
        replace(QUICK, memory_limit_bytes=1 << 20).choose(program, MACHINE, cut, [(2048, 2048)])
    assert refusal.value.required_bytes > 1 << 20


def test_all_algorithms_find_faster_ones_and_same_choice_twice() -> None:
    program = dense((4096,))
    options = replace(QUICK, algorithms=())
    found = [options.choose(program, MACHINE, cut, [(2048, 2048)]) for _ in range(2)]
    assert found[0].schedule == found[1].schedule
    nccl = QUICK.choose(program, MACHINE, cut, [(2048, 2048)])
    assert found[0].schedule.makespan_s <= nccl.schedule.makespan_s
    names = {t.modes[m].name for t, m in zip(nccl.schedule.problem.tasks, nccl.schedule.modes, strict=True)}
    assert not any(name.startswith("multimem") for name in names)


def test_restricted_keeps_a_way_to_do_each_collective() -> None:
    problem = problem_of(dense((256,)).graph, MACHINE)
    kept = restricted(problem, ("multimem",))
    for task in kept.tasks:
        if task.collective is not None:
            assert all(mode.name.startswith("multimem") for mode in task.modes)
            assert 0 <= task.given_mode < len(task.modes)
    assert restricted(problem, ("unheard",)).tasks[2].modes


def test_plan_issues_starts_and_waits_as_scheduled_and_covers_every_operator() -> None:
    choice = QUICK.choose(dense((4096,)), MACHINE, cut, [(2048, 2048)])
    plan = to_plan(choice.alternative.graph, MACHINE, choice.schedule)
    waits = {i.op: [f"wait of {i.op}"] for i in plan.instructions if isinstance(i, CollectiveWait)}
    order = issue_order(plan, choice.schedule, waits)
    assert sorted(order) == sorted([op.name for op in choice.alternative.graph.ops] + [w[0] for w in waits.values()])
    started = [i.op for i in plan.instructions if isinstance(i, CollectiveStart)]
    assert all(order.index(f"wait of {name}") > order.index(name) for name in started)
    # the second part's product runs between a start and its wait
    inside = order[order.index("all_reduce0_part0") : order.index("wait of all_reduce0_part0")]
    assert any(name.startswith("mm") and name.endswith("part1") for name in inside)


def test_verifier_catches_a_plan_that_reads_before_the_wait() -> None:
    """A negative control: the plan with a wait moved to the end does not verify."""
    choice = QUICK.choose(dense((4096,)), MACHINE, cut, [(2048, 2048)])
    plan = to_plan(choice.alternative.graph, MACHINE, choice.schedule)
    wait = next(i for i in plan.instructions if isinstance(i, CollectiveWait))
    moved = (*(i for i in plan.instructions if i is not wait), wait)
    assert not verify(Plan(plan.graph, plan.machine, moved)).ok


def test_split_points_avoid_waves_that_are_nearly_empty() -> None:
    graph = dense((1280,)).graph
    products = products_of(graph, 1280)
    assert sum(product.count for product in products) == 4
    found = list(points(graph, 1280, (2, 3), MACHINE))
    assert found[0] == (640, 640)
    assert all(sum(sizes) == 1280 and min(sizes) > 0 for sizes in found)
    assert len(set(found)) == len(found)
    cost = {sizes: seconds_of_parts(products, sizes, MACHINE) for sizes in found if len(sizes) == 2}
    assert min(cost.values()) <= cost[640, 640]
    assert list(points(graph, 1280, (), MACHINE)) == []
    assert next(points(dense((3,)).graph, 3, (2, 4), MACHINE)) == (2, 1)


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"margin": 1.0}, {"effort": -1}, {"most_operators": -1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Overlap(**wrong)
