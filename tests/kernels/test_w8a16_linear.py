"""What ``kernels/w8a16_linear.py`` does besides numerics: refusals, cost, its reference, what it matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.w8a16_linear import KERNEL, quantize
from tests.kernels.matching import check_fusion, check_matches, exported

SIZES = {"rows": 6, "depth": 96, "columns": 10}
HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(6, 96)}, r"needs x \[any, any\] of float16, bfloat16"),
        ({"x": torch.zeros(6, 0, dtype=HALF)}, r"needs at least one input feature"),
        ({"x": torch.zeros(2, 6, 96, dtype=HALF).transpose(0, 1)}, r"needs rows of x at equal distances"),
        ({"weight": torch.zeros(10, 95, dtype=torch.int8)}, r"needs weight \[any, 96\]"),
        ({"weight": torch.zeros(10, 96, dtype=torch.uint8)}, r"needs weight .* of int8"),
        ({"group": 24}, r"needs a group of 32, 64, 128, \.\.\. weights, or all 96 in one; got 24"),
        ({"group": 16}, r"needs a group"),
        ({"group": 0}, r"needs a group"),
        ({"group": 32}, r"needs scales \[3, 10\]"),
        ({"scales": torch.zeros(1, 9, dtype=HALF)}, r"needs scales \[1, 10\]"),
        ({"scales": torch.zeros(1, 10)}, r"needs scales .* of float16, bfloat16"),
        ({"scales": torch.zeros(1, 20, dtype=HALF)[:, ::2]}, r"needs scales row-major"),
        ({"bias": torch.zeros(9)}, r"needs bias \[10\]"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*(KERNEL.arguments(HALF, **SIZES) | changes).values())


def test_refuses_outputs_that_overlap() -> None:
    given = KERNEL.arguments(HALF, rows=6, depth=96, columns=96)
    _, partial = KERNEL.allocate(*given.values())
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps x"):
        KERNEL.launch(*given.values(), out=given["x"], partial=partial)


@pytest.mark.parametrize(
    ("rows", "depth", "room"), [(1, 4096, 16), (16, 4096, 16), (17, 4096, 15), (64, 4096, 4), (65, 4096, 0), (1, 64, 0)]
)
def test_scratch_depends_on_sizes_alone(rows: int, depth: int, room: int) -> None:
    given = KERNEL.arguments(HALF, "meta", rows=rows, depth=depth, columns=48)
    assert KERNEL.allocate(*given.values())[1].shape == (room, rows, 48)


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("bfloat16", rows=3, depth=100, columns=5)
    assert plain.flops == 2 * 3 * 100 * 5
    assert plain.traffic_bytes == 2 * (300 + 15 + 5) + 500
    more = KERNEL.cost("bfloat16", rows=3, depth=100, columns=5, group=32, bias=True)
    assert more.flops == plain.flops + 15
    assert more.traffic_bytes == 2 * (300 + 15 + 4 * 5 + 5) + 500


@pytest.mark.parametrize("group", [32, 64, 96])
def test_quantising_is_as_near_as_scales_allow(group: int) -> None:
    weight = torch.randn(10, 96, dtype=torch.float32, generator=torch.Generator().manual_seed(1)).to(HALF)
    weight[3] = 0
    integers, scales = quantize(weight, group)
    assert scales.shape == (-(-96 // group), 10)
    spread = scales.float()[torch.arange(96) // group].t()
    error = (integers * spread - weight.float()).abs()
    assert bool((error <= spread * 1.0 + 1e-7).all())  # half a step, and as much where 127 scales fall short
    assert integers.abs().max() == 127
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(2)).to(HALF)
    torch.testing.assert_close(KERNEL(x, integers, scales, None, group), x @ weight.t(), rtol=0.05, atol=0.1)


def inputs(dtype: torch.dtype = HALF, *shape: int) -> list[torch.Tensor]:
    given = KERNEL.arguments(dtype, **SIZES, bias=True)
    x = given["x"].view(*shape, 96) if shape else given["x"]
    return [x, given["weight"], given["scales"][0], given["bias"]]


Function = Callable[..., torch.Tensor]

SPELLINGS: dict[str, Function] = {
    "weights scaled": lambda x, w, s, b: functional.linear(x, w.to(x.dtype) * s[:, None]),
    "weights scaled, bias": lambda x, w, s, b: functional.linear(x, w.to(x.dtype) * s.unsqueeze(-1), b),
    "result scaled, as gpt-fast": lambda x, w, s, b: functional.linear(x, w.to(dtype=x.dtype)) * s,
    "result scaled, as torchao": lambda x, w, s, b: (
        (torch.mm(x.reshape(-1, x.shape[-1]), w.t().to(x.dtype)) * s).reshape(*x.shape[:-1], -1) + b
    ),
    "product": lambda x, w, s, b: x @ (w.t().to(x.dtype) * s),
    "product of a scaled weight, transposed": lambda x, w, s, b: x @ (w.to(x.dtype) * s[:, None]).t() + b,
}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, HALF])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_matches_what_models_say(name: str, shape: tuple[int, ...], dtype: torch.dtype, decomposed: bool) -> None:
    given = inputs(dtype, *shape)
    graph = check_fusion(KERNEL, SPELLINGS[name], given, rtol=0.05, atol=0.05, decomposed=decomposed)
    assert len(graph.ops) == 1


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matches_its_own_eager_spelling(bias: bool, decomposed: bool) -> None:
    given = KERNEL.arguments(HALF, **SIZES, bias=bias)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]

    def function(*values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = KERNEL.eager(*values, *([] if bias else [None]), 96)
        return out

    check_fusion(KERNEL, function, tensors, rtol=0.05, atol=0.05, decomposed=decomposed)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_matches_what_follows_an_activation(name: str, decomposed: bool) -> None:
    """Decomposed, ``x`` is a float32 result that was rounded: the launch reads it rounded."""

    def function(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return SPELLINGS[name](functional.silu(x), w, s, b)

    check_fusion(KERNEL, function, inputs(HALF, 2, 3), rtol=0.05, atol=0.05, decomposed=decomposed)


def matched(function: Function, *given: torch.Tensor, decomposed: bool = False) -> int:
    return len(check_matches(KERNEL, exported(function, given, decomposed=decomposed).graph))


LEFT: dict[str, tuple[Function, dict[int, torch.Tensor]]] = {
    "no scale": (lambda x, w, s, b: functional.linear(x, w.to(x.dtype), b), {}),
    "uint8": (SPELLINGS["weights scaled"], {1: torch.ones(10, 96, dtype=torch.uint8)}),
    "a scale for each input": (
        lambda x, w, s, b: functional.linear(x, w.to(x.dtype) * s),
        {2: torch.rand(96).to(HALF)},
    ),
    "a scale for each input of a square weight": (
        lambda x, w, s, b: functional.linear(x, w.to(x.dtype) * s),
        {1: torch.ones(96, 96, dtype=torch.int8), 2: torch.rand(96).to(HALF)},
    ),
    "a scale for each row of the result": (
        lambda x, w, s, b: functional.linear(x, w.to(x.dtype)) * s,
        {2: torch.rand(6, 1).to(HALF)},
    ),
    "one scale": (SPELLINGS["result scaled, as gpt-fast"], {2: torch.rand(()).to(HALF)}),
    "scaled twice": (lambda x, w, s, b: functional.linear(x, w.to(x.dtype) * s[:, None]) * s[0], {}),
    "a bias that is scaled": (lambda x, w, s, b: functional.linear(x, w.to(x.dtype), b) * s, {}),
    "float32": (
        lambda x, w, s, b: functional.linear(x.float(), w.float() * s[:, None].float()),
        {},
    ),
    "float weights": (SPELLINGS["weights scaled"], {1: torch.ones(10, 96, dtype=HALF)}),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_what_is_something_else(name: str) -> None:
    function, changed = LEFT[name]
    given = [changed.get(index, tensor) for index, tensor in enumerate(inputs())]
    graph = exported(function, given, decomposed=False).graph
    found = check_matches(KERNEL, graph)
    if name == "scaled twice":  # the inner layer is one
        assert [match.outputs[0].name for match in found] == ["linear"]
    else:
        assert not found


def test_leaves_a_bias_that_is_not_of_channels() -> None:
    function = SPELLINGS["result scaled, as torchao"]
    given = inputs()
    assert matched(function, *given) == 1
    given[3] = torch.rand(6, 1).to(HALF)
    found = check_matches(KERNEL, exported(function, given, decomposed=False).graph)
    assert [match.arguments["bias"] for match in found] == [None]


def test_a_weight_that_others_read_is_cast_for_them() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = w.to(x.dtype)
        return functional.linear(x, wide) * s, wide.sum(0)

    graph = check_fusion(KERNEL, function, inputs()[:3], rtol=0.05, atol=0.05)
    assert len(graph.ops) == 3
