"""Ways of a collective over a machine's links: in one node, and between nodes as a ring, a tree, in levels, in pairs.

The formulas are in ``docs/formulations/collectives.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .fabric import CollectiveKind, CollectiveRate, Scope, Traffic, steps, wire_bytes

__all__ = ["Phase", "Way", "across_nodes", "within_node"]


@dataclass(frozen=True)
class Phase:
    """What one rate does in a collective: its seconds, and the bytes a rank has on its link and in its memory."""

    rate: CollectiveRate
    seconds: float
    wire: float
    memory: float


@dataclass(frozen=True)
class Way:
    """A way of doing a collective: ``seconds`` for all its phases, whether they follow one another or not."""

    algorithm: str
    seconds: float
    phases: tuple[Phase, ...]


def within_node(
    kind: CollectiveKind, nbytes: float, ranks: int, rates: Sequence[CollectiveRate], fuses: str
) -> list[Way]:
    """Ways among ``ranks`` devices of one node: by each algorithm, with each number of programs, the fastest rate."""
    fastest: dict[tuple[str, int, float | None], Way] = {}
    for rate in rates:
        if rate.kind is kind and rate.scope is Scope.WITHIN_NODE and rate.fuses == fuses:
            phase, name = _phase(rate, nbytes, ranks), (rate.algorithm, rate.programs, rate.compute_share)
            if name not in fastest or phase.seconds < fastest[name].seconds:
                fastest[name] = Way(rate.algorithm, phase.seconds, (phase,))
    return list(fastest.values())


def across_nodes(
    kind: CollectiveKind, nbytes: float, on_node: Sequence[int], rates: Sequence[CollectiveRate], fuses: str
) -> list[Way]:
    """Ways among ranks of which ``on_node`` are on each node that has any, two nodes or more."""
    plain = [rate for rate in rates if not rate.fuses]
    found: list[Way] = []
    for outer in rates:
        if outer.kind is not kind or outer.scope is not Scope.ACROSS_NODES or outer.fuses != fuses:
            continue
        if kind is CollectiveKind.ALL_TO_ALL:
            found += _all_pairs(outer, nbytes, on_node, plain)
            continue
        flat = [*_ring(outer, nbytes, on_node, plain), *_tree(outer, nbytes, on_node, plain)]
        found += [min(flat, key=lambda way: way.seconds)] if flat else []
        found += _levels(outer, nbytes, on_node, plain)
    return found


def _more_steps_s(rate: CollectiveRate, ranks: int) -> float:
    of_ranks, measured = (steps(rate.kind, rate.traffic, count) for count in (ranks, rate.ranks))
    return rate.step_s * (of_ranks - measured)


def _phase(rate: CollectiveRate, nbytes: float, ranks: int) -> Phase:
    """``rate`` among ``ranks``: the time of the message with as many bytes on the wire, with other steps; but not less
    than its programs take for one rank's part.
    """
    wire, measured = (wire_bytes(rate.kind, rate.traffic, count) for count in (ranks, rate.ranks))
    seconds = rate.seconds_at(nbytes * wire / measured)
    if rate.part_bytes_per_s is not None:
        seconds = max(seconds, rate.fixed_s + nbytes / ranks / (rate.programs * rate.part_bytes_per_s))
    memory = rate.memory_bytes_per_byte * nbytes * wire / measured
    return Phase(rate, seconds + _more_steps_s(rate, ranks), nbytes * wire, memory)


def _ring(outer: CollectiveRate, nbytes: float, on_node: Sequence[int], rates: Sequence[CollectiveRate]) -> list[Way]:
    """A ring over all ranks, as many times as a node has ranks, each through another one's way out of the node.

    Its bytes pass every link, so the slowest counts: all ways out of a node together, or the ring within it.
    """
    nodes, ways, ranks = len(on_node), min(on_node), sum(on_node)
    if ranks == nodes:
        phase = _phase(outer, nbytes, nodes)
        return [Way(outer.algorithm, phase.seconds, (phase,))]
    inner = _widest(rates, outer.kind, outer.algorithm)
    if inner is None:
        return []
    wire = nbytes * wire_bytes(outer.kind, Traffic.PEERS, ranks)
    turns = steps(outer.kind, Traffic.PEERS, ranks) - steps(outer.kind, Traffic.PEERS, nodes)
    latency = outer.fixed_s + _more_steps_s(outer, nodes) + inner.step_s * turns
    local = _phase(inner, nbytes, ranks)
    seconds = max(latency + wire / min(ways * outer.wire_bytes_per_s, inner.wire_bytes_per_s), local.seconds)
    return [Way(outer.algorithm, seconds, (local, Phase(outer, seconds, wire / ways, 0.0)))]


def _tree(outer: CollectiveRate, nbytes: float, on_node: Sequence[int], rates: Sequence[CollectiveRate]) -> list[Way]:
    """An all-reduce of two nodes in a tree: the message leaves each node once while it is reduced within both."""
    ways = min(on_node)
    local = within_node(outer.kind, nbytes, max(on_node), [r for r in rates if r.algorithm == outer.algorithm], "")
    if outer.kind is not CollectiveKind.ALL_REDUCE or len(on_node) != 2 or ways == 1 or not local:
        return []
    (inner,) = min(local, key=lambda way: way.seconds).phases
    latency = outer.fixed_s + _more_steps_s(outer, 2) + inner.rate.fixed_s
    seconds = max(latency + nbytes / ways / outer.wire_bytes_per_s, inner.seconds)
    return [Way(outer.algorithm, seconds, (inner, Phase(outer, seconds, nbytes / ways, 0.0)))]


#: Collectives within each node before and behind the same one between nodes.
_LEVELS: Mapping[CollectiveKind, tuple[CollectiveKind | None, CollectiveKind | None]] = {
    CollectiveKind.ALL_REDUCE: (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER),
    CollectiveKind.ALL_GATHER: (None, CollectiveKind.ALL_GATHER),
    CollectiveKind.REDUCE_SCATTER: (CollectiveKind.REDUCE_SCATTER, None),
}


def _levels(outer: CollectiveRate, nbytes: float, on_node: Sequence[int], rates: Sequence[CollectiveRate]) -> list[Way]:
    """Within each node, then between devices of the same place in their nodes, then within each node again."""
    nodes, local = len(on_node), on_node[0]
    if local == 1 or len(set(on_node)) > 1 or outer.kind not in _LEVELS:
        return []
    found = []
    for algorithm in dict.fromkeys(rate.algorithm for rate in rates if rate.scope is Scope.WITHIN_NODE):
        inner = [_widest(rates, kind, algorithm, Traffic) for kind in _LEVELS[outer.kind] if kind is not None]
        if None not in inner:
            phases = [_phase(rate, nbytes, local) for rate in inner if rate is not None]
            phases.append(_phase(outer, nbytes / local, nodes))
            found.append(Way(f"levels_{algorithm}", sum(phase.seconds for phase in phases), tuple(phases)))
    return found


def _all_pairs(
    outer: CollectiveRate, nbytes: float, on_node: Sequence[int], rates: Sequence[CollectiveRate]
) -> list[Way]:
    """Every rank to every other: over both links at a time, each with the bytes for the ranks that it leads to.

    The slowest rank counts: over the network one with few others in its node, within a node one with many.
    """
    ranks, fewest, most = sum(on_node), min(on_node), max(on_node)
    wire = nbytes * (ranks - fewest) / ranks
    seconds = outer.fixed_s + outer.step_s * (ranks - fewest - (outer.ranks - 1)) + wire / outer.wire_bytes_per_s
    memory = outer.memory_bytes_per_byte * wire / wire_bytes(outer.kind, outer.traffic, outer.ranks)
    phases = [Phase(outer, seconds, wire, memory)]
    if most > 1:
        inner = _widest(rates, outer.kind, outer.algorithm) or _widest(rates, outer.kind, None)
        if inner is None:
            return []
        phases.append(_phase(inner, nbytes * most / ranks, most))
    return [Way(outer.algorithm, max(phase.seconds for phase in phases), tuple(phases))]


def _widest(
    rates: Sequence[CollectiveRate],
    kind: CollectiveKind,
    algorithm: str | None,
    traffic: type[Traffic] | tuple[Traffic, ...] = (Traffic.PEERS,),
) -> CollectiveRate | None:
    """The rate within a node that is fastest for long messages; of ``algorithm`` if one is named."""
    fitting = [
        rate
        for rate in rates
        if rate.scope is Scope.WITHIN_NODE
        and rate.kind is kind
        and algorithm in (None, rate.algorithm)
        and rate.traffic in traffic
    ]
    return max(fitting, key=lambda rate: rate.wire_bytes_per_s, default=None)
