"""The fused kernels worth launching: matches of greatest predicted gain, no two of which replace one operator.

docs/formulations/fusion.md states the integer program in the same symbols.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pulp

from ...compiler.fusion import Match, fused
from ...compiler.graph import Graph, Op, Tensor
from ...compiler.pipeline import Budget
from ...errors import ModelError
from ...hw_models.cost import op_seconds
from ...hw_models.model import EngineKind, HardwareModel
from .._solver.highs import less_tolerances, solve

__all__ = ["EFFICIENCY", "MARGIN", "Choice", "Prices", "choose_matches"]

#: Arithmetic of a fused matrix product beside a vendor library's, assumed: Triton's own tutorial reached 0.95 of cuBLAS
#: on an H100 (triton pull request 5461), kernels with more epilogue reach less.
EFFICIENCY = 0.9
#: A launch is not chosen for less than this part of what it replaces: predictions are no better than that.
MARGIN = 0.05
_PS = 1e12
#: Calls that Inductor leaves to a library, or gives a kernel of their own; it fuses all others with their neighbours.
_ALONE = frozenset(
    {
        *("addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "_scaled_mm", "_grouped_mm"),
        *("conv1d", "conv2d", "conv3d", "convolution", "convolution_backward"),
        *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention"),
        *("_scaled_dot_product_efficient_attention", "cumsum", "sort", "topk", "histc", "bincount"),
        *("index_add", "index_put", "scatter", "scatter_add", "embedding_dense_backward"),
    }
)


@dataclass(frozen=True)
class Choice:
    """The matches chosen, in program order, what they are predicted to save, and at most could, in seconds.

    ``refused`` counts, by kernel, the matches that would save nothing or go with none of those chosen.
    """

    matches: tuple[Match, ...] = ()
    gain_s: float = 0.0
    bound_s: float = 0.0
    refused: Mapping[str, int] = field(default_factory=dict)


def choose_matches(
    graph: Graph,
    candidates: Sequence[Match],
    machine: HardwareModel,
    budget: Budget,
    *,
    others_fuse: bool = True,
    required: bool = False,
) -> Choice:
    """Choose among ``candidates`` those of greatest total gain on ``machine``.

    ``others_fuse`` says whether what is not chosen is fused by Inductor, or every operator runs on its own.
    ``required`` takes all that go together, most operators first, whatever they are predicted to gain: for tests and
    for users who know better.
    """
    unique = list({_key(m): m for m in candidates}.values())
    prices = Prices(graph, machine, others_fuse)
    times = {m: (prices.before_s(match), prices.launch_s(match)) for m, match in enumerate(unique)}
    gains = {m: before - launch for m, (before, launch) in times.items()}
    values = {m: float(len(unique[m].ops)) if required else gains[m] * _PS for m in gains}
    worthwhile = [m for m in values if required or gains[m] > MARGIN * times[m][0]]
    taken, bound = _packed(unique, worthwhile, values, budget)
    chosen = _compatible(graph, [unique[m] for m in taken], [values[m] for m in taken])
    names = Counter(m.kernel for m in unique)
    names.subtract(m.kernel for m in chosen)
    gain = sum(gains[m] for m, match in enumerate(unique) if match in chosen)
    return Choice(tuple(chosen), gain, max(gain, 0.0 if required else bound / _PS), dict(+names))


def _key(match: Match) -> tuple[object, ...]:
    """What tells a match from others, but for operands in another order: sums and products match both ways."""
    values = sorted(str(v.name if isinstance(v, Tensor) else v) for v in match.arguments.values())
    return match.kernel, match.ops, match.outputs, match.cost, tuple(values)


def _packed(
    matches: Sequence[Match], worthwhile: Sequence[int], values: Mapping[int, float], budget: Budget
) -> tuple[list[int], float]:
    """Maximise the sum of ``values`` over matches that share no operator; the greedy answer if the time is up."""
    taken: set[str] = set()
    greedy: list[int] = []
    for m in sorted(worthwhile, key=lambda m: -values[m]):
        if taken.isdisjoint(matches[m].ops):
            taken.update(matches[m].ops)
            greedy.append(m)
    claims: dict[str, list[int]] = {}
    for m in worthwhile:
        for op in matches[m].ops:
            claims.setdefault(op, []).append(m)
    contested = [claim for claim in claims.values() if len(claim) > 1]
    if not contested:
        return greedy, sum(values[m] for m in greedy)
    model = pulp.LpProblem("fusion", pulp.LpMinimize)
    take = {m: model.add_variable(f"take_{m}", cat=pulp.LpBinary) for m in worthwhile}
    model += pulp.lpSum(-values[m] * take[m] for m in worthwhile), "gain"
    for number, claim in enumerate({tuple(claim) for claim in contested}):
        model += pulp.lpSum(take[m] for m in claim) <= 1, f"one_launch_each_{number}"
    start = {take[m].name: float(m in greedy) for m in worthwhile}
    solution = solve(model, budget, start=start)
    bound = -less_tolerances(solution.bound, len(take))
    found = [m for m in worthwhile if solution.values.get(take[m].name, 0.0) > 0.5]
    best = max((greedy, found), key=lambda answer: sum(values[m] for m in answer))
    return best, bound


def _compatible(graph: Graph, chosen: list[Match], values: Sequence[float]) -> list[Match]:
    """``chosen`` in program order, without those of least value that the others leave no place for."""
    position = {op.name: index for index, op in enumerate(graph.ops)}
    ranked = [match for _, match in sorted(zip(values, chosen, strict=True), key=lambda pair: -pair[0])]
    kept = ranked
    try:
        fused(graph, ranked)
    except ModelError:
        kept = []
        for match in ranked:
            try:
                fused(graph, [*kept, match])
            except ModelError:
                continue
            kept.append(match)
    return sorted(kept, key=lambda match: position[match.ops[0]])


@dataclass(frozen=True)
class Prices:
    """What operators and launches are predicted to take on a machine, by its roofline.

    Where ``others_fuse``, matrix products, convolutions, sorts and the like are one library call each, and what lies
    between them is fused as far as it hangs together; else every operator is a kernel.
    """

    graph: Graph
    machine: HardwareModel
    others_fuse: bool = True

    @cached_property
    def _readers(self) -> Mapping[str, Collection[str]]:
        """Names of the operators that read each buffer, and ``""``, the caller, where it returns one."""
        found: dict[str, set[str]] = {}
        for op, read in zip(self.graph.ops, self.graph.reads, strict=True):
            for buffer in read:
                found.setdefault(buffer, set()).add(op.name)
        for name in self.graph.outputs:
            found.setdefault(self.graph.tensor[name].buffer, set()).add("")
        return found

    @cached_property
    def _op(self) -> Mapping[str, Op]:
        return {op.name: op for op in self.graph.ops}

    def before_s(self, match: Match) -> float:
        """Seconds that the operators of ``match`` take without it."""
        ops = [self._op[name] for name in match.ops]
        groups = [[op] for op in ops]
        if self.others_fuse:
            groups = [[op] for op in ops if _called(op) in _ALONE]
            groups += self._connected([op for op in ops if _called(op) not in _ALONE])
        return sum(self._seconds(sum(o.flops for o in g), g[-1].outputs[0], self._traffic_bytes(g)) for g in groups)

    def launch_s(self, match: Match) -> float:
        """Seconds of one launch in their place."""
        ops = [self._op[name] for name in match.ops]
        alone = [op for op in ops if _called(op) in _ALONE]
        flops = int(match.cost.flops / EFFICIENCY) if alone else match.cost.flops
        return self._seconds(flops, (alone or ops[-1:])[0].outputs[0], match.cost.traffic_bytes)

    def _seconds(self, flops: int, tensor: str, traffic_bytes: int) -> float:
        engine = self.machine.engines_of(EngineKind.COMPUTE)[0]
        return op_seconds(flops, self.graph.tensor[tensor].dtype, traffic_bytes, 0, self.machine, engine)

    def _connected(self, ops: Iterable[Op]) -> list[list[Op]]:
        """``ops`` in groups that hang together by what they read and write."""
        groups: list[tuple[set[str], list[Op]]] = []
        for op in ops:
            written = {self.graph.tensor[name].buffer for name in op.outputs}
            read = {self.graph.tensor[name].buffer for name in op.inputs}
            joined = [group for group in groups if group[0] & read]
            groups = [group for group in groups if not group[0] & read]
            merged = [other for group in joined for other in group[1]]
            groups.append((written.union(*(group[0] for group in joined)), [*merged, op]))
        return [group for _, group in groups]

    def _traffic_bytes(self, group: Sequence[Op]) -> int:
        """Bytes that one kernel for ``group`` moves: what it reads of others, and what others read of it."""
        names = {op.name for op in group}
        written = {self.graph.tensor[name].buffer for op in group for name in op.outputs}
        read = {self.graph.tensor[name].buffer for op in group for name in op.inputs} - written
        needed = {buffer for buffer in written if not names.issuperset(self._readers.get(buffer, ()))}
        return sum(self.graph.buffers[buffer].nbytes for buffer in read | needed)


def _called(op: Op) -> str:
    return op.target.split(".")[1] if op.target.count(".") == 2 else ""
