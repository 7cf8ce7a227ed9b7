"""What Inductor gets wrong and the backend does not."""

from __future__ import annotations

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import scheduler

from opweave.compiler.frontend.dynamo.repairs import repaired
from opweave.errors import OpweaveError
from tests.compiler.frontend.dynamo.contract import compiled, same, tiers


def _scattered(like: torch.Tensor, other: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> object:
    """The sum loops over rows and columns; the product reads what was scattered, in one loop.

    To fuse both, Inductor computes the product's loops anew. Fused, they come where the sum comes: first, unless it is
    known that the product reads what ``index_put`` has filled, and not the zeros.
    """
    added = like + other.t()
    filled = torch.zeros_like(like).index_put((rows,), values)
    return added, filled * like


def _given() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(4, 6), torch.randn(6, 4), torch.tensor([0, 2]), torch.randn(2, 6)


@pytest.mark.parametrize("tier", ["T1", "T0"])
def test_a_read_stays_behind_the_write_in_place_that_it_needs(tier: str) -> None:
    """Without the repair, torch 2.13 runs the fused kernel before ``index_put`` (pytorch issue 185509)."""
    same(compiled(_scattered, tier=tier)(*_given()), _scattered(*_given()))
    assert tiers() == {tier}


def test_stock_inductor_is_repaired_only_while_it_compiles_for_us() -> None:
    """The repair changes nothing for torch.compile with other backends, and is needed as long as those are wrong."""
    before = scheduler.SchedulerNode.recompute_size_and_body
    with repaired():
        assert scheduler.SchedulerNode.recompute_size_and_body is not before
    assert scheduler.SchedulerNode.recompute_size_and_body is before


@pytest.mark.skipif(torch.__version__ >= "2.14.0a0", reason="mended upstream")
def test_the_graph_shows_the_error() -> None:
    """Inductor alone loses what was scattered: where it does not, the first test shows nothing."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        found = torch.compile(_scattered)(*_given())
        expected = _scattered(*_given())
    assert isinstance(found, tuple)
    assert isinstance(expected, tuple)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


def test_another_scheduler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(scheduler.SchedulerNode, "recompute_size_and_body")
    with pytest.raises(OpweaveError, match=r"no torch\._inductor\.scheduler\.SchedulerNode\.recompute_size_and_body"):
        repaired().__enter__()
