"""What the cross-entropy of a linear layer and its gradient share: operands, soft cap, and logits in plain PyTorch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, check_tensor, fail

__all__ = ["capped", "check_operands", "dense_logits", "is_chosen"]


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def capped(logit: tl.tensor, soft_cap: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``soft_cap * tanh(logit / soft_cap)`` and its derivative."""
    bent = 2.0 * tl.sigmoid(2.0 * logit / soft_cap) - 1.0
    return soft_cap * bent, 1.0 - bent * bent


def check_operands(
    kernel: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
) -> None:
    """Raise ExecutionError unless these are ``[..., depth]``, ``[vocabulary, depth]`` and int64 ``[...]``, and sane."""
    check_tensor(kernel, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(kernel, "weight", weight, (None, x.shape[-1]), x.dtype, x.device, row_major=False)
    check_tensor(kernel, "target", target, x.shape[:-1], torch.int64, x.device)
    if not 0.0 <= label_smoothing <= 1.0 or z_loss < 0.0 or soft_cap < 0.0:
        raise fail(
            kernel,
            "needs label_smoothing from 0 to 1, and z_loss and soft_cap of at least 0; "
            f"got {label_smoothing}, {z_loss} and {soft_cap}",
        )


def dense_logits(x: torch.Tensor, weight: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """All logits ``[tokens, vocabulary]`` in float32, products of what is given summed in float32."""
    logits = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float() @ weight.float().t()
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def is_chosen(target: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``[tokens, vocabulary]``, true where a token's target is."""
    return target.flatten()[:, None] == torch.arange(vocabulary, device=target.device)
