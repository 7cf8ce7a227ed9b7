"""What ``kernels/rope_cache.py`` does besides numerics: refusals, cost, which slots it writes, matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.rope_cache import KERNEL, cost, launch
from tests.kernels.matching import check_fusion, check_matches, exported


def given(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return KERNEL.arguments(dtype, tokens=6, heads=4, kv_heads=2, dim=8, context=16, page_size=4, **more)


@pytest.mark.parametrize("more", [{}, {"interleaved": True}, {"rotary_dim": 4}])
def test_reference_is_eager_code(more: Mapping[str, Any]) -> None:
    inputs = given(**more)
    results = KERNEL.reference(*inputs.values())
    torch.testing.assert_close(results, KERNEL.eager(*inputs.values()))  # which writes its caches
    torch.testing.assert_close(results[1:], (inputs["key_cache"], inputs["value_cache"]))


def test_writes_no_slot_outside_and_wraps_only_if_told_to() -> None:
    inputs = given()
    last = inputs["key_cache"].shape[0] * 4 - 1
    inputs["slots"] = torch.tensor([-1, last + 1, 2**40, -(2**40), -last - 2, 3])
    before = {name: inputs[name].flatten(0, 1).clone() for name in ("key_cache", "value_cache")}
    for wrap, written in ((False, {3}), (True, {3, last})):
        _, *caches = KERNEL(*(inputs | {"wrap": wrap}).values())
        for cache, old in zip(caches, before.values(), strict=True):
            changed = (cache.flatten(0, 1) != old).any(-1).any(-1)
            assert set(changed.nonzero()[:, 0].tolist()) == written
    assert all(torch.equal(inputs[name].flatten(0, 1), old) for name, old in before.items())  # the operator copies


def test_the_operator_that_writes_stores_in_place() -> None:
    inputs = given(torch.bfloat16)
    _, keys, values = KERNEL(*inputs.values())
    q_out = torch.empty(6, 4, 8, dtype=torch.bfloat16)
    KERNEL.out_operator(*inputs.values(), q_out)
    assert torch.equal(inputs["key_cache"], keys)
    assert torch.equal(inputs["value_cache"], values)
    assert torch.equal(values.flatten(0, 1)[inputs["slots"]], inputs["v"])


def test_cost_is_what_was_counted_by_hand() -> None:
    sizes: dict[str, Any] = {"tokens": 3, "heads": 4, "kv_heads": 2, "dim": 8}
    assert cost("float32", **sizes).flops == 3 * 6 * 4 * 6
    assert cost("float32", **sizes, rotary_dim=4).flops == 3 * 6 * 2 * 6
    assert cost("bfloat16", **sizes).traffic_bytes == 3 * (2 * 2 * (4 + 2 + 2) * 8 + 4 * 8 + 8 + 8)
    assert cost("bfloat16", **sizes, table_bytes=7).traffic_bytes == 3 * (2 * 2 * 8 * 8 + 8) + 7


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "a batch": ({"q": torch.zeros(1, 6, 4, 8)}, r"needs q \[any, any, any\]"),
        "other values": ({"v": torch.zeros(6, 3, 8)}, r"needs v \[6, 2, 8\]"),
        "narrow values": ({"v": torch.zeros(6, 2, 8, dtype=torch.float16)}, r"needs v \[6, any, 8\] of float32"),
        "strided values": ({"v": torch.zeros(6, 2, 16)[..., ::2]}, r"elements of each head of v side by side"),
        "short slots": ({"slots": torch.zeros(5, dtype=torch.int64)}, r"needs slots \[6\] of int64"),
        "narrow slots": ({"slots": torch.zeros(6, dtype=torch.int32)}, r"needs slots \[6\] of int64"),
        "narrow cache": (
            {"key_cache": torch.zeros(5, 4, 2, 8, dtype=torch.float16)},
            r"needs key_cache \[any, any, 2, 8\] of float32",
        ),
        "heads first": ({"key_cache": torch.zeros(5, 2, 4, 8)}, r"needs key_cache \[any, any, 2, 8\]"),
        "unequal caches": ({"value_cache": torch.zeros(8, 4, 2, 8)}, r"needs value_cache \[5, 4, 2, 8\]"),
        "empty pages": (dict.fromkeys(("key_cache", "value_cache"), torch.zeros(5, 0, 2, 8)), r"at least one token"),
        "strided cache": ({"value_cache": torch.zeros(5, 4, 2, 16)[..., ::2]}, r"head of value_cache side by side"),
        "no positions": ({"positions": None}, r"needs positions, or 6 rows of cos; got 16"),
        "short positions": ({"positions": torch.zeros(5, dtype=torch.int64)}, r"needs positions \[6\]"),
        "other tables": ({"rotary_dim": 6}, r"needs 3 or 6 columns of cos; got 4"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    inputs = {**given(), **changed}
    for refusing in (
        lambda: KERNEL.allocate(*inputs.values()),
        lambda: launch(**inputs, q_out=torch.zeros(6, 4, 8)),
    ):
        with pytest.raises(ExecutionError, match=message):
            refusing()


def test_refuses_what_is_written_to_overlap() -> None:
    inputs, q_out = given(), torch.zeros(6, 4, 8)
    for changed, message in (
        ({"value_cache": inputs["key_cache"]}, "needs key_cache in memory of its own; it overlaps value_cache"),
        ({"v": inputs["key_cache"].flatten(0, 1)[:6]}, "needs key_cache in memory of its own; it overlaps v"),
        ({"q_out": inputs["value_cache"].flatten()[:192].view(6, 4, 8)}, "needs .* in memory of its own"),
    ):
        with pytest.raises(ExecutionError, match=message):
            launch(**{**inputs, "q_out": q_out, **changed})


def test_takes_caches_that_alternate_page_by_page() -> None:
    """They are taken as far as a device: the next thing refused is that there is none."""
    both = torch.zeros(5, 2, 4, 2, 8)
    inputs = given() | {"key_cache": both[:, 0], "value_cache": both[:, 1]}
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device; they are on cpu"):
        launch(**inputs, q_out=torch.zeros(6, 4, 8))


def tensors_and_rest(inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[Any]]:
    values = list(inputs.values())
    return [v for v in values if isinstance(v, torch.Tensor)], [v for v in values if not isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize(
    ("dtype", "more"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"interleaved": True, "rotary_dim": 4})],
)
def test_matches_its_eager_code(dtype: torch.dtype, more: Mapping[str, Any], decomposed: bool) -> None:
    tensors, rest = tensors_and_rest(given(dtype, **more))
    tensors[6] = torch.tensor([5, -1, 0, 17, -20 + 7, 9])  # slots, some from the end
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    graph = check_fusion(
        KERNEL, lambda *t: KERNEL.eager(*t, *rest), tensors, rtol=tolerance, atol=tolerance, decomposed=decomposed
    )
    (launched,) = (op for op in graph.ops if op.target == "opweave.rope_cache.default")
    assert launched.body.endswith("True)")  # negative slots wrap, as they do in ``index_put``
    assert len(graph.ops) == (3 if decomposed else 1)  # decomposed, caches are copied back


def test_matches_each_layer_with_its_own_cache() -> None:
    tensors, rest = tensors_and_rest(given())
    more = [torch.zeros_like(tensors[7]) for _ in range(2)]

    def two_layers(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, _, _ = KERNEL.eager(*t[:9], *rest)
        second, _, _ = KERNEL.eager(first + 1, t[1] + 1, t[2] + 1, *t[3:7], *t[9:], *rest)
        return first, second, *t[7:]

    check_fusion(KERNEL, two_layers, [*tensors, *more], rtol=1e-5, atol=1e-5, count=2)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def stored(
    *, size: int = 4, row_size: int = 4, accumulate: bool = False, turn: bool = True, other: int = 0
) -> Callable[..., Any]:
    """Rotates, and stores; each argument changes one thing."""

    def function(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor,
        keys: torch.Tensor, values: torch.Tensor,
    ) -> Any:  # fmt: skip
        key = rotated(k, cos, sin) if turn else k + 1
        keys.index_put_((slots // size, slots % row_size), key, accumulate)
        slots = slots + other if other else slots
        values.index_put_((slots // 4, slots % 4), v)
        return rotated(q, cos, sin), keys, values

    return function


TENSORS = (*(torch.zeros(6, n, m) for n, m in ((4, 8), (2, 8), (2, 8), (1, 4), (1, 4))), torch.arange(6),
           torch.zeros(3, 4, 2, 8), torch.ones(3, 4, 2, 8))  # fmt: skip


def changed(place: int, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*TENSORS[:place], tensor, *TENSORS[place + 1 :])


NOT_MATCHED: Mapping[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = MappingProxyType(
    {
        "pages of another size": (stored(size=2, row_size=2), TENSORS),
        "rows of another size": (stored(row_size=3), TENSORS),
        "added": (stored(accumulate=True), TENSORS),
        "keys as they are": (stored(turn=False), TENSORS),
        "values elsewhere": (stored(other=1), TENSORS),
        "narrow slots": (stored(), changed(5, torch.arange(6, dtype=torch.int32))),
        "one token's values for all": (stored(), changed(2, torch.zeros(1, 2, 8))),
        "one head's values for all": (stored(), changed(2, torch.zeros(6, 1, 8))),
        "other queries": (stored(), changed(0, torch.zeros(1, 4, 8))),
    }
)


def test_matches_what_the_next_test_changes() -> None:
    assert len(check_matches(KERNEL, exported(stored(), TENSORS, decomposed=False).graph)) == 1


@pytest.mark.parametrize("case", NOT_MATCHED)
def test_leaves_other_things_alone(case: str) -> None:
    function, tensors = NOT_MATCHED[case]
    assert not check_matches(KERNEL, exported(function, tensors, decomposed=False).graph)
