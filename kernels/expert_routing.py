"""Routing of a mixture of experts: which experts a token goes to, with which weight, and all assignments by expert.

    indices = the top_k experts with the largest logits, largest first
    weights = softmax(logits)[indices], or with ``normalize`` softmax(logits[indices])
    order   = the tokens * top_k assignments, stably sorted by expert; those of expert e end at ends[e]

Mixtral's routing (arXiv 2401.04088) normalises: softmax over all logits divided by its sum over the chosen ones is
softmax over the chosen ones. Qwen-MoE's does or does not, by its flag ``norm_topk_prob``. Equal logits go to the lower
expert first, which torch.topk does not promise; NaN counts as largest, as it does there. Softmax is in float32 from
logits as they are, and ``weights`` is float32.

Assignment ``a`` is choice ``a % top_k`` of token ``a // top_k``. The sort counts: every block of tokens counts its
experts, one pass adds up the blocks, and every block then knows where its assignments go. The host waits for nothing,
and since nothing is added atomically, the same logits give the same order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.fusion import Scalar
from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._expert_patterns import Routing, routings
from ._experts import MOST_EXPERTS, WORKLOADS
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk, is_row_major

__all__ = ["KERNEL"]

NAME = "expert_routing"
CONFIGS = Configs.beside(__file__)
MOST_CHOICES = 16


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def expert_routing_choice_kernel(
    logits_pointer: tl.tensor,
    weights_pointer: tl.tensor,
    indices_pointer: tl.tensor,
    counts_pointer: tl.tensor,
    tokens: tl.tensor,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    block_tokens: tl.constexpr,
    block_experts: tl.constexpr,
    block_choices: tl.constexpr,
) -> None:
    """Choose the experts of one block of tokens and count them."""
    block = tl.program_id(0).to(tl.int64)
    token = block * block_tokens + tl.arange(0, block_tokens)
    expert = tl.arange(0, block_experts)
    choice = tl.arange(0, block_choices)
    has_token = (token < tokens)[:, None]
    is_expert = (expert < experts)[None, :]
    at = token[:, None] * experts + expert[None, :]
    logits = tl.load(logits_pointer + at, mask=has_token & is_expert, other=0.0).to(tl.float32)
    logits = tl.where(is_expert, logits, float("-inf"))
    # Integers in the order of the floats, above the ones that say which is first among equals. What is none of the
    # experts or was chosen before gets the least, which no logit has.
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    bits = tl.where(logits == logits, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    least = tl.full([], -(2**63), tl.int64)
    keys = (bits.to(tl.int64) << 32) | (block_experts - 1 - expert).to(tl.int64)[None, :]
    keys = tl.where(is_expert, keys, least)
    chosen_logits = tl.full([block_tokens, block_choices], float("-inf"), tl.float32)
    chosen_experts = tl.zeros([block_tokens, block_choices], tl.int32)
    for step in tl.static_range(top_k):
        largest = tl.max(keys, axis=1)
        found = block_experts - 1 - (largest & 0xFFFFFFFF).to(tl.int32)
        of_found = (largest >> 32).to(tl.int32)
        value = (of_found ^ ((of_found >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        chosen_logits = tl.where(choice[None, :] == step, value[:, None], chosen_logits)
        chosen_experts = tl.where(choice[None, :] == step, found[:, None], chosen_experts)
        is_found = expert[None, :] == found[:, None]
        keys = tl.where(is_found, least, keys)
    largest_logit = tl.max(tl.where(choice[None, :] == 0, chosen_logits, float("-inf")), axis=1)[:, None]
    powers = tl.exp(chosen_logits - largest_logit)
    if normalize:
        total = tl.sum(tl.where((choice < top_k)[None, :], powers, 0.0), axis=1)
    else:
        total = tl.sum(tl.where(is_expert, tl.exp(logits - largest_logit), 0.0), axis=1)
    to = token[:, None] * top_k + choice[None, :]
    inside = has_token & (choice < top_k)[None, :]
    tl.store(weights_pointer + to, powers / total[:, None], mask=inside)
    tl.store(indices_pointer + to, chosen_experts.to(tl.int64), mask=inside)
    is_chosen = has_token & is_expert & (keys == least)
    counts = tl.sum(is_chosen.to(tl.int32), axis=0)
    tl.store(counts_pointer + block * experts + expert, counts, mask=expert < experts)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def expert_routing_sum_kernel(
    counts_pointer: tl.tensor,
    starts_pointer: tl.tensor,
    blocks: tl.tensor,
    experts: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Write for some experts how many assignments the blocks before each have, and behind the last block their sum."""
    expert = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    total = tl.zeros([block_columns], tl.int32)
    for first in range(0, blocks, block_rows):
        row = first + tl.arange(0, block_rows)
        at = row.to(tl.int64)[:, None] * experts + expert[None, :]
        inside = (row < blocks)[:, None] & (expert < experts)[None, :]
        counts = tl.load(counts_pointer + at, mask=inside, other=0)
        before = total[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(starts_pointer + at, before, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(starts_pointer + tl.cast(blocks, tl.int64) * experts + expert, total, mask=expert < experts)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def expert_routing_order_kernel(
    indices_pointer: tl.tensor,
    starts_pointer: tl.tensor,
    order_pointer: tl.tensor,
    ends_pointer: tl.tensor,
    tokens: tl.tensor,
    blocks: tl.tensor,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    block_tokens: tl.constexpr,
    block_experts: tl.constexpr,
) -> None:
    """Put the assignments of one block of tokens where they belong; the first program writes the ends."""
    block = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, block_experts)
    is_expert = expert < experts
    totals = tl.load(starts_pointer + tl.cast(blocks, tl.int64) * experts + expert, mask=is_expert, other=0)
    ends = tl.cumsum(totals, axis=0)
    if block == 0:
        tl.store(ends_pointer + expert, ends, mask=is_expert)
    token = block * block_tokens + tl.arange(0, block_tokens)
    slot = tl.full([block_tokens, block_experts], -1, tl.int32)
    for step in tl.static_range(top_k):
        index = tl.load(indices_pointer + token * top_k + step, mask=token < tokens, other=-1).to(tl.int32)
        slot = tl.where(expert[None, :] == index[:, None], step, slot)
    is_chosen = (slot >= 0).to(tl.int32)  # a token goes to no expert twice
    start = ends - totals + tl.load(starts_pointer + block * experts + expert, mask=is_expert, other=0)
    position = start[None, :] + tl.cumsum(is_chosen, axis=0) - is_chosen
    tl.store(order_pointer + position, token[:, None] * top_k + slot, mask=slot >= 0)


def launch(
    logits: torch.Tensor,
    top_k: int,
    normalize: bool,
    *,
    weights: torch.Tensor,
    indices: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Route tokens, on the current stream, in three launches.

    Args:
        logits: ``[..., experts]``, float32, float16 or bfloat16, row-major, on a CUDA device; at most 512 experts.
        top_k: experts of a token, at most 16.
        normalize: whether the weights of a token sum to one, else they are its largest shares of all experts.
        weights: ``[..., top_k]`` of float32; written, as all that follow, and in memory of its own.
        indices: ``[..., top_k]`` of int64: the experts.
        order: ``[tokens * top_k]`` of int64: assignments.
        ends: ``[experts]`` of int32.
        counts: ``[blocks, experts]`` of int32, scratch, as ``allocate`` makes it.
        starts: ``[blocks + 1, experts]`` of int32, scratch.
        config: how to launch; chosen by ``experts`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    experts, tokens = _check(logits, top_k)
    written = {"weights": weights, "indices": indices, "order": order, "ends": ends}
    written |= {"counts": counts, "starts": starts}
    for (name, tensor), (shape, dtype) in zip(written.items(), _outputs(logits, top_k), strict=True):
        check_tensor(NAME, name, tensor, shape, dtype, logits.device)
    check_apart(NAME, written, {"logits": logits})
    check_device(NAME, expert_routing_choice_kernel, logits)
    if tokens == 0:
        ends.zero_()
        return
    config = config or CONFIGS.choose(logits.device, logits.dtype, experts=experts)
    options = dataclasses.replace(config, constants={}).options
    blocks = counts.shape[0]
    tile = {"block_tokens": _block_tokens(experts), "block_experts": triton.next_power_of_2(experts)}
    columns = config.constants["block_columns"]
    with torch.accelerator.device_index(logits.device.index):
        expert_routing_choice_kernel[(blocks,)](
            logits, weights, indices, counts, tokens, experts=experts, top_k=top_k, normalize=normalize,
            block_choices=triton.next_power_of_2(top_k), **tile, **options,
        )  # fmt: skip
        expert_routing_sum_kernel[(triton.cdiv(experts, columns),)](
            counts, starts, blocks, experts=experts, **config.options
        )
        expert_routing_order_kernel[(blocks,)](
            indices, starts, order, ends, tokens, blocks, experts=experts, top_k=top_k, **tile, **options
        )


def _block_tokens(experts: int) -> int:
    """Tokens of one program, which has all their experts in registers. Scratch has a row for each such block."""
    return 16 if experts <= 128 else 8


def _check(logits: torch.Tensor, top_k: int) -> tuple[int, int]:
    check_tensor(NAME, "logits", logits, (*[None] * max(logits.dim(), 1),), FLOATS, logits.device)
    experts = logits.shape[-1]
    if not 0 < top_k <= min(MOST_CHOICES, experts) or experts > MOST_EXPERTS:
        raise fail(
            NAME,
            f"needs 1 to {MOST_EXPERTS} experts and top_k from 1 to {MOST_CHOICES}, no more than experts; "
            f"got {experts} experts and top_k={top_k}",
        )
    tokens = logits.numel() // experts
    if tokens * top_k >= 2**31:
        raise fail(NAME, f"needs fewer than 2**31 assignments; got {tokens} tokens with {top_k} each")
    return experts, tokens


def _outputs(logits: torch.Tensor, top_k: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of all that is written."""
    *leading, experts = logits.shape
    tokens = logits.numel() // experts
    blocks = triton.cdiv(tokens, _block_tokens(experts))
    return (
        ((*leading, top_k), torch.float32),
        ((*leading, top_k), torch.int64),
        ((tokens * top_k,), torch.int64),
        ((experts,), torch.int32),
        ((blocks, experts), torch.int32),
        ((blocks + 1, experts), torch.int32),
    )


def allocate(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, ...]:
    """New ``(weights, indices, order, ends, counts, starts)``, not filled. Raises ExecutionError as ``launch``."""
    _check(logits, top_k)
    return tuple(torch.empty(shape, dtype=dtype, device=logits.device) for shape, dtype in _outputs(logits, top_k))


def reference(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, ...]:
    """``(weights, indices, order, ends)`` by plain PyTorch on any device; shapes as ``launch``."""
    wide = logits.to(torch.float32)
    largest, indices = (part[..., :top_k] for part in wide.sort(dim=-1, descending=True, stable=True))
    weights = torch.softmax(largest, -1) if normalize else torch.softmax(wide, -1).gather(-1, indices)
    counts = torch.zeros(logits.shape[-1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
    order = indices.flatten().argsort(stable=True)
    return weights, indices.contiguous(), order, counts.cumsum(0, dtype=torch.int32)


def eager(logits: torch.Tensor, top_k: int, normalize: bool) -> Any:
    """What a model says: softmax, topk, a division; then a sort of the experts and their histogram."""
    weights, indices = torch.softmax(logits, -1, dtype=torch.float32).topk(top_k, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    experts, order = indices.flatten().sort(stable=True)
    counts = torch.histc(experts.float(), logits.shape[-1], 0, logits.shape[-1] - 1)
    return weights, indices, order, counts.cumsum(0, dtype=torch.int32)


def cost(dtype: str, tokens: int, experts: int, top_k: int) -> Cost:
    """Flops and bytes of routing ``tokens``: logits read once, weights, indices, order and ends written once.

    Flops are those of one softmax over the logits; comparisons and the integers of the sort are none. Scratch of
    eight bytes for every expert and block of tokens is not counted: it stays in the cache.
    """
    written = tokens * top_k * (4 + 8 + 8) + 4 * experts
    return Cost(tokens * (3 * experts - 1 + top_k), tokens * experts * DTYPE_BYTES[dtype] + written)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    normalize: bool = True,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    return {"logits": normal(device, seed)(tokens, experts).to(dtype), "top_k": top_k, "normalize": normalize}


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph chooses experts by ``topk``: see `_expert_patterns.routings`.

    Where the graph sorts the assignments or counts them, as models do before a grouped product, the launch does that,
    too. Softmax before the choice has to be in float32; a result in another dtype is cast by the graph.
    """
    walk = Walk(graph)
    found: dict[str, Match] = {}
    for routing in routings(walk):
        match = _match(walk, routing)
        if match is not None and (routing.normalize or routing.indices.name not in found):
            found[routing.indices.name] = match
    return tuple(found.values())


def _match(walk: Walk, routing: Routing) -> Match | None:
    """The launch that does most of a routing: what else is read of a sort keeps the sort."""
    logits, top_k, indices = routing.logits, routing.top_k, routing.indices
    experts, assignments = logits.shape[-1], math.prod(indices.shape)
    if top_k > MOST_CHOICES or assignments >= 2**31 or not is_row_major(routing.weights):
        return None
    arguments: dict[str, Tensor | Scalar] = {"logits": logits, "top_k": top_k, "normalize": routing.normalize}
    launch_cost = cost(logits.dtype, assignments // top_k, experts, top_k)
    for order, ends in ((routing.order, routing.ends), (None, routing.ends), (None, None)):
        order = order or walk.fresh(indices, "order", (assignments,), "int64")
        ends = ends or walk.fresh(indices, "ends", (experts,), "int32")
        match = walk.match(NAME, arguments, (routing.weights, indices, order, ends), launch_cost)
        if match is not None:
            return match
    return None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, ctx.normalize = inputs
    weights, indices, *_ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, weights, indices)


def _backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, None, None]:
    """Gradient of the logits, of softmax over the chosen experts or over all. It is small: plain PyTorch."""
    logits, weights, indices = ctx.saved_tensors
    weighted = weights * gradient
    total = weighted.sum(-1, keepdim=True)
    if ctx.normalize:
        wide = torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, indices, weighted - weights * total)
    else:
        shares = torch.softmax(logits, -1, dtype=weights.dtype)
        wide = torch.zeros_like(shares).scatter(-1, indices, weighted) - shares * total
    return wide.to(logits.dtype), None, None


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
        *(Workload(w.name, {key: w.sizes[key] for key in ("tokens", "experts", "top_k")}) for w in WORKLOADS),
        Workload("Qwen3-Next-80B-A3B, 8192 tokens", {"tokens": 8192, "experts": 512, "top_k": 10}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("counts", "starts"),
)
KERNEL.operator.register_autograd(_backward, setup_context=_keep)
