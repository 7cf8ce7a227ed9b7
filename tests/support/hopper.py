"""An H100 for Inductor on a machine without a GPU.

Within `h100`, torch believes in one H100: from fake tensors on ``cuda:0`` Inductor generates the kernels it would
generate there. `compile_kernels` makes machine code of them; under the interpreter (TRITON_INTERPRET=1, see
`tests.support.interpreted`) they run on tensors of the CPU. The names replaced are private to torch and Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo import device_interface
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor import utils as inductor_utils
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import hints, triton_helpers
from torch._prims_common import suggest_memory_format
from torch.utils import _triton as triton_presence
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from opweave.compiler.runtime.device.program import Program

__all__ = ["DEVICE", "compile_kernels", "h100"]

DEVICE = torch.device("cuda", 0)

#: What ``torch.cuda.get_device_properties`` says of an H100 SXM.
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
    uuid="none",
)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **keywords: value


#: What the questions that Inductor asks ``torch.cuda`` and its interface to devices are answered with.
_ANSWERS = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": _PROPERTIES,
    "get_device_capability": (9, 0),
    "get_device_name": _PROPERTIES.name,
    "is_bf16_supported": True,
    "synchronize": None,
    "current_stream": SimpleNamespace(cuda_stream=0),
    "set_device": None,
    "_exchange_device": -1,
    "_maybe_exchange_device": -1,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
}
_MORE_ANSWERS = {
    "get_compute_capability": 90,
    "is_triton_capable": True,
    "exchange_device": -1,
    "maybe_exchange_device": -1,
}


class _OfflineDriver(DriverBase):  # type: ignore[misc] # triton ships no types
    """Names the target; has no device."""

    def __init__(self) -> None:
        self.target = GPUTarget("cuda", 90, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing can be measured without a GPU")


@contextmanager
def h100() -> Iterator[torch.device]:
    """Make Inductor and Triton believe in one H100, the device yielded, until the context ends."""
    with pytest.MonkeyPatch.context() as patch:
        interface = device_interface.CudaInterface
        for name, answer in _ANSWERS.items():
            patch.setattr(torch.cuda, name, _always(answer))
        for name, answer in {**_ANSWERS, **_MORE_ANSWERS}.items():
            patch.setattr(interface, name, staticmethod(_always(answer)), raising=False)
        for name in ("get_device_properties", "current_device"):
            patch.setattr(interface.Worker, name, staticmethod(_always(_ANSWERS[name])))
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", _always(0), raising=False)
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", _cudnn_memory_format)
        patch.setattr(triton_helpers, "set_driver_to_gpu", _always(None))
        patch.setattr(compile_fx, "_warn_tf32_disabled", _always(None), raising=False)  # advice, which tests take ill
        patch.setattr(driver, "_active", _OfflineDriver())
        _forget()
        try:
            with inductor_config.patch(use_static_cuda_launcher=False):  # it keeps no machine code
                yield DEVICE
        finally:
            _forget()


def compile_kernels(program: Program) -> dict[str, Any]:
    """Triton's compiled kernels for sm_90a, in the launch configuration that Inductor tries first, by name.

    Within `h100`, and not under the interpreter.
    """
    assert not knobs.runtime.interpret, "the interpreter compiles nothing"
    sources = _Sources()
    for kernel in program.kernels.values():
        exec(kernel.source, {"async_compile": sources})
    tuners = {name: getattr(PyCodeCache.load(source), name) for name, source in sources.inner.items()}
    return {name: tuner._precompile_config(tuner.configs[0]).kernel for name, tuner in tuners.items()}


class _Sources:
    """Stands for Inductor's asynchronous compiler in the source of a kernel, and keeps what that would compile."""

    def __init__(self) -> None:
        self.inner: dict[str, str] = {}

    def triton(self, name: str, source: str, device_str: str = "cuda") -> None:
        self.inner[name] = source


def _cudnn_memory_format(input_: torch.Tensor, weight: torch.Tensor, backend: object) -> torch.memory_format:
    """What cuDNN makes: channels last where either operand is; torch without CUDA says contiguous."""
    formats = {suggest_memory_format(operand) for operand in (input_, weight)}
    return (formats - {torch.contiguous_format} or formats).pop()


def _forget() -> None:
    """Forget the answers that torch keeps of what devices there are."""
    hints.DeviceProperties.create.cache_clear()
    for module in (triton_presence, inductor_utils):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
