"""What ``kernels/w4a16_linear.py`` does besides numerics: refusals, cost, packing, its reference, layers made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError, OptionError
from opweave.kernels.quantized import QuantizedLinear, quantized_linear
from opweave.kernels.w4a16_linear import KERNEL, pack, pack_integers, unpack

SIZES = {"rows": 6, "depth": 96, "columns": 10, "group": 32}
HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(6, 96)}, r"needs x \[any, any\] of float16, bfloat16"),
        ({"x": torch.zeros(6, 0, dtype=HALF)}, r"needs at least one input feature"),
        ({"packed": torch.zeros(10, 12, dtype=torch.int32)}, r"needs packed \[any, 32\]"),
        ({"packed": torch.zeros(10, 32, dtype=torch.int64)}, r"needs packed .* of int32"),
        ({"packed": torch.zeros(10, 64, dtype=torch.int32)[:, ::2]}, r"needs packed row-major"),
        ({"group": 48}, r"needs a group of 32, 64, 128, \.\.\. weights, or all 96 in one; got 48"),
        ({"scales": torch.zeros(2, 10, dtype=HALF)}, r"needs scales \[3, 10\]"),
        ({"scales": torch.zeros(3, 10)}, r"needs scales .* of float16, bfloat16"),
        ({"zeros": torch.zeros(2, 10, dtype=torch.uint8)}, r"needs zeros \[3, 10\]"),
        ({"zeros": torch.zeros(3, 10)}, r"needs zeros .* of uint8"),
        ({"bias": torch.zeros(9)}, r"needs bias \[10\]"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*(KERNEL.arguments(HALF, **SIZES) | changes).values())


def test_refuses_scratch_of_another_shape() -> None:
    given = KERNEL.arguments(HALF, **SIZES)
    out, partial = KERNEL.allocate(*given.values())
    with pytest.raises(ExecutionError, match=r"needs partial \[any, 6, 10\]"):
        KERNEL.launch(*given.values(), out=out, partial=partial[:, :3])


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("bfloat16", rows=3, depth=100, columns=5, group=100)
    assert plain.flops == 2 * 3 * 100 * 5
    assert plain.traffic_bytes == 2 * (300 + 15 + 5) + 5 * 128
    more = KERNEL.cost("bfloat16", rows=3, depth=300, columns=5, group=32, asymmetric=True, bias=True)
    assert more.flops == 2 * 3 * 300 * 5 + 15
    assert more.traffic_bytes == 2 * (900 + 15 + 5) + 5 * (2 * 128 + 10 * 3)


@pytest.mark.parametrize("depth", [1, 32, 255, 256, 257, 600])
def test_unpacks_what_was_packed(depth: int) -> None:
    integers = torch.randint(0, 16, (7, depth), generator=torch.Generator().manual_seed(depth))
    packed = pack_integers(integers)
    assert packed.dtype == torch.int32
    assert packed.shape == (7, -(-depth // 256) * 32)
    assert torch.equal(unpack(packed, depth).long(), integers)


def test_nibbles_lie_where_the_layout_says() -> None:
    integers = torch.zeros(1, 512, dtype=torch.uint8)
    integers[0, 256 + 3 * 32 + 5] = 9
    packed = pack_integers(integers)
    assert packed[0, 32 + 5] == 9 << 12
    assert int(packed.count_nonzero()) == 1


def test_higher_bits_are_dropped() -> None:
    assert torch.equal(pack_integers(torch.full((1, 256), 0x73)), pack_integers(torch.full((1, 256), 3)))


@pytest.mark.parametrize("group", [32, 64, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantising_is_as_near_as_scales_allow(group: int, symmetric: bool) -> None:
    weight = torch.randn(10, 100, generator=torch.Generator().manual_seed(1)).to(HALF)
    weight[3] = 0
    weight[4] = weight[4].abs() + 1
    packed, scales, zeros = pack(weight, group, symmetric=symmetric)
    of_group = torch.arange(100) // group
    spread = scales.float()[of_group].t()
    zero = 8.0 if zeros is None else zeros.float()[of_group].t()
    error = ((unpack(packed, 100) - zero) * spread - weight.float()).abs()
    assert bool((error <= spread + 1e-6).all())  # half a step for the weight, and half for the zero point
    assert (zeros is None) == symmetric


@pytest.mark.parametrize("zeros", [False, True])
def test_reference_is_a_layer_with_the_dequantised_weight(zeros: bool) -> None:
    given = KERNEL.arguments(HALF, **SIZES, asymmetric=zeros, bias=True)
    (out,) = KERNEL.reference(*given.values())
    torch.testing.assert_close(out, KERNEL.eager(*given.values()), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "tolerance"),
    [(4, 32, True, 0.1), (4, 64, False, 0.1), (4, None, True, 0.15), (8, 64, True, 0.01), (8, None, True, 0.01)],
)
def test_a_quantised_layer_stands_for_a_float_one(
    bits: int, group: int | None, symmetric: bool, tolerance: float
) -> None:
    torch.manual_seed(3)
    plain = nn.Linear(256, 40).to(HALF)
    layer = quantized_linear(plain, bits, group, symmetric=symmetric)
    x = torch.randn(2, 5, 256).to(HALF)
    wanted, given = plain(x).double(), layer(x).double()
    assert given.shape == wanted.shape
    assert (given - wanted).norm() <= tolerance * wanted.norm()
    assert (given - wanted).norm() > 0


def test_layers_are_exported_and_saved() -> None:
    torch.manual_seed(3)
    up, down = nn.Linear(64, 48, bias=False).to(HALF), nn.Linear(48, 8).to(HALF)
    model = nn.Sequential(quantized_linear(up, 4, 32, symmetric=False), nn.SiLU(), quantized_linear(down, 8))
    x = torch.randn(3, 64).to(HALF)
    program = torch.export.export(model, (x,), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["opweave.w4a16_linear.default", "aten.silu.default", "opweave.w8a16_linear.default"]
    assert torch.equal(program.module()(x), model(x))
    assert {"0.weight", "0.scales", "0.zeros", "2.weight", "2.scales", "2.bias"} == set(model.state_dict())
    assert "in_features=64, out_features=48, bias=False, bits=4, group=32" in repr(model[0])


def test_layers_may_be_of_integers_found_elsewhere() -> None:
    integers = torch.randint(0, 16, (8, 64))
    layer = QuantizedLinear(pack_integers(integers), torch.ones(1, 8, dtype=HALF), None, None, 64, 4, 64)
    assert torch.equal(layer(torch.eye(64, dtype=HALF)), (integers.t() - 8).to(HALF))


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "message"),
    [(3, 32, True, "got 3 bits"), (8, 32, False, "got 8 bits with zero points"), (4, 48, True, "got 48")],
)
def test_layers_have_what_kernels_take(bits: int, group: int, symmetric: bool, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quantized_linear(nn.Linear(96, 4), bits, group, symmetric=symmetric)


def test_nothing_is_matched() -> None:
    from tests.kernels.matching import check_matches, exported

    given = KERNEL.arguments(HALF, **SIZES)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    program = exported(
        lambda x, packed, scales: KERNEL.eager(x, packed, scales, None, None, 32), tensors, decomposed=False
    )
    assert check_matches(KERNEL, program.graph) == ()
