"""What compiled functions return, and how their results and arguments share memory, is as in eager PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler.frontend.dynamo.contract import check, compiled, reports, same, tiers


def _rows() -> tuple[torch.Tensor]:
    return (torch.arange(12.0).reshape(3, 4),)


def test_outputs_of_every_kind() -> None:
    """Inputs, views of inputs, views of results, the same result twice, ``None``, numbers and nested containers."""

    def function(x: torch.Tensor) -> Any:
        y = x.sin()
        return x, x[1:], x.t(), y, y, y[0], y.view(-1), None, 3, 2.5, "text", {"twice": (y * 2, [y + 1])}

    check(function, _rows)


def test_outputs_of_every_kind_have_gradients() -> None:
    def make() -> tuple[torch.Tensor]:
        return (torch.arange(12.0).reshape(3, 4).requires_grad_(),)

    def function(x: torch.Tensor) -> Any:
        y = x.sin()
        return x[1:], x.t(), y, y, y[0], y.view(-1), (y * 2, [y + 1]), y.detach(), (x > 1)

    check(function, make, gradients=True)


def test_arguments_written_in_place() -> None:
    """The caller sees the new values, through views, too; results that alias a written argument do."""

    def function(x: torch.Tensor, y: torch.Tensor, part: torch.Tensor) -> Any:
        x.add_(1)
        y[1:].mul_(part)
        part.zero_()
        return x, x.view(-1), y + 1

    def make() -> tuple[torch.Tensor, ...]:
        base = torch.arange(20.0)
        return torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4), base[3:7]

    check(function, make)


def test_an_argument_written_and_needed_before() -> None:
    """The old values go into results, and into a gradient."""

    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = (x + w).sigmoid()
        old = x.clone()
        x.copy_(y.detach() * 2)
        return y, old, (x + w).sum()

    def make() -> tuple[torch.Tensor, ...]:
        return torch.arange(6.0), torch.linspace(0, 1, 6).requires_grad_()

    check(function, make, gradients=True)


def test_arguments_that_share_memory() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        x.mul_(2)
        return y + x, y

    def make() -> tuple[torch.Tensor, ...]:
        base = torch.arange(8.0)
        return base[:6], base[2:]

    check(function, make)


def test_strides_and_offsets() -> None:
    """Transposed, expanded, strided, offset and misaligned arguments; transposed and expanded results."""

    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> Any:
        product = a @ b
        return product.t(), (c + 1), d.expand(2, 3, 4) * 2, (e * e)[::2], (a + 1).t().contiguous(), d.expand(5, 3, 4)

    def make() -> tuple[torch.Tensor, ...]:
        base = torch.arange(100.0)
        return (
            base[:20].reshape(5, 4).t(),
            base[1:41].reshape(5, 8)[:, ::2],
            base[:4].unsqueeze(0).expand(3, 4),
            base[7:19].reshape(3, 4),
            base[3:12],
        )

    check(function, make)


def test_misaligned_arguments() -> None:
    """Their first byte is a multiple of an element, but of nothing more."""

    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x.half() * 2, y.exp() @ y.exp()

    def make() -> tuple[torch.Tensor, ...]:
        return torch.arange(33, dtype=torch.int8)[1:], torch.linspace(0, 1, 17)[1:].reshape(4, 4)

    check(function, make)


def test_as_strided_of_an_argument_with_an_offset() -> None:
    def function(x: torch.Tensor) -> Any:
        return torch.as_strided(x, (2, 2), (2, 1), 3) + 1, x[2:] + 1

    check(function, lambda: (torch.arange(12.0)[2:],))


def test_empty_tensors() -> None:
    """No elements: as arguments, results, and in between."""

    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x + 1, x @ y, y[:0], torch.cat([y, y * 2]), (x @ y).sum(), x.new_empty(0), torch.zeros(2, 0, 3)

    check(function, lambda: (torch.zeros(2, 0), torch.zeros(0, 3)))


def test_nothing_but_empty_results() -> None:
    check(lambda x: x.exp(), lambda: (torch.zeros(0, 4),))


def test_tensors_without_dimensions() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> Any:
        z = x * y.sum()
        return z, z + 1, y.max(), y.argmin(), z.expand(3), torch.tensor(2.5) * z

    check(function, lambda: (torch.tensor(2.0), torch.arange(5.0)))


_NUMBERS = (
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float64,
    torch.float16,
    torch.bfloat16,
)


def test_dtypes() -> None:
    """Each alone, and converted into each other."""

    def function(flag: torch.Tensor, *numbers: torch.Tensor) -> Any:
        sums = [number + 1 for number in numbers]
        total = torch.stack([number.to(torch.float32) for number in numbers]).sum(0)
        return (
            sums,
            total,
            [total.to(number.dtype) for number in numbers],
            ~flag,
            flag & (total > 3),
            flag.to(torch.int32),
        )

    def make() -> tuple[torch.Tensor, ...]:
        return torch.arange(6) % 2 == 0, *(torch.arange(6).to(dtype) for dtype in _NUMBERS)

    check(function, make)


def test_bits_read_as_another_dtype() -> None:
    def function(x: torch.Tensor) -> Any:
        y = x * 2
        return y.view(torch.int32) + 1, x.view(torch.int16), y.view(torch.uint8)

    check(function, _rows)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_complex_numbers() -> None:
    """Inductor leaves them to operators of PyTorch's."""

    def function(x: torch.Tensor) -> Any:
        z = torch.view_as_complex(x) * (1 + 2j)
        return z, z.abs(), torch.view_as_real(z * 2), torch.fft.fft(x[:, 0])

    check(function, lambda: (torch.arange(8.0).reshape(4, 2),))


def test_index_and_scatter() -> None:
    def function(x: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> Any:
        y = x.clone()
        y[index] = values
        y.index_put_((index,), values, accumulate=True)
        z = torch.zeros_like(x).scatter_(0, index.unsqueeze(1).expand(-1, 4), values)
        z = z.scatter_add(1, index.unsqueeze(1), values[:, :1])
        x.index_add_(0, index, values)
        return y, z, x[index], x.gather(0, index.unsqueeze(1)), z.scatter_reduce(0, index.unsqueeze(1), values, "amax")

    def make() -> tuple[torch.Tensor, ...]:
        return torch.arange(12.0).reshape(3, 4), torch.tensor([2, 0]), torch.linspace(0, 1, 8).reshape(2, 4)

    check(function, make)


def test_operators_with_several_results() -> None:
    def function(x: torch.Tensor) -> Any:
        values, indices = x.sort(dim=1)
        top = torch.topk(x, 2)
        return (
            values,
            indices,
            top.values + 1,
            top.indices,
            *torch.linalg.qr(x.t() @ x + torch.eye(4))[:1],
            torch.var_mean(x),
        )

    def make() -> tuple[torch.Tensor]:
        return (torch.tensor([[3.0, 1, 2, 9], [0, 5, 4, 8], [7, 6, 11, 10]]),)

    check(function, make)


def test_constants_of_a_graph() -> None:
    table = torch.linspace(0, 1, 4)

    def function(x: torch.Tensor) -> Any:
        return x + table, x * torch.tensor([1.0, 2, 3, 4]), torch.tensor(3), torch.arange(4)

    check(function, _rows)
    same(list(table), list(torch.linspace(0, 1, 4)))


class _Sharing(nn.Module):
    """One parameter under two names, a buffer that is counted up, and a constant that is no buffer."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.scale = torch.tensor(0.5)
        self.seen = 0

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.seen += 1
        result: torch.Tensor = self.head(self.table(index) * self.scale) + self.steps
        return result


def test_a_module_with_state() -> None:
    """Shared parameters get the sum of both gradients; buffers and attributes are written."""
    module = _Sharing()
    check(module, lambda: (torch.tensor([[1, 2], [6, 1]]),), gradients=True, calls=3)
    assert module.seen == 3
    assert int(module.steps) == 3


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool) -> None:
    """Its statistics are updated in training, and only then."""
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).train(training)
    check(module, lambda: (torch.linspace(-1, 1, 2 * 2 * 5 * 5).reshape(2, 2, 5, 5),), gradients=True, tolerance=1e-4)
    assert {report.phase for report in reports()} == {"forward", "backward"}


def test_attention() -> None:
    """Flash attention makes results of its own; a mask and dropout of 0 change nothing of that."""

    def function(q: torch.Tensor, mask: torch.Tensor) -> Any:
        plain = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return plain, nn.functional.scaled_dot_product_attention(q, q * 2, q, attn_mask=mask)

    def make() -> tuple[torch.Tensor, ...]:
        return torch.linspace(-1, 1, 64).reshape(1, 2, 4, 8).requires_grad_(), torch.tril(torch.ones(4, 4)).bool()

    check(function, make, gradients=True)


def test_a_compiled_function_of_a_compiled_function() -> None:
    inner = compiled(lambda x: x.sin() + 1)

    def outer(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = inner(x) * 2
        return result

    x = torch.arange(4.0)
    same(compiled(outer)(x), (x.sin() + 1) * 2)
    assert tiers() == {"T1"}
