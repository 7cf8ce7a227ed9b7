"""What a kernel's file hands over: a ``Kernel``, with the PyTorch operators made of its launcher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..compiler.graph import Graph
from ._checks import fail
from ._configs import Configs
from ._match import Cost, Match

__all__ = ["Kernel", "Workload", "normal"]

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A size that matters: ``name`` says where it is from, ``sizes`` are keywords of ``arguments`` and ``cost``."""

    name: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One fused kernel: how it is found in a graph, what it computes, what it costs, and how it is launched.

    ``launch(inputs..., scalars..., *, outputs..., config=None)`` writes its keyword tensors. ``allocate(inputs...,
    scalars...)`` checks them and makes those tensors, in order. ``reference`` takes the same and returns, as a tuple,
    what the launch writes but for ``scratch``, by plain PyTorch with the kernel's roundings. ``eager`` takes the same
    and says it as a user of PyTorch would: the benchmark's baseline. ``mutates`` are inputs that are written, too; the
    reference returns their new versions last. ``arguments(dtype, device, seed, **sizes)`` makes random inputs and
    scalars by name; ``cost(dtype, **sizes)`` says what a launch does.

    Making one registers ``opweave::<name>``, its functional ``operator``, which returns new tensors, and
    ``opweave::<name>_out``, which writes given ones. Their schemas are read off the annotations of ``launch``, which
    must be such as ``torch.library.infer_schema`` takes. On a CPU without Triton's interpreter both compute the
    reference.
    """

    name: str
    launch: Callable[..., None]
    allocate: Callable[..., Tensors]
    reference: Callable[..., Tensors]
    eager: Callable[..., Any]
    cost: Callable[..., Cost]
    matches: Callable[[Graph], tuple[Match, ...]]
    arguments: Callable[..., dict[str, Any]]
    workloads: tuple[Workload, ...]
    dtypes: tuple[torch.dtype, ...]
    configs: Configs
    scratch: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    operator: Any = field(init=False, repr=False)
    out_operator: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator", _functional(self))
        object.__setattr__(self, "out_operator", _writing(self))
        for name in (self.name, f"{self.name}_out"):  # as PyTorch's flop counter, and our predictions, count them
            flop_registry[getattr(torch.ops.opweave, name)] = self._flops

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the launcher's inputs and scalars, in order."""
        return _parameters(self.launch, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the launcher's outputs in order, scratch tensors included."""
        return tuple(n for n in _parameters(self.launch, inspect.Parameter.KEYWORD_ONLY) if n != "config")

    @property
    def results(self) -> tuple[str, ...]:
        """Names of what ``operator`` returns: outputs without scratch, then new versions of what it mutates."""
        return (*(name for name in self.written if name not in self.scratch), *self.mutates)

    @property
    def is_differentiable(self) -> bool:
        """Whether autograd knows a backward of ``operator``."""
        return getattr(self.operator, "_backward_fn", None) is not None

    def _flops(self, *arguments: Any, out_val: Any = None, **named: Any) -> int:
        """Multiplications and additions of matrix products and the like: those that ``eager`` has, by its shapes."""
        defaults = {p.name: p.default for p in inspect.signature(self.launch).parameters.values()}
        given = {**defaults, **dict(zip(self.inputs, arguments, strict=False)), **named}
        inputs = _without_memory([given[name] for name in self.inputs])
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.eager(*inputs)
        except Exception:  # eager code that looks at values has no count without them; bytes decide the time then
            return 0
        return int(counter.get_total_flops())

    def __call__(self, *inputs: Any) -> Any:
        """``operator``, which autograd knows where the kernel has a backward: one tensor, or a tuple."""
        return self.operator(*inputs)


def normal(device: str, seed: int) -> Callable[..., torch.Tensor]:
    """Draws float32 tensors of the shapes it is called with, the same for the same seed; on ``meta``, only shapes."""
    if device == "meta":
        return lambda *shape: torch.empty(shape, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def _parameters(function: Callable[..., Any], kind: Any) -> tuple[str, ...]:
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is kind)


def _launches(tensors: Sequence[Any]) -> bool:
    """Whether Triton can run on these tensors; else the reference computes."""
    return triton.knobs.runtime.interpret or any(isinstance(t, torch.Tensor) and t.is_cuda for t in tensors)


def _without_memory(inputs: Sequence[Any]) -> list[Any]:
    """On ``meta``, with the same strides, which ``.to`` would not keep."""

    def without(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")

    return [without(item) for item in inputs]


def _functional(kernel: Kernel) -> Any:
    """``opweave::<name>(inputs) -> results``."""
    first_mutated = {name: kernel.inputs.index(name) for name in kernel.mutates}

    def run(*inputs: Any) -> Any:
        if _launches(inputs):
            copies = list(inputs)
            for index in first_mutated.values():
                copies[index] = inputs[index].clone()
            made = dict(zip(kernel.written, kernel.allocate(*inputs), strict=True))
            kernel.launch(*copies, **made)
            results = [made[name] for name in kernel.written if name not in kernel.scratch]
            results += [copies[index] for index in first_mutated.values()]
        else:
            kernel.allocate(*_without_memory(inputs))  # checks them
            results = [*kernel.reference(*inputs)]
        return results[0] if len(results) == 1 else tuple(results)

    def fake(*inputs: Any) -> Any:
        made = dict(zip(kernel.written, kernel.allocate(*inputs), strict=True))
        results = [made[name] for name in kernel.written if name not in kernel.scratch]
        results += [torch.empty_like(inputs[index]) for index in first_mutated.values()]
        return results[0] if len(results) == 1 else tuple(results)

    returns = torch.Tensor if len(kernel.results) == 1 else tuple[(torch.Tensor,) * len(kernel.results)]  # type: ignore[misc]
    parameters = [p for p in inspect.signature(kernel.launch).parameters.values() if p.name in kernel.inputs]
    operator = _register(kernel, kernel.name, run, parameters, returns, ())
    operator.register_fake(fake)
    return operator


def _writing(kernel: Kernel) -> Any:
    """``opweave::<name>_out(inputs, outputs) -> ()``."""
    count = len(kernel.inputs)

    def run(*arguments: Any) -> None:
        inputs, outputs = arguments[:count], arguments[count:]
        if _launches(inputs):
            kernel.launch(*inputs, **dict(zip(kernel.written, outputs, strict=True)))
            return
        fake(*arguments)
        given = dict(zip((*kernel.inputs, *kernel.written), arguments, strict=True))
        for name, value in zip(kernel.results, kernel.reference(*inputs), strict=True):
            given[name].copy_(value)

    def fake(*arguments: Any) -> None:
        inputs, outputs = arguments[:count], arguments[count:]
        expected = kernel.allocate(*_without_memory(inputs))
        for name, given, made in zip(kernel.written, outputs, expected, strict=True):
            if (given.shape, given.dtype, given.stride()) != (made.shape, made.dtype, made.stride()):
                wanted = f"{list(made.shape)} of {made.dtype} with strides {list(made.stride())}"
                raise fail(
                    kernel.name,
                    f"needs {name} {wanted}; got {list(given.shape)} of {given.dtype} with {list(given.stride())}",
                )

    parameters = [
        p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD, default=inspect.Parameter.empty)
        for p in inspect.signature(kernel.launch).parameters.values()
        if p.name != "config"
    ]
    mutated = (*kernel.mutates, *kernel.written)
    operator = _register(kernel, f"{kernel.name}_out", run, parameters, None, mutated)
    operator.register_fake(fake)
    return operator


def _register(
    kernel: Kernel,
    name: str,
    run: Callable[..., Any],
    parameters: Sequence[inspect.Parameter],
    returns: Any,
    mutates: Sequence[str],
) -> Any:
    """A custom operator whose schema has ``parameters``, with the types that ``launch`` gives them."""
    types = inspect.get_annotations(kernel.launch, eval_str=True)
    annotated = [p.replace(annotation=types[p.name]) for p in parameters]

    def prototype(*arguments: Any) -> Any:
        raise NotImplementedError

    prototype.__signature__ = inspect.Signature(annotated, return_annotation=returns)  # type: ignore[attr-defined]
    prototype.__annotations__ = {**{p.name: p.annotation for p in annotated}, "return": returns}
    schema = torch.library.infer_schema(prototype, mutates_args=tuple(mutates))
    return torch.library.custom_op(f"opweave::{name}", run, mutates_args=tuple(mutates), schema=schema)
