"""Pins as users write them: what they become, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pins import pins_of
from opweave.compiler.plan import Pin, Plan
from opweave.errors import OptionError
from tests.graphs.build import all_graphs, machine

GRAPH = Graph(
    "pinned",
    (
        Tensor("x", (64,), "int8", Role.INPUT),
        Tensor("w", (32,), "int8", Role.WEIGHT),
        Tensor("none", (0,), "int8", Role.INPUT),
        Tensor("y", (64,), "int8", Role.ACTIVATION),
        Tensor("y_2", (64,), "int8", Role.ACTIVATION, buffer="y"),
    ),
    (
        Op("make", ("x", "w", "none"), ("y",)),
        Op("update", ("y",), ("y_2",)),
    ),
    ("y_2",),
)
PLAN = Plan.of_order(GRAPH, machine(1, 16).with_banks(128, 64, 32))


@pytest.mark.parametrize(
    ("wanted", "pins"),
    [
        ({}, ()),
        ({"x": {"offset": 0}}, (Pin("x", offset=0),)),
        ({"x": {"offset": 128, "bank": 1}}, (Pin("x", offset=128, bank=1),)),
        ({"y_2": {"resident": True}, "w": {"bank": 2}}, (Pin("w", bank=2), Pin("y", resident=True))),
        ({"y": {"bank": 0}, "y_2": {"bank": 0, "resident": False}}, (Pin("y", bank=0),)),
    ],
)
def test_pins(wanted: dict[str, dict[str, Any]], pins: tuple[Pin, ...]) -> None:
    assert pins_of(wanted, PLAN) == pins


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([], "a mapping of tensor names"),
        ({"z": {"offset": 0}}, "'z', which the graph does not have"),
        ({"x": {}}, "the pin of 'x' is {}"),
        ({"x": 0}, "the pin of 'x' is 0"),
        ({"x": {"at": 0}}, "has the field 'at'"),
        ({"x": {"offset": -16}}, "takes an integer from 0"),
        ({"x": {"offset": 1.0}}, "takes an integer from 0"),
        ({"x": {"bank": True}}, "takes an integer from 0"),
        ({"x": {"resident": 1}}, "takes True or False"),
        ({"x": {"bank": 3}}, "pinned to bank 3; memory 'sram' has 0: bytes 0 to 127, 1: bytes 128 to 191"),
        ({"x": {"bank": 2}}, "of 64 bytes is pinned to bank 2, and no bank"),
        ({"x": {"offset": 96}}, "pinned to bytes 96 to 159, and no bank"),
        ({"x": {"offset": 0, "bank": 1}}, "pinned to bank 1 and bytes 0 to 63, and no bank"),
        ({"x": {"offset": 1 << 40}}, "and no bank"),
        ({"none": {"offset": 0}}, "it has no bytes"),
        ({"y": {"bank": 0}, "y_2": {"bank": 1}}, "'y' and 'y_2' share buffer 'y' and are pinned differently"),
    ],
)
def test_refused(wanted: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pins_of(wanted, PLAN)


def test_a_buffer_larger_than_every_bank_has_no_place() -> None:
    small = msgspec.structs.replace(PLAN, machine=machine(1, 16).with_banks(32, 32))
    with pytest.raises(OptionError, match="pinned to the scratchpad, and no bank"):
        pins_of({"x": {"resident": True}}, small)


def test_offsets_are_aligned() -> None:
    plan = Plan.of_order(GRAPH, machine(1024, 16))
    assert pins_of({"x": {"offset": 32}}, plan) == (Pin("x", offset=32),)
    with pytest.raises(OptionError, match="begin at multiples of 16"):
        pins_of({"x": {"offset": 8}}, plan)


def test_streamed_weights_have_no_place() -> None:
    plan = Plan.of_order(GRAPH, machine(1024), streamed=("w",))
    with pytest.raises(OptionError, match="streamed") as raised:
        pins_of({"w": {"offset": 0}}, plan)
    assert "weights='resident'" in raised.value.hint


def test_pins_stay_with_the_plan() -> None:
    """Through JSON, and when the order is decided again."""
    graph = all_graphs()["chain"]
    plan = Plan.of_order(graph, machine(), pins=(Pin("x", offset=16, resident=True),))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.with_order(plan.order).pins == plan.pins
