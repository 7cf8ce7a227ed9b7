"""torch's runtime for schedules of any order, and its way from what computes to what also sends and receives.

The runtime's class is private to torch, and has moved and been renamed in parts since it exists. What is used of it
here is what torchtitan uses too: it is made from stages, it reads a CSV of computing actions (``_load_csv``), holds the
lists that it has made of them (``pipeline_order_with_comms``), and runs them (``step``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ....errors import ExecutionError
from ...pipelining.schedule import PipelineSchedule
from .emit import write_csv

__all__ = ["load", "lowered_alone", "runtime_class"]

_HOMES = ("torch.distributed.pipelining.schedules", "torch.distributed.pipelining.runtime")
_NAME = "_PipelineScheduleRuntime"


def runtime_class() -> type[Any]:
    """The class of torch that executes lists of actions.

    Raises:
        ExecutionError: this version of torch has none, or one that reads no CSV.
    """
    for home in _HOMES:
        try:
            found = getattr(import_module(home), _NAME, None)
        except ImportError:
            continue
        if isinstance(found, type) and hasattr(found, "_load_csv"):
            return found
    raise ExecutionError(
        f"torch {torch.__version__} has no {_NAME} that reads a schedule from a CSV",
        hint="pipelines are run by torch from 2.11 on, and were tried with 2.11, 2.13 and 2.15",
    )


def load(runtime: Any, schedule: PipelineSchedule) -> dict[int, tuple[str, ...]]:
    """Let ``runtime`` read ``schedule`` and lower it; its lists by rank, in torch's words.

    Raises:
        ExecutionError: torch refuses it, or keeps its lists where they are not found.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_csv(schedule, Path(folder) / "schedule.csv")
        try:
            runtime._load_csv(str(path))
        except (AssertionError, RuntimeError, ValueError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ExecutionError(f"torch refuses schedule {schedule.method!r}: {first}") from error
    lists = getattr(runtime, "pipeline_order_with_comms", None)
    if not isinstance(lists, Mapping):
        raise ExecutionError(f"torch {torch.__version__} does not say what it made of the schedule")
    return {rank: tuple(str(action) for action in lists[rank] if action is not None) for rank in sorted(lists)}


def lowered_alone(schedule: PipelineSchedule) -> dict[int, tuple[str, ...]]:
    """What torch makes of ``schedule``, asked without processes, modules or a process group. Raises ExecutionError."""
    problem = schedule.problem
    stages = [
        SimpleNamespace(num_stages=len(problem.stages), group_size=problem.ranks, group_rank=0, stage_index=index)
        for index in problem.stages_of[0]
    ]
    if not stages:
        stages = [SimpleNamespace(num_stages=len(problem.stages), group_size=problem.ranks, group_rank=0)]
    return load(runtime_class()(stages, problem.microbatches), schedule)
