"""Schedules that torch has built in too: action for action what its classes make."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.schedule import Action, ActionKind
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel.named import named, problem_for

torch = pytest.importorskip("torch")
schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

_SIZES = ((1, 2), (2, 4), (4, 8), (4, 12), (3, 7), (8, 16), (4, 9), (4, 3))
_STAGE = Stage(0, 1, 1, 1)


def _torch_orders(made: Any, ranks: int) -> list[list[Action]]:
    return [list(_actions(made.pipeline_order[rank])) for rank in range(ranks)]


def _actions(order: list[Any]) -> Iterator[Action]:
    """Overlapped actions in turn; neither idle slots nor reductions of gradients."""
    for action in order:
        if action is None or action.computation_type.name.endswith("REDUCE_GRAD"):
            continue
        for part in action.sub_actions or (action,):
            yield Action(part.stage_index, ActionKind(part.computation_type.value), part.microbatch_index)


def _stages(ranks: int, chunks: int) -> list[Any]:
    """Rank 0's, with what torch's classes ask of a stage before it computes anything."""
    common = {"num_stages": ranks * chunks, "group_size": ranks, "group_rank": 0}
    return [SimpleNamespace(submod=torch.nn.Identity(), **common) for _ in range(chunks)]


@pytest.mark.parametrize(
    ("name", "torch_name", "chunks"),
    [
        *(("interleaved-1f1b", "ScheduleInterleaved1F1B", chunks) for chunks in (1, 2, 3)),
        *(("breadth-first", "ScheduleLoopedBFS", chunks) for chunks in (1, 2, 3)),
        *(("interleaved-zb", "ScheduleInterleavedZeroBubble", chunks) for chunks in (1, 2, 3)),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 1),
        ("zbv", "ScheduleZBVZeroBubble", 2),
        ("dualpipe-v", "ScheduleDualPipeV", 2),
    ],
)
def test_orders_are_those_of_torch(name: str, torch_name: str, chunks: int) -> None:
    """Every rank's actions, for some sizes; sizes that torch refuses are refused here as well."""
    refused = 0
    for ranks, microbatches in _SIZES:
        try:
            made = getattr(schedules, torch_name)(_stages(ranks, chunks), microbatches)
        except ValueError:
            refused += 1
            if name != "zb-h1":  # for which rounds mean nothing
                with pytest.raises(OptionError):
                    problem_for(name, _STAGE, ranks, microbatches, chunks=chunks)
            continue
        found = named(name, problem_for(name, _STAGE, ranks, microbatches, chunks=chunks))
        assert [list(order) for order in found.orders] == _torch_orders(made, ranks), (ranks, microbatches)
    assert refused < len(_SIZES) / 2


def test_orders_of_one_stage_are_those_of_torch() -> None:
    """GPipe, and 1F1B but for the last rank, whose written order leaves out its first forward in torch 2.13."""
    for ranks, microbatches in ((1, 2), (2, 4), (4, 8), (8, 16), (4, 9)):
        for name, torch_name, compared in (("gpipe", "ScheduleGPipe", ranks), ("1f1b", "Schedule1F1B", ranks - 1)):
            made = getattr(schedules, torch_name)(_stages(ranks, 1)[0], microbatches)
            found = named(name, problem_for(name, _STAGE, ranks, microbatches))
            assert [list(order) for order in found.orders[:compared]] == _torch_orders(made, compared)
