"""Takes figures on a GPU: milliseconds with a cold cache, bytes at the peak, and what the device does at most.

Times are those of ``triton.testing.do_bench``: events around each call, the L2 cache overwritten before it. Where a
step can be captured it is timed as the replay of a CUDA graph, so that what Python takes between launches counts for
nobody; a step that waits for the device on its way is called as it is.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton

from ...errors import ExecutionError
from .roofline import Roofline

__all__ = ["Clock", "Gpu", "Quantiles", "Step", "quantiles"]

Step = Callable[[], Any]

COPY_BYTES = 1 << 30
MATRIX = 8192
CALIBRATION_MS = 200.0


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds that 20 %, 50 % and 80 % of the calls took at most."""

    p20: float
    p50: float
    p80: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Of one call's times, or more."""
    ordered = torch.tensor(list(samples), dtype=torch.float64)
    return Quantiles(*torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


class Clock(Protocol):
    """What the bench needs of a device; tests have one without a GPU."""

    device: torch.device
    name: str

    def now(self) -> float:
        """Seconds, for the budget."""

    def captured(self, step: Step) -> tuple[Step, str]:
        """What to time instead of ``step``, and what to note about it."""

    def milliseconds(self, step: Step, ms: float) -> list[float]:
        """Times of single calls, as many as fill ``ms``, at least one."""

    def peak_bytes(self, step: Step) -> int:
        """The most bytes that are allocated during a call beyond those before; what it returns is among them."""

    def finish(self) -> None:
        """Wait until everything is done that was begun. Raises what went wrong on the device."""

    def forget(self) -> None:
        """Release memory that nothing refers to."""

    def measured(self) -> Roofline:
        """What the device does at most, by a large copy and large matrix products."""


class Gpu:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ExecutionError(f"times are taken on a CUDA device, not on {device}")
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        torch.cuda.set_device(device)

    def now(self) -> float:
        """As `Clock`."""
        return time.monotonic()

    def captured(self, step: Step) -> tuple[Step, str]:
        """As `Clock`."""
        if not self._runs_without_waiting(step):
            return step, "waits for the device: not captured"
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
            self.finish()
        except RuntimeError as error:
            self.finish()
            return step, f"not captured: {_first_line(error)}"
        return graph.replay, ""

    def _runs_without_waiting(self, step: Step) -> bool:
        """Whether the host never waits for the device in ``step``: what does cannot be captured."""
        step()
        self.finish()
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
                step()
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            self.finish()
        return True

    def milliseconds(self, step: Step, ms: float) -> list[float]:
        """As `Clock`."""
        samples = triton.testing.do_bench(step, warmup=max(ms / 4, 1), rep=ms, return_mode="all")
        return [float(sample) for sample in samples]

    def peak_bytes(self, step: Step) -> int:
        """As `Clock`."""
        self.forget()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = step()
        self.finish()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak

    def finish(self) -> None:
        """As `Clock`."""
        torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """As `Clock`."""
        gc.collect()
        torch.cuda.empty_cache()

    def measured(self) -> Roofline:
        """As `Clock`."""
        bytes_per_s = self._copy_rate()
        rates = {kind: self._product_rate(kind) for kind in (torch.bfloat16, torch.float16, torch.float32)}
        self.forget()
        by_name = {str(kind).removeprefix("torch."): rate for kind, rate in rates.items()}
        return Roofline("measured", bytes_per_s, {"default": rates[torch.float32], **by_name})

    def _copy_rate(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        free, _ = torch.cuda.mem_get_info(self.device)
        source = torch.empty(min(COPY_BYTES, free // 8), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        ms = quantiles(self.milliseconds(lambda: target.copy_(source), CALIBRATION_MS)).p50
        return 2e3 * source.nbytes / ms

    def _product_rate(self, dtype: torch.dtype) -> float:
        """Flops a second of a large product by the vendor's library; float32 without tf32."""
        size = MATRIX if dtype.itemsize == 2 else MATRIX // 2
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        ms = quantiles(self.milliseconds(lambda: torch.mm(left, right, out=out), CALIBRATION_MS)).p50
        return 2e3 * size**3 / ms


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:100] if text else type(error).__name__
