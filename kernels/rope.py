"""Rotary position embedding of queries and keys in one launch, with a backward.

    q_out = rotate(q, cos[positions], sin[positions]), and k_out likewise

RoFormer's embedding (Su et al., arXiv 2104.09864); ``_rope.py`` has the formula. Arithmetic is in float32 and each
result is rounded once, where models that compute in bfloat16 round both products and their sum. The gradient is the
rotation by the opposite angle, and so the same kernel with ``inverse``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, contiguous_strides
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk
from ._rope import (
    INTEGERS,
    check_heads,
    check_tables,
    dense_strides,
    positions_of,
    rotate_heads,
    rotated,
    spelled,
    tables,
)
from ._rotations import Rotation, rotations, row_major

__all__ = ["KERNEL"]

NAME = "rope"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def rope_kernel(
    q_pointer: tl.tensor,
    k_pointer: tl.tensor,
    cos_pointer: tl.tensor,
    sin_pointer: tl.tensor,
    position_pointer: tl.tensor,
    q_out_pointer: tl.tensor,
    k_out_pointer: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    positions_batch: tl.tensor,
    cos_row: tl.tensor,
    cos_column: tl.tensor,
    sin_row: tl.tensor,
    sin_column: tl.tensor,
    q_batch: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    q_out_batch: tl.tensor,
    q_out_token: tl.tensor,
    q_out_head: tl.tensor,
    k_out_batch: tl.tensor,
    k_out_token: tl.tensor,
    k_out_head: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    pairs: tl.constexpr,
    each: tl.constexpr,
    gathered: tl.constexpr,
    interleaved: tl.constexpr,
    inverse: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
    block_heads: tl.constexpr,
) -> None:
    """Rotate ``block_heads`` heads of q, or of k, of one token; the grid is all tokens times such blocks of both."""
    q_blocks: tl.constexpr = (heads + block_heads - 1) // block_heads
    blocks: tl.constexpr = q_blocks + (kv_heads + block_heads - 1) // block_heads
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks // tokens).to(tl.int64)
    token = (tl.program_id(0) // blocks % tokens).to(tl.int64)
    position = batch * positions_batch + token
    if gathered:
        position = tl.load(position_pointer + position).to(tl.int64)
    angles = tables(cos_pointer, sin_pointer, (cos_row, cos_column), (sin_row, sin_column), position, rows, pairs,
                    each, interleaved, block_pairs)  # fmt: skip
    if inverse:
        angles = (angles[0], -angles[3], angles[2], -angles[1])
    lane = tl.arange(0, block_heads)
    if block < q_blocks:
        source, target = q_pointer + batch * q_batch + token * q_token, batch * q_out_batch + token * q_out_token
        head = block * block_heads + lane
        rotate_heads(source, q_out_pointer + target, q_head, q_out_head, head, head < heads, angles,
                     dim, pairs, interleaved, block_heads, block_pairs, block_rest)  # fmt: skip
    else:
        source, target = k_pointer + batch * k_batch + token * k_token, batch * k_out_batch + token * k_out_token
        head = (block - q_blocks) * block_heads + lane
        rotate_heads(source, k_out_pointer + target, k_head, k_out_head, head, head < kv_heads, angles,
                     dim, pairs, interleaved, block_heads, block_pairs, block_rest)  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_first: bool,
    row_major: bool,
    inverse: bool,
    *,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write rotated ``q`` and ``k`` into ``q_out`` and ``k_out``, on the current stream.

    Args:
        q: ``[tokens, heads, dim]``, or with a batch in front, float32, float16 or bfloat16, on a CUDA device; all but
            the last dimension may be strided. With ``heads_first``, heads come before tokens.
        k: as ``q``, with a number of heads of its own.
        cos: ``[context, rotary_dim / 2]`` or, one for each element, ``[context, rotary_dim]``, float32 or of the dtype
            of ``q``; may be strided.
        sin: as ``cos``.
        positions: ``[tokens]``, ``[1, tokens]`` or ``[batch, tokens]``, int64 or int32: rows of the tables. Negative
            ones count from the end; outside of the tables, rotated elements become NaN. Without positions, tables have
            a row for each token, or for each token of each batch.
        rotary_dim: how many elements of a head are rotated, the others stay.
        interleaved: whether a pair is two neighbours; else it is one element of each half.
        heads_first: whether the dimension before the last is tokens; else it is heads.
        row_major: whether results are row-major; else they lie in memory as the inputs do.
        inverse: whether to rotate back.
        q_out: the shape and dtype of ``q``, row-major or dense and in the order in memory of ``q``; written, shares no
            memory with any other argument.
        k_out: as ``q_out``, for ``k``.
        config: how to launch; chosen by shapes if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    each, positions_batch = _check(q, k, cos, sin, positions, rotary_dim, heads_first)
    for name, tensor, like in (("q_out", q_out, q), ("k_out", k_out, k)):
        check_tensor(NAME, name, tensor, like.shape, q.dtype, q.device, row_major=False)
        wanted = contiguous_strides(like.shape) if row_major else dense_strides(like.shape, like.stride())
        if any(e > 1 and a != b for e, a, b in zip(like.shape, wanted, tensor.stride(), strict=True)):
            raise fail(NAME, f"needs {name} with strides {list(wanted)}; got {list(tensor.stride())}")
    read = {"q": q, "k": k, "cos": cos, "sin": sin} | ({} if positions is None else {"positions": positions})
    check_apart(NAME, {"q_out": q_out, "k_out": k_out}, read)
    check_device(NAME, rope_kernel, q)
    if q.numel() + k.numel() == 0:
        return
    token_dim = -2 if heads_first else -3
    tokens, heads, kv_heads, dim = q.shape[token_dim], q.shape[-5 - token_dim], k.shape[-5 - token_dim], q.shape[-1]
    config = config or CONFIGS.choose(q.device, q.dtype, tokens=tokens, heads=max(heads, kv_heads), dim=dim)
    block_heads = config.constants["block_heads"]
    blocks = triton.cdiv(heads, block_heads) + triton.cdiv(kv_heads, block_heads)
    strides = [(t.stride(0) if t.dim() == 4 else 0, t.stride(token_dim), t.stride(-5 - token_dim))
               for t in (q, k, q_out, k_out)]  # fmt: skip
    with torch.accelerator.device_index(q.device.index):
        rope_kernel[((q.numel() // (heads * dim) if heads else k.numel() // (kv_heads * dim)) * blocks,)](
            q, k, cos, sin, positions, q_out, k_out, tokens, cos.shape[0], positions_batch,
            *cos.stride(), *sin.stride(), *strides[0], *strides[1], *strides[2], *strides[3],
            heads=heads, kv_heads=kv_heads, dim=dim, pairs=rotary_dim // 2, each=each,
            gathered=positions is not None, interleaved=interleaved, inverse=inverse,
            block_pairs=triton.next_power_of_2(rotary_dim // 2),
            block_rest=triton.next_power_of_2(dim - rotary_dim) if dim > rotary_dim else 0,
            **config.options,
        )  # fmt: skip


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_dim: int,
    heads_first: bool,
) -> tuple[bool, int]:
    """Raise ExecutionError for what ``launch`` refuses.

    Gives whether tables have a column for each element, and how far apart rows of two batches are: none if they share.
    """
    if q.dim() not in (3, 4):
        raise fail(NAME, f"needs q of 3 or 4 dimensions; got {list(q.shape)}")
    head_dim, token_dim = (-3, -2) if heads_first else (-2, -3)
    check_heads(NAME, "q", q, q, head_dim)
    check_heads(NAME, "k", k, q, head_dim)
    each = check_tables(NAME, q, cos, sin, rotary_dim)
    batch, tokens = q.shape[0] if q.dim() == 4 else 1, q.shape[token_dim]
    if positions is None:
        if cos.shape[0] not in (tokens, batch * tokens):
            raise fail(NAME, f"needs positions, or {tokens} rows of cos, or {batch * tokens}; got {cos.shape[0]}")
        return each, tokens if cos.shape[0] == batch * tokens else 0
    shared = positions.dim() < 2 or positions.shape[0] == 1
    shape = (*(() if positions.dim() < 2 else (1,) if shared else (batch,)), tokens)
    check_tensor(NAME, "positions", positions, shape, INTEGERS, q.device)
    return each, 0 if shared else tokens


def allocate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_first: bool,
    row_major: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(q_out, k_out)``, laid out as the inputs are, not filled. Raises ExecutionError as ``launch`` does."""
    _check(q, k, cos, sin, positions, rotary_dim, heads_first)
    return _new(q, row_major), _new(k, row_major)


def _new(like: torch.Tensor, row_major: bool) -> torch.Tensor:
    if row_major:
        return like.new_empty(like.shape)
    return like.new_empty_strided(like.shape, dense_strides(like.shape, like.stride()))


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_first: bool,
    row_major: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q_out, k_out)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    if q.numel() + k.numel() == 0:
        return _new(q, row_major), _new(k, row_major)
    if positions is None:
        tokens = q.shape[-2 if heads_first else -3]
        positions = torch.arange(cos.shape[0], device=q.device).view(-1, tokens)
    positions = positions[0] if q.dim() == 3 and positions.dim() == 2 else positions
    sin = _opposite(sin, rotary_dim, interleaved) if inverse else sin
    results = []
    for x in (q, k):
        out = rotated(_tokens_first(x, heads_first), cos, sin, positions, rotary_dim, interleaved)
        results.append(_new(x, row_major).copy_(_tokens_first(out, heads_first)))
    return results[0], results[1]


def _opposite(sin: torch.Tensor, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    """Sines of the transposed rotation; where elements have columns of their own, each meets that of the other."""
    if sin.shape[1] == rotary_dim:
        sin = sin.reshape(-1, rotary_dim // 2, 2).flip(-1).flatten(-2) if interleaved else sin.roll(rotary_dim // 2, 1)
    return -sin


def _tokens_first(x: torch.Tensor, heads_first: bool) -> torch.Tensor:
    return x.transpose(-2, -3) if heads_first else x


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_first: bool,
    row_major: bool,
    inverse: bool,
) -> Any:
    """What a model says: gather the angles, rotate halves or neighbours, once for queries and once for keys."""
    sin = _opposite(sin, rotary_dim, interleaved) if inverse else sin
    if positions is not None:
        positions = positions[0] if q.dim() == 3 and positions.dim() == 2 else positions
        cos, sin = cos[positions], sin[positions]
    elif q.dim() == 4:
        cos, sin = (table.reshape(-1, q.shape[-2 if heads_first else -3], table.shape[1]) for table in (cos, sin))
    cosine, sine = (table.unsqueeze(-3 if heads_first else -2) for table in (cos, sin))
    return spelled(q, cosine, sine, rotary_dim, interleaved), spelled(k, cosine, sine, rotary_dim, interleaved)


def cost(
    dtype: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int = 0,
    table_dtype: str = "float32",
    table_bytes: int | None = None,
    **_: Any,
) -> Cost:
    """Flops and bytes of one launch.

    A pair takes four products, a sum and a difference. Bytes are compulsory: q and k read and written, and for each
    token its position and a row of both tables; or ``table_bytes`` for tables and positions.
    """
    width = rotary_dim or dim
    flops = tokens * (heads + kv_heads) * 3 * width
    moved = 2 * tokens * (heads + kv_heads) * dim * DTYPE_BYTES[dtype]
    if table_bytes is None:
        table_bytes = tokens * (width * DTYPE_BYTES[table_dtype] + 8)
    return Cost(flops, moved + table_bytes)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int = 0,
    table_dtype: str = "float32",
    context: int = 8192,
    interleaved: bool = False,
    inverse: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; q and k are views of one projection of q, k and v."""
    random = normal(device, seed)
    projection = random(tokens, heads + 2 * kv_heads, dim).to(dtype)
    positions, cos, sin = positions_of(random, device, seed, tokens, context, (rotary_dim or dim) // 2)
    return {
        "q": projection[:, :heads],
        "k": projection[:, heads : heads + kv_heads],
        "cos": cos.to(getattr(torch, table_dtype)),
        "sin": sin.to(getattr(torch, table_dtype)),
        "positions": positions,
        "rotary_dim": rotary_dim or dim,
        "interleaved": interleaved,
        "heads_first": False,
        "row_major": False,
        "inverse": inverse,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph rotates two tensors, such as queries and keys, by the same angles; `_rotations.py` says how.

    Where a model rounds products and sums, as it does in a narrow dtype, the kernel rounds once. Pairs are sought among
    rotations by the same angles that follow each other. Not known is an interleaved rotation of whole heads that ends
    in ``stack``: its result has one dimension more than the kernel's.
    """
    walk = Walk(graph)
    groups: dict[tuple[bool, object], list[Rotation]] = {}
    for rotation in rotations(walk):
        layout = row_major(rotation)
        if layout is not None:
            groups.setdefault((layout, rotation.key), []).append(rotation)
    found = []
    for (layout, _), group in groups.items():
        left = iter(group)
        query = next(left)
        for key in left:
            match = _match(walk, query, key, layout)
            if match is not None:
                found.append(match)
            query = key if match is None else next(left, key)
    return tuple(found)


def _match(walk: Walk, q: Rotation, k: Rotation, layout: bool) -> Match | None:
    angles, (tokens, dim) = q.angles, (math.prod(q.x.shape[:-3]) * q.tokens, q.x.shape[-1])
    launch_cost = cost(q.x.dtype, tokens, q.heads, k.heads, dim, q.rotary_dim, table_bytes=angles.moved_bytes)
    given = {
        **{"q": q.x, "k": k.x, "cos": angles.cos, "sin": angles.sin, "positions": angles.positions},
        **{"rotary_dim": q.rotary_dim, "interleaved": q.interleaved, "heads_first": angles.heads_first},
        **{"row_major": layout, "inverse": False},
    }
    return walk.match(NAME, given, (q.out, k.out), launch_cost, row_major=False)


KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=(
        Workload("Llama-3 8B, 8192 tokens", {"tokens": 8192, "heads": 32, "kv_heads": 8, "dim": 128}),
        Workload("Llama-3 70B, 8192 tokens", {"tokens": 8192, "heads": 64, "kv_heads": 8, "dim": 128}),
        Workload("Qwen2.5-7B, 8192 tokens", {"tokens": 8192, "heads": 28, "kv_heads": 4, "dim": 128}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, positions, *ctx.scalars, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[Any, ...]:
    """Rotate back. Tables are constants: they get no gradient."""
    grads = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q, grad_k))
    return (*KERNEL.operator(*grads, *ctx.saved_tensors, *ctx.scalars, not ctx.inverse), *[None] * 8)


KERNEL.operator.register_autograd(_backward, setup_context=_setup_context)
