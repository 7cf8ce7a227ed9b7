"""How many bytes each region of a graph brings to life, and who are the last to use them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...compiler.graph import Graph

__all__ = ["lifetimes"]


def lifetimes(graph: Graph, regions: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Bytes that each region allocates, and the regions whose bytes it is among the last to use.

    Bytes are those of buffers that others than the region read, or the caller; a region's bytes die together, with the
    last user of any of them, and never where one of them is returned. So the sum of what lives is never too small.
    """
    creator = _creators(graph, regions)
    touched = _touched(graph, regions, creator)
    allocates = [0] * len(regions)
    users: list[set[int]] = [set() for _ in regions]
    returned: set[int] = set()
    for buffer, number in creator.items():
        others = touched[buffer] - {number}
        if buffer in graph.output_buffers:
            returned.add(number)
        elif not others and len(regions[number]) > 1:
            continue  # a value within a kernel, in registers
        allocates[number] += graph.buffers[buffer].nbytes
        users[number] |= others
    frees: list[list[int]] = [[] for _ in regions]
    for number, others in enumerate(users):
        if allocates[number] and number not in returned:
            for other in others or {number}:
                frees[other].append(number)
    return allocates, [tuple(found) for found in frees]


def _creators(graph: Graph, regions: Sequence[Sequence[int]]) -> dict[str, int]:
    """The region that makes each buffer."""
    return {
        name: number
        for number, region in enumerate(regions)
        for index in region
        for name in graph.ops[index].outputs
        if graph.tensor[name].buffer == name
    }


def _touched(graph: Graph, regions: Sequence[Sequence[int]], buffers: Collection[str]) -> dict[str, set[int]]:
    """The regions that read or write each of ``buffers``."""
    touched: dict[str, set[int]] = {name: set() for name in buffers}
    for number, region in enumerate(regions):
        for buffer in {b for index in region for b in graph.touches[index]}.intersection(touched):
            touched[buffer].add(number)
    return touched
