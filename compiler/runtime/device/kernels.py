"""Generated kernels, from source to what launches them."""

from __future__ import annotations

from typing import Any

from .program import Program

__all__ = ["load_kernels"]


def load_kernels(program: Program) -> dict[str, Any]:
    """Inductor's launcher of each kernel of ``program``; compiles what its caches on disk do not hold."""
    if not program.kernels:
        return {}
    from torch._inductor.codecache import PyCodeCache

    module = PyCodeCache.load(program.source)
    return {name: _resolved(getattr(module, name)) for name in program.kernels}


def _resolved(kernel: Any) -> Any:
    """What an asynchronous compilation ends with."""
    return kernel.result() if hasattr(kernel, "result") else kernel
