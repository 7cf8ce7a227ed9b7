"""Compiles kernels for a GPU that is not there, through their own launchers, and reads what the machine code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from ...errors import ExecutionError
from .. import _checks
from .._configs import HOPPER, Config
from .._kernel import Kernel
from .choices import Choice, noted

__all__ = ["Resources", "choice", "compiled", "compiled_for", "resources"]


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel needs.

    ``registers`` and ``stack_bytes`` are of one thread, ``shared_bytes`` of the program. ``spills`` counts loads and
    stores of registers that did not fit, ``tensor_core`` matrix instructions (HGMMA, and QGMMA for 8-bit types; the
    older HMMA and IMMA elsewhere), ``bulk_copies`` loads and stores by the tensor memory accelerator.
    """

    function: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_core: int
    bulk_copies: int


class _OfflineDriver(DriverBase):  # type: ignore[misc] # triton ships no types
    """Stands for a GPU of one architecture while kernels are compiled and nothing is launched."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return cast(int, self._target.arch)  # Triton keeps what it compiled by device: one for each architecture

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise ExecutionError("there is no GPU to measure on")


@contextmanager
def _compiling(architecture: int, *, really: bool = True) -> Iterator[list[Any]]:
    """Launches inside compile for ``architecture``, or not even that, and run nothing; gives what they compiled."""
    done: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not really:
            return None
        made = run(self, *args, **{**kwargs, "warmup": True})
        done.append(made)
        return made

    with (
        mock.patch.object(triton.runtime.driver, "_active", _OfflineDriver(architecture)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(_checks, "_is_gpu", return_value=True),
    ):
        yield done


def compiled(
    kernel: Kernel,
    sizes: Mapping[str, Any],
    dtype: torch.dtype,
    config: Config | None = None,
    architecture: int = HOPPER,
) -> tuple[Any, ...]:
    """What launching ``kernel`` once for ``sizes`` compiles, one of Triton's compiled kernels a function launched.

    No tensor has memory, so sizes may be as large as they come. Raises what Triton raises where it cannot compile.
    """
    return compiled_for(kernel, kernel.arguments(dtype, "meta", **sizes), config, architecture)


def compiled_for(
    kernel: Kernel, inputs: Mapping[str, Any], config: Config | None = None, architecture: int = HOPPER
) -> tuple[Any, ...]:
    """As `compiled`, for inputs by name, on whatever device they are."""
    outputs = dict(zip(kernel.written, kernel.allocate(*inputs.values()), strict=True))
    with _compiling(architecture) as done:
        kernel.launch(*inputs.values(), **outputs, config=config)
    return tuple({id(item): item for item in done}.values())


def choice(kernel: Kernel, sizes: Mapping[str, Any], dtype: torch.dtype, architecture: int = HOPPER) -> Choice | None:
    """By what ``kernel`` chooses its configuration for such sizes; ``None`` if it makes no choice of its own."""
    inputs = kernel.arguments(dtype, "meta", **sizes)
    outputs = dict(zip(kernel.written, kernel.allocate(*inputs.values()), strict=True))
    with _compiling(architecture, really=False), noted(architecture) as seen:
        kernel.launch(*inputs.values(), **outputs)
    return next((found for found in seen if found.configs is kernel.configs), None)


def resources(made: Any) -> Resources:
    """Read off the machine code by the ``cuobjdump`` that Triton ships.

    Raises:
        ExecutionError: this Triton comes without it.
    """
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise ExecutionError(f"there is no cuobjdump to read machine code with: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True, timeout=60).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    counts = dict(re.findall(r"(REG|STACK):(\d+)", usage))

    def instructions(pattern: str) -> int:
        return len(re.findall(rf"\b(?:{pattern})\b", code))

    return Resources(
        function=cast(str, made.metadata.name),
        registers=int(counts["REG"]),
        stack_bytes=int(counts["STACK"]),
        spills=instructions("LDL|STL"),
        shared_bytes=int(made.metadata.shared),
        tensor_core=instructions("HGMMA|QGMMA|IGMMA|HMMA|IMMA"),
        bulk_copies=instructions("UTMALDG|UTMASTG|UTMAREDG"),
    )
