"""The backend: Inductor's front half around compilers of ours.

``compile_fx`` is Inductor's own entry. It runs AOTAutograd with Inductor's decompositions, passes and partitioner, and
calls an ``inner_compile`` for each forward, backward or inference graph: ours lowers the graph to a ``Program``, plans
it, and returns what runs it (tier T1). Where a graph cannot be recorded, stock Inductor compiles it in our order (T0).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch._inductor.compile_fx import compile_fx

from ....errors import Infeasible, OptionError
from ....hw_models.model import HardwareModel
from ...runtime.device.host import HostMemory
from .fallbacks import Fallbacks
from .inner import Inner, Planners
from .options import MODES, BackendOptions
from .planned import LOADING
from .report import Reports
from .retarget import retarget
from .traced import copied, device_of
from .training import ATTEMPTS, UNLIMITED, step_bytes

__all__ = ["FORMAT", "Backend"]

log = logging.getLogger("opweave.backend")
_compiler_config: Any = torch.compiler.config

#: Changes whenever what the cache holds would be read differently.
FORMAT = 2


@dataclass
class Backend:
    """Compiles Dynamo's graphs; keeps reports of them and counts of fallbacks."""

    planners: Planners
    version: str
    reports: Reports = field(default_factory=Reports)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)
    _numbers: Any = field(default_factory=itertools.count)
    #: By device and options, as long as a graph uses one: graphs of one model share the copies of its weights.
    _memories: weakref.WeakValueDictionary[tuple[torch.device, str], HostMemory] = field(
        default_factory=weakref.WeakValueDictionary
    )

    def __call__(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: BackendOptions
    ) -> Callable[..., Any]:
        """A function of the graph's flat inputs.

        Raises:
            Infeasible: no plan holds the memory limit.
            ExecutionError: a fallback would be needed, and the options are strict.
            OptionError: the option ``device`` is for another model: one with gradients, or on a device already.
            ModelError: what works on the host only cannot run on that device.
        """
        if options.overlapping is not None and options.kernels not in ("auto", "off"):
            raise OptionError(
                f"overlap does not go with kernels={options.kernels!r}: an overlapped graph is Inductor's",
                hint="leave out 'kernels'",
            )
        if options.overlapping is not None and (options.memory_limit is not None or options.device is not None):
            raise OptionError(
                "overlap does not go with memory_limit or device",
                hint="options={'overlap': {'memory_limit': '8GiB'}} bounds what an overlapped graph has alive",
            )
        if options.device is not None:
            return self._hosted(module, inputs, options)
        machine = self.planners.machine(device_of(module, inputs), options)
        limit = options.limit_bytes(machine.scratchpad_memory.capacity_bytes)
        if limit is None:
            return self._compiled(module, inputs, self._inner(options, machine).cutting())
        return self._within(module, inputs, self._inner(options, machine, limit))

    def _inner(
        self,
        options: BackendOptions,
        machine: HardwareModel,
        limit: int | None = None,
        memory: HostMemory | None = None,
    ) -> Inner:
        number = next(self._numbers)
        return Inner(self.planners, self.reports, self.fallbacks, options, number, machine, limit, memory=memory)

    def _hosted(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: BackendOptions
    ) -> Callable[..., Any]:
        """For a model in host memory: the device does the work, within the limit or what the device has."""
        device = torch.device(options.device or "")
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        module, inputs = retarget(module, inputs, device)
        machine = self.planners.machine(device, options)
        capacity = machine.scratchpad_memory.capacity_bytes
        limit = options.limit_bytes(capacity)
        memory = self._memories.setdefault((device, options.key), HostMemory(device))
        inner = self._inner(options, machine, capacity if limit is None else limit, memory)
        return self._compiled(module, inputs, inner)

    def _compiled(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], inner: Inner, tag: str = ""
    ) -> Callable[..., Any]:
        with ExitStack() as stack:
            stack.enter_context(_compiler_config.patch(cache_key_tag=_cache_tag(inner, self.version) + tag))
            stack.enter_context(_functorch_settings(inner.options))
            token = LOADING.set(inner)
            stack.callback(LOADING.reset, token)
            module = inner.differentiable(module)
            settings = {**MODES[inner.options.mode], **inner.settings}
            compiled: Any = compile_fx(module, inputs, inner_compile=inner, config_patches=settings)
        if not tag:
            inner.settle()
        return compiled  # type: ignore[no-any-return] # for a graph of Dynamo's, always a function

    def _within(self, module: torch.fx.GraphModule, inputs: Sequence[Any], inner: Inner) -> Callable[..., Any]:
        """The first attempt that holds the limit: ever less is saved between the halves of a training step."""
        assert inner.limit is not None
        saved_limit, least, lowest, reason = UNLIMITED, UNLIMITED, 0, ""
        for number in range(ATTEMPTS):
            attempt = inner.saving(saved_limit)
            try:
                compiled = self._compiled(copied(module), inputs, attempt, f" saved {saved_limit}")
            except Infeasible as error:
                answer = attempt.partitioned
                if answer is None:
                    if saved_limit == UNLIMITED:  # no graph of a training step
                        raise
                    saved_limit = lowest = error.required_bytes  # so much has to be saved
                    continue
                needed, saved, reason = error.required_bytes, answer.recount.kept_bytes, f": {error.message}"
            else:
                needed = step_bytes(attempt.reports) if any(r.phase == "backward" for r in attempt.reports) else 0
                least = min(least, needed)
                if needed <= inner.limit:
                    attempt.settle()
                    return compiled
                saved = max(report.saved_bytes for report in attempt.reports)
            log.info("saving %d bytes between forward and backward, a step needs %d", saved, needed)
            if min(saved, saved_limit) <= lowest:
                break
            saved_limit = min(saved, saved_limit) - (needed - inner.limit)
            if number >= ATTEMPTS - 3:  # small steps have not led there: the last ones save as little as can be
                saved_limit = lowest
            saved_limit = max(saved_limit, lowest)
        least = min(least, self._least_step(module, inputs, inner, lowest))
        raise Infeasible(
            f"a training step within {inner.limit:,} bytes was not found; the least found needs {least:,}{reason}",
            required_bytes=least,
            available_bytes=inner.limit,
            hint="parameters, inputs and outputs stay on the device: a smaller batch, or a larger limit",
        )

    def _least_step(self, module: torch.fx.GraphModule, inputs: Sequence[Any], inner: Inner, lowest: int) -> int:
        """Bytes of a step with no limit but the device's, everything saved or as little as can be: so much works."""
        capacity, least = inner.machine.scratchpad_memory.capacity_bytes, UNLIMITED
        for saved in (UNLIMITED, lowest):
            attempt = dataclasses.replace(inner.saving(saved), limit=capacity)
            try:
                self._compiled(copied(module), inputs, attempt, f" least {saved}")
            except Infeasible:  # more has to be saved, or the device is too small
                continue
            least = min(least, step_bytes(attempt.reports))
        return least


def _cache_tag(inner: Inner, version: str) -> str:
    machine = hashlib.sha256(msgspec.json.encode(inner.machine)).hexdigest()[:16]  # a file of it may have changed
    own = f"opweave {version} format {FORMAT} options {inner.options.key} machine {machine}"
    return f"{torch.compiler.config.cache_key_tag} {own}"


def _functorch_settings(options: BackendOptions) -> Any:
    """Entries of the cache hold our objects; a backward graph is compiled, and stored, with its forward graph."""
    from torch._functorch import config

    # Ranks that are to be compared all compile: one that found its graph kept would leave the others waiting.
    kept = options.cache and not (options.overlapping is not None and options.overlapping.check_ranks)
    return config.patch(
        bundled_autograd_cache=kept,
        enable_autograd_cache=kept and config.enable_autograd_cache,
        force_non_lazy_backward_lowering=True,
    )
