"""What ``kernels/linear_epilogue.py`` does besides numerics: refusals, cost, configurations, what it matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels._activations import ACTIVATIONS
from opweave.kernels._matmul import sizes_of
from opweave.kernels.linear_epilogue import KERNEL, KNOWN
from tests.kernels.matching import check_fusion, check_matches, exported

SIZES = {"rows": 6, "depth": 16, "columns": 8, "bias": True, "residual": True}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def arguments(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return KERNEL.arguments(dtype, **(SIZES | more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"needs x \[any\]"),
        ({"x": torch.zeros(6, 16, dtype=torch.float64)}, r"of float32, float16, bfloat16"),
        ({"x": torch.zeros(16, 6).t()}, r"needs x row-major"),
        ({"weight": torch.zeros(8, 16)}, r"needs weight \[16, any\]"),
        ({"weight": torch.zeros(16, 8, dtype=torch.float16)}, r"needs weight .* of float32"),
        ({"bias": torch.zeros(1)}, r"needs bias \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, r"needs bias .*got .*int32"),
        ({"residual": torch.zeros(8)}, r"needs residual \[6, 8\]"),
        ({"residual": torch.zeros(8, 6).t()}, r"needs residual row-major"),
        ({"activation": "tanh"}, r"knows the activations none, relu, gelu, gelu_tanh, silu; got 'tanh'"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*(arguments() | changes).values())


def test_refuses_outputs_that_overlap_and_others() -> None:
    given = arguments(columns=16)
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps x"):
        KERNEL.launch(*given.values(), out=given["x"])
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps residual"):
        KERNEL.launch(*given.values(), out=given["residual"])
    with pytest.raises(ExecutionError, match=r"needs out \[6, 16\] of float32"):
        KERNEL.launch(*given.values(), out=torch.zeros(6, 16, dtype=torch.float16))
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
        KERNEL.launch(*given.values(), out=torch.zeros(6, 16))


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = {"rows": 3, "depth": 5, "columns": 7, "bias": False}
    assert KERNEL.cost("float32", **plain).flops == 2 * 3 * 5 * 7
    assert KERNEL.cost("float32", **plain).traffic_bytes == 4 * (15 + 35 + 21)
    more = KERNEL.cost("bfloat16", **(plain | {"bias": True, "residual": True, "activation": "gelu"}))
    assert more.flops == 21 * (2 * 5 + 3)
    assert more.traffic_bytes == 2 * (15 + 35 + 2 * 21 + 7)


@pytest.mark.parametrize("activation", KNOWN)
def test_reference_is_torch_s_in_float64(activation: str) -> None:
    given = arguments(activation=activation)
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in given.values()]
    (out,) = KERNEL.reference(*given.values())
    torch.testing.assert_close(out.double(), KERNEL.eager(*wide), rtol=1e-5, atol=1e-5)


def test_the_operator_takes_what_is_optional_by_default() -> None:
    x, weight = torch.randn(2, 3, 16), torch.randn(8, 16)
    torch.testing.assert_close(KERNEL(x, weight.t()), functional.linear(x, weight))
    assert torch.ops.opweave.linear_epilogue(x, weight.t(), activation="relu").min() == 0


def test_configurations_are_chosen_by_rows_dtype_and_what_can_be_read_in_vectors() -> None:
    def block(rows: int, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[int, int]:
        weight = torch.empty(shape, dtype=dtype, device="meta").t()
        constants = KERNEL.configs.choose(torch.device("cpu"), None, **sizes_of(rows, weight)).constants
        return constants["block_m"], constants["block_n"]

    assert block(16, torch.bfloat16, (4096, 4096)) == (16, 32)
    assert block(17, torch.bfloat16, (4096, 4096)) == (64, 32)
    assert block(512, torch.float16, (4096, 4096)) == (128, 128)
    assert block(513, torch.float16, (4096, 4096)) == (128, 256)
    assert block(513, torch.float32, (4096, 4096)) == (128, 64)
    assert block(513, torch.bfloat16, (4096, 4092)) == (128, 64)
    assert block(513, torch.bfloat16, (4096, 4088)) == (128, 256)


def test_a_weight_without_neighbours_is_ragged() -> None:
    weight = torch.empty(64, 64, dtype=torch.bfloat16)
    assert sizes_of(1, weight)["ragged"] == sizes_of(1, weight.t())["ragged"] == 0
    assert sizes_of(1, weight, weight[:, ::2].t()[:, ::2])["ragged"] == 1


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("activation", "more"),
    [
        *((activation, {}) for activation in KNOWN),
        ("none", {"bias": False}),
        ("none", {"residual": False}),
        ("silu", {"bias": False, "residual": False}),
        ("gelu", {"residual": False}),
    ],
)
def test_matches_its_own_eager_spelling(
    activation: str, more: dict[str, bool], dtype: torch.dtype, decomposed: bool
) -> None:
    given = arguments(dtype, activation=activation, **more)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    rows = {name: value.view(2, 3, -1) for name, value in tensors.items() if name in ("x", "residual")}
    tensors = {**tensors, **rows, "weight": tensors["weight"].t().contiguous()}

    def function(*values: torch.Tensor) -> Any:
        now = given | dict(zip(tensors, values, strict=True))
        return KERNEL.eager(**(now | {"weight": now["weight"].t()}))

    count = int(activation != "none" or more.get("residual", True))
    tolerance = TOLERANCE[dtype]
    inputs = list(tensors.values())
    graph = check_fusion(KERNEL, function, inputs, rtol=tolerance, atol=tolerance, decomposed=decomposed, count=count)
    assert len(graph.ops) == 1


class Mlp(nn.Module):
    """A transformer's second half, with its residual connection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's result."""
        out: torch.Tensor = x + self.down(functional.gelu(self.up(x), approximate="tanh"))
        return out


@pytest.mark.parametrize("decomposed", [False, True])
def test_matches_both_layers_of_an_mlp(decomposed: bool) -> None:
    graph = check_fusion(KERNEL, Mlp(), [torch.randn(2, 5, 8)], rtol=1e-5, atol=1e-5, decomposed=decomposed, count=2)
    assert [op.target for op in graph.ops] == ["opweave.linear_epilogue.default"] * 2


def matched(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    return len(check_matches(KERNEL, exported(function, inputs, decomposed=False).graph))


def test_an_activation_whose_operand_is_needed_stays_fused_with_nothing() -> None:
    """The sum is returned, too: another launch would have to compute the product a second time."""

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = functional.linear(x, w)
        return value, functional.silu(value)

    x, w = torch.randn(6, 16), torch.randn(8, 16)
    found = check_matches(KERNEL, exported(function, [x, w], decomposed=False).graph)
    assert all("linear" not in match.ops for match in found)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w, r: functional.linear(x, w) + r, ((6, 16), (8, 16), (8,))),  # a bias, and nothing else
        (lambda x, w, r: functional.linear(x, w) + r, ((6, 16), (8, 16), (6, 1))),
        (lambda x, w, r: functional.linear(x, w) + r, ((6, 16), (8, 16), (2, 6, 8))),
        (lambda x, w, r: torch.add(functional.linear(x, w), r, alpha=2), ((6, 16), (8, 16), (6, 8))),
        (lambda x, w, r: functional.linear(x, w) - r, ((6, 16), (8, 16), (6, 8))),
        (lambda x, w, r: functional.leaky_relu(functional.linear(x, w)), ((6, 16), (8, 16), (1,))),
        (lambda x, w, r: functional.silu(x @ w), ((2, 6, 16), (2, 16, 8), (1,))),  # a batch of weights
        (lambda x, w, r: functional.silu(x.t() @ w), ((16, 6), (16, 8), (1,))),
        (lambda x, w, r: functional.linear(x, w) + r.t(), ((6, 16), (8, 16), (8, 6))),
        (lambda x, w, r: functional.silu(torch.addmm(r, x, w, beta=2)), ((6, 16), (16, 8), (8,))),
        (lambda x, w, r: functional.linear(x, w), ((6, 16), (8, 16), (1,))),
    ],
)
def test_leaves_what_it_does_not_compute(
    function: Callable[..., torch.Tensor], shapes: tuple[tuple[int, ...], ...]
) -> None:
    assert matched(function, *shapes) == 0


def test_leaves_sums_in_another_dtype() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w) + r.float()

    assert matched(function, (6, 16), (8, 16), (6, 8), dtype=torch.bfloat16) == 0
    assert matched(lambda x, w, r: functional.linear(x, w) + r, (6, 16), (8, 16), (6, 8), dtype=torch.float64) == 0


def test_activations_are_those_of_the_launcher() -> None:
    assert set(KNOWN) <= set(ACTIVATIONS)
