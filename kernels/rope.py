"""Rotary position embedding of queries and keys in one launch, with a backward.

    q_out = rotate(q, cos[positions], sin[positions]), and k_out likewise

RoFormer's embedding (Su et al., arXiv 2104.09864); ``_rope.py`` has the formula. Arithmetic is in float32 and each
result is rounded once, where models that compute in bfloat16 round both products and their sum. The gradient is the
rotation by the opposite angle, and so the same kernel with ``inverse``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match
from ._rope import check_heads, check_tables, positions_of, rotate_heads, rotated, tables

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
    rows: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    inverse: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
    block_heads: tl.constexpr,
) -> None:
    """Rotate ``block_heads`` heads of q, or of k, of one token; the grid is tokens times such blocks of both."""
    q_blocks: tl.constexpr = (heads + block_heads - 1) // block_heads
    blocks: tl.constexpr = q_blocks + (kv_heads + block_heads - 1) // block_heads
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position = tl.load(position_pointer + token).to(tl.int64)
    cosine, sine = tables(cos_pointer, sin_pointer, cos_stride, sin_stride, position, rows, pairs, block_pairs)
    if inverse:
        sine = -sine
    lane = tl.arange(0, block_heads)
    if block < q_blocks:
        head = block * block_heads + lane
        rotate_heads(q_pointer + token * q_token, q_out_pointer + token * (heads * dim), q_head, dim, head,
                     head < heads, cosine, sine, dim, pairs, interleaved,
                     block_heads, block_pairs, block_rest)  # fmt: skip
    else:
        head = (block - q_blocks) * block_heads + lane
        rotate_heads(k_pointer + token * k_token, k_out_pointer + token * (kv_heads * dim), k_head, dim, head,
                     head < kv_heads, cosine, sine, dim, pairs, interleaved,
                     block_heads, block_pairs, block_rest)  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
    *,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write rotated ``q`` and ``k`` into ``q_out`` and ``k_out``, on the current stream.

    Args:
        q: ``[tokens, heads, dim]``, float32, float16 or bfloat16, on a CUDA device; tokens and heads may be strided.
        k: ``[tokens, kv_heads, dim]``, as ``q``.
        cos: ``[context, rotary_dim / 2]``, float32 or of the dtype of ``q``; rows may be strided.
        sin: as ``cos``.
        positions: ``[tokens]``, int64 or int32: rows of the tables. Outside of them, rotated elements become NaN.
        interleaved: whether a pair is two neighbours; else it is one element of each half.
        inverse: whether to rotate by the opposite angle.
        q_out: the shape and dtype of ``q``, row-major; written, shares no memory with any other argument.
        k_out: the shape and dtype of ``k``; as ``q_out``.
        config: how to launch; chosen by ``heads`` and ``dim`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(q, k, cos, sin, positions)
    for name, tensor, like in (("q_out", q_out, q), ("k_out", k_out, k)):
        check_tensor(NAME, name, tensor, like.shape, q.dtype, q.device)
    read = {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}
    check_apart(NAME, {"q_out": q_out, "k_out": k_out}, read)
    check_device(NAME, rope_kernel, q)
    if q.numel() + k.numel() == 0:
        return
    (tokens, heads, dim), kv_heads, (rows, pairs) = q.shape, k.shape[1], cos.shape
    config = config or CONFIGS.choose(q.device, q.dtype, tokens=tokens, heads=max(heads, kv_heads), dim=dim)
    blocks = triton.cdiv(heads, config.constants["block_heads"]) + triton.cdiv(
        kv_heads, config.constants["block_heads"]
    )
    with torch.accelerator.device_index(q.device.index):
        rope_kernel[(tokens * blocks,)](
            q, k, cos, sin, positions, q_out, k_out, rows, cos.stride(0), sin.stride(0),
            *q.stride()[:2], *k.stride()[:2],
            heads=heads, kv_heads=kv_heads, dim=dim, pairs=pairs, interleaved=interleaved, inverse=inverse,
            block_pairs=triton.next_power_of_2(pairs),
            block_rest=triton.next_power_of_2(dim - 2 * pairs) if dim > 2 * pairs else 0,
            **config.options,
        )  # fmt: skip


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    check_heads(NAME, "q", q, None, None, q)
    check_heads(NAME, "k", k, q.shape[0], q.shape[2], q)
    check_tables(NAME, q, cos, sin, positions)


def allocate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(q_out, k_out)``, row-major, not filled. Raises ExecutionError as ``launch`` does."""
    _check(q, k, cos, sin, positions)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q_out, k_out)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    sin = -sin if inverse else sin
    return rotated(q, cos, sin, positions, interleaved), rotated(k, cos, sin, positions, interleaved)


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> Any:
    """What a model says: gather the angles, rotate halves or neighbours, once for queries and once for keys."""
    sin = -sin if inverse else sin
    cosine, sine = cos[positions][:, None], sin[positions][:, None]
    return spelled(q, cosine, sine, interleaved), spelled(k, cosine, sine, interleaved)


def spelled(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """One rotation as models spell it, computed in the wider dtype of both and rounded at the end."""
    width = 2 * cosine.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    turned = turned.to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def cost(
    dtype: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int | None = None,
    table_dtype: str = "float32",
    **_: Any,
) -> Cost:
    """Flops and bytes of one launch.

    A pair takes four products, a sum and a difference. Bytes are compulsory: q and k read and written, and for each
    token its position and a row of both tables.
    """
    width = rotary_dim or dim
    flops = tokens * (heads + kv_heads) * 3 * width
    moved = 2 * tokens * (heads + kv_heads) * dim * DTYPE_BYTES[dtype]
    return Cost(flops, moved + tokens * (width * DTYPE_BYTES[table_dtype] + 8))


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int | None = None,
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
        "interleaved": interleaved,
        "inverse": inverse,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Later."""
    return ()


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


def _setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, positions, context.interleaved, context.inverse = inputs
    context.save_for_backward(cos, sin, positions)


def _backward(context: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[Any, ...]:
    """Rotate back. Tables are constants: they get no gradient."""
    tables = context.saved_tensors
    grads = KERNEL.operator(*map(_headwise, (grad_q, grad_k)), *tables, context.interleaved, not context.inverse)
    return (*grads, None, None, None, None, None)


def _headwise(grad: torch.Tensor) -> torch.Tensor:
    """A gradient whose heads the kernel can read: autograd may hand over an expanded or transposed one."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


KERNEL.operator.register_autograd(_backward, setup_context=_setup_context)
