"""Which operators of a graph become one kernel: what a library does stands alone, what lies between is fused.

Inductor fuses pointwise operators and reductions that hang together. Here they are grouped by *level*: the most kernels
that stand alone on any path to them. Operators of one level that hang together are one region. Nothing on a path
between two of them stands alone, for that would raise the level; so regions depend on one another in no circle. A
change of part raises the level too: what belongs to different parts of a split is never one kernel, or they would wait
for each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from ...compiler.graph import Graph, Op, OpKind

__all__ = ["called", "is_attention", "is_product", "regions_of", "stands_alone"]

_PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv", "dot", "_scaled_mm", "_grouped_mm", "_int_mm"}
)
#: Calls that Inductor leaves to a library or that have a kernel of their own, beside products and attention.
_LIBRARY = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "convolution", "convolution_backward", "einsum", "_cdist_forward"),
        *("sort", "topk", "cumsum", "histc", "bincount", "nonzero", "masked_select", "unique", "multinomial"),
        *("index_put", "index_add", "scatter", "scatter_add", "scatter_reduce", "embedding_dense_backward"),
    }
)


def called(op: Op) -> str:
    """Name of the operator that the body calls, without namespace and overload; empty without a body."""
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_product(op: Op) -> bool:
    """Whether it is a matrix product."""
    return called(op) in _PRODUCTS


def is_attention(op: Op) -> bool:
    """Whether it is one kernel of attention, forward or backward."""
    name = called(op)
    return "attention" in name or name in ("flex_attention", "flex_attention_backward")


def stands_alone(op: Op) -> bool:
    """Whether it is fused with nothing. One without a body is not, if it computes: nothing is known of it."""
    unknown = not op.body and bool(op.outputs)
    return op.kind is not OpKind.COMPUTE or unknown or is_product(op) or is_attention(op) or called(op) in _LIBRARY


def regions_of(graph: Graph, parts: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """The operators of ``graph``, by index and in program order, of each region; every operator is in one.

    Regions come in an order that every dependency allows, close to the program's. ``parts`` gives the part of the split
    that an operator belongs to, by name; others are in none.
    """
    alone = [stands_alone(op) for op in graph.ops]
    part = [parts.get(op.name, -1) for op in graph.ops]
    level = _levels(graph, alone, part)
    leader = list(range(len(graph.ops)))

    def root(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for index, before in enumerate(graph.predecessors):
        for other in before:
            if not alone[index] and not alone[other] and level[index] == level[other]:
                first, second = sorted((root(index), root(other)))
                leader[second] = first
    members: dict[int, list[int]] = {}
    for index in range(len(graph.ops)):
        members.setdefault(root(index), []).append(index)
    return _sorted(graph, list(members.values()))


def _levels(graph: Graph, alone: Sequence[bool], part: Sequence[int]) -> list[int]:
    level: list[int] = []
    for index, before in enumerate(graph.predecessors):
        raised = (level[other] + (alone[other] or part[other] != part[index]) for other in before)
        level.append(max(raised, default=0))
    return level


def _sorted(graph: Graph, regions: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """``regions`` such that each comes behind those it depends on, otherwise by their first operators."""
    region_of = {index: number for number, region in enumerate(regions) for index in region}
    before = [
        {region_of[other] for index in region for other in graph.predecessors[index]} - {number}
        for number, region in enumerate(regions)
    ]
    after: list[list[int]] = [[] for _ in regions]
    for number, others in enumerate(before):
        for other in others:
            after[other].append(number)
    missing = [len(others) for others in before]
    ready = [(region[0], number) for number, region in enumerate(regions) if not missing[number]]
    heapq.heapify(ready)
    found: list[tuple[int, ...]] = []
    while ready:
        _, number = heapq.heappop(ready)
        found.append(tuple(regions[number]))
        for other in after[number]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (regions[other][0], other))
    return tuple(found)
