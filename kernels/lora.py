"""A linear layer with a LoRA adapter, forward and backward, for training and inference.

    s = dropout(x, p) @ a
    y = x @ w + scale * s @ b + bias

as Hu and others (ICLR 2022) define it, computed as LoRAFusion does (Zhu and others, arXiv 2510.00206): ``lora_down``
writes the rank-r tensor ``s`` and ``lora_linear`` all the rest; autograd goes on through ``lora_backward_down``,
``lora_backward_weight`` and ``lora_backward_input``. Between forward and backward only ``x`` and ``s`` are kept:
neither the dropped-out activations nor a mask. ``s`` and ``y`` are rounded, once each. The base weight ``w`` is frozen
in LoRA; where it does want a gradient, that is a plain product.

`lora` is the function to call. With ``offsets`` several adapters share a batch (`_lora` says how).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..compiler.graph import Graph
from . import lora_backward_down, lora_backward_input, lora_backward_weight, lora_down, lora_linear
from ._checks import FLOATS
from ._configs import Config
from ._kernel import Kernel, Workload
from ._lora import as_matrix
from ._lora_rules import low_rank_sums, product_of
from ._match import Cost, Match, Walk

__all__ = ["KERNEL", "lora"]

NAME = "lora"


def lora(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float = 1.0,
    p: float = 0.0,
    seed: torch.Tensor | int | None = None,
    *,
    bias: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w + scale * dropout(x, p) @ a @ b + bias``, with gradients for ``x``, ``a``, ``b`` and ``bias``.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16.
        w: ``[depth, columns]`` of x's dtype and any strides: ``linear.weight.t()`` of a torch Linear. Frozen.
        a: ``[depth, rank]`` likewise: ``lora_A.weight.t()`` of PEFT; with ``offsets`` ``[adapters, depth, rank]``.
        b: ``[rank, columns]`` likewise: ``lora_B.weight.t()`` of PEFT; with ``offsets`` ``[adapters, rank, columns]``.
        scale: what the adapters' part is multiplied by: PEFT's ``lora_alpha / r``, the same for all of them.
        p: the probability with which an element of ``x`` is dropped on its way to ``a``; 0 where nothing is trained.
        seed: says which elements are dropped, the same for the same seed. An int64 tensor ``[1]`` on x's device can
            change from step to step in a captured graph. Drawn from PyTorch's generator if needed and not given.
        bias: ``[columns]`` or None.
        offsets: int32 or int64 ``[adapters + 1]``: tokens ``offsets[i]`` up to ``offsets[i + 1]`` use adapter ``i``,
            tokens before the first and behind the last none.

    Raises:
        ExecutionError: a tensor has another shape, dtype or device, ``p`` is no probability, or ``w`` wants a gradient.
    """
    if p > 0 and seed is None:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    elif isinstance(seed, int):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    y: torch.Tensor = KERNEL.operator(x.contiguous(), w, a, b, bias, seed, offsets, scale, p)[0]
    return y


def launch(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    *,
    y: torch.Tensor,
    s: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``dropout(x, p) @ a`` into ``s`` and ``x @ w + scale * s @ b + bias`` into ``y``, on the current stream.

    Two launches; `lora_down` and `lora_linear` say what they take. ``config`` is for the second, by far the longer.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, an output overlaps something, or ``p`` is
            no probability.
    """
    lora_down.launch(x, a, seed, offsets, p, s=s)
    lora_linear.launch(x, w, s, b, bias, offsets, scale, y=y, config=config)


def allocate(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(y, s)``, not filled. Raises ExecutionError as ``launch`` does."""
    (s,) = lora_down.allocate(x, a, seed, offsets, p)
    (y,) = lora_linear.allocate(x, w, s, b, bias, offsets, scale)
    return y, s


def reference(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y, s)`` by plain PyTorch on any device, with the kernels' mask and roundings; shapes as ``launch``."""
    (s,) = lora_down.reference(x, a, seed, offsets, p)
    (y,) = lora_linear.reference(x, w, s, b, bias, offsets, scale)
    return y, s


def eager(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT says, with PyTorch's own generator; several adapters one after the other."""
    s = lora_down.eager(x, a, seed, offsets, p)
    return lora_linear.eager(x, w, s, b, bias, offsets, scale), s


def cost(
    dtype: str,
    tokens: int,
    depth: int,
    columns: int,
    rank: int,
    adapters: int = 0,
    bias: bool = False,
    p: float = 0.0,
) -> Cost:
    """Flops and bytes of both launches: ``x`` and ``s`` are moved by either."""
    down = lora_down.KERNEL.cost(dtype, tokens, depth, rank, adapters, p)
    up = lora_linear.KERNEL.cost(dtype, tokens, depth, columns, rank, adapters, bias)
    return Cost(down.flops + up.flops, down.traffic_bytes + up.traffic_bytes)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    depth: int,
    columns: int,
    rank: int,
    adapters: int = 0,
    bias: bool = False,
    scale: float = 0.3,
    p: float = 0.0,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; matrices are weights of torch layers, transposed."""
    up = lora_linear.arguments(
        dtype, device, seed, tokens=tokens, depth=depth, columns=columns, rank=rank, adapters=adapters, bias=bias
    )
    down = lora_down.arguments(dtype, device, seed + 1, tokens=tokens, depth=depth, rank=rank, adapters=adapters)
    return {
        "x": up["x"],
        "w": up["w"],
        "a": down["a"],
        "b": up["b"],
        "bias": up["bias"],
        "seed": down["seed"],
        "offsets": up["offsets"],
        "scale": scale,
        "p": p,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds a product of low rank, scaled or not, to a linear layer of the same input.

    That is LoRA without dropout; PyTorch's dropout draws other masks than this kernel, so it is not matched. Nobody
    needs ``s``; if somebody reads the graph's own, that one stays.
    """
    walk = Walk(graph)
    found = []
    for item in low_rank_sums(walk):
        base, (depth, columns) = item.base, item.base.weight.shape
        for a in product_of(walk, item.s, base.x):
            tokens, has_bias = math.prod(item.out.shape[:-1]), base.bias is not None
            launch_cost = cost(item.out.dtype, tokens, depth, columns, item.rank, bias=has_bias)
            tensors = {"x": base.x, "w": base.weight, "a": a, "b": item.b, "bias": base.bias}
            scalars = {"seed": None, "offsets": None, "scale": item.scale, "p": 0.0}
            s = walk.fresh(item.out, "low_rank", item.s.shape, item.out.dtype)
            match = walk.match(NAME, {**tensors, **scalars}, (item.out, s), launch_cost)
            if match is not None:
                found.append(match)
    return tuple(found)


def _workload(name: str, tokens: int, depth: int, columns: int, rank: int, adapters: int = 0) -> Workload:
    sizes = {"tokens": tokens, "depth": depth, "columns": columns, "rank": rank, "adapters": adapters}
    return Workload(name, {**sizes, "p": 0.1})


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
        _workload("Llama-3 8B query, rank 16, 4096 tokens", 4096, 4096, 4096, 16),
        _workload("Llama-3 8B MLP up, rank 64, 8192 tokens", 8192, 4096, 14336, 64),
        _workload("Llama-3 70B query, rank 64, 8192 tokens", 8192, 8192, 8192, 64),
        _workload("Llama-3 8B query, 4 adapters of rank 16, 8192 tokens", 8192, 4096, 4096, 16, 4),
    ),
    dtypes=FLOATS,
    configs=lora_linear.CONFIGS,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w, a, b, bias, seed, offsets, scale, p = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w, a, b, bias, seed, offsets, output[1])
    ctx.scale, ctx.p = scale, p


def _backward(ctx: Any, grad_y: torch.Tensor, grad_s_unused: Any) -> tuple[torch.Tensor | None, ...]:
    x, w, a, b, bias, seed, offsets, s = ctx.saved_tensors
    wants_x, wants_w, wants_a, wants_b, wants_bias = ctx.needs_input_grad[:5]
    grad_y = grad_y.contiguous()
    grad_x = grad_a = grad_b = grad_bias = None
    if wants_x or wants_a or wants_b:
        grad_s, grad_b = lora_backward_down.KERNEL(grad_y, s, b, offsets, ctx.scale)
        if wants_a:
            grad_a = lora_backward_weight.KERNEL(x, grad_s, seed, offsets, ctx.p)
        if wants_x:
            grad_x = lora_backward_input.KERNEL(grad_y, w, grad_s, a, seed, offsets, ctx.p)
    if wants_bias:
        grad_bias = as_matrix(grad_y).sum(0).to(bias.dtype)
    grad_w = as_matrix(x).t() @ as_matrix(grad_y) if wants_w else None
    return grad_x, grad_w, grad_a, grad_b, grad_bias, None, None, None, None


KERNEL.operator.register_autograd(_backward, setup_context=_keep)
