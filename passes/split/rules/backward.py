"""Backward operators, and forward ones that come with them: normalisations, convolutions, pooling.

What is a gradient of activations is cut like the activations. What is a gradient of parameters is a sum over the
tokens: each part holds its summand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Partial, Result, State
from ._operands import OTHERWISE, alike, first_cut, needs, packed
from .elementwise import POINTWISE

__all__ = ["RULES"]

aten = torch.ops.aten


def _present(call: Call, states: Sequence[State]) -> Result:
    """``states``, but Whole for what is not returned."""
    return tuple(WHOLE if value is None else state for value, state in zip(call.value, states, strict=True))


def _normalised(names: Sequence[str], states: Callable[[Along], Sequence[State]]) -> Callable[[Call], Outcome]:
    """Gradients of normalisations over the last dimensions, ``normalized_shape``; statistics are the last names."""

    def divide(call: Call) -> Outcome:
        along = first_cut(call, names)
        if along and along.dim >= len(call.operands[0].shape) - len(call.arguments["normalized_shape"]):
            return Refused("a norm over the tokens")
        given = alike(call, along, names) if along else None
        if along is None or given is None:
            return Refused(OTHERWISE)
        return Divided(_present(call, states(along)), needs(call, given), emit=_packed(names[2:]))

    return divide


def _packed(names: Sequence[str]) -> Callable[[Part], Node]:
    """The call with some operands without gaps: kernels read statistics of rows as if there were none."""
    return lambda part: part.again(**{name: packed(part, name) for name in names})


def _leading(kept: int, names: Sequence[str], states: Callable[[Along], Sequence[State]]) -> Callable[[Call], Outcome]:
    """Operators that treat each of the first ``kept`` dimensions item by item; all the named tensors have them."""

    def divide(call: Call) -> Outcome:
        along = first_cut(call, names)
        given = alike(call, along, names) if along else None
        if along is None or given is None:
            return Refused(OTHERWISE)
        if along.dim >= kept:
            return Refused("tokens along a dimension in which neighbours mix")
        if isinstance(call.value, torch.Tensor):
            return Divided(states(along)[0], needs(call, given))
        return Divided(_present(call, states(along)), needs(call, given))

    return divide


def _spatial(spatial: int, names: Sequence[str], outputs: int = 1) -> Callable[[Call], Outcome]:
    """Pooling and resizing: all but the last ``spatial`` dimensions are item by item."""

    def divide(call: Call) -> Outcome:
        kept = len(call.operands[0].shape) - spatial
        return _leading(kept, names, lambda along: (along,) * outputs)(call)

    return divide


def _windows(call: Call) -> Outcome:
    """Pooling as Inductor decomposes it: as many dimensions as the windows have are not item by item."""
    outputs = 1 if isinstance(call.value, torch.Tensor) else len(call.value)
    return _spatial(len(call.arguments["kernel_size"]), ("self",), outputs)(call)


def _softmax_backward(call: Call) -> Outcome:
    """Rows of a softmax over another dimension."""
    names = ("grad_output", "output")
    along = first_cut(call, names)
    given = alike(call, along, names) if along else None
    if along is None or given is None:
        return Refused(OTHERWISE)
    if call.arguments["dim"] % len(call.operands[0].shape) == along.dim:
        return Refused("softmax over the tokens")
    return Divided(along, needs(call, given))


def _embedding_dense_backward(call: Call) -> Outcome:
    """The gradient of the table is a sum over the tokens."""
    names = ("grad_output", "indices")
    along = first_cut(call, names)
    given = alike(call, along, names) if along else None
    if along is None or given is None:
        return Refused(OTHERWISE)
    if call.arguments["scale_grad_by_freq"]:
        return Refused("gradients divided by how often a word occurs in the whole")
    return Divided(Partial(), needs(call, given))


def _grouped(names: Sequence[str], states: Callable[[Along], Sequence[State]]) -> Callable[[Call], Outcome]:
    """Group norms along the batch, whose extent is also in the argument ``N``; statistics are the last names."""

    def divide(call: Call) -> Outcome:
        outcome = _leading(1, names, states)(call)
        along = first_cut(call, names)
        if isinstance(outcome, Refused) or along is None:
            return outcome

        def emit(part: Part) -> Node:
            extent = part.division.extent(along, part.index)
            return part.again(N=extent, **{name: packed(part, name) for name in names[2:]})

        return Divided(outcome.result, outcome.needs, emit=emit)

    return divide


def _select_backward(call: Call) -> Outcome:
    """Zeros but for one place of ``dim``."""
    along = call.operands[0].along
    if along is None:
        return Refused(OTHERWISE)
    dim = call.arguments["dim"] % len(call.value.shape)
    result = along if along.dim < dim else along.at(along.dim + 1)
    return _filled(call, result)


def _slice_backward(call: Call) -> Outcome:
    """Zeros but for some places of ``dim``."""
    along = call.operands[0].along
    if along is None or call.arguments["dim"] % len(call.value.shape) == along.dim:
        return Refused("the gradient of some of the tokens")
    return _filled(call, along)


def _filled(call: Call, result: Along) -> Outcome:
    """The call with ``input_sizes`` of the part."""
    shape = tuple(call.value.shape)
    return Divided(result, given={"input_sizes": lambda part: list(call.division.shape(shape, result, part))})


def _scattered(call: Call) -> Outcome:
    """``select_scatter`` and ``slice_scatter``: ``src`` takes some places of ``dim`` of ``self``."""
    rank = len(call.value.shape)
    dim = call.arguments["dim"] % rank
    places = [0, 1]
    for place in places:
        operand = call.operands[place]
        if operand.along is None:
            continue
        below = len(operand.shape) < rank and operand.along.dim >= dim
        result = operand.along.at(operand.along.dim + 1) if below else operand.along
        if result.dim == dim:
            return Refused("writing to some of the tokens")
        source = result.at(result.dim - 1) if len(call.operands[1].shape) < rank and result.dim > dim else result
        given = alike(call, result, ["self"]), alike(call, source, ["src"])
        if given[0] is None or given[1] is None:
            return Refused(OTHERWISE)
        return Divided(result, needs(call, given[0] | given[1]))
    return Refused(OTHERWISE)


def _planes(spatial: int) -> Mapping[str, Rule]:
    """Pooling over ``spatial`` dimensions, and its gradients."""
    own, back = ("self",), ("grad_output", "self")
    return {
        f"aten::avg_pool{spatial}d": Rule(_spatial(spatial, own)),
        f"aten::avg_pool{spatial}d_backward": Rule(_spatial(spatial, back)),
        f"aten::max_pool{spatial}d_with_indices": Rule(_spatial(spatial, own, 2)),
        f"aten::max_pool{spatial}d_with_indices_backward": Rule(_spatial(spatial, (*back, "indices"))),
        f"aten::_adaptive_avg_pool{spatial}d": Rule(_spatial(spatial, own)),
        f"aten::_adaptive_avg_pool{spatial}d_backward": Rule(_spatial(spatial, back)),
    }


#: Pointwise gradients that torch does not tag so.
_POINTWISE = (
    *("elu_backward", "leaky_relu_backward", "hardtanh_backward", "softplus_backward", "hardswish_backward"),
    *("hardsigmoid_backward", "log_sigmoid_backward", "softshrink_backward"),
)
_CONVOLVED = ("grad_output", "input")
_GROUPED = ("grad_out", "input", "mean", "rstd")

RULES: dict[str, Rule] = {
    "aten::native_layer_norm_backward": Rule(
        _normalised(("grad_out", "input", "mean", "rstd"), lambda along: (along, Partial(), Partial()))
    ),
    "aten::_fused_rms_norm_backward": Rule(
        _normalised(("grad_out", "input", "rstd"), lambda along: (along, Partial()))
    ),
    "aten::native_group_norm": Rule(_grouped(("input",), lambda along: (along,) * 3)),
    "aten::native_group_norm_backward": Rule(_grouped(_GROUPED, lambda along: (along, Partial(), Partial()))),
    "aten::_softmax_backward_data": Rule(_softmax_backward),
    "aten::_log_softmax_backward_data": Rule(_softmax_backward),
    "aten::embedding_dense_backward": Rule(_embedding_dense_backward),
    "aten::convolution": Rule(_leading(1, ("input",), lambda along: (along,))),
    "aten::convolution_backward": Rule(_leading(1, _CONVOLVED, lambda along: (along, Partial(), Partial()))),
    "aten::select_backward": Rule(_select_backward),
    "aten::slice_backward": Rule(_slice_backward),
    "aten::select_scatter": Rule(_scattered),
    "aten::slice_scatter": Rule(_scattered),
    **{f"aten::{name}": POINTWISE for name in _POINTWISE},
    "prims::_low_memory_max_pool_with_offsets": Rule(_windows),
    "prims::_low_memory_max_pool_offsets_to_indices": Rule(_windows),
    **_planes(2),
    **_planes(3),
}
