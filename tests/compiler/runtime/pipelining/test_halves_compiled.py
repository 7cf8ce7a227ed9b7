"""Compiled split stages: right, each graph once a microbatch, and no backward twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.compiler.runtime.pipelining.halves_bytes import measured_bytes, stage_bytes
from opweave.compiler.runtime.pipelining.halves_run import Boxed, Freeing, inductor
from tests.compiler.runtime.pipelining.halves_stages import (
    Block,
    Convolutions,
    Several,
    differences,
    perceptron,
    x,
)


def _counting(
    seen: Counter[str], compile: Callable[[fx.GraphModule, str], Boxed]
) -> Callable[[fx.GraphModule, str], Boxed]:
    def counted(module: fx.GraphModule, phase: str) -> Boxed:
        run = compile(module, phase)
        seen[f"{phase} compiled"] += 1

        def call(arguments: list[Any]) -> Any:
            seen[phase] += 1
            return run(arguments)

        return call

    return counted


def test_each_graph_runs_once_a_microbatch() -> None:
    """Compiled by the caller's function: three graphs, and each runs as often as there are microbatches."""
    seen: Counter[str] = Counter()
    compile = _counting(seen, lambda module, _: Freeing(module))
    differences(perceptron(), [(x(4, 8),) for _ in range(3)], compile=compile)
    phases = ("forward", "input_gradient", "weight_gradient")
    assert seen == dict.fromkeys(phases, 3) | {f"{phase} compiled": 1 for phase in phases}


def test_inductor_leaves_what_eager_autograd_leaves() -> None:
    """A stage with a view as output, compiled; its backward graphs run once each, where torch would run one twice."""
    torch.manual_seed(1)
    seen: Counter[str] = Counter()
    found = differences(
        nn.Sequential(perceptron(), nn.Dropout(0.3)),
        [(x(2, 3, 8),) for _ in range(2)],
        compile=_counting(seen, inductor),
    )
    assert max(found.values(), default=0.0) < 1e-5
    assert (seen["forward"], seen["input_gradient"], seen["weight_gradient"]) == (2, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("make", "args"),
    [
        (lambda: Block(32, 2), lambda: (x(2, 8, 32),)),
        (lambda: Block(32, 2), lambda: (x(2, 8, 32, gradient=False),)),
        (Convolutions, lambda: (x(2, 3, 6, 6),)),
        (Several, lambda: (x(4, 8), x(4, 8), torch.arange(3), 2)),
    ],
    ids=["block", "first", "convolutions", "several"],
)
def test_inductor_on_more_modules(make: Callable[[], nn.Module], args: Callable[[], Any], autocast: bool) -> None:
    """Random numbers, updates, layouts and casts through Inductor; sums are taken in another order there."""
    torch.manual_seed(1)
    found = differences(make(), [args() for _ in range(2)], autocast=autocast, compile=True)
    assert max(found.values(), default=0.0) < (5e-2 if autocast else 1e-5)


@pytest.mark.slow
def test_compiled_stages_hold_what_their_graphs_say() -> None:
    """Two blocks, decomposed and compiled, hold what they hold in eager execution."""
    module = nn.Sequential(Block(128, 4), Block(128, 4))
    given = x(2, 32, 128)
    stage = SplitStage(module, (given,), compile=True)
    said, seen = stage_bytes(stage), measured_bytes(stage, (given,))
    assert said == seen
    unit = 4 * given.numel()
    assert said.after_forward / unit == pytest.approx(20.1, abs=0.3)
    assert said.after_input_gradient / unit == pytest.approx(32.1, abs=0.3)
