"""What COSMA's model is about: versions of buffers, who makes and needs them, and when operators can run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...compiler.graph import Graph
from ...compiler.plan import Plan
from ...hw_models.model import aligned_bytes
from ..order.problem import ancestor_masks, descendant_masks
from ..residency.workset import planned_buffers

__all__ = ["CosmaProblem", "Version", "Window"]

Window = tuple[int, int]  # first and last step


@dataclass(frozen=True)
class Version:
    """The content that one write leaves in a buffer: a tensor of the paper's.

    ``number`` counts the writes, as ``Lifetime.versions`` does; 0 is what a source holds beforehand. ``creator`` is the
    operator that writes it, ``None`` for number 0; ``in_place`` says that it overwrites the version before. ``users``
    must find it resident: the operators that read it, and the one that overwrites it, ``overwriter``. ``backed`` says
    that backing memory holds it at no additional cost as soon as it exists: sources, and the last version of an
    output. ``window`` are the steps at which it can be resident at all.
    """

    buffer: int
    number: int
    creator: int | None
    in_place: bool
    users: tuple[int, ...]
    overwriter: int | None
    backed: bool
    window: Window


@dataclass(frozen=True)
class CosmaProblem:
    """Operators, buffers and versions as indices; a step is the execution of one operator.

    ``windows`` holds the first and last step each operator can run at: as many operators must come before and after
    it (ASAP and ALAP), or the one step of a fixed order. ``predecessors`` are reduced to those no other implies.
    ``sizes[d][b]`` of ``capacities[d]`` is what buffer ``b`` takes of capacity dimension ``d``, as in ``GapProblem``.
    ``staying`` are buffers pinned as resident: never spilled, and fetched once if they are sources.
    ``constant_bytes`` is what the objective counts besides fetches and stores, negative for compulsory fetches.
    """

    windows: tuple[Window, ...]
    predecessors: tuple[tuple[int, ...], ...]
    buffers: tuple[str, ...]
    nbytes: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    capacities: tuple[int, ...]
    versions: tuple[Version, ...]
    staying: frozenset[int]
    constant_bytes: int

    @classmethod
    def of(cls, plan: Plan, base_bytes: int, *, fixed: bool) -> CosmaProblem:
        """The problem of ``plan``'s graph and machine; ``fixed`` keeps the plan's order.

        ``base_bytes`` is additional traffic that no plan avoids: ``GapProblem.base_bytes``, the same for all orders.
        """
        if fixed:
            position = {op: p for p, op in enumerate(plan.order)}
            predecessors = plan.graph.predecessors
            windows = tuple((position[op], position[op]) for op in range(len(position)))
        else:
            predecessors, windows = _reduced(plan.graph)
        sized = planned_buffers(plan)
        touched = {b for buffers in plan.graph.touches for b in buffers}
        names = tuple(b for b in sized if b in touched)
        nbytes = tuple(sized[b] for b in names)
        memory = plan.machine.scratchpad_memory
        sizes = [tuple(aligned_bytes(n, memory.alignment_bytes) for n in nbytes)]
        capacities = [aligned_bytes(memory.capacity_bytes, memory.alignment_bytes)]
        if capacities[0] != memory.capacity_bytes:
            sizes.append(nbytes)
            capacities.append(memory.capacity_bytes)
        pinned = {pin.buffer for pin in plan.pins if pin.resident}
        versions = _versions(plan.graph, names, windows)
        compulsory = sum(nbytes[v.buffer] for v in versions if v.creator is None)
        return cls(
            windows=windows,
            predecessors=predecessors,
            buffers=names,
            nbytes=nbytes,
            sizes=tuple(sizes),
            capacities=tuple(capacities),
            versions=versions,
            staying=frozenset(b for b, name in enumerate(names) if name in pinned),
            constant_bytes=base_bytes - compulsory,
        )

    @property
    def steps(self) -> int:
        """Number of steps, one for each operator."""
        return len(self.windows)

    @cached_property
    def unit(self) -> int:
        """The greatest number of bytes that divides every buffer."""
        return max(1, math.gcd(*self.nbytes))

    @cached_property
    def index(self) -> dict[tuple[str, int], int]:
        """Index into ``versions`` by the buffer's name and the version's number."""
        return {(self.buffers[version.buffer], version.number): v for v, version in enumerate(self.versions)}

    @property
    def freedom(self) -> int:
        """Steps that operators can be moved by, in sum; 0 for a fixed order."""
        return sum(last - first for first, last in self.windows)

    def terms(self) -> int:
        """About how many non-zeros the model without addresses has; what it costs to build and to solve."""
        width = [last - first + 1 for first, last in self.windows]
        order = sum(4 * width[op] + 3 * width[op] * len(before) for op, before in enumerate(self.predecessors))
        moves = sum(20 * (v.window[1] - v.window[0] + 1) for v in self.versions)
        return order + moves + sum(5 * width[user] for v in self.versions for user in v.users)

    def address_terms(self) -> int:
        """About how many non-zeros Eq. 9 to 11 add: a dozen for each two buffers that may share a step, and step."""
        return sum(6 * len(live) * (len(live) - 1) for live in self.live)

    @cached_property
    def live(self) -> tuple[tuple[int, ...], ...]:
        """Buffers that may be resident at each step."""
        found: list[set[int]] = [set() for _ in range(self.steps)]
        for version in self.versions:
            for step in range(version.window[0], version.window[1] + 1):
                found[step].add(version.buffer)
        return tuple(tuple(sorted(buffers)) for buffers in found)


def _reduced(graph: Graph) -> tuple[tuple[tuple[int, ...], ...], tuple[Window, ...]]:
    """Predecessors that no other one implies, and the steps each operator can run at in some order."""
    count = len(graph.ops)
    ancestors, descendants = ancestor_masks(graph.predecessors), descendant_masks(graph.successors)
    reduced: list[tuple[int, ...]] = []
    for before in graph.predecessors:
        implied = 0
        for p in before:
            implied |= ancestors[p]
        reduced.append(tuple(p for p in before if not implied >> p & 1))
    windows = tuple((a.bit_count(), count - 1 - d.bit_count()) for a, d in zip(ancestors, descendants, strict=True))
    return tuple(reduced), windows


@dataclass
class _Open:
    """A version while its users are being collected."""

    creator: int | None
    in_place: bool
    users: list[int]


def _versions(graph: Graph, names: Sequence[str], windows: Sequence[Window]) -> tuple[Version, ...]:
    """Versions of all buffers, those of one buffer in a row and in the order in which they are written."""
    index = {name: b for b, name in enumerate(names)}
    found: list[list[_Open]] = [
        [_Open(None, in_place=False, users=[])] if graph.buffers[name].role.is_source else [] for name in names
    ]
    for op, touched in enumerate(graph.touches):
        for name in touched:
            if name not in index:
                continue
            chain = found[index[name]]
            if chain:
                chain[-1].users.append(op)
            if name in graph.writes[op]:
                chain.append(_Open(op, in_place=bool(chain), users=[]))
    return tuple(
        _version(graph, names[b], b, chain, k, windows) for b, chain in enumerate(found) for k in range(len(chain))
    )


def _version(
    graph: Graph, name: str, buffer: int, chain: Sequence[_Open], k: int, windows: Sequence[Window]
) -> Version:
    this = chain[k]
    last = k == len(chain) - 1
    begin = min(windows[u][0] for u in this.users) if this.creator is None else windows[this.creator][0]
    ends = [windows[u][1] for u in this.users] or [windows[op][1] for op in (this.creator,) if op is not None]
    return Version(
        buffer=buffer,
        number=k + (chain[0].creator is not None),
        creator=this.creator,
        in_place=this.in_place,
        users=tuple(this.users),
        overwriter=None if last else chain[k + 1].creator,
        backed=this.creator is None or (last and name in graph.output_buffers),
        window=(begin, max(ends)),
    )
