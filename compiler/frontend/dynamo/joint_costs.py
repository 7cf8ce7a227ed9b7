"""What operators of a joint graph take on a machine, if what can be fused is fused.

An operator that Inductor fuses with its neighbours (torch's own list of fusible operators) pays for its arithmetic and
for what passes between it and operators that cannot be fused with; every other one is a kernel with a launch, and its
roofline counts all operands and results. Flops are those of ``torch.utils.flop_counter``; one for each element of the
result where it knows none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners
from torch.fx.experimental import symbolic_shapes
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from ....errors import MachineError, OpweaveError
from ....hw_models.cost import op_seconds, transfer_seconds
from ....hw_models.model import Direction, Engine, EngineKind, HardwareModel

__all__ = ["JointCosts", "aliased", "nbytes_of", "source", "tensors_of"]

SYMBOLIC_SIZE = 4096  # what torch assumes for a size that only the data tells


#: Operators that have another's formula.
_SAME_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True)
class JointCosts:
    """Times on ``machine``, in whole picoseconds; ``written`` are nodes whose values leave the graph."""

    machine: HardwareModel
    written: frozenset[fx.Node] = frozenset()

    def step_ps(self, node: fx.Node) -> int:
        """Time that ``node`` takes where it stands."""
        if not self._computes(node):
            return 0
        if not self.is_fused(node):
            return self._roofline_ps(node, _flops(node), [*node.all_input_nodes, node], launch=True)
        moved = [read for read in node.all_input_nodes if not self.is_fused(read)]
        return self._roofline_ps(node, _flops(node), [*moved, *self._if_written(node)], launch=False)

    def again_ps(self, node: fx.Node) -> int:
        """Time that computing ``node`` once more adds: what it reads of saved values is counted with them."""
        if not self._computes(node):
            return 0
        if not self.is_fused(node):
            return self.step_ps(node)
        moved = [read for read in node.all_input_nodes if read.op != "call_function"]
        return self._roofline_ps(node, _flops(node), [*moved, *self._if_written(node)], launch=False)

    def save_ps(self, node: fx.Node) -> int:
        """Time that saving ``node`` adds: it is read once, and written if otherwise it would stay in registers."""
        times = 1 if self._if_written(node) or not self.is_fused(node) else 2
        return round(1e12 * times * nbytes_of(node) / self.machine.scratchpad_memory.bandwidth_bytes_per_s)

    def store_ps(self, nbytes: int) -> int:
        """Time for ``nbytes`` from the device to the host."""
        return round(1e12 * self._transfer_s(nbytes, Direction.STORE))

    def load_ps(self, nbytes: int) -> int:
        """Time for ``nbytes`` from the host to the device."""
        return round(1e12 * self._transfer_s(nbytes, Direction.LOAD))

    def is_fused(self, node: fx.Node) -> bool:
        """Whether a kernel may compute ``node`` together with its neighbours."""
        made = source(node)
        return made.op == "call_function" and (self._operators.is_fusible(made) or aliased(made) is not None)

    def is_random(self, node: fx.Node) -> bool:
        """Whether ``node`` draws random numbers. Attention can, and is tagged so, but does not without dropout."""
        tagged = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        return self._operators.is_random(node) or (tagged and _argument(node, "dropout_p") != 0)

    @cached_property
    def _operators(self) -> Any:
        listed = getattr(partitioners, "get_default_op_list", None)
        if listed is None:
            raise OpweaveError(
                f"torch {torch.__version__} has no torch._functorch.partitioners.get_default_op_list",
                hint="a memory limit for training works with torch 2.11 to 2.15",
            )
        return listed()

    @cached_property
    def _engine(self) -> Engine:
        return self.machine.engines_of(EngineKind.COMPUTE)[0]

    def _computes(self, node: fx.Node) -> bool:
        return node.op == "call_function" and aliased(node) is None and any(True for _ in tensors_of(node))

    def _if_written(self, node: fx.Node) -> list[fx.Node]:
        """``node`` itself if a kernel of its own, or the caller, reads it or a view of it."""
        pending, seen = [node], set()
        while pending:
            reader = pending.pop()
            if reader in self.written:
                return [node]
            for user in reader.users:
                if aliased(user) is reader and user not in seen:
                    seen.add(user)
                    pending.append(user)
                elif user.op == "call_function" and not self.is_fused(user):
                    return [node]
        return []

    def _roofline_ps(self, node: fx.Node, flops: int, moved: Iterable[fx.Node], *, launch: bool) -> int:
        dtype = str(next(tensors_of(node)).dtype).removeprefix("torch.")
        local = sum(nbytes_of(other) for other in moved)
        seconds = op_seconds(flops, dtype, local, 0, self.machine, self._engine)
        return round(1e12 * (seconds if launch else seconds - self._engine.launch_s))

    def _transfer_s(self, nbytes: int, direction: Direction) -> float:
        engines = [engine for engine in self.machine.engines_of(EngineKind.COPY) if engine.copies(direction)]
        if not engines:
            raise MachineError(f"machine {self.machine.name!r} has no copy engine for a {direction.value}")
        return min(transfer_seconds(nbytes, engine) for engine in engines)


def tensors_of(node: fx.Node) -> Iterator[torch.Tensor]:
    """The fake tensors that ``node`` makes."""
    return (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))


def nbytes_of(node: fx.Node) -> int:
    """Bytes of all tensors that ``node`` makes, each dense."""
    return sum(math.prod(_sizes(tensor)) * tensor.dtype.itemsize for tensor in tensors_of(node))


def source(node: fx.Node) -> fx.Node:
    """The operator that makes ``node``: itself, or the one of whose results it is an element."""
    while node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def aliased(node: fx.Node) -> fx.Node | None:
    """The operand of which ``node`` is a view: the schema says so, or they have one storage."""
    made = source(node)
    storages = {_storage(tensor) for tensor in tensors_of(node)}
    if node.op != "call_function" or not storages:
        return None
    reads = [read for read in made.all_input_nodes if any(True for _ in tensors_of(read))]
    for read in reads:
        if storages == {_storage(tensor) for tensor in tensors_of(read)} - {None}:
            return read
    return reads[0] if reads and getattr(made.target, "is_view", False) else None


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse tensors have none
        return None


def _sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(_hint(size) for size in tensor.shape)


def _hint(size: int | torch.SymInt) -> int:
    """The size that was seen; asking for the number itself would specialise the graph to it."""
    if isinstance(size, int):
        return size
    asked = getattr(symbolic_shapes, "optimization_hint", None) or getattr(symbolic_shapes, "size_hint", None)
    if asked is None:
        raise OpweaveError(
            f"torch {torch.__version__} has neither optimization_hint nor size_hint in symbolic_shapes",
            hint="a memory limit for training works with torch 2.11 to 2.15",
        )
    return int(asked(size, fallback=SYMBOLIC_SIZE))


def _argument(node: fx.Node, name: str) -> object:
    """The argument of that name, or its default; ``None`` if there is none."""
    for i, argument in enumerate(
        node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    ):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def _flops(node: fx.Node) -> int:
    """Flops by torch's formula, with sizes that were seen; one an element of what is made without a formula."""
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    formula = flop_registry.get(packet) or flop_registry.get(_SAME_FLOPS.get(packet))
    if formula is None:
        return sum(math.prod(_sizes(tensor)) for tensor in tensors_of(node))
    args, kwargs, out = pytree.tree_map(_concrete, (node.args, node.kwargs, node.meta["val"]))
    return int(formula(*args, **kwargs, out_val=out))


def _concrete(leaf: object) -> object:
    """A node's value without symbols: what formulas compare sizes of."""
    value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
    if isinstance(value, torch.SymInt):
        return _hint(value)
    if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
        return torch.empty(_sizes(value), dtype=value.dtype, device="meta")
    return value
