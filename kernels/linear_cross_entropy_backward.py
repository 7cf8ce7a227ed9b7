"""Gradients of the cross-entropy of a linear layer's logits, which never exist as a whole.

    share = exp(logits - log_sum_exp) * (1 + 2 * z_loss * log_sum_exp)
    logit_gradient = gradient * (share - (1 - label_smoothing) * is_target - label_smoothing / vocabulary)
    dx = logit_gradient @ weight
    dweight = logit_gradient.T @ x

``gradient`` is each token's: 1 / number of valid targets for the mean. ``logits`` and ``log_sum_exp`` are those of
``linear_cross_entropy``; behind a soft cap, the gradient is also multiplied by the cap's slope. Rows of ignored targets
are exactly zero; those of targets outside the vocabulary are NaN, as their losses are.

The vocabulary is walked in chunks, as wide as 128 MiB of scratch hold logit gradients of all tokens: 8192 columns for
8192 tokens in bfloat16. The fused kernel computes the chunk's logits again, tile by tile, and stores their gradient,
rounded once; two plain matrix products, which are cuBLAS's, make the chunk's rows of ``dweight`` and add to ``dx``.
Other ways cost more of something:

- Storing logits for this pass saves 2 of the 8 flops for each of tokens x depth x vocabulary that loss and gradients
  cost together (three products, the first twice), and costs logits and their gradients: 4.2 GB at 8192 tokens of
  Llama-3 in bfloat16, and about 12 ms of traffic where models compute the loss in float32, which is what the 2 flops
  take at 700 TFLOP/s. So the time is about eager's, and scratch is 128 MiB and a float32 copy of ``dx``.
- Chunks of tokens whose gradients are made in the forward pass (Liger) need no logits twice either, but take
  ``dweight`` through memory, rounded, for every chunk; chunks of the vocabulary round ``dweight`` once, and the sum
  that does go through memory, that of ``dx``, is small and kept in float32.
- Products inside the fused kernel would need atomic additions, or logits a third time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._cross_entropy import capped, check_operands, dense_logits, is_chosen
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match
from ._matmul import multiplied, sizes_of
from ._tiles import swizzled

__all__ = ["KERNEL"]

NAME = "linear_cross_entropy_backward"
CONFIGS = Configs.beside(__file__)
#: What scratch may hold of logit gradients, if nothing else is said.
SCRATCH_BYTES = 2**27
#: Chunks of the vocabulary are multiples of this, the widest tile.
TILE = 256


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def linear_cross_entropy_backward_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    target_pointer: tl.tensor,
    log_sum_exp_pointer: tl.tensor,
    gradient_pointer: tl.tensor,
    out_pointer: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ignore_index: tl.tensor,
    label_smoothing: tl.tensor,
    z_loss: tl.tensor,
    soft_cap: tl.tensor,
    has_cap: tl.constexpr,
    vocabulary: tl.constexpr,
    depth: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Gradients of one tile of logits, of columns from ``first`` on, in row-major ``out`` [tokens, width].

    The grid is the number of tiles in ``width`` columns. What lies behind the vocabulary is not written.
    """
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(tokens, block_m), tl.cdiv(width, block_n), group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    place = tile_n * block_n + tl.arange(0, block_n)
    column = first + place
    has_row = row < tokens
    logit = multiplied(x_pointer, weight_pointer, row, column, tokens, stride_k, stride_v, vocabulary, depth, block_k)
    target = tl.load(target_pointer + row, mask=has_row, other=0)
    log_sum_exp = tl.load(log_sum_exp_pointer + row, mask=has_row, other=0.0)
    gradient = tl.load(gradient_pointer + row, mask=has_row, other=0.0)
    gradient = tl.where((target >= 0) & (target < vocabulary), gradient, float("nan"))
    if has_cap:
        logit, slope = capped(logit, soft_cap)
    share = tl.exp(logit - log_sum_exp[:, None]) * (1.0 + 2.0 * z_loss * log_sum_exp)[:, None]
    share -= tl.where(column[None, :] == target[:, None], 1.0 - label_smoothing, 0.0) + label_smoothing / vocabulary
    value = share * gradient[:, None]
    if has_cap:
        value *= slope
    value = tl.where((target == ignore_index)[:, None], 0.0, value)
    inside = has_row[:, None] & ((place < width) & (column < vocabulary))[None, :]
    out_pointers = out_pointer + row.to(tl.int64)[:, None] * width + place[None, :]
    tl.store(out_pointers, value.to(out_pointer.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    gradient: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    needs_dweight: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
    *,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    logit_gradients: torch.Tensor,
    dx_sum: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gradients of ``sum(gradient * losses)`` by ``x`` and ``weight``, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        weight: ``[vocabulary, depth]`` of x's dtype and any strides.
        target: ``[...]`` of int64, row-major.
        log_sum_exp: as ``target``, of float32: what ``linear_cross_entropy`` wrote.
        gradient: as ``target``, of float32: the gradient of each token's loss.
        ignore_index: as for ``linear_cross_entropy``, as are the next three.
        label_smoothing: see there.
        z_loss: see there.
        soft_cap: see there.
        needs_dweight: whether ``dweight`` is wanted: where a model's head is frozen it is not, and left empty.
        scratch_bytes: what ``logit_gradients`` may take; it is never narrower than 256 columns.
        dx: as ``x``; written, as all that follow; none shares memory with any other argument.
        dweight: ``[vocabulary, depth]`` of x's dtype, row-major; ``[0, depth]`` if it is not wanted.
        logit_gradients: scratch, ``[tokens, width of a chunk]`` of x's dtype.
        dx_sum: scratch, ``[tokens, depth]`` of float32 where the dtype is narrower and there are several chunks, else
            empty.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, an output overlaps something, or a factor
            is out of range.
    """
    read = {"x": x, "weight": weight, "target": target, "log_sum_exp": log_sum_exp, "gradient": gradient}
    written = {"dx": dx, "dweight": dweight, "logit_gradients": logit_gradients, "dx_sum": dx_sum}
    expected = _results(
        x, weight, target, log_sum_exp, gradient, label_smoothing, z_loss, soft_cap, needs_dweight, scratch_bytes
    )
    for (name, tensor), (shape, dtype) in zip(written.items(), expected, strict=True):
        check_tensor(NAME, name, tensor, shape, dtype, x.device)
    check_apart(NAME, written, read)
    check_device(NAME, linear_cross_entropy_backward_kernel, x)
    (vocabulary, depth), tokens, width = weight.shape, target.numel(), logit_gradients.shape[1]
    if not logit_gradients.numel():
        dx.zero_()
        dweight.zero_()
        return
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(tokens, weight.t()[:, :0]))
    tiles = -(-tokens // config.constants["block_m"]) * -(-width // config.constants["block_n"])
    rows, total = x.view(tokens, depth), dx_sum if dx_sum.numel() else dx.view(tokens, depth)
    with torch.accelerator.device_index(x.device.index):
        for first in range(0, vocabulary, width):
            last = min(first + width, vocabulary)
            linear_cross_entropy_backward_kernel[(tiles,)](
                x, weight, target, log_sum_exp, gradient, logit_gradients, tokens, first, width,
                ignore_index, label_smoothing, z_loss, soft_cap,
                has_cap=soft_cap != 0.0, vocabulary=vocabulary, depth=depth,
                stride_k=weight.stride(1), stride_v=weight.stride(0), **config.options,
            )  # fmt: skip
            chunk = logit_gradients[:, : last - first]
            if needs_dweight:
                torch.mm(chunk.t(), rows, out=dweight[first:last])
            _add_product(total, chunk, weight[first:last], is_first=first == 0)
        if dx_sum.numel():
            dx.view(tokens, depth).copy_(dx_sum)


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *, is_first: bool) -> None:
    """``total = one @ other``, or ``+=`` it; ``total`` may be wider than the operands."""
    if total.dtype == one.dtype:
        torch.addmm(total, one, other, beta=0 if is_first else 1, out=total)
    elif total.is_cuda:  # products of narrow operands into float32; PyTorch has this for CUDA only
        torch.ops.aten.addmm.dtype_out(total, one, other, total.dtype, beta=0 if is_first else 1, out=total)
    else:
        torch.addmm(total, one.to(total.dtype), other.to(total.dtype), beta=0 if is_first else 1, out=total)


def _results(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    gradient: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
    needs_dweight: bool,
    scratch_bytes: int,
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what is written."""
    check_operands(NAME, x, weight, target, label_smoothing, z_loss, soft_cap)
    check_tensor(NAME, "log_sum_exp", log_sum_exp, target.shape, torch.float32, x.device)
    check_tensor(NAME, "gradient", gradient, target.shape, torch.float32, x.device)
    (vocabulary, depth), tokens = weight.shape, target.numel()
    most = scratch_bytes // max(tokens * x.element_size() * TILE, 1) * TILE
    width = min(max(most, TILE), -(-vocabulary // TILE) * TILE)
    is_summed = width < vocabulary and x.dtype != torch.float32
    return (
        (tuple(x.shape), x.dtype),
        ((vocabulary if needs_dweight else 0, depth), x.dtype),
        ((tokens, width), x.dtype),
        ((tokens, depth) if is_summed else (0, depth), torch.float32),
    )


def allocate(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    gradient: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    needs_dweight: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[torch.Tensor, ...]:
    """New ``(dx, dweight, logit_gradients, dx_sum)``, not filled. Raises ExecutionError as ``launch`` does."""
    made = _results(
        x, weight, target, log_sum_exp, gradient, label_smoothing, z_loss, soft_cap, needs_dweight, scratch_bytes
    )
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in made)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    gradient: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    needs_dweight: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[torch.Tensor, ...]:
    """``(dx, dweight)`` by plain PyTorch on any device, from all logits, with the kernel's roundings."""
    logits, vocabulary = dense_logits(x, weight, soft_cap), weight.shape[0]
    each, given = log_sum_exp.flatten()[:, None], gradient.flatten()[:, None]
    hits = is_chosen(target, vocabulary)
    value = torch.exp(logits - each) * (1 + 2 * z_loss * each) - torch.where(hits, 1 - label_smoothing, 0.0)
    value = (value - label_smoothing / max(vocabulary, 1)) * torch.where(
        hits.any(-1, keepdim=True), given, float("nan")
    )
    if soft_cap:
        value = value * (1 - (logits / soft_cap).square())
    value = torch.where(target.flatten()[:, None] == ignore_index, 0.0, value).to(x.dtype).float()
    rows = x.reshape(target.numel(), x.shape[-1]).float()
    dweight = (value.t() @ rows).to(x.dtype) if needs_dweight else rows.new_empty(0, x.shape[-1], dtype=x.dtype)
    return (value @ weight.float()).to(x.dtype).view(x.shape), dweight


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    gradient: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    needs_dweight: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What autograd does where logits were not kept: again in float32, then softmax minus one, then two products."""
    vocabulary, rows = weight.shape[0], x.flatten(0, -2)
    logits = torch.nn.functional.linear(rows, weight).float()
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    each = log_sum_exp.flatten()[:, None]
    value = torch.exp(logits - each)
    if z_loss:
        value = value * (1 + 2 * z_loss * each)
    if label_smoothing:
        value = value - label_smoothing / vocabulary
    chosen = target.flatten()[:, None]
    is_valid = chosen != ignore_index
    there = torch.where(is_valid, chosen, 0)
    value = value.scatter_add(1, there, torch.full_like(there, label_smoothing - 1, dtype=torch.float32))
    value = value * torch.where(is_valid, gradient.flatten()[:, None], 0.0)
    if soft_cap:
        value = value * (1 - (logits / soft_cap).square())
    value = value.to(x.dtype)
    dweight = value.t() @ rows if needs_dweight else weight.new_empty(0, x.shape[-1])
    return (value @ weight).view(x.shape), dweight


def cost(
    dtype: str,
    tokens: int,
    depth: int,
    vocabulary: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    needs_dweight: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Cost:
    """Flops and bytes of one launch: three products of ``tokens x depth x vocabulary``, two without ``dweight``.

    Between them, every logit costs five operations (difference, exponential, two terms, product) and six more with a
    cap. Bytes are compulsory: ``x`` and ``weight`` read and their gradients written, and three numbers a token. Logit
    gradients go through memory, too, written once and read twice, in chunks that the L2 cache holds in part; that is
    not counted.
    """
    products = 2 + needs_dweight
    each = 2 * products * depth + 5 + 6 * (soft_cap != 0)
    values = (2 * tokens + (1 + needs_dweight) * vocabulary) * depth
    return Cost(tokens * vocabulary * each, values * DTYPE_BYTES[dtype] + 16 * tokens)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    depth: int,
    vocabulary: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    needs_dweight: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; about every eighth target is ignored.

    ``log_sum_exp`` is about what it is for such logits, and not computed from them.
    """
    random = normal(device, seed)
    target = torch.empty(tokens, dtype=torch.int64, device=device)
    if device != "meta":
        generator = torch.Generator(device).manual_seed(seed + 1)
        target.random_(0, max(vocabulary, 1), generator=generator)
        target[3::8] = -100
    return {
        "x": random(tokens, depth).to(dtype),
        "weight": (random(vocabulary, depth) / math.sqrt(max(depth, 1))).to(dtype),
        "target": target,
        "log_sum_exp": random(tokens) / 8 + math.log(max(vocabulary, 1)) + 0.5,
        "gradient": random(tokens),
        "ignore_index": -100,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "soft_cap": soft_cap,
        "needs_dweight": needs_dweight,
        "scratch_bytes": scratch_bytes,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Nothing: graphs of training keep log-probabilities, of which no operator writes the log-sum-exp by itself.

    The operator is called by autograd, as the backward of ``linear_cross_entropy``.
    """
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
        Workload("Llama-3 8B, 8192 tokens", {"tokens": 8192, "depth": 4096, "vocabulary": 128256}),
        Workload("Llama-3 70B, 4096 tokens", {"tokens": 4096, "depth": 8192, "vocabulary": 128256}),
        Workload("Gemma-2 9B, 4096 tokens", {"tokens": 4096, "depth": 3584, "vocabulary": 256000, "soft_cap": 30.0}),
        Workload("GPT-2, 8192 tokens", {"tokens": 8192, "depth": 768, "vocabulary": 50257}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("logit_gradients", "dx_sum"),
)
