"""Steps that the rules of kernels with an epilogue share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..compiler.graph import Tensor
from ._match import Match, Walk

__all__ = ["addends", "outermost"]


def addends(walk: Walk, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The two tensors that ``tensor`` may be the sum of, in both orders, as they were before they were cast for it.

    Both have its shape and dtype: nothing is broadcast or scaled. ``Walk.find`` would look through the casts that made
    them; what a kernel adds has to be what was added.
    """
    made = walk.writer(walk.uncast(tensor, tensor.dtype))
    if made is None or made[0].target != "aten.add.Tensor":
        return
    arguments, keywords = walk.arguments(made[0])
    if keywords.get("alpha", 1) != 1 or not all(isinstance(one, Tensor) for one in arguments):
        return
    terms = [one if one.dtype == tensor.dtype else walk.uncast(one, tensor.dtype) for one in arguments]
    shape = walk.graph.tensor[made[0].outputs[0]].shape
    if len(terms) == 2 and all((one.shape, one.dtype) == (shape, tensor.dtype) for one in terms):
        yield terms[0], terms[1]
        yield terms[1], terms[0]


def outermost(matches: Iterable[Match]) -> tuple[Match, ...]:
    """Those that replace no less than some other does: a launch that also adds stands for one that does not."""
    found = tuple(matches)
    replacing: dict[str, list[set[str]]] = {}
    for match in found:
        for name in match.ops:
            replacing.setdefault(name, []).append({*match.ops})
    return tuple(m for m in found if not any({*m.ops} < others for others in replacing[m.ops[0]]))
