"""What ``kernels/rope.py`` does besides numerics: gradients, refusals, cost, layouts, matches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels._rope import dense_strides
from opweave.kernels.rope import KERNEL, cost, launch
from tests.kernels.matching import check_fusion, check_matches, exported

Tensors = tuple[torch.Tensor, ...]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def given(dtype: torch.dtype = torch.float32, *, each: bool = False, **more: Any) -> dict[str, Any]:
    sizes = {"tokens": 6, "heads": 4, "kv_heads": 2, "dim": 8, "context": 16}
    inputs = KERNEL.arguments(dtype, **sizes, **more)
    if each:
        inputs |= {name: torch.cat((inputs[name], inputs[name].flip(-1)), -1) for name in ("cos", "sin")}
    return inputs


@pytest.mark.parametrize(
    ("each", "more"),
    [
        *itertools.product((False, True), ({}, {"rotary_dim": 4}, {"interleaved": True}, {"inverse": True})),
        (True, {"interleaved": True, "rotary_dim": 6, "inverse": True}),
    ],
)
def test_gradients_are_those_of_eager_code(each: bool, more: Mapping[str, Any]) -> None:
    """``inverse`` is the transpose also where both elements of a pair have angles of their own."""
    inputs = given(each=each, **more)
    q, k, *rest = inputs.values()
    results = []
    for function in (KERNEL, KERNEL.eager):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
        outputs = function(*leaves, *rest)
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in leaves]
        results.append(torch.autograd.grad([(o * w).sum() for o, w in zip(outputs, weights, strict=True)], leaves))
    torch.testing.assert_close(results[0], results[1])
    forward = KERNEL(*[torch.linspace(-1, 1, x.numel()).view(x.shape) for x in (q, k)], *rest[:-1], not rest[-1])
    torch.testing.assert_close(results[0], forward)


def test_takes_gradients_that_are_expanded_or_transposed() -> None:
    inputs = given()
    leaves = [inputs[name].detach().clone().requires_grad_() for name in ("q", "k")]
    q_out, k_out = KERNEL(*leaves, *list(inputs.values())[2:])
    grads = torch.autograd.grad(q_out.sum() + (k_out.transpose(0, 2).contiguous() ** 2).sum(), leaves)
    expected_q, _ = KERNEL.reference(torch.ones_like(q_out), k_out.detach(), *list(inputs.values())[2:-1], True)
    torch.testing.assert_close(grads[0], expected_q)
    torch.testing.assert_close(grads[1], 2 * leaves[1].detach())


def test_turns_back_what_it_turned() -> None:
    q, k, *rest = given().values()
    for one, other in zip(KERNEL(*KERNEL(q, k, *rest), *rest[:-1], True), (q, k), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_reference_is_eager_code(interleaved: bool, rotary_dim: int) -> None:
    inputs = given(interleaved=interleaved, rotary_dim=rotary_dim)
    torch.testing.assert_close(KERNEL.reference(*inputs.values()), KERNEL.eager(*inputs.values()))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("rows", ["each", "all", "each gathered", "all gathered"])
def test_reference_is_eager_code_of_batches(rows: str, heads_first: bool) -> None:
    inputs = given(interleaved=False) | {"heads_first": heads_first}
    for name in ("q", "k"):
        x = inputs[name].unflatten(0, (2, 3))
        inputs[name] = x.transpose(1, 2) if heads_first else x
    inputs["positions"] = inputs["positions"].view(2, 3)[: 2 if "each" in rows else 1]
    if "gathered" in rows:
        positions = inputs["positions"].flatten()
        inputs |= {"cos": inputs["cos"][positions], "sin": inputs["sin"][positions], "positions": None}
    torch.testing.assert_close(KERNEL.reference(*inputs.values()), KERNEL.eager(*inputs.values()))


def test_outside_of_the_tables_is_nan_and_only_where_it_is_rotated() -> None:
    inputs = given(rotary_dim=6)
    inputs["positions"] = torch.tensor([16, 15, -16, -17, 2**40, -(2**40)])
    q_out, _ = KERNEL(*inputs.values())
    assert q_out[..., :6].isnan().all(-1).all(-1).tolist() == [True, False, False, True, True, True]
    assert torch.equal(q_out[..., 6:], inputs["q"][..., 6:])
    inputs["positions"] = torch.tensor([16, 15, 0, -17, 16, 16])
    torch.testing.assert_close(KERNEL(*inputs.values())[0][1:3], q_out[1:3])


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_results_lie_in_memory_as_pytorch_lays_them_out(order: tuple[int, int, int]) -> None:
    """Dimensions of one element, which PyTorch's own rules put anywhere, are another matter."""
    for shape in itertools.product((2, 3), (2, 4), (3, 5), (1, 6)):
        x = torch.empty([*(shape[dim] for dim in order), shape[3]]).permute(*map(order.index, range(3)), 3)
        assert (2 * x).stride() == dense_strides(x.shape, x.stride())
    assert dense_strides((1, 4, 5, 8), (160, 8, 32, 1)) == (160, 8, 32, 1)
    assert dense_strides((2, 0, 5), (1, 1, 1)) == torch.empty(2, 0, 5).stride()


def test_cost_is_what_was_counted_by_hand() -> None:
    assert cost("float32", tokens=1, heads=1, kv_heads=1, dim=2).flops == 2 * 6
    assert cost("float32", tokens=3, heads=4, kv_heads=2, dim=8, rotary_dim=4).flops == 3 * 6 * 2 * 6
    bytes_of_bf16 = cost("bfloat16", tokens=3, heads=4, kv_heads=2, dim=8).traffic_bytes
    assert bytes_of_bf16 == 3 * (2 * 2 * (4 + 2) * 8 + 4 * 8 + 8)
    assert cost("float32", tokens=3, heads=4, kv_heads=2, dim=8, table_bytes=7).traffic_bytes == 3 * 2 * 4 * 48 + 7


BATCHED = {"q": torch.zeros(2, 6, 4, 8), "k": torch.zeros(2, 6, 2, 8)}
REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "two dimensions": ({"q": torch.zeros(6, 8)}, r"needs q of 3 or 4 dimensions; got \[6, 8\]"),
        "float64": (
            {"q": torch.zeros(6, 4, 8, dtype=torch.float64)},
            r"of float32, float16, bfloat16 on cpu; got .*float64",
        ),
        "mixed dtypes": ({"k": torch.zeros(6, 2, 8, dtype=torch.float16)}, r"needs k \[6, any, 8\] of float32"),
        "keys of another size": ({"k": torch.zeros(6, 2, 16)}, r"needs k \[6, any, 8\]"),
        "fewer keys": ({"k": torch.zeros(5, 2, 8)}, r"needs k \[6, any, 8\]"),
        "strided heads": ({"q": torch.zeros(6, 4, 16)[..., ::2]}, r"elements of each head of q side by side"),
        "another device": ({"k": torch.zeros(6, 2, 8, device="meta")}, r"on cpu; got .* on meta"),
        "narrow tables": ({"cos": torch.zeros(16, 4, dtype=torch.float16)}, r"needs cos \[any, any\] of float32"),
        "unequal tables": ({"sin": torch.zeros(15, 4)}, r"needs sin \[16, 4\]"),
        "another angle": ({"rotary_dim": 6}, r"needs 3 or 6 columns of cos; got 4"),
        "odd": ({"rotary_dim": 7}, r"rotates 2, 4, ... elements of a head of 8; got rotary_dim 7"),
        "none": ({"rotary_dim": 0}, r"got rotary_dim 0"),
        "too many": ({"rotary_dim": 10}, r"got rotary_dim 10"),
        "short positions": ({"positions": torch.zeros(5, dtype=torch.int64)}, r"needs positions \[6\] of int32, int64"),
        "narrow positions": ({"positions": torch.zeros(6, dtype=torch.int16)}, r"needs positions \[6\]"),
        "positions of a batch": ({"positions": torch.zeros(2, 6, dtype=torch.int64)}, r"needs positions \[1, 6\]"),
        "positions of three": (
            BATCHED | {"positions": torch.zeros(3, 6, dtype=torch.int64)},
            r"needs positions \[2, 6\]",
        ),
        "no positions": ({"positions": None}, r"needs positions, or 6 rows of cos, or 6; got 16"),
        "neither": (BATCHED | {"positions": None}, r"needs positions, or 6 rows of cos, or 12; got 16"),
        "tokens for heads": ({"heads_first": True}, r"needs k \[any, 4, 8\]"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    inputs = {**given(), **changed}
    outputs: dict[str, Any] = {"q_out": torch.zeros(6, 4, 8), "k_out": torch.zeros(6, 2, 8)}
    for refusing in (lambda: KERNEL.allocate(*inputs.values()), lambda: launch(**inputs, **outputs)):
        with pytest.raises(ExecutionError, match=message):
            refusing()


def test_refuses_outputs_that_overlap_or_lie_otherwise() -> None:
    inputs, free, memory = given(), torch.zeros(6, 2, 8), torch.zeros(6 * 6 * 8)
    with pytest.raises(ExecutionError, match="needs q_out in memory of its own; it overlaps k_out"):
        launch(**inputs, q_out=memory[: 6 * 32].view(6, 4, 8), k_out=memory[-(6 * 32) :][: 6 * 16].view(6, 2, 8))
    with pytest.raises(ExecutionError, match=r"needs q_out with strides \[32, 8, 1\]; got \[8, 48, 1\]"):
        launch(**inputs, q_out=torch.zeros(4, 6, 8).transpose(0, 1), k_out=free)
    with pytest.raises(ExecutionError, match=r"needs q_out \[6, 4, 8\]"):
        launch(**inputs, q_out=torch.zeros(6, 4, 9), k_out=free)
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device; they are on cpu"):
        launch(**inputs, q_out=torch.zeros(6, 4, 8), k_out=free)


def tensors_and_rest(inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[Any]]:
    values = list(inputs.values())
    return [v for v in values if isinstance(v, torch.Tensor)], [v for v in values if not isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.float32, {}),
        (torch.float32, {"rotary_dim": 4}),
        (torch.float32, {"rotary_dim": 4, "interleaved": True}),
        (torch.float32, {"interleaved": True, "each": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"each": True}),
        (torch.bfloat16, {"interleaved": True}),
        (torch.bfloat16, {"interleaved": True, "rotary_dim": 4, "each": True}),
        (torch.bfloat16, {"rotary_dim": 6, "table_dtype": "bfloat16"}),
    ],
)
def test_matches_its_eager_code(dtype: torch.dtype, more: Mapping[str, Any], decomposed: bool) -> None:
    """Gathering the angles is part of the launch."""
    tensors, rest = tensors_and_rest(given(dtype, **more))
    tolerance = TOLERANCE[dtype]
    graph = check_fusion(
        KERNEL, lambda *t: KERNEL.eager(*t, *rest), tensors, rtol=tolerance, atol=tolerance, decomposed=decomposed
    )
    assert [op.target for op in graph.ops] == ["opweave.rope.default"]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def hugging_face(x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, ids: torch.Tensor, inv: torch.Tensor) -> Tensors:
    """Llama as transformers writes it: heads before tokens, tables with each angle twice, in the model's dtype."""
    frequencies = (inv[None, :, None].expand(len(ids), -1, 1) @ ids[:, None, :].float()).transpose(1, 2)
    angles = torch.cat((frequencies, frequencies), -1)
    cos, sin = angles.cos().to(x.dtype).unsqueeze(1), angles.sin().to(x.dtype).unsqueeze(1)
    q, k = (torch.nn.functional.linear(x, w).view(*x.shape[:2], -1, 8).transpose(1, 2) for w in (wq, wk))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def neox(x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, ids: torch.Tensor, inv: torch.Tensor) -> Tensors:
    """Half of each head, as Phi and GPT-NeoX do; one row of angles for a token of all batches."""
    angles = ids[0, :, None].float() * inv
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    results = []
    for weight in (wq, wk):
        heads = torch.nn.functional.linear(x, weight).view(*x.shape[:2], -1, 8).transpose(1, 2)
        turning, rest = heads[..., :4], heads[..., 4:]
        results.append(torch.cat((turning * cos + rotate_half(turning) * sin, rest), -1))
    return tuple(results)


def gpt_fast(x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, ids: torch.Tensor, inv: torch.Tensor) -> Tensors:
    """Neighbours, in float32, tokens before heads, by real and imaginary parts that alternate."""
    angles = ids[0, :, None].float() * inv
    table = torch.stack((angles.cos(), angles.sin()), -1)[None, :, None]
    results = []
    for weight in (wq, wk):
        wide = torch.nn.functional.linear(x, weight).view(*x.shape[:2], -1, 4, 2).float()
        even, odd = wide[..., 0], wide[..., 1]
        parts = (even * table[..., 0] - odd * table[..., 1], odd * table[..., 0] + even * table[..., 1])
        results.append(torch.stack(parts, -1).flatten(3).to(x.dtype))
    return tuple(results)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("model", "dtype", "layout"),
    [
        (hugging_face, torch.float32, (False, True, False)),
        (hugging_face, torch.bfloat16, (False, True, False)),
        (neox, torch.float32, (False, True, True)),
        (neox, torch.bfloat16, (False, True, True)),
        (gpt_fast, torch.bfloat16, (True, False, False)),
    ],
)
def test_matches_how_models_write_it(
    model: Callable[..., Tensors], dtype: torch.dtype, layout: tuple[bool, ...], batch: int, decomposed: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    x, wq, wk = (torch.randn(*s, generator=random).to(dtype) for s in ((batch, 6, 16), (32, 16), (16, 16)))
    ids = torch.arange(6).expand(batch, 6) + torch.arange(batch)[:, None]
    inputs = (x, wq, wk, ids.contiguous(), torch.rand(2 if model is neox else 4, generator=random))
    if model is neox:
        inputs = (*inputs[:4], torch.cat((inputs[4], inputs[4])))
    tolerance = 3 * TOLERANCE[dtype]
    graph = check_fusion(KERNEL, model, inputs, rtol=tolerance, atol=tolerance, decomposed=decomposed)
    (launched,) = (op for op in graph.ops if op.target == "opweave.rope.default")
    assert launched.body.endswith(f"None, {4 if model is neox else 8}, {', '.join(map(str, layout))}, False)")


def test_matches_each_layer_with_the_tables_of_all() -> None:
    def two_layers(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k = torch.split((x @ weight).view(6, 6, 8), [4, 2], 1)
            q, k = (y * cos[:, None] + rotate_half(y) * sin[:, None] for y in (q, k))
            x = (q + k.repeat(1, 2, 1)).flatten(1)
        return x

    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=random) / 4 for shape in ((6, 32), (32, 48), (6, 8), (6, 8))]
    check_fusion(KERNEL, two_layers, inputs, rtol=1e-5, atol=1e-5, count=2)


def two(rotation: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    return lambda q, k, cos, sin: (rotation(q, cos, sin), rotation(k, cos, sin))


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def backwards(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[..., 4:], -x[..., :4]), -1)


#: What is rotated, and cosines and sines; each changes one thing about what would match.
NOT_MATCHED: Mapping[str, tuple[Callable[..., Any], dict[int, torch.Tensor]]] = MappingProxyType(
    {
        "one tensor": (lambda q, k, cos, sin: halves(q, cos, sin), {}),
        "other angles for keys": (lambda q, k, cos, sin: (halves(q, cos, sin), halves(k, sin, cos)), {}),
        "fewer keys": (two(halves), {1: torch.zeros(1, 2, 8)}),
        "one angle for all": (two(halves), {2: torch.zeros(1, 1, 4), 3: torch.zeros(1, 1, 4)}),
        "an angle for each head": (
            lambda q, k, cos, sin: (halves(q, cos, sin), halves(q + k, cos, sin)),
            {1: torch.zeros(6, 4, 8), 2: torch.zeros(6, 4, 4), 3: torch.zeros(6, 4, 4)},
        ),
        "float64": (
            two(halves),
            dict(enumerate(torch.zeros(6, n, m).double() for n, m in ((4, 8), (2, 8), (1, 4), (1, 4)))),
        ),
        "wide tables": (two(halves), {2: torch.zeros(6, 1, 4).double(), 3: torch.zeros(6, 1, 4).double()}),
        "a difference in both": (
            two(lambda x, c, s: torch.cat((x[..., :4] * c - x[..., 4:] * s, x[..., 4:] * c - x[..., :4] * s), -1)),
            {},
        ),
        "exchanged halves": (
            two(lambda x, c, s: torch.cat((x[..., 4:] * c - x[..., :4] * s, x[..., :4] * c + x[..., 4:] * s), -1)),
            {},
        ),
        "halves that overlap": (
            two(lambda x, c, s: torch.cat((x[..., :4] * c - x[..., 3:7] * s, x[..., 3:7] * c + x[..., :4] * s), -1)),
            {},
        ),
        "put together in another dimension": (
            two(lambda x, c, s: torch.cat((x[..., :4] * c - x[..., 4:] * s, x[..., 4:] * c + x[..., :4] * s), 1)),
            {},
        ),
        "halves of neighbours": (
            two(
                lambda x, c, s: torch.cat((x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s), -1)
            ),
            {},
        ),
        "turned back": (two(lambda x, c, s: x * c.repeat(1, 1, 2) + backwards(x) * s.repeat(1, 1, 2)), {}),
        "not negated": (
            two(lambda x, c, s: x * c.repeat(1, 1, 2) + x.roll(4, -1) * s.repeat(1, 1, 2)),
            {},
        ),
        "the half of another tensor": (
            lambda q, k, cos, sin: two(lambda x, c, s: x * c.repeat(1, 1, 2) + rotate_half(k + 1) * s.repeat(1, 1, 2))(
                k * 2, k, cos, sin
            ),
            {},
        ),
        "another rest": (
            two(lambda x, c, s: torch.cat((halves(x[..., :4], c[..., :2], s[..., :2]), x[..., :4]), -1)),
            {},
        ),
    }
)


UNCHANGED = MappingProxyType(dict(enumerate(torch.zeros(6, *rest) for rest in ((4, 8), (2, 8), (1, 4), (1, 4)))))


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_matches_what_the_next_test_changes(decomposed: bool) -> None:
    program = exported(two(halves), [*UNCHANGED.values()], decomposed=decomposed)
    assert len(check_matches(KERNEL, program.graph)) == 1


@pytest.mark.parametrize("case", NOT_MATCHED)
def test_leaves_other_things_alone(case: str) -> None:
    function, changed = NOT_MATCHED[case]
    found = check_matches(KERNEL, exported(function, [*(UNCHANGED | changed).values()], decomposed=False).graph)
    assert not [match for match in found if match.outputs[0].shape[-1] == 8]
