"""What one step of a model takes: seconds, and bytes of memory above what there was before it was first run.

On a GPU, bytes are the caching allocator's: ``allocated`` is ``torch.cuda.max_memory_allocated`` during a step,
``reserved`` ``max_memory_reserved``, which alone sees what a CUDA graph keeps for its replays. On a CPU they are those
of torch's CPU allocator, reported to torch's profiler at each allocation and each release: eager operators, Inductor's
buffers and opweave's arena alike. What C++ kernels take from ``malloc`` for their threads, and what oneDNN and MKL take
for themselves, is in neither; both are the same for all who use these libraries.

Bytes count from the state before the first call, not before the measured one: memory that compiled code keeps between
calls (an arena, the pool of a CUDA graph, copies of weights) is its own.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .worker import Device

__all__ = ["WARM_UP", "Footprint", "calls_for", "described", "footprint", "seconds_of"]

WARM_UP = 3  # steps before anything is measured: CUDA graphs are recorded in the second and replayed from the third on
LINK_BYTES = 1 << 26  # of the copy that measures the link
MARK = "opweave: the measured step"

Step = Callable[[], None]


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one warm step above the state before the first, and seconds that getting warm took.

    ``reserved`` is ``None`` on a CPU, whose allocator keeps nothing. ``compile_s`` is the seconds of the first steps
    less those of as many warm ones.
    """

    allocated: int
    reserved: int | None
    compile_s: float


def seconds_of(step: Step, device: torch.device, calls: int) -> float:
    """Seconds a step takes when ``calls`` of them follow each other: by events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            step()
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop)) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def footprint(step: Step, device: torch.device) -> Footprint:
    """Run ``step`` for the first time, until it is warm, then measure one. Nothing of it may have run before."""
    gc.collect()
    return _footprint_cuda(step, device) if device.type == "cuda" else _footprint_cpu(step)


def _footprint_cuda(step: Step, device: torch.device) -> Footprint:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    compile_s = _warmed(step, device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return Footprint(
        torch.cuda.max_memory_allocated(device) - allocated,
        torch.cuda.max_memory_reserved(device) - reserved,
        compile_s,
    )


def _footprint_cpu(step: Step) -> Footprint:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        compile_s = _warmed(step, torch.device("cpu"))
        gc.collect()
        with torch.profiler.record_function(MARK):
            step()
    events = profiler.profiler.kineto_results.events()
    marked = next(event for event in events if event.name() == MARK)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return Footprint(_peak(changes, marked.start_ns(), marked.end_ns()), None, compile_s)


def _peak(changes: Sequence[tuple[int, int]], begin: int, end: int) -> int:
    """The most bytes alive at a time from ``begin`` to ``end``, given each change and its time."""
    alive, peak, begun = 0, 0, False
    for when, nbytes in changes:
        if when > end:
            break
        if when >= begin and not begun:
            peak, begun = alive, True
        alive += nbytes
        if begun:
            peak = max(peak, alive)
    return peak if begun else alive


def _warmed(step: Step, device: torch.device) -> float:
    """Run the first steps; seconds they took beyond what as many warm ones take."""
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = time.perf_counter() - begin
    warm = seconds_of(step, device, 1)
    return max(total - WARM_UP * warm, 0.0)


def calls_for(step: Step, device: torch.device, seconds: float, most: int = 1000) -> int:
    """How many calls fill ``seconds``, at least one."""
    once = seconds_of(step, device, 1)
    return min(max(1, math.ceil(seconds / max(once, 1e-9))), most)


def described(device: torch.device) -> Device:
    """The device, with the bandwidth of a large copy from the host: pinned memory on a GPU, plain memory on a CPU."""
    on_gpu = device.type == "cuda"
    source = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    copy()
    seconds = min(seconds_of(copy, device, 1) for _ in range(3))
    if not on_gpu:
        return Device("cpu", 0, source.nbytes / seconds)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, properties.total_memory, source.nbytes / seconds)
