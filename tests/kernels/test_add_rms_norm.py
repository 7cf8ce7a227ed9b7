"""What ``kernels/add_rms_norm.py`` does besides numerics: refusals, cost, machine code, and the GPU if there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from torch._subclasses.fake_tensor import FakeTensorMode

from opweave.errors import ExecutionError
from opweave.kernels.add_rms_norm import (
    CONFIGS,
    WIDE_ROWS,
    Config,
    add_rms_norm_kernel,
    config_for,
    cost,
    launch,
    operator,
    reference,
)
from tests.kernels.add_rms_norm_cases import SHAPES, TOLERANCE, check, operands
from tests.kernels.offline import compile_for_hopper, resources


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference_is_torch_s_rms_norm_of_the_sum(dtype: torch.dtype) -> None:
    x, residual, weight = operands(5, 67, dtype=dtype, weight_dtype=dtype)
    hidden, out = reference(x, residual, weight, 1e-5)
    assert torch.equal(hidden, x + residual)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(hidden, (67,), weight, 1e-5), rtol=rtol, atol=atol)


def test_cost_is_what_was_counted_by_hand() -> None:
    assert cost(1, 1, "float32").flops == 7
    assert cost(2, 3, "float32").flops == 2 * (3 + 3 + 2 + 1 + 1 + 1 + 3 + 3)
    assert cost(2, 3, "bfloat16").traffic_bytes == 2 * (4 * 6 + 3)
    assert cost(2, 3, "bfloat16", "float32").traffic_bytes == 2 * 4 * 6 + 4 * 3
    assert cost(0, 8, "float16").flops == 0


def test_configurations_cover_every_row() -> None:
    assert [config.block for config in CONFIGS] == sorted({config.block for config in CONFIGS})
    assert config_for(1) is CONFIGS[0]
    assert config_for(257) is CONFIGS[1]
    assert config_for(CONFIGS[-1].block) is CONFIGS[-1]
    assert config_for(CONFIGS[-1].block + 1) is WIDE_ROWS


def arguments() -> dict[str, torch.Tensor]:
    return {**dict.fromkeys(("x", "residual"), torch.zeros(2, 8)), "weight": torch.zeros(8)} | {
        name: torch.zeros(2, 8) for name in ("hidden", "out")
    }


REFUSED: Mapping[str, tuple[dict[str, torch.Tensor], str]] = MappingProxyType(
    {
        "broadcast": ({"residual": torch.zeros(8)}, r"needs residual \[2, 8\].*got \[8\]"),
        "weight of another size": ({"weight": torch.zeros(4)}, r"needs weight \[8\]"),
        "mixed dtypes": ({"out": torch.zeros(2, 8, dtype=torch.float16)}, r"needs out .*float32.*got .*float16"),
        "float64": ({"x": torch.zeros(2, 8, dtype=torch.float64)}, r"of float32, float16, bfloat16; got .*float64"),
        "no dimension": ({"x": torch.zeros(())}, r"got 0 dimensions"),
        "another device": ({"residual": torch.zeros(2, 8, device="meta")}, r"on cpu; got .* on meta"),
        "columns first": ({"x": torch.zeros(8, 2).t()}, r"row-major tensors; x \[2, 8\] has strides \[1, 2\]"),
        "strided output": ({"out": torch.zeros(2, 16)[:, ::2]}, r"row-major tensors; out"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    tensors = {**arguments(), **changed}
    with pytest.raises(ExecutionError, match=message):
        launch(**tensors, epsilon=1e-6)


@pytest.mark.parametrize(("output", "other"), [("hidden", "x"), ("out", "residual"), ("out", "hidden")])
def test_refuses_outputs_that_share_memory(output: str, other: str) -> None:
    memory = torch.zeros(3, 8)
    tensors = {**arguments(), output: memory[:2], other: memory[1:]}
    with pytest.raises(ExecutionError, match=rf"needs (hidden|out) in memory of its own; it overlaps {other}|{output}"):
        launch(**tensors, epsilon=1e-6)


def test_outputs_may_be_neighbours() -> None:
    """Regions that touch do not overlap: planned arenas have no gaps. Without a device, that is the next refusal."""
    memory = torch.zeros(4, 8)
    tensors = {**arguments(), "hidden": memory[:2], "out": memory[2:]}
    with pytest.raises(ExecutionError, match=r"needs tensors on a CUDA device; they are on cpu"):
        launch(**tensors, epsilon=1e-6)


def test_the_operator_s_fake_checks_shapes() -> None:
    """A compiled graph is refused when it is traced, not when it runs; valid shapes give nothing and launch nothing."""
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in arguments().values()]
        x, residual, weight, hidden, out = tensors
        operator(x, residual, weight, 1e-6, hidden, out)
        with pytest.raises(ExecutionError, match="needs out"):
            operator(x, residual, weight, 1e-6, hidden, weight)


TRITON_TYPE: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
)


def types(dtype: torch.dtype) -> dict[str, str]:
    """Triton's types of the kernel's arguments that are not constants."""
    pointers = ("x_pointer", "residual_pointer", "weight_pointer", "hidden_pointer", "out_pointer")
    return {**dict.fromkeys(pointers, f"*{TRITON_TYPE[dtype]}"), "epsilon": "fp32"}


def rows_of(config: Config) -> tuple[int, int]:
    """Columns with vector and with scalar access that ``config_for`` gives this configuration."""
    return (81920, 16411) if config is WIDE_ROWS else (config.block, config.block - 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", [*CONFIGS, WIDE_ROWS], ids=str)
def test_compiles_for_hopper_without_spills(config: Config, dtype: torch.dtype) -> None:
    """No GPU is needed: Triton ships the assembler. 232448 bytes are what one program may have of shared memory."""
    for columns in rows_of(config):
        assert config_for(columns) is config
        constants = {"columns": columns, "block": config.block}
        compiled = compile_for_hopper(add_rms_norm_kernel, types(dtype), constants, num_warps=config.num_warps)
        assert ".target sm_90a" in compiled.asm["ptx"]
        used = resources(compiled)
        assert (used.stack_bytes, used.spills) == (0, 0), used
        assert used.registers * 32 * config.num_warps <= 65536, used
        assert used.shared_bytes <= 232448, used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 5 * CONFIGS[-1].block])
def test_computes_in_float32_with_wide_offsets(columns: int, dtype: torch.dtype) -> None:
    """No arithmetic in a narrow dtype, and a row's offset is 64 bits wide: matrices exceed 2**31 elements."""
    config = config_for(columns)
    constants = {"columns": columns, "block": config.block}
    code = compile_for_hopper(add_rms_norm_kernel, types(dtype), constants, num_warps=config.num_warps).asm["ttir"]
    arithmetic = re.findall(r"(?:arith\.(?:add|sub|mul|div)f|math\.\w+) .* : (\S+)", code)
    assert arithmetic
    assert all("f32" in kind for kind in arithmetic)
    assert re.search(r"arith\.muli .* : i64", code)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096), (64, 50000)])
def test_runs_on_the_device(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*shape, dtype=dtype, weight_dtype=dtype, device="cuda")
