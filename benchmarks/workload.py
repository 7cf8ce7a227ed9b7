"""What a worker does: build one model of the zoo, run it one way, judge its results, measure its memory."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import opweave
from opweave.errors import ExecutionError, OptionError

from .backend_cases import OURS
from .measuring import described, footprint
from .numerics import Comparison, compare, result
from .worker import Prepared, Provider, Spec
from .zoo import MODELS

__all__ = ["Workload", "checkpoint_blocks", "prepare"]

#: Fields of the backend's reports that are kept, where a report has them.
REPORTED = (
    *("name", "phase", "tier", "kernels", "operators", "fallbacks", "peak_before_bytes", "peak_bytes", "bound_bytes"),
    *("allocated_bytes", "arena_bytes", "held_bytes", "streams", "predicted_s", "lowering_s", "planning_s", "status"),
    *("from_cache", "bound_s", "streamed_bytes", "resident_bytes"),
)
SAMPLE = 1 << 20  # elements of a tensor that are compared, evenly spaced
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # which replay CUDA graphs, whose outputs the next replay overwrites

Results = Mapping[str, Tensor]
Loss = Callable[[tuple[Tensor, ...]], Tensor]


def prepare(spec: Spec) -> tuple[Callable[[], None], torch.device, Prepared]:
    """Get ready to run ``spec``: its step, where it runs, and what was found on the way."""
    load = Workload.of(spec)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in load.tensors()}
    expected = load.references() if spec.check and spec.provider.backend else None
    if spec.provider.checkpointed:
        checkpoint_blocks(load.model)
    call = called(spec.provider, load.model, load.device)
    step = load.step(call, mark=spec.provider.mode in GRAPH_MODES)
    _load_libraries(load.device)
    measured = footprint(step, load.device)
    if spec.provider.on_host and load.device.type == "cuda" and measured.allocated == 0:
        raise ExecutionError(f"{spec.provider.name} ran on the host: nothing was allocated on {load.device}")
    judged = Comparison(True, "", 0.0, 1.0) if expected is None else load.judged(call, *expected)
    reports, device = _reports(spec.provider), described(load.device)
    if load.device.type == "cuda":
        torch.cuda.empty_cache()  # for the workers beside this one
    return step, load.device, Prepared(measured, reports, judged.reason, judged.error, sum(held.values()), device)


class Training(nn.Module):
    """A model with its loss, compiled together: what the loss takes is as much of a step as the model's own memory."""

    def __init__(self, model: nn.Module, objective: Loss) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *inputs: Tensor) -> Tensor:
        """The scalar."""
        return self.objective(self.model(*inputs))


@dataclass(frozen=True, eq=False)
class Workload:
    """A model with its inputs, to be run on ``device``, by an inference or, with a ``loss``, by a training step.

    The loss of a ``Training`` is its only output. ``kinks``: its gradients jump; see ``numerics.compare``.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Loss | None
    device: torch.device
    kinks: bool = False

    @classmethod
    def of(cls, spec: Spec) -> Workload:
        """Build model and inputs, on the host if the provider wants them there."""
        entry, device, dtype = MODELS[spec.model], torch.device(spec.device), getattr(torch, spec.dtype)
        home = torch.device("cpu") if spec.provider.on_host else device
        model = entry.build(spec.size, train=spec.training, device=home, dtype=dtype)
        inputs = entry.inputs(spec.size, device=home, dtype=dtype)
        if not spec.training:
            return cls(model, inputs, None, device)
        return cls(Training(model, entry.loss).train(), inputs, _only, device, entry.kinks)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is there before anything runs."""
        return (*self.model.parameters(), *self.model.buffers(), *self.inputs)

    def step(self, call: Callable[..., Any], *, mark: bool) -> Callable[[], None]:
        """One inference or training step, which keeps nothing; ``mark`` tells torch that the last one's is given up."""

        def infer() -> None:
            if mark:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                call(*self.inputs)

        def train() -> None:
            if mark:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            call(*self.inputs).backward()
            self.model.zero_grad(set_to_none=True)

        return infer if self.loss is None else train

    def references(self) -> tuple[Results, Results]:
        """Eager's results, and those in float64 (float32 for 16 bits), both on the device, of copies of the model."""
        inputs = [tensor.to(self.device) for tensor in self.inputs]
        eager = _sampled(result(copy.deepcopy(self.model).to(self.device), inputs, self.loss))
        narrow = any(parameter.dtype.itemsize == 2 for parameter in self.model.parameters())
        wide = torch.float32 if narrow else torch.float64
        widened = [tensor.to(wide) if tensor.is_floating_point() else tensor for tensor in inputs]
        higher = _sampled(result(copy.deepcopy(self.model).to(self.device, wide), widened, self.loss))
        return eager, {name: tensor.double() for name, tensor in higher.items()}

    def judged(self, call: Callable[..., Any], eager: Results, higher: Results) -> Comparison:
        """The results of ``call`` against the references; buffers have moved on by now and are left out."""
        found = _sampled(result(self.model, self.inputs, self.loss, call=call))
        self.model.zero_grad(set_to_none=True)
        return compare(found, eager, higher, kinks=self.kinks)


def _only(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def called(provider: Provider, model: nn.Module, device: torch.device) -> Callable[..., Any]:
    """``model`` as the provider runs it; may set torch's configuration."""
    from torch._functorch import config

    if provider.activation_budget is not None:
        config.activation_memory_budget = provider.activation_budget
    if not provider.backend:
        return model
    if provider.backend == "accelerate":
        return _offloaded(model, device)
    options: Any = dict(provider.options) or None
    backend: Any = provider.backend if provider.backend != OURS else opweave.backend  # found also where not installed
    compiled: Callable[..., Any] = torch.compile(
        model, backend=backend, mode=provider.mode, options=options, dynamic=False
    )
    return compiled


def _offloaded(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with its weights on the host, fetched module by module when they are called, by accelerate."""
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise OptionError("the package accelerate is not installed", hint="pip install accelerate") from error
    offloaded: nn.Module = accelerate.cpu_offload(model, execution_device=device)
    return offloaded


def checkpoint_blocks(model: nn.Module) -> int:
    """Recompute in the backward pass every block that follows another of its class; returns how many.

    Those are the layers of a transformer and the residual blocks of a network's stages: the innermost lists of two or
    more modules of one class.
    """
    from torch.utils.checkpoint import checkpoint

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and _repeats(m)]
    blocks = [
        block
        for each in lists
        if not any(other is not each and other in set(each.modules()) for other in lists)
        for block in each
    ]
    for block in blocks:
        forward = block.forward

        def recomputed(*args: Any, _forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

        block.forward = recomputed
    return len(blocks)


def _repeats(blocks: nn.ModuleList | nn.Sequential) -> bool:
    return len(blocks) > 1 and len({type(block) for block in blocks}) == 1 and any(map(_is_composite, blocks))


def _is_composite(block: nn.Module) -> bool:
    return any(True for _ in block.children())


def _sampled(results: Results) -> dict[str, Tensor]:
    """At most ``SAMPLE`` evenly spaced elements of each tensor, in host memory; no buffers."""
    kept = {name: tensor for name, tensor in results.items() if not name.startswith("buffer.")}
    return {name: tensor.detach().flatten()[:: 1 + tensor.numel() // SAMPLE].cpu() for name, tensor in kept.items()}


def _load_libraries(device: torch.device) -> None:
    """Have the matrix library take the workspace that it keeps, so that nobody is charged with it."""
    if device.type == "cuda":
        square = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        torch.mm(square, square)


def _reports(provider: Provider) -> tuple[Mapping[str, Any], ...]:
    if provider.backend != OURS:
        return ()
    reports = opweave.backend_reports()
    return tuple({name: getattr(each, name) for name in REPORTED if hasattr(each, name)} for each in reports)
