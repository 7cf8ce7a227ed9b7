"""Random programs: whatever the split divides or joins, the module computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opweave.passes.split import split
from tests.passes.split import comparison, programs
from tests.passes.split.programs import AXES, FAMILIES, SIZES, Program

EVERYTHING = tuple(FAMILIES)


@pytest.mark.parametrize("family", EVERYTHING)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(numbers=programs.numbers(8), sizes=st.sampled_from(SIZES))
def test_a_family_with_elementwise_operators(family: str, numbers: list[int], sizes: tuple[int, ...]) -> None:
    _compare(Program(numbers, (family, "elementwise")), sizes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(numbers=programs.numbers(14), sizes=st.sampled_from(SIZES))
def test_all_families(numbers: list[int], sizes: tuple[int, ...]) -> None:
    _compare(Program(numbers, EVERYTHING), sizes)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(numbers=programs.numbers(10), sizes=st.sampled_from(SIZES))
def test_gradients(numbers: list[int], sizes: tuple[int, ...]) -> None:
    """Joint graphs: the last values and the gradients of the inputs, made functional as AOTAutograd does."""
    program = Program(numbers, EVERYTHING)

    def joint(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() if each.is_floating_point() else each for each in inputs]
        values = [value for value in program(*leaves) if value.requires_grad][-4:]
        if not values:
            return (inputs[0].cos(),)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(values, wanted, [torch.cos(value.detach()) for value in values], allow_unused=True)
        return (*(value.detach() for value in values), *(each for each in found if each is not None))

    _compare(torch.func.functionalize(programs.traced(joint, programs.inputs())), sizes)


def _compare(program: Callable[..., tuple[Tensor, ...]], sizes: tuple[int, ...]) -> None:
    given_ = programs.inputs()
    module = programs.traced(program, given_)
    result = split(module, AXES, sizes)
    comparison.checked(module, result)
    assert comparison.difference(module, result, given_) < 1e-11, module.code
