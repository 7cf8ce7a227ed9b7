"""What launchers refuse: wrong shapes, dtypes, layouts and devices, and outputs that overlap anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import ExecutionError

__all__ = ["FLOATS", "check_apart", "check_device", "check_tensor", "dtype_name", "fail"]

#: The dtypes that most kernels take; arithmetic is in float32 for all of them.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name without its prefix: ``float32``."""
    return str(dtype).removeprefix("torch.")


def fail(kernel: str, message: str, hint: str = "") -> ExecutionError:
    """The error that a launcher raises, naming its kernel."""
    return ExecutionError(f"kernel {kernel} {message}", hint=hint)


def check_tensor(
    kernel: str,
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Collection[torch.dtype],
    device: torch.device,
    *,
    row_major: bool = True,
) -> None:
    """Raise ExecutionError unless ``tensor`` has this shape (``None`` is any extent), dtype, device and layout."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    fits = len(tensor.shape) == len(shape) and all(
        wanted is None or extent == wanted for extent, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in allowed or tensor.device != device:
        wanted_shape = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise fail(
            kernel,
            f"needs {name} [{wanted_shape}] of {', '.join(map(dtype_name, allowed))} on {device}; "
            f"got {list(tensor.shape)} of {dtype_name(tensor.dtype)} on {tensor.device}",
        )
    if row_major and not tensor.is_contiguous():
        raise fail(
            kernel,
            f"needs {name} row-major; {list(tensor.shape)} has strides {list(tensor.stride())}",
            hint="call .contiguous() on inputs; outputs must be allocated row-major",
        )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin


def check_apart(kernel: str, written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Raise ExecutionError if a written tensor shares memory with another argument."""
    everything = {**read, **written}
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in everything.values()):
        return  # they have no memory
    spans = {name: _span(tensor) for name, tensor in everything.items()}
    for output in written:
        begin, end = spans[output]
        for name, (other_begin, other_end) in spans.items():
            if name != output and max(begin, other_begin) < min(end, other_end):
                raise fail(kernel, f"needs {output} in memory of its own; it overlaps {name}")


def _is_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def check_device(kernel: str, function: Any, tensor: torch.Tensor) -> None:
    """Raise ExecutionError unless ``function`` can be launched where ``tensor`` is: on a GPU, or interpreted."""
    if not _is_gpu(tensor) and isinstance(function, triton.JITFunction):
        raise fail(
            kernel,
            f"needs tensors on a CUDA device; they are on {tensor.device}",
            hint="without a GPU, use `reference`, or Triton's interpreter as the tests do",
        )
