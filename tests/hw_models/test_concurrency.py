"""Machines whose compute engine runs several operators at a time."""

from __future__ import annotations

import msgspec
import pytest

from opweave.errors import MachineError
from opweave.hw_models import EngineKind, load, names


def test_gpus_state_their_concurrency_and_others_do_not() -> None:
    alone = [name for name in names() if load(name).fabric is None]
    assert [name for name in alone if load(name).concurrency] == ["a100", "h100-sxm", "h200"]


@pytest.mark.parametrize("name", ["a100", "h100-sxm", "h200"])
def test_figures_are_in_their_usual_range(name: str) -> None:
    """As for all other figures: a factor of a thousand between two units would show."""
    concurrency = load(name).concurrency
    assert concurrency is not None
    assert 2 <= concurrency.streams <= 128
    assert 1e-7 <= concurrency.event_s <= concurrency.issue_s <= 1e-5
    assert 1e5 <= concurrency.saturating_elements <= 1e7


def test_streams_are_engines_like_the_first() -> None:
    machine = load("h100-sxm").with_streams(3)
    first, *others = machine.engines_of(EngineKind.COMPUTE)
    assert [engine.name for engine in others] == ["sm1", "sm2"]
    assert all(msgspec.structs.replace(engine, name=first.name) == first for engine in others)
    assert load("h100-sxm").with_streams(1) == load("h100-sxm")


@pytest.mark.parametrize(("name", "count"), [("h100-sxm", 0), ("edge-npu", 2)])
def test_streams_that_a_machine_cannot_have(name: str, count: int) -> None:
    with pytest.raises(MachineError, match=f"{count} streams were asked for"):
        load(name).with_streams(count)
