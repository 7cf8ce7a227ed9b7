"""What ``kernels/depthwise_conv.py`` does besides numerics: refusals, cost, its reference, what it matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.depthwise_conv import KERNEL, channels_inside
from tests.kernels.matching import check_fusion, check_matches, exported

SIZES = {"batch": 2, "channels": 8, "height": 9, "width": 7}
LAST = torch.channels_last


def arguments(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return KERNEL.arguments(dtype, **(SIZES | more))


def refused(changes: dict[str, Any], message: str) -> None:
    given = arguments() | changes
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*given.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 9, 7)}, r"needs x \[any, any, any, any\]"),
        ({"x": torch.zeros(2, 8, 9, 7, dtype=torch.float64)}, r"of float32, float16, bfloat16"),
        ({"weight": torch.zeros(8, 2, 3, 3)}, r"needs weight \[8, 1, any, any\]"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"needs weight \[8, 1, any, any\]"),
        ({"weight": torch.zeros(8, 1, 3, 3, dtype=torch.float16)}, r"needs weight .* of float32"),
        ({"weight": torch.zeros(8, 1, 3, 13)}, r"needs a filter of 1 x 1 to 11 x 11; got 3 x 13"),
        ({"weight": torch.zeros(8, 1, 11, 11), "padding": 0}, r"needs images as large as the filter"),
        ({"gamma": torch.zeros(4)}, r"needs gamma \[8\]"),
        ({"beta": torch.zeros(16)[::2]}, r"needs beta row-major"),
        ({"mean": None}, r"needs mean and variance both, or neither"),
        ({"activation": "tanh"}, r"knows the activations none, relu"),
        ({"stride": 0}, r"needs positive steps; got stride 0"),
        ({"dilation": -1}, r"needs positive steps"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    refused(changes, message)


def test_refuses_outputs_of_another_layout_and_those_that_overlap() -> None:
    given = arguments()
    with pytest.raises(ExecutionError, match="needs out channels-last"):
        KERNEL.launch(*given.values(), out=torch.zeros(2, 8, 9, 7))
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps x"):
        KERNEL.launch(*given.values(), out=given["x"])


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = {"batch": 2, "channels": 5, "height": 4, "width": 6, "kernel": 3, "norm": False}
    assert KERNEL.cost("float32", **plain).flops == 2 * 5 * 24 * 18
    assert KERNEL.cost("float32", **plain).traffic_bytes == 4 * (2 * 240 + 45)
    more = KERNEL.cost("bfloat16", **(plain | {"norm": True, "bias": True, "activation": "silu"}))
    assert more.flops == 240 * (18 + 2 + 1 + 1)
    assert more.traffic_bytes == 2 * (2 * 240 + 45 + 5 * 5)
    assert KERNEL.cost("float32", **plain, stride=2).flops == 2 * 5 * (2 * 3) * 18
    assert KERNEL.cost("float32", **plain, padding=0).flops == 2 * 5 * (2 * 4) * 18


@pytest.mark.parametrize("more", [{}, {"stride": 2, "kernel": 5}, {"dilation": 2, "padding": 1}, {"kernel": 2}])
def test_cost_counts_the_pixels_that_are_computed(more: dict[str, int]) -> None:
    given = arguments(torch.float32, **{key: value for key, value in more.items() if key != "padding"})
    given["padding"] = more.get("padding", given["padding"])
    (out,) = KERNEL.allocate(*given.values())
    sizes = SIZES | more | {"norm": False}
    assert KERNEL.cost("float32", **sizes).flops == out.numel() * 2 * more.get("kernel", 3) ** 2


def test_reference_is_torch_s_in_float64() -> None:
    given = arguments(bias=True, activation="gelu", kernel=5, stride=2)
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in given.values()]
    torch.testing.assert_close(KERNEL.reference(*given.values())[0].double(), KERNEL.eager(*wide), rtol=1e-5, atol=1e-5)


def test_the_operator_gives_channels_last_without_a_gpu() -> None:
    out = KERNEL(*arguments(torch.bfloat16).values())
    assert out.is_contiguous(memory_format=LAST)
    assert out.dtype == torch.bfloat16


def test_a_repacked_filter_is_the_same_filter() -> None:
    weight = torch.randn(6, 1, 3, 5)
    packed = channels_inside(weight)
    assert torch.equal(packed, weight)
    assert packed.stride(0) == 1


class Block(nn.Module):
    """A convolution, a normalisation with statistics of its own, an activation."""

    def __init__(self, activation: nn.Module, *, norm: bool = True, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        options = {"kernel_size": 3, "padding": 1, "groups": 8, "bias": not norm} | more
        self.conv = nn.Conv2d(8, 8, **options)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        for tensor in self.norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's result."""
        out: torch.Tensor = self.activation(self.norm(self.conv(x)))
        return out


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(7)).to(dtype, memory_format=LAST)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2": lambda: Block(nn.ReLU6(inplace=False), stride=2),
    "MobileNetV3": lambda: Block(nn.Hardswish(), kernel_size=5, padding=2),
    "EfficientNet": lambda: Block(nn.SiLU()),
    "ReLU": lambda: Block(nn.ReLU()),
    "dilated": lambda: Block(nn.GELU(), dilation=2, padding=2),
    "normalisation alone": lambda: Block(nn.Identity()),
    "ConvNeXt": lambda: Block(nn.Identity(), norm=False, kernel_size=7, padding=3),
}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BLOCKS)
def test_matches_blocks_of_models(name: str, dtype: torch.dtype, decomposed: bool) -> None:
    block = BLOCKS[name]().eval().to(dtype)
    tolerance = TOLERANCE[dtype]
    graph = check_fusion(KERNEL, block, [image(dtype)], rtol=tolerance, atol=tolerance, decomposed=decomposed)
    assert len(graph.ops) == 1


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["whole", "folded", "scale"])
def test_matches_its_own_eager_spelling(kind: str, dtype: torch.dtype, decomposed: bool) -> None:
    given = arguments(dtype, bias=True, activation="silu")
    absent = {"whole": (), "folded": ("mean", "variance"), "scale": ("mean", "variance", "beta", "bias")}[kind]
    given |= dict.fromkeys(absent)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}

    def function(*values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = KERNEL.eager(**(given | dict(zip(tensors, values, strict=True))))
        return out

    tolerance = TOLERANCE[dtype]
    inputs = list(tensors.values())
    graph = check_fusion(KERNEL, function, inputs, rtol=tolerance, atol=tolerance, decomposed=decomposed)
    assert len(graph.ops) == 1


def test_what_somebody_else_reads_stays() -> None:
    """The normalised sum is returned, too: the launch computes it, and the activation stays."""
    block = Block(nn.SiLU()).eval()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normal = block.norm(block.conv(x))
        return normal, functional.silu(normal)

    graph = check_fusion(KERNEL, function, [image()], rtol=1e-5, atol=1e-5)
    assert [op.target for op in graph.ops] == ["opweave.depthwise_conv.default", "aten.silu.default"]


def matched(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> int:
    return len(check_matches(KERNEL, exported(function, inputs, decomposed=False).graph))


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},  # two channels a group
        {"stride": (1, 2)},
        {"padding": (1, 0)},
        {"dilation": (2, 1)},
        {"kernel_size": (3, 1)},
        {"kernel_size": 13, "padding": 6},
        {"padding": "same"},
    ],
)
def test_leaves_other_convolutions(options: dict[str, Any]) -> None:
    assert matched(Block(nn.SiLU(), **options).eval(), image()) == 0


def test_leaves_images_with_channels_first() -> None:
    assert matched(Block(nn.SiLU()).eval(), image()) == 1
    assert matched(Block(nn.SiLU()).eval(), image().contiguous()) == 0


def test_leaves_several_filters_for_a_channel() -> None:
    weight = torch.randn(16, 1, 3, 3)
    assert matched(lambda x: functional.conv2d(x, weight.to(x.device), padding=1, groups=8), image()) == 0


def test_leaves_a_normalisation_of_the_batch() -> None:
    """Only the convolution alone is computed: what follows takes its statistics from the batch."""
    found = check_matches(KERNEL, exported(Block(nn.SiLU()).train(), [image()], decomposed=False).graph)
    assert [len(match.ops) for match in found] in ([], [1])


@pytest.mark.parametrize("shape", [(7,), (9, 1), (1, 9, 7), (2, 8, 1, 1), ()])
@pytest.mark.parametrize("operation", [torch.mul, torch.add])
def test_leaves_factors_and_terms_that_are_not_of_channels(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    conv = Block(nn.Identity(), norm=False)
    program = exported(lambda x, y: operation(conv(x), y), [image(), torch.randn(shape)], decomposed=False)
    (match,) = check_matches(KERNEL, program.graph)
    assert len(match.ops) == 1


def test_leaves_a_vector_over_the_width_that_is_as_long_as_there_are_channels() -> None:
    conv = Block(nn.Identity(), norm=False)
    square = torch.randn(2, 8, 8, 8).to(memory_format=LAST)
    program = exported(lambda x, y: conv(x) * y, [square, torch.randn(8)], decomposed=False)
    (match,) = check_matches(KERNEL, program.graph)
    assert len(match.ops) == 1


@pytest.mark.parametrize("decomposed", [False, True])
def test_matches_what_follows_another_block(decomposed: bool) -> None:
    """Decomposed, the image is a float32 result that was rounded: the launch reads it rounded."""
    chain = nn.Sequential(Block(nn.SiLU()), nn.Conv2d(8, 8, 1), Block(nn.SiLU())).eval().to(torch.bfloat16)
    check_fusion(KERNEL, chain, [image(torch.bfloat16)], rtol=0.05, atol=0.05, decomposed=decomposed, count=2)
