"""Cross-entropy of a linear layer's logits, which never exist as a whole.

    logits = x @ weight.T                              (soft_cap * tanh(logits / soft_cap) where there is a cap)
    log_sum_exp = log(sum(exp(logits)))                over the vocabulary
    losses = log_sum_exp - logits[target] + z_loss * log_sum_exp ** 2
    loss = sum(losses) / number of targets that are not ignore_index

With label smoothing ``s`` the logit of the target is ``(1 - s) * logits[target] + s * mean(logits)``. Losses of ignored
targets are 0; if all are ignored the mean is NaN, as PyTorch's. A target outside the vocabulary, which PyTorch stops
at, makes its loss NaN; nothing is read there.

The vocabulary is split into slices of 1024. A program keeps the running maximum and sum (the online softmax of Milakov
and Gimelshein, 2018) of a slice for a block of tokens and picks the target's logit where it passes; a second kernel
merges the slices, a third averages. Scratch holds two numbers a token and slice, 1/256 of the logits in float32. Logits
are summed in float32 and never rounded; so are all results. For training see ``linear_cross_entropy_backward``.
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
from ._cross_entropy_patterns import Loss, losses
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk
from ._matmul import multiplied, sizes_of
from ._tiles import swizzled
from .linear_cross_entropy_backward import KERNEL as BACKWARD

__all__ = ["KERNEL"]

NAME = "linear_cross_entropy"
CONFIGS = Configs.beside(__file__)
#: Columns of the vocabulary that one program walks; a constant, so that scratch does not depend on the configuration.
SLICE = 1024


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def linear_cross_entropy_partials_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    target_pointer: tl.tensor,
    partials_pointer: tl.tensor,
    target_logits_pointer: tl.tensor,
    tokens: tl.tensor,
    soft_cap: tl.tensor,
    has_cap: tl.constexpr,
    is_smooth: tl.constexpr,
    vocabulary: tl.constexpr,
    depth: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    columns: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Maximum, sum of exponentials and, if smooth, sum of the logits of ``block_m`` tokens and one slice.

    The grid is the number of slices of ``columns`` times that of blocks of tokens.
    """
    slices = (vocabulary + columns - 1) // columns
    tile_m, part = swizzled(tl.program_id(0), tl.cdiv(tokens, block_m), slices, group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    has_row = row < tokens
    target = tl.load(target_pointer + row, mask=has_row, other=-1)
    largest = tl.full([block_m], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_m], dtype=tl.float32)
    plain = tl.zeros([block_m], dtype=tl.float32)
    begin = part * columns
    end = tl.minimum(begin + columns, vocabulary)
    for first in range(begin, end, block_n):
        column = first + tl.arange(0, block_n)
        logit = multiplied(
            x_pointer, weight_pointer, row, column, tokens, stride_k, stride_v, vocabulary, depth, block_k
        )
        if has_cap:
            logit, _ = capped(logit, soft_cap)
        if is_smooth:
            plain += tl.sum(logit, axis=1)  # those outside are 0
        picked = tl.sum(tl.where(column[None, :] == target[:, None], logit, 0.0), axis=1)
        is_here = has_row & (target >= first) & (target < tl.minimum(first + block_n, end))
        tl.store(target_logits_pointer + row, picked, mask=is_here)
        logit = tl.where((column < end)[None, :], logit, float("-inf"))
        larger = tl.maximum(largest, tl.max(logit, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # a difference of infinities would be NaN
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logit - base[:, None]), axis=1)
        largest = larger
    plane = tl.full([], slices, tl.int64) * tokens
    place = partials_pointer + part.to(tl.int64) * tokens + row
    tl.store(place, largest, mask=has_row)
    tl.store(place + plane, total, mask=has_row)
    if is_smooth:
        tl.store(place + 2 * plane, plain, mask=has_row)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def linear_cross_entropy_merge_kernel(
    target_pointer: tl.tensor,
    partials_pointer: tl.tensor,
    target_logits_pointer: tl.tensor,
    losses_pointer: tl.tensor,
    log_sum_exp_pointer: tl.tensor,
    tokens: tl.tensor,
    slices: tl.tensor,
    vocabulary: tl.tensor,
    ignore_index: tl.tensor,
    label_smoothing: tl.tensor,
    z_loss: tl.tensor,
    is_smooth: tl.constexpr,
    block_slices: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """Losses of ``block_tokens`` tokens from what all slices say."""
    row = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    has_row = row < tokens
    largest = tl.full([block_tokens], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_tokens], dtype=tl.float32)
    plain = tl.zeros([block_tokens], dtype=tl.float32)
    plane = tl.full([], tokens, tl.int64) * slices
    for first in range(0, slices, block_slices):
        part = first + tl.arange(0, block_slices)
        place = partials_pointer + part.to(tl.int64)[:, None] * tokens + row[None, :]
        inside = (part < slices)[:, None] & has_row[None, :]
        maxima = tl.load(place, mask=inside, other=float("-inf"))
        totals = tl.load(place + plane, mask=inside, other=0.0)
        larger = tl.maximum(largest, tl.max(maxima, axis=0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.sum(totals * tl.exp(maxima - base[None, :]), axis=0)
        largest = larger
        if is_smooth:
            plain += tl.sum(tl.load(place + 2 * plane, mask=inside, other=0.0), axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    log_sum_exp = base + tl.log(tl.where(has_row, total, 1.0))
    target = tl.load(target_pointer + row, mask=has_row, other=0)
    is_known = has_row & (target >= 0) & (target < vocabulary)
    logit = tl.load(target_logits_pointer + row, mask=is_known, other=float("nan"))
    if is_smooth:
        logit = (1.0 - label_smoothing) * logit + label_smoothing * (plain / vocabulary)
    loss = log_sum_exp - logit + z_loss * log_sum_exp * log_sum_exp
    tl.store(losses_pointer + row, tl.where(target == ignore_index, 0.0, loss), mask=has_row)
    tl.store(log_sum_exp_pointer + row, log_sum_exp, mask=has_row)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def linear_cross_entropy_mean_kernel(
    target_pointer: tl.tensor,
    losses_pointer: tl.tensor,
    loss_pointer: tl.tensor,
    tokens: tl.tensor,
    ignore_index: tl.tensor,
    block: tl.constexpr,
) -> None:
    """The mean over targets that are not ignored, in one program."""
    total = tl.zeros([block], dtype=tl.float32)
    count = tl.zeros([block], dtype=tl.float32)
    for first in range(0, tokens, block):
        row = first + tl.arange(0, block)
        has_row = row < tokens
        total += tl.load(losses_pointer + row, mask=has_row, other=0.0)
        target = tl.load(target_pointer + row, mask=has_row, other=0)
        count += tl.where(has_row & (target != ignore_index), 1.0, 0.0)
    tl.store(loss_pointer, tl.sum(total, axis=0) / tl.sum(count, axis=0))


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    *,
    loss: torch.Tensor,
    losses: torch.Tensor,
    log_sum_exp: torch.Tensor,
    partials: torch.Tensor,
    target_logits: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the mean loss, each token's loss and log-sum-exp, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        weight: ``[vocabulary, depth]`` of x's dtype and any strides.
        target: ``[...]`` of int64, row-major.
        ignore_index: targets of this value have no loss.
        label_smoothing: the share of the target's probability that goes to the whole vocabulary.
        z_loss: factor of the squared log-sum-exp in the loss.
        soft_cap: logits are bent to stay below this; 0 leaves them.
        loss: ``[]`` of float32; written, as all that follow; none shares memory with any other argument.
        losses: as ``target``, of float32.
        log_sum_exp: as ``target``, of float32.
        partials: scratch, ``[2, slices, tokens]`` of float32; 3 of them with label smoothing.
        target_logits: scratch, ``[tokens]`` of float32.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, an output overlaps something, or a factor
            is out of range.
    """
    read = {"x": x, "weight": weight, "target": target}
    written = {
        "loss": loss,
        "losses": losses,
        "log_sum_exp": log_sum_exp,
        "partials": partials,
        "target_logits": target_logits,
    }
    expected = _shapes(x, weight, target, label_smoothing, z_loss, soft_cap)
    for (name, tensor), shape in zip(written.items(), expected, strict=True):
        check_tensor(NAME, name, tensor, shape, torch.float32, x.device)
    check_apart(NAME, written, read)
    check_device(NAME, linear_cross_entropy_partials_kernel, x)
    (vocabulary, depth), tokens, slices = weight.shape, target.numel(), partials.shape[1]
    # How long the vocabulary is does not matter to loads, which go along the other dimension.
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(tokens, weight.t()[:, :0]))
    blocks = -(-tokens // config.constants["block_m"])
    is_smooth = label_smoothing != 0.0
    fixed = {"num_stages": 1, "enable_fp_fusion": True}
    with torch.accelerator.device_index(x.device.index):
        if partials.numel():
            linear_cross_entropy_partials_kernel[(blocks * slices,)](
                x, weight, target, partials, target_logits, tokens, soft_cap,
                has_cap=soft_cap != 0.0, is_smooth=is_smooth, vocabulary=vocabulary, depth=depth,
                stride_k=weight.stride(1), stride_v=weight.stride(0), columns=SLICE, **config.options,
            )  # fmt: skip
        if tokens:
            linear_cross_entropy_merge_kernel[(-(-tokens // 64),)](
                target, partials, target_logits, losses, log_sum_exp, tokens, slices, vocabulary, ignore_index,
                label_smoothing, z_loss, is_smooth=is_smooth, block_slices=32, block_tokens=64, num_warps=4, **fixed,
            )  # fmt: skip
        linear_cross_entropy_mean_kernel[(1,)](
            target, losses, loss, tokens, ignore_index, block=4096, num_warps=16, **fixed
        )


def _shapes(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, label_smoothing: float, z_loss: float, soft_cap: float
) -> tuple[tuple[int, ...], ...]:
    check_operands(NAME, x, weight, target, label_smoothing, z_loss, soft_cap)
    slices = -(-weight.shape[0] // SLICE)
    planes = 3 if label_smoothing else 2
    shape = tuple(target.shape)
    return (), shape, shape, (planes, slices, target.numel()), (target.numel(),)


def allocate(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """New ``(loss, losses, log_sum_exp, partials, target_logits)``, not filled. Raises as ``launch`` does."""
    shapes = _shapes(x, weight, target, label_smoothing, z_loss, soft_cap)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """``(loss, losses, log_sum_exp)`` by plain PyTorch on any device, from all logits; shapes as ``launch``."""
    logits = dense_logits(x, weight, soft_cap)
    log_sum_exp = logits.logsumexp(-1)
    hits = is_chosen(target, weight.shape[0])
    logit = torch.where(hits, logits, 0.0).sum(-1)
    logit = torch.where(hits.any(-1), logit, float("nan"))
    if label_smoothing:
        logit = (1 - label_smoothing) * logit + label_smoothing * logits.mean(-1)
    losses = log_sum_exp - logit + z_loss * log_sum_exp.square()
    is_valid = target.flatten() != ignore_index
    losses = torch.where(is_valid, losses, 0.0)
    return losses.sum() / is_valid.sum(), losses.view(target.shape), log_sum_exp.view(target.shape)


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """What a model says: a linear layer, logits in float32, and their cross-entropy."""
    logits = torch.nn.functional.linear(x, weight).float()
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits, target = logits.flatten(0, -2), target.flatten()
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if z_loss:
        is_valid = target != ignore_index
        loss = loss + z_loss * torch.where(is_valid, logits.logsumexp(-1).square(), 0.0).sum() / is_valid.sum()
    return loss


def cost(
    dtype: str,
    tokens: int,
    depth: int,
    vocabulary: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
) -> Cost:
    """Flops and bytes of one launch: a multiplication and an addition for each of ``tokens x depth x vocabulary``.

    Behind them, every logit costs four operations (maximum, difference, exponential, sum), one more with label
    smoothing and three more with a cap. Bytes are compulsory: operands and target read, three results written.
    """
    each = 2 * depth + 4 + (label_smoothing != 0) + 3 * (soft_cap != 0)
    operands = (tokens + vocabulary) * depth * DTYPE_BYTES[dtype]
    return Cost(tokens * vocabulary * each, operands + 8 * tokens + 4 * (2 * tokens + 1))


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
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; about every eighth target is ignored."""
    random = normal(device, seed)
    target = torch.empty(tokens, dtype=torch.int64, device=device)
    if device != "meta":
        generator = torch.Generator(device).manual_seed(seed + 1)
        target.random_(0, max(vocabulary, 1), generator=generator)
        target[3::8] = -100
    return {
        "x": random(tokens, depth).to(dtype),
        "weight": (random(vocabulary, depth) * (2 / math.sqrt(max(depth, 1)))).to(dtype),
        "target": target,
        "ignore_index": -100,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "soft_cap": soft_cap,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph computes float32 losses, each token's or their mean, of a linear layer without bias.

    What the graph computes in a narrower dtype than the loss is rounded less here. Where logits have other readers, as
    in training, they stay, and nothing is won: there the operator itself is to be called, which autograd knows.
    """
    walk = Walk(graph)
    found = [match for loss in losses(walk) if (match := _match(walk, loss)) is not None]
    return tuple(m for m in found if not any(set(m.ops) < set(other.ops) for other in found))


def _match(walk: Walk, loss: Loss) -> Match | None:
    (tokens, depth), vocabulary = loss.x.shape, loss.weight.shape[0]
    each, log_sum_exp = (walk.fresh(loss.out, name, (tokens,), "float32") for name in ("losses", "log_sum_exp"))
    if loss.is_mean:
        outputs = (loss.out, each, log_sum_exp)
    else:
        outputs = (walk.fresh(loss.out, "mean", (), "float32"), loss.out, log_sum_exp)
    factors = (loss.label_smoothing, 0.0, loss.soft_cap)
    inputs = (loss.x, loss.weight, loss.target, loss.ignore_index, *factors)
    launch_cost = cost(loss.x.dtype, tokens, depth, vocabulary, *factors)
    return walk.match(NAME, dict(zip(KERNEL.inputs, inputs, strict=True)), outputs, launch_cost)


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
    scratch=("partials", "target_logits"),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, target, *factors = inputs
    ctx.save_for_backward(x, weight, target, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.factors = factors


def _backward(
    ctx: Any, loss_gradient: torch.Tensor, losses_gradient: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    x, weight, target, log_sum_exp = ctx.saved_tensors
    count = (target != ctx.factors[0]).sum()
    gradient = losses_gradient + loss_gradient / count  # of ignored targets, the kernel reads none
    needs_dweight = ctx.needs_input_grad[1]
    dx, dweight = BACKWARD(x, weight, target, log_sum_exp, gradient, *ctx.factors, needs_dweight)
    return dx, dweight if needs_dweight else None, None, *[None] * 4


KERNEL.operator.register_autograd(_backward, setup_context=_save)
