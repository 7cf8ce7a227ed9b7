"""Negative controls: one plausible mistake for each family of rules, which the comparison of all tests must see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opweave.passes.split import Rule, split
from opweave.passes.split.rule import Call, Divided, Outcome
from opweave.passes.split.rules.elementwise import pointwise
from opweave.passes.split.state import WHOLE, Along, Partial
from tests.passes.split.comparison import difference
from tests.passes.split.programs import traced

_ATEN = torch.ops.aten


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _summand_twice(call: Call) -> Outcome:
    return Divided(Partial())


def _unweighed(call: Call) -> Outcome:
    return Divided(Partial(), given={"dim": lambda part: [0]})


def _ignores_blocks(call: Call) -> Outcome:
    state = call.operands[0].state
    assert isinstance(state, Along)
    shape = tuple(call.value.shape)
    wrong = call.division.along(shape, 0)
    assert wrong is not None
    return Divided(wrong, given={"size": lambda part: call.division.shape(shape, wrong, part)})


def _running(call: Call) -> Outcome:
    return Divided(call.operands[0].state)


def _no_blocks(call: Call) -> Outcome:
    state = call.operands[0].state
    assert isinstance(state, Along)
    return Divided(Along(0, 2 * state.scale))


def _ones(call: Call) -> Outcome:
    return Divided(Partial(), (WHOLE,) * len(call.operands))


def _shared(call: Call) -> Outcome:
    """Every part reads the slice of part 0."""
    found = pointwise(call)
    assert isinstance(found, Divided)
    return Divided(found.result, found.needs, emit=lambda part: part.make(_ATEN.mul.Tensor, part.operand(0, 0), 2))


WRONG: dict[str, tuple[Callable[..., object], tuple[Tensor, ...], str, Callable[[Call], Outcome]]] = {
    "elementwise": (lambda x: x * 2, (_drawn(6, 2),), "aten::mul", _shared),
    "matmul": (lambda x, b: torch.addmm(b, x.t(), x), (_drawn(6, 2), _drawn(2)), "aten::addmm", _summand_twice),
    "reduction": (lambda x: x.mean(0), (_drawn(6, 2),), "aten::mean", _unweighed),
    "running": (lambda x: x.cumsum(0), (_drawn(6, 2),), "aten::cumsum", _running),
    "views": (lambda x: x.transpose(0, 1).contiguous().view(-1), (_drawn(6, 2),), "aten::view", _ignores_blocks),
    "pieces": (lambda x: torch.cat([x, x.tanh()]), (_drawn(6, 2),), "aten::cat", _no_blocks),
    "creation": (lambda x: torch.ones_like(x), (_drawn(6, 2),), "aten::ones_like", _ones),
}


@pytest.mark.parametrize("family", WRONG)
def test_a_wrong_rule_is_noticed(family: str) -> None:
    """One plausible mistake for each family: the comparison that all these tests make sees it, and passes without."""
    function, inputs, operator, divide = WRONG[family]
    module = traced(lambda *given: (function(*given),), inputs)
    equal = (3, 3)  # so that shapes fit whichever part's slice is taken
    sizes = (2, 4) if family in ("reduction", "views") else equal
    wrong = split(module, {"arg0_1": 0}, sizes, rules={operator: Rule(divide, partial=True)})
    assert difference(module, wrong, inputs) > 1e-3
    assert difference(module, split(module, {"arg0_1": 0}, sizes), inputs) < 1e-12
