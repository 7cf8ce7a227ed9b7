"""What ``compile`` returns for one rank of several: a plan to look at, and a module to run on the ranks there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExecutionError
from .compiled import CompiledModel
from .overlap import CollectiveLine, Overlapped
from .plan import Plan

if TYPE_CHECKING:
    import torch

    from .frontend.program import ImportedGraph
    from .frontend.ranks import Captured
    from .runtime.distributed import RankExecutor

__all__ = ["RankModel"]


@dataclass(frozen=True, kw_only=True)
class RankModel(CompiledModel):
    """One rank's module, its collectives hidden behind compute as far as that was predicted to pay.

    ``overlapped`` is what was decided, and ``captured`` what it was decided for. ``weights`` are this rank's parameters
    and buffers by their names in the module. All ranks run one plan (SPMD): the same operators on their own values.
    """

    captured: Captured
    overlapped: Overlapped
    weights: Mapping[str, Any]
    ranks: tuple[int, ...] = (0,)
    check_ranks: bool = False

    @property
    def plan_before(self) -> Plan:
        """The same for the module as it was given, which waits for each collective at once."""
        return self.overlapped.before

    @property
    def collectives(self) -> tuple[CollectiveLine, ...]:
        """What became of each collective of the module as it was given."""
        return self.overlapped.lines

    @cached_property
    def executor(self) -> RankExecutor:
        """What runs the module in the plan's order; ranks are compared when it is made, if that is wanted."""
        from .runtime.agreement import check_same_order, collective_orders
        from .runtime.distributed import RankExecutor

        if self.check_ranks:
            check_same_order(collective_orders(self.overlapped.module))
        return RankExecutor(self.overlapped.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run this rank, with the others: every rank calls, with its own inputs.

        Takes what the module takes, and returns what it returns; of a DTensor the part on this rank.

        Raises:
            ExecutionError: the inputs have other shapes or types than those that were planned for, or the process
                groups are not there.
        """
        import torch
        import torch.distributed as dist
        import torch.utils._pytree as pytree

        if not dist.is_initialized():
            raise ExecutionError(
                "there is no process group here",
                hint="run it in the processes that torchrun starts, behind torch.distributed.init_process_group",
            )
        given, structure = pytree.tree_flatten((args, kwargs))
        if structure != self.captured.call:
            raise ExecutionError(f"the module was planned for a call of {self.captured.call}, got {structure}")
        leaves = [_local(leaf) for leaf in given if isinstance(leaf, torch.Tensor)]
        names = self.captured.inputs
        if len(leaves) != len(names):
            raise ExecutionError(f"the module takes {len(names)} tensors ({', '.join(names)}), got {len(leaves)}")
        values = {name: _local(self.weights[own]) for name, own in self.captured.parameters.items()}
        values |= dict(zip(names, leaves, strict=True))
        outputs = self.executor(*self._flat(values))
        for name, value in zip(self.captured.updated, outputs, strict=False):
            _copy_back(values[name], value)
        return pytree.tree_unflatten(outputs[len(self.captured.updated) :], self.captured.result)

    def _flat(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The module's inputs in its own order. Raises ExecutionError."""
        flat = []
        for node in self.overlapped.module.graph.find_nodes(op="placeholder"):
            value = values[node.name]
            planned = node.meta["val"]
            if (value.shape, value.dtype) != (planned.shape, planned.dtype):
                raise ExecutionError(
                    f"input {node.name!r} is {list(value.shape)} of {value.dtype}; the plan is for "
                    f"{list(planned.shape)} of {planned.dtype}",
                    hint="compile again for these inputs",
                )
            flat.append(value)
        return flat

    def _program(self) -> ImportedGraph:
        raise ExecutionError("one rank alone cannot be executed in a scratchpad", hint="call the model, on every rank")

    def summary(self) -> str:
        """What was decided, and what became of each collective, in words."""
        from .report.overlap import overlap_text

        machine = self.plan.machine
        head = f"{self.plan.graph.name} on {machine.name}, {len(self.ranks)} ranks"
        return "\n".join([head, *overlap_text(self.overlapped)])

    def report(self, folder: str | Path) -> dict[str, Path]:
        """Write ``plan.json``, ``index.html`` with the timeline of all ranks, ``trace.json`` and PNGs."""
        from .report.ranks import write_ranks

        target = Path(folder)
        self.plan.save(target / "plan.json")
        return {"plan.json": target / "plan.json", **write_ranks(self.overlapped, target)}


def _copy_back(old: torch.Tensor, new: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        old.copy_(new)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
