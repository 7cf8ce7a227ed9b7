"""Shapes that change, graphs that break, and sizes that depend on data."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from opweave import torch_backend
from opweave.compiler.frontend.dynamo.fallbacks import OpweaveFallbackWarning
from tests.compiler.frontend.dynamo.contract import check, compare, compiled, reports, same, tiers


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3), nn.Softmax(1))


def _batch(rows: int) -> torch.Tensor:
    return torch.linspace(-1, 1, rows * 4).reshape(rows, 4)


def _batches(rows: int) -> tuple[torch.Tensor]:
    return (_batch(rows),)


def test_a_size_that_changes_is_compiled_once_more() -> None:
    """The second size brings a symbol; ten more bring plans, but no graph; 0 and 1 are sizes of their own to Dynamo."""
    module = _layers()
    function = compiled(module)
    for rows in (5, 7):
        compare(function, module, partial(_batches, rows), gradients=True)
    assert len(reports()) == 4
    for rows in range(8, 18):
        compare(function, module, partial(_batches, rows), gradients=True)
    assert len(reports()) == 4
    for rows in (1, 0):
        compare(function, module, partial(_batches, rows))
    assert len(reports()) <= 8
    assert tiers() == {"T1"}


def _sized(rows: int, columns: int, count: int) -> tuple[Any, ...]:
    return _batch(rows), torch.ones(4, columns), count


def test_sizes_that_are_dynamic_from_the_first_call() -> None:
    """By ``mark_dynamic``, and by ``dynamic=True`` with several symbols, numbers computed from them, and views."""

    def function(x: torch.Tensor, y: torch.Tensor, count: int) -> Any:
        z = torch.cat([x, x.flip(0)]) @ y
        return z, z.view(-1)[x.shape[0] :], x.shape[0] * 2 + count, z.sum(0).expand(count, -1), x[:, None] + 1, x[1:]

    marked = compiled(lambda x: (x @ x.t()).sin().sum(0))
    for rows in (3, 6):
        x = _batch(rows)
        torch._dynamo.mark_dynamic(x, 0)
        same(marked(x), (x @ x.t()).sin().sum(0))
    assert len(reports()) == 1
    dynamic = compiled(function, dynamic=True)
    for rows, columns, count in ((3, 5, 2), (4, 6, 3), (7, 3, 9)):
        compare(dynamic, function, partial(_sized, rows, columns, count))
    assert len(reports()) == 2
    assert tiers() == {"T1"}


def test_sizes_that_shrink_as_others_grow() -> None:
    """The largest size of a bucket may be one that others cannot have: 195 rows leave 5 of 200, 208 leave none."""
    weights = torch.linspace(-1, 1, 16).reshape(4, 4)

    def function(x: torch.Tensor) -> Any:
        rest = torch.full((200 - x.shape[0], 4), 0.5) @ weights
        return torch.sort(rest @ weights)[0], x @ weights

    compile_once = compiled(function, dynamic=True)
    for rows in (195, 150, 198, 7):
        compare(compile_once, function, partial(_batches, rows))
    assert tiers() == {"T1"}


def _learning(rows: int) -> tuple[torch.Tensor, ...]:
    return _batch(rows).requires_grad_(), torch.ones(4, 4)


def test_numbers_computed_from_sizes_are_saved_for_the_backward_pass() -> None:
    """Their symbols are saved beside them."""

    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        both = torch.cat([x @ y, x])
        return both[: x.shape[0] // 2] @ y, both[: x.shape[0] * 3 // 2].exp()

    step = compiled(function, dynamic=True)
    for rows in (6, 9, 12):
        compare(step, function, partial(_learning, rows), gradients=True)
    assert tiers() == {"T1"}


def test_strides_that_change() -> None:
    """Rows of a wider tensor: the stride is a symbol that no size tells."""
    function = compiled(lambda x: (x * 2).sum(1), dynamic=True)
    for width in (8, 9, 12):
        x = torch.arange(5.0 * width).reshape(5, width)[:, :6]
        same(function(x), (x * 2).sum(1))
    assert tiers() == {"T1"}


def test_many_sizes_keep_few_plans() -> None:
    """More sizes than plans are kept for: the oldest are planned again."""
    function = compiled(lambda x: (x.t() @ x).sin().sum(0), dynamic=True)
    for rows in (*range(2, 70), 2, 3):
        x = _batch(rows)
        same(function(x), (x.t() @ x).sin().sum(0), 1e-4)
    assert len(reports()) == 1


def _signals(rows: int) -> tuple[torch.Tensor]:
    return (torch.linspace(-1, 1, rows * 12).reshape(rows, 2, 6),)


def test_a_training_step_with_a_dynamic_size() -> None:
    """Symbols go through what the forward pass saves; batch statistics are updated."""
    module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    make = [partial(_signals, rows) for rows in (4, 5, 9)]
    function = check(module, make[0], gradients=True, dynamic=True, tolerance=1e-4)
    for inputs in make:
        compare(function, module, inputs, gradients=True, tolerance=1e-3)
    assert len(reports()) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_graph_breaks() -> None:
    """Each part is a graph; Python between them sees values."""
    seen = []

    def function(x: torch.Tensor) -> Any:
        y = x.sin() + 1
        torch._dynamo.graph_break()
        z = y * 2
        seen.append(float(z.detach().sum()))
        if z.detach().sum() > 0:
            return z.cos(), y
        return z.tan(), y

    check(function, lambda: (torch.arange(6.0).requires_grad_(),), gradients=True, calls=1)
    assert seen[0] == pytest.approx(seen[1])
    compare(compiled(function), function, lambda: (-torch.arange(6.0) - 9,))
    assert tiers() == {"T1"}


@pytest.mark.filterwarnings("ignore::opweave.compiler.frontend.dynamo.fallbacks.OpweaveFallbackWarning")
def test_sizes_that_depend_on_data() -> None:
    """Dynamo breaks the graph, or stock Inductor runs what it was told to capture; each way the values are right."""

    def function(x: torch.Tensor) -> Any:
        y = x.sin()
        return y[y > 0] * 2, torch.nonzero(y).sum(0), torch.unique(x // 2), y[0].item()

    make = lambda: (torch.arange(6.0),)  # noqa: E731 # a name for both
    compare(compiled(function), function, make)
    assert "T1" in tiers()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compare(compiled(function), function, make)


def test_control_flow_runs_on_stock_inductor() -> None:
    """With one warning, however often it is compiled; the reason names what we cannot run."""

    def function(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)) + 1
        return result

    with pytest.warns(OpweaveFallbackWarning, match="stock Inductor.*subgraph") as caught:
        check(function, lambda: (torch.arange(6.0),), tier="T0")
    assert len(caught) == 1
    (report,) = reports()
    (reason,) = torch_backend.fallback_counts()
    assert report.fallbacks == (f"{report.name} {reason}",)
    compare(compiled(function), function, lambda: (-torch.arange(6.0),))


def test_higher_order_operators_that_inductor_resolves() -> None:
    """Scans become kernels, and a checkpoint with dropout a random seed that is drawn again."""
    from torch._higher_order_ops.associative_scan import associative_scan
    from torch.utils.checkpoint import checkpoint

    def function(x: torch.Tensor) -> Any:
        total: Any = associative_scan(torch.mul, x, 0, combine_mode="generic")
        return total, checkpoint(torch.sin, x, use_reentrant=False)

    check(function, lambda: (torch.linspace(0.5, 1.5, 12).reshape(6, 2),))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
def test_sparse_tensors_break_the_graph() -> None:
    """No backend of Inductor's takes them; Dynamo leaves them to eager mode, and we compile what is dense."""

    def function(x: torch.Tensor, index: torch.Tensor) -> Any:
        y = torch.sparse_coo_tensor(index, x, (5,), check_invariants=True)
        return y.to_dense() + 1

    compare(compiled(function), function, lambda: (torch.arange(3.0), torch.tensor([[0, 2, 4]])))
