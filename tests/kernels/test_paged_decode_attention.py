"""What ``kernels/paged_decode_attention.py`` does besides numerics: splits, refusals, cost, matches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.compiler.fusion import fused
from opweave.errors import ExecutionError
from opweave.kernels.bench.offline import compiled
from opweave.kernels.paged_decode_attention import KERNEL, choose_splits, cost, launch
from tests.kernels.matching import check_fusion, check_matches, exported, values_of


def given(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    sizes = {"sequences": 3, "heads": 4, "kv_heads": 2, "dim": 16, "tokens": 37, "page_size": 8, **more}
    inputs = KERNEL.arguments(dtype, **sizes)
    if sizes["tokens"] >= 37:
        inputs["lengths"] = torch.tensor([37, 5, 1], dtype=torch.int32)
    return inputs


@pytest.mark.parametrize("more", [{}, {"window": 7}, {"soft_cap": 2.0}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_reference_is_eager_code(more: Mapping[str, Any]) -> None:
    inputs = given(**more)
    (out,) = KERNEL.reference(*inputs.values())
    torch.testing.assert_close(out, KERNEL.eager(*inputs.values()))
    inputs["q"] = inputs["q"][:, :, None]
    torch.testing.assert_close(KERNEL.reference(*inputs.values())[0], out[:, :, None])


def test_a_sequence_without_tokens_is_zeros_and_garbage_is_not_looked_at() -> None:
    inputs = given()
    inputs["lengths"] = torch.tensor([0, -3, 9], dtype=torch.int32)
    inputs["page_table"] = inputs["page_table"].clone()
    inputs["page_table"][:, 2:] = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)[:, None]
    out = KERNEL(*inputs.values())
    assert torch.equal(out[:2], torch.zeros(2, 4, 16))
    assert out[2].isfinite().all()
    assert out[2].any()


def test_splits_fill_the_gpu_and_depend_on_shapes_only() -> None:
    assert choose_splits(8, 255) == 1  # too short to cut
    assert choose_splits(8, 2048) == 7  # one sequence of Llama-3 8B: nearly as many as there are
    assert 28 <= choose_splits(8, 32768) <= 33  # 264 programs at a time
    assert choose_splits(128, 8192) == 2
    assert choose_splits(512, 8192) == 1  # 1.94 waves are nearly two
    assert 100 <= choose_splits(1, 10**6) <= 128
    assert choose_splits(0, 0) == 1
    assert choose_splits(265, 10**5) > 1  # a wave of one program is not worth waiting for
    for programs in range(1, 700, 13):
        splits = choose_splits(programs, 10**6)
        best = max(programs * s / 264 / math.ceil(programs * s / 264) for s in range(1, 129))
        assert programs * splits / 264 / math.ceil(programs * splits / 264) >= 0.85 * best


def test_scratch_is_as_large_as_the_splits_need() -> None:
    shapes = [tuple(tensor.shape) for tensor in KERNEL.allocate(*given(splits=5).values())]
    assert shapes == [(3, 4, 16), (3, 4, 5, 16), (3, 4, 5)]
    shapes = [tuple(tensor.shape) for tensor in KERNEL.allocate(*given(splits=1).values())]
    assert shapes == [(3, 4, 16), (3, 4, 0, 16), (3, 4, 0)]
    many = KERNEL.arguments(torch.bfloat16, "meta", sequences=1, heads=32, kv_heads=8, dim=128, tokens=4096)
    assert KERNEL.allocate(*many.values())[2].shape == (1, 32, 14)
    many["window"] = 512  # what is out of reach is not cut
    assert KERNEL.allocate(*many.values())[2].shape == (1, 32, 2)


def test_cost_is_what_was_counted_by_hand() -> None:
    sizes: dict[str, Any] = {"sequences": 3, "heads": 4, "kv_heads": 2, "dim": 16, "tokens": 37, "page_size": 8}
    assert cost("float32", **sizes).flops == 3 * 4 * 37 * (16 * 2 + 3 + 16 * 2)
    keys_and_values, queries_and_results = 2 * 3 * 2 * 37 * 16, 2 * 3 * 4 * 16
    assert cost("bfloat16", **sizes).traffic_bytes == 2 * (keys_and_values + queries_and_results) + 4 * (3 * 5 + 3)
    assert cost("bfloat16", **sizes, window=5).flops == 3 * 4 * 5 * 67
    assert cost("float32", **sizes | {"tokens": 0}).flops == 0


def test_offsets_into_caches_are_wide() -> None:
    """A cache of 70 GB: pages, sequences and splits are multiplied in 64 bits."""
    sizes = {"sequences": 64, "heads": 64, "kv_heads": 8, "dim": 128, "tokens": 32768, "splits": 2}
    attend, merge = compiled(KERNEL, sizes, torch.bfloat16)
    for made in (attend, merge):
        code = made.asm["ttir"]
        pointers = [line for line in code.splitlines() if "tt.addptr" in line]
        assert any("i64>" in line or line.rstrip().endswith("i64") for line in pointers)
        assert "arith.muli" in code
        assert not any("f16" in line or "bf16" in line for line in code.splitlines() if "arith.mulf" in line)


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "two queries": ({"q": torch.zeros(3, 4, 2, 16)}, r"needs q \[any, any, 1, any\]"),
        "float64": ({"q": torch.zeros(3, 4, 16, dtype=torch.float64)}, r"got .*float64"),
        "mixed dtypes": ({"q": torch.zeros(3, 4, 16, dtype=torch.float16)}, r"needs key_cache .* of float16"),
        "other keys": ({"q": torch.zeros(3, 4, 8)}, r"needs key_cache \[any, any, any, 8\]"),
        "unequal caches": ({"value_cache": torch.zeros(4, 8, 2, 16)}, r"needs value_cache \[16, 8, 2, 16\]"),
        "a group and a half": ({"q": torch.zeros(3, 3, 16)}, r"got 3 heads, 2 of keys"),
        "large heads": (
            {"q": torch.zeros(3, 4, 257)} | dict.fromkeys(("key_cache", "value_cache"), torch.zeros(16, 8, 2, 257)),
            r"takes heads of up to 256 elements; got 257",
        ),
        "strided heads": ({"q": torch.zeros(3, 4, 32)[..., ::2]}, r"last dimension of q side by side"),
        "wide page table": (
            {"page_table": torch.zeros(3, 5, dtype=torch.int64)},
            r"needs page_table \[3, any\] of int32",
        ),
        "short page table": ({"page_table": torch.zeros(2, 5, dtype=torch.int32)}, r"needs page_table \[3, any\]"),
        "columns first": (
            {"page_table": torch.zeros(5, 3, dtype=torch.int32).t()},
            r"dimension of page_table side by side",
        ),
        "wide lengths": ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"needs lengths \[3\] of int32"),
        "negative window": ({"window": -1}, r"needs soft_cap, window and splits of 0 or more"),
        "negative cap": ({"soft_cap": -1.0}, r"got -1.0, 0, 0"),
        "too many splits": ({"splits": 65536}, r"got 0.0, 0, 65536"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    inputs = {**given(), **changed}
    outputs: dict[str, Any] = dict(zip(KERNEL.written, KERNEL.allocate(*given().values()), strict=True))
    for refusing in (lambda: KERNEL.allocate(*inputs.values()), lambda: launch(**inputs, **outputs)):
        with pytest.raises(ExecutionError, match=message):
            refusing()


def test_refuses_wrong_outputs() -> None:
    inputs = given(splits=2)
    outputs = dict(zip(KERNEL.written, KERNEL.allocate(*inputs.values()), strict=True))
    for changed, message in (
        ({"out": inputs["q"]}, "needs out in memory of its own; it overlaps q"),
        ({"partial": outputs["partial"].transpose(0, 1).contiguous().transpose(0, 1)}, "needs partial row-major"),
        ({"log_sum_exp": torch.zeros(3, 4, 3)}, r"needs log_sum_exp \[3, 4, 2\]"),
        ({}, "needs tensors on a CUDA device; they are on cpu"),
    ):
        with pytest.raises(ExecutionError, match=message):
            launch(**inputs, **{**outputs, **changed})


def tensors_and_rest(inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[Any]]:
    values = list(inputs.values())
    return [v for v in values if isinstance(v, torch.Tensor)], [v for v in values if not isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_its_eager_code(dtype: torch.dtype, window: int, decomposed: bool) -> None:
    """Decomposed, the graph cannot be run for itself (``prims.iota`` wants a device); the fused one can."""
    tensors, rest = tensors_and_rest(given(dtype, window=window))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    if not decomposed:
        graph = check_fusion(
            KERNEL, lambda *t: KERNEL.eager(*t, *rest), tensors, rtol=tolerance, atol=tolerance, decomposed=False
        )
    else:
        program = exported(lambda *t: KERNEL.eager(*t, *rest), tensors, decomposed=True)
        graph = fused(program.graph, check_matches(KERNEL, program.graph))
        (out,) = values_of(graph, dict(zip(program.input_names, tensors, strict=True)))
        torch.testing.assert_close(out, KERNEL.eager(*tensors, *rest), rtol=tolerance, atol=tolerance)
    assert [op.target for op in graph.ops] == ["opweave.paged_decode_attention.default"]
    assert graph.ops[0].body.endswith(f"0.25, 0.0, {window}, 0)")


def paged(
    *,
    first: int = 0,
    last: int = 15,
    start: int = 0,
    within: Callable[..., torch.Tensor] = torch.lt,
    recent: Callable[..., torch.Tensor] | None = None,
    **more: Any,
) -> Callable[..., torch.Tensor]:
    """Attention as ``eager`` says it; each argument changes one thing."""

    def function(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, other: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        gathered = [
            cache[pages.clamp(first, last)].flatten(1, 2).transpose(1, 2)
            for cache, pages in ((keys, table), (values, other))
        ]
        count = torch.arange(start, start + gathered[0].shape[2])
        mask = within(count, lengths[:, None])
        mask = mask if recent is None else mask & recent(count, lengths[:, None])
        attention = torch.nn.functional.scaled_dot_product_attention
        key, value = gathered
        return attention(q, key, value, attn_mask=mask[:, None, None], enable_gqa=True, **more)

    return function


TABLE, LENGTHS = torch.zeros(3, 5, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
TENSORS = (torch.zeros(3, 4, 1, 16), torch.zeros(16, 8, 2, 16), torch.ones(16, 8, 2, 16), TABLE, TABLE + 1, LENGTHS)


def call(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, same: bool = True) -> tuple[Any, Any]:
    """With one page table for both, or two."""
    if same:
        return lambda q, k, v, table, lengths: function(q, k, v, table, table, lengths), (*tensors[:4], tensors[5])
    return function, tensors


NOT_MATCHED: Mapping[str, tuple[Any, Any]] = MappingProxyType(
    {
        "two page tables": call(paged(), *TENSORS, same=False),
        "no page behind the last": call(paged(last=14), *TENSORS),
        "not the first page": call(paged(first=1), *TENSORS),
        "a token more": call(paged(within=torch.le), *TENSORS),
        "the others": call(paged(within=torch.ge), *TENSORS),
        "counted from one": call(paged(start=1), *TENSORS),
        "a window without its end": call(paged(recent=lambda c, n: c > n - 4), *TENSORS),
        "two queries": call(paged(), torch.zeros(3, 4, 2, 16), *TENSORS[1:]),
        "long lengths": call(paged(), *TENSORS[:5], LENGTHS.long()),
        "long pages": call(paged(), *TENSORS[:3], TABLE.long(), TABLE.long(), LENGTHS),
        "one length for all": call(paged(), *TENSORS[:5], LENGTHS[:1]),
        "large heads": call(
            paged(), torch.zeros(3, 4, 1, 320), torch.zeros(16, 8, 2, 320), torch.zeros(16, 8, 2, 320), *TENSORS[3:]
        ),
    }
)


def test_matches_what_the_next_test_changes() -> None:
    function, tensors = call(paged(recent=lambda c, n: c >= n - 4, scale=0.5), *TENSORS)
    (found,) = check_matches(KERNEL, exported(function, tensors, decomposed=False).graph)
    assert (found.arguments["window"], found.arguments["scale"]) == (4, 0.5)


@pytest.mark.parametrize("case", NOT_MATCHED)
def test_leaves_other_things_alone(case: str) -> None:
    function, tensors = NOT_MATCHED[case]
    assert not check_matches(KERNEL, exported(function, tensors, decomposed=False).graph)
