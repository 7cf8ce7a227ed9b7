"""Small problems of every kind, and orders of their actions that do not wait for ever, drawn by hypothesis."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule
from tests.compiler.pipelining.recounted import actions_of, followed, rank_of


@st.composite
def problems(draw: st.DrawFn, *, plain: bool = False, stages: int = 4, microbatches: int = 2) -> PipelineProblem:
    """A problem of up to three ranks; ``plain`` ones have one route through all stages and nothing but F, I and W."""
    ranks = draw(st.integers(1, 3))
    count = draw(st.integers(1, stages))
    few = st.integers(0, 3)
    made = tuple(draw(_stage(ranks, plain=plain)) for _ in range(count))
    if plain:
        return PipelineProblem(ranks, made, (Route(tuple(range(count)), draw(st.integers(1, microbatches))),))
    routes = tuple(draw(_route(count, microbatches)) for _ in range(draw(st.integers(1, 2))))
    vocabulary = None
    if draw(st.booleans()):
        outputs, gradients = (tuple(draw(few) for _ in range(ranks)) for _ in range(2))
        vocabulary = Vocabulary(outputs, gradients, draw(few), draw(few), draw(st.integers(1, 2)), draw(few))
    limit = draw(st.none() | st.lists(st.integers(0, 12), min_size=ranks, max_size=ranks).map(tuple))
    return PipelineProblem(ranks, made, routes, limit, vocabulary)


@st.composite
def _stage(draw: st.DrawFn, ranks: int, *, plain: bool) -> Stage:
    few = st.integers(0, 3)
    times = {
        "rank": draw(st.integers(0, ranks - 1)),
        "forward_ns": draw(few),
        "input_gradient_ns": draw(few),
        "weight_gradient_ns": draw(few),
        "until_input_gradient_bytes": draw(few),
        "until_weight_gradient_bytes": draw(few),
        "forward_send_ns": draw(few),
        "backward_send_ns": draw(few),
    }
    if plain:
        return Stage(**times)
    more = {name: draw(few) for name in ("between_gradients_bytes", "reduce_ns", "resident_bytes")}
    whole = draw(st.none() | st.integers(0, 6))
    if draw(st.booleans()):
        more["offloaded_bytes"] = draw(st.integers(0, times["until_weight_gradient_bytes"]))
        more |= {"offload_ns": draw(few), "reload_ns": draw(few)}
    return Stage(**times, **more, backward_ns=whole)


@st.composite
def _route(draw: st.DrawFn, count: int, microbatches: int) -> Route:
    through = tuple(draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)))
    hops = [tuple(draw(st.integers(0, 3)) for _ in through[1:]) if draw(st.booleans()) else () for _ in range(2)]
    return Route(through, draw(st.integers(1, microbatches)), *hops)


def schedule_of(problem: PipelineProblem, random: Random) -> PipelineSchedule:
    """Any order that is possible: one action after another that only follows what is done; some backwards whole."""
    waiting: list[Action] = []
    for microbatch, route in enumerate(problem.route_of):
        whole = frozenset(stage for stage in problem.routes[route].stages if random.random() < 0.3)
        waiting += actions_of(problem, microbatch, whole)
    known = set(waiting)
    done: set[Action] = set()
    orders: list[list[Action]] = [[] for _ in range(problem.ranks)]
    while waiting:
        possible = [action for action in waiting if _possible(problem, action, known, done)]
        action = random.choice(possible)
        waiting.remove(action)
        done.add(action)
        orders[rank_of(problem, action)].append(action)
    return PipelineSchedule(problem, tuple(map(tuple, orders)), "drawn")


def _possible(problem: PipelineProblem, action: Action, known: set[Action], done: set[Action]) -> bool:
    before = {Action(stage, kind, action.microbatch) for stage, kinds, _ in followed(problem, action) for kind in kinds}
    return before & known <= done
