"""One output tile of a matrix product: the main loop, and the epilogue, that kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._activations import activated

__all__ = ["finish", "multiplied", "sizes_of"]


def sizes_of(rows: int, *weights: torch.Tensor) -> dict[str, int]:
    """By what configurations of a product ``[rows, depth] @ [depth, columns]`` are chosen.

    ``ragged`` is 1 where some operand cannot be read in vectors of 16 bytes; loads then go element by element and
    through registers, which large tiles have no room for. ``element_bytes`` tells float32, which tensor cores do not
    multiply exactly, from what they do.
    """
    depth, columns = weights[0].shape
    strides = [stride for weight in weights for stride in weight.stride()]
    lengths = [depth, columns, *(stride for stride in strides if stride != 1)]
    element_bytes = weights[0].element_size()
    ragged = any(length * element_bytes % 16 for length in lengths) or any(1 not in w.stride() for w in weights)
    sizes = {"rows": rows, "columns": columns, "depth": depth}
    return {**sizes, "element_bytes": element_bytes, "ragged": int(ragged)}


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def multiplied(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    stride_k: tl.constexpr,
    stride_n: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    block_k: tl.constexpr,
) -> tl.tensor:
    """``x[row] @ weight[:, column]``, summed in float32.

    ``x`` is row-major ``[rows, depth]``, ``weight`` ``[depth, columns]`` has any strides; ``row`` and ``column`` are
    blocks of indices, of which those outside read nothing and give zero. Strides are constants so that the compiler
    knows along which of the two it can read vectors, and how long they can be.
    """
    lane = tl.arange(0, block_k)
    x_pointers = x_pointer + row.to(tl.int64)[:, None] * depth + lane[None, :]
    weight_pointers = weight_pointer + lane.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_n
    has_row = (row < rows)[:, None]
    has_column = (column < columns)[None, :]
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for first in range(0, depth, block_k):
        has_depth = lane < depth - first
        x = tl.load(x_pointers, mask=has_row & has_depth[None, :], other=0.0)
        weight = tl.load(weight_pointers, mask=has_depth[:, None] & has_column, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_pointers += block_k
        weight_pointers += block_k * stride_k
    return total


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def finish(
    value: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    bias_pointer: tl.tensor,
    mean_pointer: tl.tensor,
    variance_pointer: tl.tensor,
    gamma_pointer: tl.tensor,
    beta_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    out_pointer: tl.tensor,
    epsilon: tl.tensor,
    rows: tl.tensor,
    stride_bias: tl.constexpr,
    columns: tl.constexpr,
    activation: tl.constexpr,
    residual_first: tl.constexpr,
) -> None:
    """Store sums, from column ``first`` on, shifted by the bias, normalised, and activated.

    The residual is added before the activation or after it. Pointers that are None change nothing. ``residual`` and
    ``out`` are row-major ``[rows, columns]``.
    """
    height: tl.constexpr = value.shape[0]
    width: tl.constexpr = value.shape[1]
    if width > 128:  # half by half, or residual and addresses do not fit into registers beside the sums
        half: tl.constexpr = width // 2
        left, right = tl.split(tl.permute(tl.reshape(value, [height, 2, half]), (0, 2, 1)))
        finish(
            left,
            row,
            first,
            bias_pointer,
            mean_pointer,
            variance_pointer,
            gamma_pointer,
            beta_pointer,
            residual_pointer,
            out_pointer,
            epsilon,
            rows,
            stride_bias,
            columns,
            activation,
            residual_first,
        )
        finish(
            right,
            row,
            first + half,
            bias_pointer,
            mean_pointer,
            variance_pointer,
            gamma_pointer,
            beta_pointer,
            residual_pointer,
            out_pointer,
            epsilon,
            rows,
            stride_bias,
            columns,
            activation,
            residual_first,
        )
    else:
        column = first + tl.arange(0, width)
        has_column = column < columns
        scale = tl.full([width], 1.0, tl.float32)
        shift = tl.zeros([width], tl.float32)
        if bias_pointer is not None:
            at_bias = bias_pointer + column.to(tl.int64) * stride_bias
            shift += tl.load(at_bias, mask=has_column, other=0.0).to(tl.float32)
        if mean_pointer is not None:
            variance = tl.load(variance_pointer + column, mask=has_column, other=1.0).to(tl.float32)
            scale = tl.rsqrt(variance + epsilon)
            shift = (shift - tl.load(mean_pointer + column, mask=has_column, other=0.0).to(tl.float32)) * scale
        if gamma_pointer is not None:
            gamma = tl.load(gamma_pointer + column, mask=has_column, other=0.0).to(tl.float32)
            scale *= gamma
            shift *= gamma
        if beta_pointer is not None:
            shift += tl.load(beta_pointer + column, mask=has_column, other=0.0).to(tl.float32)
        value = value * scale[None, :] + shift[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & has_column[None, :]
        if not residual_first:
            value = activated(value, activation)
        if residual_pointer is not None:
            value += tl.load(residual_pointer + at, mask=inside, other=0.0).to(tl.float32)
        if residual_first:
            value = activated(value, activation)
        tl.store(out_pointer + at, value.to(out_pointer.dtype.element_ty), mask=inside)
