"""Compiles kernels for a GPU that is not there, and counts what the machine code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["Resources", "compile_for_hopper", "resources"]


def compile_for_hopper(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, int], *, num_warps: int, aligned: bool = True
) -> Any:
    """The compiled ``kernel`` for sm_90a; ``aligned`` says that every pointer is a multiple of 16 bytes.

    Args:
        kernel: a ``triton.JITFunction``.
        types: Triton's type of each argument by name, such as ``*bf16`` or ``fp32``.
        constants: values of the ``tl.constexpr`` arguments by name.
        num_warps: warps of one program.
        aligned: as PyTorch's allocator makes them.
    """
    index = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    pointers = [name for name, kind in types.items() if kind.startswith("*") and aligned]
    source = ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={index[name]: value for name, value in constants.items()},
        attrs={index[name]: [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


class Resources(NamedTuple):
    """Of one program: registers a thread, bytes of stack a thread, local loads and stores, bytes of shared memory."""

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int


def resources(compiled: Any) -> Resources:
    """Read off the machine code by the ``cuobjdump`` that Triton ships; skips the test where it is missing."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"no cuobjdump to read machine code: {error}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True, timeout=60).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    counts = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Resources(int(counts["REG"]), int(counts["STACK"]), spills, int(compiled.metadata.shared))
