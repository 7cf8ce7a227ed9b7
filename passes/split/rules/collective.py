"""Functional collectives. All ranks run the same split, so part i of a rank meets part i of the others.

Reducing works on each element alone. Gathering puts the ranks' tensors one behind the other along dimension 0, so
slices of it gather to slices with as many blocks more (``Along.blocks``); scattering and exchanging take blocks apart
again. Where the tokens of one block would go to several ranks, the parts would not go where the whole goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..rule import Call, Divided, Outcome, Refused, Rule
from ..state import Along, Partial, State

__all__ = ["REDUCED_SUMMANDS", "RULES"]


_SPREAD = "it sends tokens that lie together to several ranks"


def _same(call: Call) -> Outcome:
    """All-reduce, broadcast: every element on its own."""
    return Divided(call.operands[0].state)


def _wait(call: Call) -> Outcome:
    return Divided(call.operands[0].state)


def _each(call: Call) -> Outcome:
    """The same for a list of tensors."""
    return Divided(tuple(operand.state for operand in call.operands))


def _summands(call: Call) -> Outcome:
    """All-reduce of summands: their sums over the ranks are summands of the sum over the ranks."""
    state = call.operands[0].state
    if isinstance(state, Partial) and call.arguments["reduce_op"] not in ("sum", "avg"):
        return Refused("it reduces the sum over all parts by something else than a sum")
    return Divided(state)


def _gathered(state: State, ranks: int) -> State:
    return replace(state, blocks=state.blocks * ranks) if isinstance(state, Along) and state.dim == 0 else state


def _scattered(state: State, ranks: int) -> State | None:
    if not isinstance(state, Along) or state.dim != 0:
        return state
    return replace(state, blocks=state.blocks // ranks) if state.blocks % ranks == 0 else None


def _all_gather(call: Call) -> Outcome:
    return Divided(_gathered(call.operands[0].state, call.arguments["group_size"]))


def _reduce_scatter(call: Call) -> Outcome:
    """Where it parts the tokens of a block, each rank goes on with parts of its own tokens."""
    state = _scattered(call.operands[0].state, call.arguments["group_size"])
    if state is None:
        return Refused(_SPREAD, call.division.along(tuple(call.value.shape), 0))
    return Divided(state)


def _all_gather_each(call: Call) -> Outcome:
    ranks = call.arguments["group_size"]
    return Divided(tuple(_gathered(operand.state, ranks) for operand in call.operands))


def _reduce_scatter_each(call: Call) -> Outcome:
    states = tuple(_scattered(operand.state, call.arguments["group_size"]) for operand in call.operands)
    if any(state is None for state in states):
        return Refused(_SPREAD)
    return Divided(tuple(state for state in states if state is not None))


def _all_to_all(call: Call) -> Outcome:
    """An exchange along dimension 0: right where each rank is sent as many blocks as any other.

    With unequal sizes the ranks could come to different answers, so those are refused.
    """
    along = call.operands[0].along
    if along is None or along.dim != 0:
        return Divided(call.operands[0].state)
    sent, received = (_sizes(call.arguments[name]) for name in ("input_split_sizes", "output_split_sizes"))
    if sent is None or received is None or {*sent} != {*received} or len({*sent}) != 1 or len(sent) != len(received):
        return Refused("it sends ranks unequal numbers of tokens")
    if along.blocks % len(sent):
        return Refused(_SPREAD)

    def own(part: int) -> list[int]:
        return [call.division.extent(along, part) // len(sent)] * len(sent)

    return Divided(along, given={"input_split_sizes": own, "output_split_sizes": own})


def _sizes(sizes: Any) -> list[int] | None:
    """Sizes of what goes to each rank, where they are given and known."""
    return list(sizes) if sizes and all(type(size) is int for size in sizes) else None


#: All-reduce that reduces each summand where a value is Partial: it starts earlier, and moves the bytes once a part.
#: By default summands are added first, which moves the bytes of the given module.
REDUCED_SUMMANDS = {"_c10d_functional::all_reduce": Rule(_summands, partial=True)}

RULES = {
    "_c10d_functional::all_reduce": Rule(_same),
    "_c10d_functional::broadcast": Rule(_same),
    "_c10d_functional::wait_tensor": Rule(_wait, partial=True),
    "_c10d_functional::all_reduce_coalesced": Rule(_each),
    "_c10d_functional::all_gather_into_tensor": Rule(_all_gather),
    "_c10d_functional::all_gather_into_tensor_coalesced": Rule(_all_gather_each),
    "_c10d_functional::reduce_scatter_tensor": Rule(_reduce_scatter),
    "_c10d_functional::reduce_scatter_tensor_coalesced": Rule(_reduce_scatter_each),
    "_c10d_functional::all_to_all_single": Rule(_all_to_all),
}
