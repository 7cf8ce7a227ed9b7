"""A graph whose operators are the tasks of an overlap problem: what is launched as one is one operator.

A plan of this graph can be judged: an operator's operands are what its kernel reads of others and writes for others,
and its flops are what it computes, so that no fused task is held to be faster than the machine for the traffic that
fusing it saves. A collective whose mode absorbs another task is one operator with it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...compiler.graph import DTYPE_BYTES, Graph, Op, OpKind, Tensor
from ...hw_models.model import HardwareModel
from .costs import Costs
from .problem import Problem

__all__ = ["TaskGraph", "task_graph"]


@dataclass(frozen=True)
class TaskGraph:
    """``graph`` has an operator for each task that is none's part; ``operator`` names that of each task, by index."""

    graph: Graph
    operator: tuple[str, ...]


def task_graph(graph: Graph, machine: HardwareModel, problem: Problem, modes: Sequence[int]) -> TaskGraph:
    """The tasks of ``problem``, which was made of ``graph``, as operators, in an order near the program's.

    An operator has its task's name. It keeps its body where it is one operator of ``graph`` with all its operands.
    """
    return _Builder(graph, Costs(graph, machine), problem, tuple(modes)).built()


@dataclass(frozen=True)
class _Builder:
    graph: Graph
    costs: Costs
    problem: Problem
    modes: tuple[int, ...]

    @cached_property
    def owner(self) -> Mapping[int, int]:
        """The task that does each task: itself, or the collective whose mode absorbs it."""
        tasks = self.problem.tasks
        owner = {index: index for index in range(len(tasks))}
        for index, mode in enumerate(self.modes):
            owner.update(dict.fromkeys(tasks[index].modes[mode].absorbs, index))
        return owner

    @cached_property
    def members(self) -> Mapping[int, tuple[int, ...]]:
        """Operators of ``graph``, by index and in program order, that each task does with what it absorbs."""
        place = {op.name: index for index, op in enumerate(self.graph.ops)}
        members: dict[int, list[int]] = {}
        for index, task in enumerate(self.problem.tasks):
            members.setdefault(self.owner[index], []).extend(place[name] for name in task.ops)
        return {index: tuple(sorted(found)) for index, found in members.items()}

    @cached_property
    def users(self) -> Mapping[str, set[int]]:
        """Tasks that touch each buffer; -1 for the caller."""
        users: dict[str, set[int]] = {}
        for index, region in self.members.items():
            for buffer in {b for i in region for b in self.graph.touches[i]}:
                users.setdefault(buffer, set()).add(index)
        returned = {self.graph.tensor[name].buffer for name in self.graph.outputs}
        for buffer in self.graph.output_buffers | returned:
            users.setdefault(buffer, set()).add(-1)
        return users

    def built(self) -> TaskGraph:
        tensors: dict[str, Tensor] = {}
        ops = [self.operator(index, tensors) for index in self.order()]
        for name in self.graph.outputs:
            self.keep(self.graph.tensor[name], tensors)
        outputs = tuple(self.graph.outputs)
        graph = Graph(self.graph.name, tuple(tensors.values()), tuple(ops), outputs)
        names = [self.problem.tasks[self.owner[index]].name for index in range(len(self.problem.tasks))]
        return TaskGraph(graph, tuple(names))

    def order(self) -> Iterator[int]:
        """Tasks in the program's order as far as those that are done together allow."""
        before = {index: set[int]() for index in self.members}
        after = {index: set[int]() for index in self.members}
        for index, task in enumerate(self.problem.tasks):
            own = self.owner[index]
            for other in {self.owner[first] for first in task.before} - {own}:
                before[own].add(other)
                after[other].add(own)
        ready = [index for index, first in before.items() if not first]
        heapq.heapify(ready)
        while ready:
            index = heapq.heappop(ready)
            yield index
            for other in after[index]:
                before[other].discard(index)
                if not before[other]:
                    heapq.heappush(ready, other)

    def operator(self, index: int, tensors: dict[str, Tensor]) -> Op:
        """The operator of task ``index``; its tensors, and their buffers' bases, are added to ``tensors``."""
        task, region = self.problem.tasks[index], self.members[index]
        read, _ = self.costs.traffic(region)
        inputs = [self.operand(region, buffer, read[buffer], task.name, tensors) for buffer in read]
        outputs = [self.result(region, b, tensors) for b in self.needed(region, index)]
        first = self.graph.ops[region[0]]
        alone = len(region) == 1 and tuple(inputs) == first.inputs and tuple(outputs) == first.outputs
        mode = task.modes[self.modes[index]]
        nothing = task.collective is None and mode.seconds == 0
        return Op(
            task.name,
            tuple(inputs),
            tuple(outputs),
            OpKind.COLLECTIVE if task.collective is not None else OpKind.BOUNDARY if nothing else OpKind.COMPUTE,
            flops=0 if nothing else self.costs.flops(region),
            body=first.body if alone else "",
            origin=self.graph.ops[region[-1]].origin,
            outside_bytes=sum(self.graph.ops[i].outside_bytes for i in region),
            repeatable=all(self.graph.ops[i].repeatable for i in region),
            collective=task.collective,
        )

    def needed(self, region: Sequence[int], index: int) -> Iterator[str]:
        """Buffers that others find in another state behind ``region``: those of no use to others live in registers."""
        for buffer in dict.fromkeys(b for i in region for b in self.graph.writes[i]):
            if self.users[buffer] != {index} or not self.created(region, buffer) or len(region) == 1:
                yield buffer

    def created(self, region: Sequence[int], buffer: str) -> bool:
        return any(buffer in self.graph.ops[i].outputs for i in region)

    def operand(self, region: Sequence[int], buffer: str, nbytes: int, task: str, tensors: dict[str, Tensor]) -> str:
        """A tensor in ``buffer`` of ``nbytes``: the one that is read where it has as many, or a stretch of bytes."""
        names = [n for i in region for n in self.graph.ops[i].inputs if self.graph.tensor[n].buffer == buffer]
        read = [self.graph.tensor[name] for name in dict.fromkeys(names)]
        whole = next((tensor for tensor in read if tensor.nbytes == nbytes), None)
        if whole is not None:
            return self.keep(whole, tensors)
        dtype = read[0].dtype
        stretch = Tensor(f"{buffer} read by {task}", (nbytes // DTYPE_BYTES[dtype],), dtype, buffer=buffer)
        return self.keep(stretch, tensors)

    def result(self, region: Sequence[int], buffer: str, tensors: dict[str, Tensor]) -> str:
        """The tensor that ``region`` leaves in ``buffer``: its base where the region makes it, or the last version."""
        if self.created(region, buffer):
            return self.keep(self.graph.tensor[buffer], tensors)
        names = [n for i in region for n in self.graph.ops[i].outputs if self.graph.tensor[n].buffer == buffer]
        return self.keep(self.graph.tensor[names[-1]], tensors)

    def keep(self, tensor: Tensor, tensors: dict[str, Tensor]) -> str:
        base = self.graph.tensor[tensor.buffer]
        tensors.setdefault(base.name, base)
        tensors.setdefault(tensor.name, tensor)
        return tensor.name
