"""In-place writes: only the ones that AOTAutograd leaves, into an input whose old content nobody reads any more."""

from __future__ import annotations

import torch
from torch.fx import Node

from ...errors import SplitRefused

__all__ = ["mutates"]

#: Operators whose result may be memory of their operand although their schema does not say so.
_ALIASING = frozenset({"aten::_unsafe_view", "aten::reshape", "aten::contiguous", "_c10d_functional::wait_tensor"})


def mutates(node: Node) -> bool:
    """Whether ``node`` writes in place.

    Raises:
        SplitRefused: it does, and is not a last ``copy_`` into a placeholder. Nothing but the output may read the
            placeholder afterwards, nor any view of it: parts may hold copies.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    into = node.args[0] if node.args else None
    if target is not torch.ops.aten.copy_.default or not isinstance(into, Node) or into.op != "placeholder":
        raise SplitRefused(
            node.name, str(target), "it writes in place", hint="functionalize the module (AOTAutograd does)"
        )
    views = _views(into) - {node}
    for later in _after(node):
        read = [value for value in later.all_input_nodes if value in views]
        if read and not (later.op == "output" and read == [into]):
            raise SplitRefused(node.name, str(target), f"{later.name!r} reads {read[0].name!r} after the write")
    return True


def _views(value: Node) -> set[Node]:
    """``value`` and everything that may be its memory."""
    found, open_ = {value}, [value]
    while open_:
        for user in open_.pop().users:
            if user not in found and _aliases(user):
                found.add(user)
                open_.append(user)
    return found


def _aliases(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    if target._schema.name in _ALIASING:
        return True
    return any(returned.alias_info is not None for returned in target._schema.returns)


def _after(node: Node) -> list[Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]
