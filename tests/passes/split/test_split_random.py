"""Random programs: whatever the split divides or joins, the module computes what it did."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.passes.split import split
from tests.passes.split import programs
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


def _compare(program: Program, sizes: tuple[int, ...]) -> None:
    given_ = programs.inputs()
    module = programs.traced(program, given_)
    result = split(module, AXES, sizes)
    programs.checked(module, result)
    assert programs.difference(module, result, given_) < 1e-11, program.log
