"""Random graphs that only planners see, and the least additional traffic of small ones by brute force."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.plan import Plan
from opweave.passes.order.problem import OrderProblem
from tests.graphs.build import machine

__all__ = ["least_traffic", "problems", "random_graph"]

State = tuple[frozenset[int], frozenset[int]]  # resident buffers, and those of them whose content is backed

ROLES = (Role.INPUT, Role.WEIGHT)


def random_graph(seed: int, operators: int) -> Graph:
    """Chains that branch and join, with weights, updates in place and several outputs; sizes of a few bytes."""
    draw = random.Random(seed)
    tensors = {f"s{i}": Tensor(f"s{i}", (draw.randint(1, 6),), "int8", draw.choice(ROLES)) for i in range(2)}
    values, ops = list(tensors), []
    for k in range(operators):
        latest = values[-1:] if draw.random() < 0.6 else []
        inputs = tuple(dict.fromkeys((*latest, *draw.choices(values, k=draw.choice((1, 1, 1, 2)) - len(latest)))))
        if not inputs:
            inputs = (values[-1],)
        if draw.random() < 0.15:  # a weight of its own
            name = f"w{k}"
            tensors[name] = Tensor(name, (draw.randint(1, 4),), "int8", Role.WEIGHT)
            inputs = (*inputs, name)
        outputs: list[str] = []
        for part in range(2 if draw.random() < 0.1 else 1):
            name = f"t{k}_{part}"
            target = tensors[draw.choice(inputs)]
            if part == 0 and draw.random() < 0.15:
                tensors[name] = Tensor(name, target.shape, "int8", buffer=target.buffer)
            else:
                tensors[name] = Tensor(name, (draw.randint(1, 6),), "int8")
            outputs.append(name)
        values += outputs
        ops.append(Op(f"o{k}", inputs, tuple(outputs)))
    unread = [v for v in values if not any(v in op.inputs for op in ops)]
    outputs_of_graph = tuple(v for v in values[2:] if v in unread[-2:] or draw.random() < 0.1) or (values[-1],)
    return Graph("random", tuple(tensors.values()), tuple(ops), outputs_of_graph)


def problems(graph: Graph, alignment: int = 1) -> Iterator[OrderProblem]:
    """The graph in the least scratchpad, and in a little more."""
    least = OrderProblem.of(Plan.of_order(graph, machine(1, alignment))).capacity
    for capacity in (least, least + 2, least + 5):
        yield OrderProblem.of(Plan.of_order(graph, machine(max(capacity, 1), alignment)))


def least_traffic(problem: OrderProblem, blocks: Sequence[tuple[int, ...]]) -> int:
    """Least additional traffic of all orders that run each block back to back, every residency being tried."""
    layer: dict[frozenset[int], dict[State, int]] = {frozenset(): {(frozenset(), frozenset()): 0}}
    for _ in blocks:
        following: dict[frozenset[int], dict[State, int]] = {}
        for done, states in layer.items():
            for block in blocks:
                before = {p for op in block for p in problem.predecessors[op]} - set(block)
                if block[0] in done or not before <= done:
                    continue
                reached = _run(problem, done, states, block)
                known = following.setdefault(done | set(block), {})
                for state, cost in reached.items():
                    known[state] = min(cost, known.get(state, cost))
        layer = following
    return min(cost for states in layer.values() for cost in states.values())


def _run(
    problem: OrderProblem, done: frozenset[int], states: dict[State, int], block: tuple[int, ...]
) -> dict[State, int]:
    for op in block:
        reached: dict[State, int] = {}
        past = done | {op}
        for (resident, backed), cost in states.items():
            for kept in _rooms(problem, resident, op):
                stored = sum(problem.nbytes[b] for b in resident - kept if b not in backed)
                loaded = sum(
                    problem.nbytes[b] for b in problem.touches[op] if b not in kept and done & set(problem.users[b])
                )
                clean = {
                    b for b in problem.touches[op] if (b in backed or b not in kept) and b not in problem.writes[op]
                }
                clean |= {b for b in problem.writes[op] if problem.final_writer[b] == op}
                now = {b for b in kept | set(problem.touches[op]) if not set(problem.users[b]) <= past}
                state = frozenset(now), frozenset(now & (clean | (kept & backed) - problem.writes[op]))
                reached[state] = min(cost + stored + loaded, reached.get(state, cost + stored + loaded))
        states, done = reached, past
    return states


def _rooms(problem: OrderProblem, resident: frozenset[int], op: int) -> Iterator[frozenset[int]]:
    """The largest subsets of ``resident`` that fit beside the working set of ``op``, which keeps what it has."""
    touched = frozenset(problem.touches[op])
    others = sorted(resident - touched)
    room = problem.capacity - sum(problem.footprint[b] for b in touched)
    found: list[frozenset[int]] = []
    for count in range(len(others), -1, -1):
        for chosen in combinations(others, count):
            kept = frozenset(chosen)
            if sum(problem.footprint[b] for b in kept) <= room and not any(kept <= larger for larger in found):
                found.append(kept)
                yield kept | (resident & touched)
