"""What ``kernels/pointwise_conv.py`` does besides numerics: refusals, cost, its reference, what it matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.pointwise_conv import KERNEL, KNOWN
from tests.kernels.matching import check_fusion, check_matches, exported

SIZES = {"images": 2, "channels": 8, "filters": 6, "height": 5, "width": 3}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}
LAST = torch.channels_last


def arguments(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return KERNEL.arguments(dtype, **(SIZES | {"bias": True, "residual": True} | more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 5, 3)}, r"needs x \[any, any, any, any\]"),
        ({"x": torch.zeros(2, 8, 5, 3, dtype=torch.float64)}, r"of float32, float16, bfloat16"),
        ({"x": torch.zeros(2, 8, 5, 3)}, r"needs x channels last; \[2, 8, 5, 3\] has strides \[120, 15, 3, 1\]"),
        ({"weight": torch.zeros(6, 8)}, r"needs weight \[any, 8, 1, 1\]"),
        ({"weight": torch.zeros(6, 8, 3, 3)}, r"needs weight \[any, 8, 1, 1\]"),
        ({"weight": torch.zeros(6, 4, 1, 1)}, r"needs weight \[any, 8, 1, 1\]"),
        ({"weight": torch.zeros(6, 8, 1, 1, dtype=torch.float16)}, r"needs weight .* of float32"),
        ({"bias": torch.zeros(8)}, r"needs bias \[6\]"),
        ({"gamma": torch.zeros(6, 1, 1)}, r"needs gamma \[6\]"),
        ({"beta": torch.zeros(12)[::2]}, r"needs beta row-major"),
        ({"mean": None}, r"needs mean and variance both, or neither"),
        ({"residual": torch.zeros(2, 6, 5, 3)}, r"needs residual channels last"),
        ({"residual": torch.zeros(2, 8, 5, 3)}, r"needs residual \[2, 6, 5, 3\]"),
        ({"activation": "tanh"}, r"knows the activations none, relu, relu6, silu, hardswish, gelu"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*(arguments() | changes).values())


def test_refuses_outputs_of_another_layout_and_those_that_overlap() -> None:
    given = arguments()
    with pytest.raises(ExecutionError, match="needs out channels last"):
        KERNEL.launch(*given.values(), out=torch.zeros(2, 6, 5, 3))
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps residual"):
        KERNEL.launch(*given.values(), out=given["residual"])
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
        KERNEL.launch(*given.values(), out=torch.zeros(2, 6, 5, 3).to(memory_format=LAST))


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = {"images": 2, "channels": 5, "filters": 7, "height": 3, "width": 4, "norm": False}
    assert KERNEL.cost("float32", **plain).flops == 2 * 24 * 5 * 7
    assert KERNEL.cost("float32", **plain).traffic_bytes == 4 * (24 * 5 + 35 + 24 * 7)
    more = KERNEL.cost("bfloat16", **(plain | {"norm": True, "bias": True, "residual": True}), activation="silu")
    assert more.flops == 24 * 7 * (2 * 5 + 1 + 2 + 1 + 1)
    assert more.traffic_bytes == 2 * (24 * 5 + 35 + 5 * 7 + 2 * 24 * 7)
    scale = KERNEL.cost("float32", **plain, scale=True)
    assert scale.flops == 24 * 7 * 11
    assert scale.traffic_bytes == 4 * (24 * 5 + 35 + 7 + 24 * 7)


@pytest.mark.parametrize("activation", KNOWN)
def test_reference_is_torch_s_in_float64(activation: str) -> None:
    given = arguments(activation=activation)
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in given.values()]
    (out,) = KERNEL.reference(*given.values())
    torch.testing.assert_close(out.double(), KERNEL.eager(*wide), rtol=1e-5, atol=1e-5)


def test_the_operator_gives_channels_last_without_a_gpu() -> None:
    given = arguments(torch.bfloat16)
    out = KERNEL(given["x"], given["weight"])
    assert out.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(out, functional.conv2d(given["x"], given["weight"]), rtol=2e-2, atol=2e-2)


class Block(nn.Module):
    """A convolution, a normalisation with statistics of its own or a layer scale, a residual, an activation."""

    def __init__(
        self, activation: nn.Module, *, norm: bool = True, scale: bool = False, residual: bool = False, **more: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(8, 8, **({"kernel_size": 1, "bias": not norm} | more))
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        for tensor in (*self.norm.parameters(), *self.norm.buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
        self.scale = nn.Parameter(torch.rand(8, 1, 1)) if scale else None
        self.residual = residual
        self.activation = activation

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The block's result; ``other`` is its residual."""
        value = self.norm(self.conv(x))
        value = value if self.scale is None else self.scale * value
        out: torch.Tensor = self.activation(value + other if self.residual else value)
        return out


def images(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 8, 5, 3, generator=generator).to(dtype, memory_format=LAST) for _ in range(2)]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: Block(nn.ReLU(), residual=True),
    "MobileNetV2 expansion": lambda: Block(nn.ReLU6()),
    "MobileNetV2 projection": lambda: Block(nn.Identity(), residual=True),
    "MobileNetV3": lambda: Block(nn.Hardswish()),
    "EfficientNet": lambda: Block(nn.SiLU()),
    "ConvNeXt up": lambda: Block(nn.GELU(), norm=False),
    "ConvNeXt down": lambda: Block(nn.Identity(), norm=False, scale=True, residual=True),
    "normalisation alone": lambda: Block(nn.Identity()),
}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BLOCKS)
def test_matches_blocks_of_models(name: str, dtype: torch.dtype, decomposed: bool) -> None:
    block = BLOCKS[name]().eval().to(dtype)
    tolerance = TOLERANCE[dtype]
    graph = check_fusion(KERNEL, block, images(dtype), rtol=tolerance, atol=tolerance, decomposed=decomposed)
    assert len(graph.ops) == 1


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("absent", [(), ("mean", "variance"), ("mean", "variance", "beta", "bias"), ("gamma",)])
def test_matches_its_own_eager_spelling(absent: tuple[str, ...], decomposed: bool) -> None:
    given = arguments(activation="silu") | dict.fromkeys(absent)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}

    def function(*values: torch.Tensor) -> Any:
        return KERNEL.eager(**(given | dict(zip(tensors, values, strict=True))))

    inputs = list(tensors.values())
    if absent == ("gamma",) and decomposed:
        return  # a normalisation with a shift and no scale: its decomposition is no pattern of ours
    graph = check_fusion(KERNEL, function, inputs, rtol=1e-5, atol=1e-5, decomposed=decomposed)
    assert len(graph.ops) == 1


def test_what_somebody_else_reads_stays() -> None:
    block = Block(nn.ReLU(), residual=True).eval()

    def function(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = block.norm(block.conv(x)) + other
        return total, functional.relu(total)

    graph = check_fusion(KERNEL, function, images(), rtol=1e-5, atol=1e-5)
    assert [op.target for op in graph.ops] == ["opweave.pointwise_conv.default", "aten.relu.default"]


def matched(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> int:
    return len(check_matches(KERNEL, exported(function, inputs, decomposed=False).graph))


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"stride": 2},
        {"padding": 1},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 3, "padding": 1},
    ],
)
def test_leaves_other_convolutions(options: dict[str, Any]) -> None:
    assert matched(Block(nn.SiLU(), **options).eval(), *images()) == 0


def test_leaves_images_with_channels_first_and_residuals_of_another_layout() -> None:
    block = Block(nn.ReLU(), residual=True).eval()
    x, other = images()
    assert matched(block, x, other) == 1
    assert matched(block, x.contiguous(), other.contiguous()) == 0
    found = check_matches(KERNEL, exported(block, [x, other.contiguous()], decomposed=False).graph)
    assert all(match.arguments["residual"] is None for match in found)


def test_leaves_a_normalisation_of_the_batch() -> None:
    assert matched(Block(nn.SiLU()).train(), *images()) == 0


@pytest.mark.parametrize("norm", [False, True])
def test_leaves_convolutions_with_nothing_behind_them(norm: bool) -> None:
    assert matched(Block(nn.Identity(), norm=norm).eval(), *images()) == int(norm)


def test_leaves_what_comes_between_the_normalisation_and_the_residual() -> None:
    """The kernel activates last: an activation before the sum is fused without the sum."""
    block = Block(nn.Identity()).eval()
    program = exported(lambda x, y: functional.relu(block(x, y)) + y, images(), decomposed=False)
    (match,) = check_matches(KERNEL, program.graph)
    assert match.arguments["residual"] is None
    assert match.arguments["activation"] == "relu"


def test_leaves_sums_that_are_broadcast() -> None:
    block = Block(nn.Identity(), norm=False)
    x, other = images()
    assert matched(lambda x, y: block(x, y) + y[:1], x, other) == 0
    assert matched(lambda x, y: torch.add(block(x, y), y, alpha=2), x, other) == 0
