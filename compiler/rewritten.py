"""Whether a graph that a pass has rewritten in place still computes what the model's own graph computes."""

from __future__ import annotations

import msgspec

from .graph import Graph, Op

__all__ = ["computes_same"]


def computes_same(rewritten: Graph, original: Graph) -> bool:
    """Whether ``rewritten`` has the operators, tensors and outputs of ``original``, by name, and the same values.

    Tensors may lie in other buffers and operators may be listed in another order, as ``inplace`` passes leave them.
    Values are the same if every operator, and the caller at the end, finds what the same writer left: the last to
    write a buffer is then the same at every read, and, as an update reads what it changes, so are all before it.
    """
    if rewritten == original:
        return True
    return (
        rewritten.outputs == original.outputs
        and {op.name: op for op in rewritten.ops} == {op.name: op for op in original.ops}
        and _in_buffers_of(rewritten, original) == original.tensor
        and _buffers_fit(rewritten, original)
        and _writers_found(rewritten, original) == _writers_found(original, original)
    )


def _in_buffers_of(rewritten: Graph, original: Graph) -> dict[str, object]:
    """Tensors of ``rewritten`` as if they were in the buffers they have in ``original``."""
    return {
        name: msgspec.structs.replace(tensor, buffer=original.tensor[name].buffer) if name in original.tensor else None
        for name, tensor in rewritten.tensor.items()
    }


def _buffers_fit(rewritten: Graph, original: Graph) -> bool:
    """Whether each buffer moved as a whole, is none that the model gets or gives, and no two results share one."""
    for name, tensor in original.tensor.items():
        place = rewritten.tensor[name].buffer
        if place != rewritten.tensor[tensor.buffer].buffer:
            return False
        moved = place != tensor.buffer
        if moved and (rewritten.buffers[place].role.is_source or original.buffers[tensor.buffer].role.is_source):
            return False
    return all(
        len({rewritten.tensor[name].buffer for name in op.outputs})
        == len({original.tensor[name].buffer for name in op.outputs})
        for op in original.ops
    )


def _writers_found(graph: Graph, original: Graph) -> dict[tuple[str, str], str]:
    """By operator and tensor, who wrote last what it reads, or updates, of that tensor's buffer; "" is the caller."""
    writer: dict[str, str] = {}
    found: dict[tuple[str, str], str] = {}
    for op in graph.ops:
        for name in (*op.inputs, *_updated(op, original)):
            found[op.name, name] = writer.get(graph.tensor[name].buffer, "")
        for name in op.outputs:
            writer[graph.tensor[name].buffer] = op.name
    for name in (*graph.outputs, *(t.name for t in original.tensors if t.role.is_source)):
        found["", name] = writer.get(graph.tensor[name].buffer, "")
    return found


def _updated(op: Op, original: Graph) -> list[str]:
    """Outputs of ``op`` that are new versions of a buffer that exists before it."""
    return [name for name in op.outputs if original.tensor[name].buffer != name]
