"""What ``all_gather_linear`` and ``linear_reduce_scatter`` do besides numerics, of a rank and of all together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

import torch

from opweave.errors import ExecutionError
from opweave.kernels import all_gather_linear, linear_reduce_scatter
from opweave.kernels._configs import Config
from opweave.kernels._kernel import Kernel
from opweave.kernels.bench import offline
from opweave.kernels.bench.offline import compiled

GATHER, SCATTER = all_gather_linear.KERNEL, linear_reduce_scatter.KERNEL
SIZES = {"peers": 2, "rows": 3, "depth": 8, "columns": 5}


def given(kernel: Kernel) -> dict[str, Any]:
    inputs = kernel.arguments(torch.float32, **SIZES)
    return {**inputs, **dict(zip(kernel.written, kernel.allocate(*inputs.values()), strict=True))}


def test_costs_are_what_was_counted_by_hand() -> None:
    assert GATHER.cost("bfloat16", 2, 3, 5, 7).flops == 2 * 6 * 5 * 7
    assert GATHER.cost("bfloat16", 2, 3, 5, 7).traffic_bytes == 2 * (6 * 5 + 5 * 7 + 6 * 7)
    assert SCATTER.cost("float32", 2, 3, 5, 7).flops == 2 * (6 * 7 * 10) + 6 * 7
    assert SCATTER.cost("float32", 2, 3, 5, 7).traffic_bytes == 4 * (2 * (30 + 35 + 2 * 42) + 42)


@pytest.mark.parametrize("dtype", GATHER.dtypes)
@pytest.mark.parametrize("kernel", [GATHER, SCATTER], ids=lambda kernel: str(kernel.name))
def test_reference_is_what_eager_says(kernel: Kernel, dtype: torch.dtype) -> None:
    inputs = kernel.arguments(dtype, **SIZES)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2.0**-6, 2.0**-6)
    torch.testing.assert_close(
        kernel.reference(*inputs.values())[0], kernel.eager(*inputs.values()), rtol=rtol, atol=atol
    )


def test_both_are_one_multiplication_split_in_two_ways() -> None:
    """Rows gathered for a part of the columns; then that part of the depth scattered again."""
    random = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*shape, generator=random) for shape in ((6, 8), (8, 4), (4, 5)))
    halves = torch.stack([GATHER(x.view(2, 3, 8), part, 0, 4) for part in up.chunk(2, 1)])
    out = SCATTER(halves, torch.stack(down.chunk(2)), 4)
    torch.testing.assert_close(out.view(6, 5), x @ up @ down)


REFUSED: Mapping[str, tuple[Kernel, dict[str, Any], str]] = MappingProxyType(
    {
        "weight of another depth": (
            GATHER,
            {"weight": torch.zeros(4, 5)},
            r"needs weight \[8, any\] of float32 on cpu",
        ),
        "columns first": (GATHER, {"x": torch.zeros(2, 8, 3).mT}, r"needs x row-major"),
        "no such rank": (GATHER, {"rank": 2}, r"needs a rank of the 2 that x is of; got 2"),
        "no program": (GATHER, {"programs": 0}, r"needs at least one program; got 0"),
        "wide out": (GATHER, {"out": torch.zeros(6, 6)}, r"needs out \[6, 5\]"),
        "short table": (GATHER, {"addresses": torch.zeros(2, dtype=torch.int64)}, r"needs addresses \[4\] of int64"),
        "another device": (GATHER, {}, r"needs tensors on a CUDA device; they are on cpu"),
        "rows left over": (SCATTER, {"x": torch.zeros(2, 5, 8)}, r"as many rows for each of 2 ranks; got 5"),
        "a weight too few": (SCATTER, {"weight": torch.zeros(1, 8, 5)}, r"needs weight \[2, 8, any\]"),
        "no programs": (SCATTER, {"programs": 0}, r"needs at least one program; got 0"),
        "other staging": (SCATTER, {"staging": torch.zeros(2, 3, 5)}, r"needs staging \[2, 2, 3, 5\]"),
        "a device without": (SCATTER, {}, r"needs tensors on a CUDA device; they are on cpu"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    kernel, changed, message = REFUSED[case]
    with pytest.raises(ExecutionError, match=message):
        kernel.launch(**given(kernel) | changed)


def test_refuses_outputs_that_share_memory() -> None:
    inputs = given(SCATTER)
    with pytest.raises(ExecutionError, match=r"needs out in memory of its own; it overlaps staging"):
        SCATTER.launch(**inputs | {"out": inputs["staging"][0]})
    inputs = given(GATHER)
    with pytest.raises(ExecutionError, match=r"needs out in memory of its own; it overlaps x"):
        GATHER.launch(**inputs | {"out": inputs["x"].view(-1)[:30].view(6, 5)})


def test_reads_and_sends_vectors_by_address() -> None:
    """An address in a table tells nothing of its alignment: what is promised must reach the loads and stores."""
    sizes = {"peers": 8, "rows": 256, "depth": 1024, "columns": 1024}
    config = Config({"block_m": 64, "block_n": 64, "block_k": 64, "group_m": 8}, num_warps=4, num_stages=3)
    for kernel, text in ((GATHER, "cp.async.cg.shared.global"), (SCATTER, "st.global.v4")):
        made = [m for m in compiled(kernel, sizes, torch.bfloat16, config) if kernel.name in m.metadata.name]
        assert text in made[0].asm["ptx"]


def test_waiting_orders_what_is_read_behind_it() -> None:
    """Flags are read with acquire semantics at the scope of the system: other devices write them."""
    addresses, flags = (torch.empty(8, dtype=dtype, device="meta") for dtype in (torch.int64, torch.int32))
    weight, out = (torch.empty(*shape, dtype=torch.float16, device="meta") for shape in ((1024, 64), (1024, 64)))
    with offline._compiling(90) as done:
        all_gather_linear.launch_on_rank(addresses, weight, flags, 3, 1, 132, out=out)
    assert "atomic_rmw add, acquire, sys" in done[0].asm["ttgir"]
    assert re.search(
        r"ld\.global\.sys\.acquire|ld\.acquire\.sys|atom\S*\.acquire\.sys|atom\S*\.sys\S*\.acquire", done[0].asm["ptx"]
    )
