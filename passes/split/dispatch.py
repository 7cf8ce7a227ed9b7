"""What becomes of rows in an order of their own (``orders``), operator by operator.

Row by row, an operator on rows of slots is the operator on rows of tokens, so its own rule says what comes of it; what
that rule may not do here is cut a value that is whole, or count rows otherwise. Gathering by slots, grouped products
and bringing rows back have rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .orders import Counts, Ordered, Own, Shuffled, Slots
from .rule import Call, Divided, Operand, Outcome, Refused, Rule
from .rules._operands import zeros
from .state import WHOLE, Along, Partial, Result, State, Whole

__all__ = ["in_order", "plain"]

_MOVES = frozenset(
    {
        "aten::view",
        "aten::reshape",
        "aten::_unsafe_view",
        "aten::unsqueeze",
        "aten::squeeze",
        "aten::expand",
        "aten::clone",
        "aten::alias",
        "aten::detach",
        "aten::permute",
        "aten::transpose",
        "aten::t",
        "aten::_to_copy",
        "prims::convert_element_type",
    }
)
#: Operators besides pointwise ones whose rules speak of rows wherever they stand.
_ROW_BY_ROW = _MOVES | {
    *("aten::mm", "aten::bmm", "aten::addmm", "aten::sum", "aten::mean", "aten::amax", "aten::amin"),
    *("aten::_softmax", "aten::_log_softmax", "aten::_softmax_backward_data", "aten::_fused_rms_norm"),
    *("aten::cat", "aten::split", "aten::split_with_sizes", "aten::slice", "aten::select", "aten::where"),
    *("aten::index", "aten::index_select", "aten::gather", "aten::embedding", "aten::index_put"),
    *("aten::zeros_like", "aten::ones_like", "aten::empty_like", "aten::new_zeros", "aten::new_empty"),
}

#: Those that may add up all rows, and those that make rows of their own.
_SUMS = frozenset({"aten::sum", "aten::mean", "aten::mm", "aten::bmm", "aten::index_put"})
_NEW = frozenset({"aten::new_zeros", "aten::new_empty"})

_LOST = "rows in the order of their experts"


def plain(state: Result) -> Result:
    """``state`` for rules that know nothing of orders."""
    if isinstance(state, tuple):
        return state
    return Partial() if isinstance(state, Counts) else state


def in_order(call: Call, rule: Rule | None) -> Outcome | None:
    """What becomes of a call some of whose operands are ``Ordered`` or ``Counts``; None for what any rule may say."""
    ordered = [operand.state for operand in call.operands if isinstance(operand.state, Ordered)]
    if not ordered:
        return _counted(call)
    if len({(state.order, state.ids, state.scale) for state in ordered}) > 1:
        return Refused("rows in the orders of two sorts")
    if any(isinstance(state, Own) or state.blocks != 1 for state in ordered):
        return Refused(_LOST)
    special = _SPECIAL.get(call.operator)
    outcome = special(call) if special else None
    return outcome or _row_by_row(call, rule)


def _counted(call: Call) -> Outcome | None:
    """Counts go through casts and running sums."""
    state = call.operands[0].state
    if not isinstance(state, Counts) or len(call.operands) != 1 or call.operands[0].shape != (state.bound,):
        return None
    if call.operator == "aten::cumsum" and not state.running and call.value.dtype.itemsize >= 4:
        return Divided(replace(state, running=True))
    if call.operator in _MOVES | {"prims::convert_element_type"} and tuple(call.value.shape) == (state.bound,):
        return Divided(state) if call.value.dtype.itemsize >= 4 else None
    return None


def _row_by_row(call: Call, rule: Rule | None) -> Outcome:
    """What the operator's own rule says, where it keeps rows as they are."""
    target = call.node.target
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    numbers = [operand.state for operand in call.operands if isinstance(operand.state, Slots)]
    known = call.operator in _MOVES or (not numbers and (pointwise or call.operator in _ROW_BY_ROW))
    if (
        rule is None
        or not known
        or not all(isinstance(each.state, Ordered) or each.state == WHOLE for each in call.operands)
    ):
        return Refused(_LOST)
    if numbers and (call.value.is_floating_point() or call.value.dtype.itemsize < 4):
        return Refused(_LOST)
    operands = tuple(replace(each, state=_extents(each.state)) for each in call.operands)
    outcome = rule.divide(replace(call, operands=operands))
    if isinstance(outcome, Refused):
        return outcome
    if outcome.needs is not None and outcome.needs != tuple(each.state for each in operands):
        return Refused(_LOST)
    first = next(each.state for each in call.operands if isinstance(each.state, Ordered))
    result = _marked(outcome.result, numbers[0] if numbers else first)
    if result is None or (isinstance(result, Partial | Whole) and call.operator not in _SUMS | _NEW):
        return Refused(_LOST)
    return replace(outcome, result=result, needs=call.states(), reason="")


def _extents(state: State) -> State:
    return state.plain if isinstance(state, Ordered) else state


def _marked(result: Result, like: Ordered) -> Result | None:
    """``result`` with its rows in the order of ``like``; None where its rows are others."""
    if isinstance(result, tuple):
        marked = tuple(_marked(state, like) for state in result)
        return None if any(state is None for state in marked) else tuple(_only(state) for state in marked)
    if not isinstance(result, Along):
        return None if isinstance(like, Slots) and isinstance(result, Partial) else result
    if (result.scale, result.blocks) != (like.scale, like.blocks):
        return None
    return like.at(result.dim)


def _only(state: Result | None) -> State:
    assert isinstance(state, Along | Partial | Whole)
    return state


# --- gathering and bringing back -------------------------------------------------------------------------------


def _divided_slots(call: Call) -> Outcome | None:
    """Slots to tokens: rounding down within a part is rounding down in the whole if parts begin at a multiple."""
    state, other = call.operands[0].state, call.arguments["other"]
    rounded = call.operator == "aten::floor_divide" or call.arguments.get("rounding_mode") in ("floor", "trunc")
    if not isinstance(state, Slots) or state.inverse or type(other) is not int or other < 1 or not rounded:
        return None
    divisor = state.divisor * other
    return None if state.scale % divisor else Divided(replace(state, divisor=divisor))


def _sorted(call: Call) -> Outcome | None:
    """Sorting the order itself gives the places of the slots."""
    state = call.operands[0].state
    plainly = isinstance(state, Slots) and not state.inverse and state.divisor == 1 and not call.arguments["descending"]
    if not isinstance(state, Slots) or not plainly or len(call.operands[0].shape) != 1:
        return None
    own = Own(state.dim, state.scale, state.blocks, state.order, state.ids)
    return Divided((own, replace(state, inverse=True)))


def _index_of(call: Call) -> Operand | None:
    """The index, if it picks rows of dimension 0 alone."""
    name = "index" if call.operand("index") is not None else "indices"
    found = [operand for operand in call.operands if operand.name == name]
    if len(found) != 1 or found[0].index not in (None, 0) or call.arguments.get("dim", 0) != 0:
        return None
    index = found[0]
    state = index.state
    if not isinstance(state, Slots) or state.dim != 0:
        return None
    return index if len(index.shape) == 1 or call.operator in ("aten::gather", "aten::scatter_add") else None


def _rows(call: Call, operand: Operand, wanted: Along) -> bool:
    """Whether an operand is, or can be cut to, ``wanted``."""
    fits = bool(operand.shape) and operand.shape[0] == call.division.total(wanted)
    return fits and operand.state in (wanted, WHOLE)


def _gathered(call: Call) -> Outcome | None:
    """Rows of tokens in the order of slots; or rows of slots back in the tokens' order."""
    index, source = _index_of(call), call.operand("self")
    if index is None or source is None or not isinstance(index.state, Slots):
        return None
    state = index.state
    if state.inverse:
        back = isinstance(source.state, Shuffled) and source.state.dim == 0 and len(index.shape) == 1
        return Divided(Along(0, state.scale), call.states()) if back else None
    tokens = Along(0, state.scale // state.divisor)
    if not _rows(call, source, tokens):
        return None
    result = Shuffled(0, state.scale, 1, state.order, state.ids)
    return Divided(result, call.states(**{source.name: tokens}))


def _returned(values: str, adds: Callable[[Call], bool]) -> Callable[[Call], Outcome | None]:
    """Rows of slots written or added to those of their tokens."""

    def divide(call: Call) -> Outcome | None:
        index, source, target = _index_of(call), call.operand(values), call.operand("self")
        if index is None or source is None or target is None or not isinstance(index.state, Slots):
            return None
        state = index.state
        whole_rows = source.shape[1:] == target.shape[1:] and (len(index.shape) == 1 or index.shape == source.shape)
        if state.inverse and len(index.shape) == 1 and source.shape == target.shape:
            return _back_in_order(call, state, target, source, adds(call))
        if state.inverse or not isinstance(source.state, Shuffled) or source.state.dim != 0 or not whole_rows:
            return None
        tokens = Along(0, state.scale // state.divisor)
        if adds(call):
            return Divided(tokens, call.states(self=tokens)) if _rows(call, target, tokens) else None
        if state.divisor != 1:
            return None
        if isinstance(target.state, Shuffled) and target.state.dim == 0:  # every row is written: any rows will do
            return Divided(tokens, call.states())
        return Divided(tokens, call.states(self=tokens)) if _rows(call, target, tokens) else None

    return divide


def _back_in_order(call: Call, state: Slots, target: Operand, source: Operand, adds: bool) -> Outcome | None:
    """Rows of tokens' slots written to their places in the order: the gradient of gathering by the inverse."""
    slots = Along(0, state.scale)
    if not _rows(call, source, slots) or not _rows(call, target, slots) or (adds and not zeros(target)):
        return None
    result = Shuffled(0, state.scale, 1, state.order, state.ids)
    return Divided(result, call.states(**{"self": slots, source.name: slots}))


def _grouped(call: Call) -> Outcome | None:
    """Runs of rows times their experts' weights, where the runs' ends are counted from what was sorted."""
    rows, weights, ends = call.operand("self"), call.operand("mat2"), call.operand("offs")
    if rows is None or weights is None or ends is None or len(call.operands) != 3:
        return None
    state, counts = rows.state, ends.state
    counted = isinstance(counts, Counts) and counts.running
    if not isinstance(state, Shuffled) or not isinstance(counts, Counts) or not counted or counts.ids != state.ids:
        return None
    if len(weights.shape) == 3 and weights.state == WHOLE and state.dim == 0 and weights.shape[0] == counts.bound:
        return Divided(state, call.states())
    summed = isinstance(weights.state, Shuffled) and weights.state.dim == 0 and state.dim == 1
    return Divided(Partial(), call.states()) if summed and len(weights.shape) == 2 else None


_SPECIAL: dict[str, Callable[[Call], Outcome | None]] = {
    "aten::floor_divide": _divided_slots,
    "aten::div": _divided_slots,
    "aten::sort": _sorted,
    "aten::index": _gathered,
    "aten::_unsafe_index": _gathered,
    "aten::index_select": _gathered,
    "aten::gather": _gathered,
    "aten::index_put": _returned("values", lambda call: bool(call.arguments["accumulate"])),
    "aten::_unsafe_index_put": _returned("values", lambda call: bool(call.arguments["accumulate"])),
    "aten::index_add": _returned("source", lambda call: True),
    "aten::scatter_add": _returned("src", lambda call: True),
    "aten::_grouped_mm": _grouped,
}
