"""What a stage holds for a microbatch is what autograd keeps, and what ranks hold in a step is what was predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss, scaled_dot_product_attention

from opweave.compiler.pipelining.placement import placed
from opweave.compiler.runtime.pipelining.boundaries import buffer_bytes
from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.compiler.runtime.pipelining.halves_bytes import LiveBytes
from opweave.compiler.runtime.pipelining.memory import held_by
from opweave.compiler.runtime.pipelining.pipeline import Pipeline
from opweave.passes.pipeline_parallel.named import named
from tests.support.ranks import spawn

HIDDEN, HEADS, TOKENS, ROWS = 64, 4, 32, 2
UNIT = 4 * HIDDEN * TOKENS * ROWS  # bytes of a boundary


class Block(nn.Module):
    """A transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before(x)).view(ROWS, TOKENS, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*heads)
        x = x + self.out(mixed.transpose(1, 2).reshape(ROWS, TOKENS, HIDDEN))
        return x + self.down(gelu(self.up(self.behind(x))))  # type: ignore[no-any-return]


def two_blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def units(module: nn.Module, *, loss: Any = None, first: bool = False, whole: bool = False) -> tuple[float, ...]:
    x, target = torch.randn(2, ROWS, TOKENS, HIDDEN)
    held = held_by(module, [x.requires_grad_(not first)], loss, target, first=first, whole=whole)
    found = (held.until_input_gradient_bytes, held.until_weight_gradient_bytes, held.between_gradients_bytes)
    return tuple(nbytes / UNIT for nbytes in found)


def test_eager_halves_hold_more_between_them() -> None:
    """Two blocks save 32 boundaries, of which the first is the input; torch's I frees nothing, and adds 22 and more."""
    blocks = two_blocks()
    until_i, until_w, between = units(blocks)
    assert until_i == 0
    assert until_w == pytest.approx(31, abs=0.5)
    assert between == pytest.approx(21, abs=0.5)
    assert units(blocks, first=True) == pytest.approx((0, until_w, 0), abs=0.01)
    assert units(blocks, whole=True) == pytest.approx((until_w, 0, 0), abs=0.01)
    with_loss = units(blocks, loss=mse_loss)
    assert with_loss == pytest.approx((0, until_w + 1, between + 1), abs=0.01)
    assert all(parameter.grad is None for parameter in blocks.parameters())


def test_what_is_saved_is_counted_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y * y + y.exp() * y

    assert units(Twice(), whole=True) == pytest.approx((2, 0, 0), abs=0.01)  # y and its exponential
    assert units(nn.Identity(), whole=True) == (0, 0, 0)


def test_split_stages_are_asked() -> None:
    until_i, until_w, between = units(SplitStage(two_blocks()))
    eager = units(two_blocks())
    assert until_i + until_w < eager[1]
    assert until_w + between < eager[1] + eager[2]
    assert units(SplitStage(two_blocks()), loss=mse_loss) == pytest.approx((until_i + 1, until_w, between), abs=0.01)


def in_step(wrap: Callable[[nn.Module], nn.Module], name: str, chunks: int) -> tuple[int, int, int]:
    """Bytes beside what is resident: predicted, and the most behind an action; and the most that messages may add."""
    torch.manual_seed(0)
    microbatches, here = 6, dist.get_rank()
    ranks = placed("v" if chunks == 2 else "loop", 2, chunks)
    modules = [wrap(two_blocks()) for _ in ranks]
    x, y = torch.randn(2, ROWS * microbatches, TOKENS, HIDDEN)
    pipeline = Pipeline(
        modules,
        x,
        mse_loss,
        ranks=ranks,
        microbatches=microbatches,
        planner=lambda problem: named(name, problem),
        example_target=y,
    )
    for _ in range(2):
        pipeline.step(x, target=y)
    most = 0
    live = LiveBytes()

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal most
            result = method(*args, **kwargs)
            most = max(most, live.now())
            return result

        return call

    for stage in pipeline._runner.stages:
        for method in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            setattr(stage, method, watched(getattr(stage, method)))
    with live:
        pipeline.step(x, target=y)
    predicted = pipeline.timed.peak_bytes[here] - pipeline.problem.resident_bytes[here]
    return predicted, most, buffer_bytes(pipeline.chain.boundaries, ranks, microbatches, 2)[here]


def in_steps() -> list[tuple[str, int, int, int]]:
    found = []
    for wrap in (nn.Sequential, SplitStage):
        for name, chunks in (("1f1b", 1), ("zb-h1", 1), ("zbv", 2)):
            found.append((f"{name}, {wrap.__name__}", *in_step(wrap, name, chunks)))
    return found


@pytest.mark.slow
def test_ranks_hold_what_was_predicted(tmp_path: Path) -> None:
    """What torch keeps of messages until the end, and what is not yet there at the peak, lies between."""
    for found in spawn(2, in_steps, tmp_path):
        for case, predicted, most, messages in found:
            assert predicted <= most + UNIT, case
            assert most <= predicted + messages + UNIT, case
