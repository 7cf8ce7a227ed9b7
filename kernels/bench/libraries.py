"""Other people's kernels for the same work, by the names of ours; used where they are installed.

Each entry of `LIBRARIES` builds a function of the launcher's inputs that returns its results, or the first of them.
What a library does not know (a layout, an option of the workload) it may refuse: the bench says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import linear

from ...errors import ExecutionError
from .problem import Problem

__all__ = ["LIBRARIES", "Library"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Library:
    """``build`` makes a function of the launcher's inputs for a problem; ``needs`` names a module or an operator."""

    name: str
    needs: str
    kernels: tuple[str, ...]
    build: Callable[[Problem], Function]

    def missing(self) -> str:
        """Why it cannot be used; empty if it can."""
        if self.needs.startswith("torch."):
            owner: Any = torch
            for part in self.needs.split(".")[1:]:
                owner = getattr(owner, part, None)
            return "" if owner is not None else f"torch {torch.__version__} has no {self.needs}"
        return "" if importlib.util.find_spec(self.needs) is not None else "not installed"


def _liger(problem: Problem) -> Function:
    """Liger Kernel (arXiv 2410.10989)."""
    build: Callable[[Problem], Function] = globals()[f"_liger_{problem.kernel.name}"]
    return build(problem)


def _liger_add_rms_norm(problem: Problem) -> Function:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Any:
        out, hidden = LigerFusedAddRMSNormFunction.apply(x, residual, weight, epsilon, 0.0, "llama", False)
        return hidden, out

    return run


def _liger_add_layer_norm(problem: Problem) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> Any:
        hidden = x + residual
        return hidden, LigerLayerNormFunction.apply(hidden, weight, bias, epsilon)

    return run


def _liger_gated_linear(problem: Problem) -> Function:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    functions = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}
    function = _known(functions, problem.inputs["activation"])
    return lambda x, gate, up, activation: function.apply(linear(x, gate.t()), linear(x, up.t()))


def _liger_linear_cross_entropy(problem: Problem) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        soft_cap: float,
    ) -> Any:
        return liger_fused_linear_cross_entropy(
            x.flatten(0, -2),
            weight,
            target.flatten(),
            ignore_index=ignore_index,
            lse_square_scale=z_loss,
            label_smoothing=label_smoothing,
            softcap=soft_cap or None,
        )

    return run


def _liger_rope(problem: Problem) -> Function:
    """It rotates in place, so queries and keys are copied first."""
    from liger_kernel.ops.rope import LigerRopeFunction

    given = problem.inputs
    q = given["q"]
    whole = given["rotary_dim"] == q.shape[-1] and not given["interleaved"] and not given["inverse"]
    if q.dim() != 3 or not whole or given["heads_first"]:
        raise ExecutionError("it rotates halves of whole heads of [tokens, heads, dim] only")

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor | None,
        *options: Any,
    ) -> Any:
        tables = (table if positions is None else table[positions] for table in (cos, sin))
        cosine, sine = (torch.cat((table, table), -1).to(q.dtype)[None] for table in tables)
        heads = (tensor.clone().transpose(0, 1)[None] for tensor in (q, k))
        return tuple(found[0].transpose(0, 1) for found in LigerRopeFunction.apply(*heads, cosine, sine))

    return run


def _known(functions: dict[str, Any], name: str) -> Any:
    if name not in functions:
        raise ExecutionError(f"it has no {name}")
    return functions[name]


def _dense(problem: Problem) -> Function:
    """The weight dequantised once, before anything is timed: four or two times the bytes, and no work on them."""
    given = problem.inputs
    columns, depth = given["scales"].shape[1], given["x"].shape[-1]
    identity = torch.eye(depth, dtype=problem.case.dtype, device=given["x"].device)
    unbiased = {**given, "x": identity, "bias": None}
    weight = problem.kernel.eager(*unbiased.values()).t().contiguous()
    assert weight.shape == (columns, depth)

    def run(x: torch.Tensor, *others: Any) -> Any:
        return linear(x, weight, given["bias"])

    return run


def _int4_packed(problem: Problem) -> Function:
    """PyTorch's own 4-bit product; weights are packed as it wants them before anything is timed."""
    from .._packing import unpack

    given = problem.inputs
    group, depth = given["group"], given["x"].shape[-1]
    integers = unpack(given["packed"], depth).to(torch.uint8)
    nibbles = (integers[:, ::2] << 4 | integers[:, 1::2]).contiguous()
    weight = torch._convert_weight_to_int4pack(nibbles, 8)
    scales = given["scales"]
    zeros = torch.zeros_like(scales) if given["zeros"] is None else (8 - given["zeros"].to(scales.dtype)) * scales
    both = torch.stack((scales, zeros), -1).contiguous()

    def run(x: torch.Tensor, *others: Any) -> Any:
        out = torch._weight_int4pack_mm(x.flatten(0, -2), weight, group, both)
        return (out if given["bias"] is None else out + given["bias"]).view(*x.shape[:-1], -1)

    return run


def _bounds(ends: torch.Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


def _loop(problem: Problem) -> Function:
    """One product of the vendor's library for each expert, its rows known beforehand: no wait for counts."""
    bounds: Sequence[tuple[int, int]] = _bounds(problem.inputs["ends"])

    def run(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            return torch.cat([x[a:b] @ weight[expert] for expert, (a, b) in enumerate(bounds)])
        out = x.new_empty(x.shape[0], weight.shape[-1])
        for expert, (a, b) in enumerate(bounds):
            if b > a:
                torch.mm(x[a:b], weight[expert], out=out[a:b])
        return out

    return run


def _grouped(problem: Problem) -> Function:
    return lambda x, weight, ends: torch._grouped_mm(x, weight, offs=ends)


def _flash_attention(problem: Problem) -> Function:
    """FlashAttention 3 (arXiv 2407.08608) over pages."""
    from flash_attn_interface import flash_attn_with_kvcache

    given = problem.inputs
    window = (given["window"] - 1, 0) if given["window"] else (-1, -1)

    def run(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *others: Any) -> Any:
        return flash_attn_with_kvcache(
            q[:, None],
            keys,
            values,
            cache_seqlens=given["lengths"],
            page_table=given["page_table"],
            softmax_scale=given["scale"],
            causal=True,
            window_size=window,
            softcap=given["soft_cap"],
        )[:, 0]

    return run


#: All that compute what a kernel does are measured.
LIBRARIES: tuple[Library, ...] = (
    Library(
        "Liger",
        "liger_kernel",
        ("add_rms_norm", "add_layer_norm", "gated_linear", "linear_cross_entropy", "rope"),
        _liger,
    ),
    Library("cuBLAS in the inputs' dtype", "torch.mm", ("w4a16_linear", "w8a16_linear"), _dense),
    Library("torch._weight_int4pack_mm", "torch._weight_int4pack_mm", ("w4a16_linear",), _int4_packed),
    Library("cuBLAS loop", "torch.mm", ("grouped_linear",), _loop),
    Library("torch._grouped_mm", "torch._grouped_mm", ("grouped_linear",), _grouped),
    Library("FlashAttention 3", "flash_attn_interface", ("paged_decode_attention",), _flash_attention),
)
