"""One microbatch's way through a split stage: what F leaves, what I leaves of it, and W at last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ....errors import ExecutionError
from ...frontend.dynamo.halves import Half, StageGraphs
from ...frontend.dynamo.halves_joint import Place, PlaceKind
from .halves_run import Boxed, Compile, without_autocast

__all__ = ["Deferred", "Microbatch", "Program"]

NAMES = ("input_gradient", "weight_gradient")


class Program:
    """The graphs of a stage, ready to run, and the module whose parameters and buffers they read."""

    def __init__(self, graphs: StageGraphs, module: nn.Module, compile: Compile) -> None:
        self.graphs = graphs
        self.module = module
        self.run_forward = compile(graphs.forward.module, "forward")
        halves = (graphs.input_gradient, graphs.weight_gradient)
        runs = [None if half is None else compile(half.module, name) for half, name in zip(halves, NAMES, strict=True)]
        self.run_input_gradient: Boxed | None = runs[0]
        self.run_weight_gradient: Boxed | None = runs[1]
        later = [place for half in halves if half for place in half.takes if isinstance(place, Place)]
        self.read_later = tuple(dict.fromkeys(p for p in later if p.kind in (PlaceKind.PARAMETER, PlaceKind.BUFFER)))

    def own(self, place: Place) -> torch.Tensor:
        """A parameter or buffer as it is now: it may be another tensor than it was, gathered by fully_shard."""
        path, _, name = place.name.rpartition(".")
        found: torch.Tensor = getattr(self.module.get_submodule(path), name)
        if is_traceable_wrapper_subclass(found):
            raise ExecutionError(
                f"{place.name} of {type(self.module).__name__} is a {type(found).__name__} when a graph reads it",
                hint="fully_shard must have gathered it: leave it so from F to W, set_reshard_after_backward(False)",
            )
        return found

    def arguments(self, half: Half, given: Mapping[Any, torch.Tensor]) -> list[torch.Tensor]:
        """What ``half`` takes, of what is ``given`` by place or name, parameters and buffers beside it."""
        return [given[take] if take in given else self.own(take) for take in half.takes]  # type: ignore[arg-type]

    def versions(self) -> tuple[int, ...]:
        """How often what I and W read of the module has been written to."""
        return tuple(self.own(place)._version for place in self.read_later)

    def check(self, versions: tuple[int, ...], held: Mapping[str, tuple[torch.Tensor, int]], phase: str) -> None:
        """Raise ExecutionError if something that ``phase`` reads was written to since it was kept."""
        pairs = zip(self.read_later, versions, strict=True)
        names = [place.name for place, was in pairs if self.own(place)._version != was]
        names += [f"value {name}" for name, (tensor, was) in held.items() if tensor._version != was]
        if names:
            raise ExecutionError(
                f"{names[0]} of {type(self.module).__name__} was modified between its F and its {phase}",
                hint="update weights behind the last W, and do not write in place to a stage's inputs or outputs",
            )


class Microbatch:
    """From F to I; ``take`` gets what W needs."""

    def __init__(self, program: Program, take: Callable[[Deferred], None]) -> None:
        self.program = program
        self.take = take
        self.versions: tuple[int, ...] = ()
        self.held: dict[str, tuple[torch.Tensor, int]] | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is held for I and W."""
        return (tensor for tensor, _ in (self.held or {}).values())

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run F on the tensors among the arguments; the outputs, and nothing else of it, are visible outside."""
        program, graphs = self.program, self.program.graphs
        given = {Place(PlaceKind.INPUT, index=index): tensor for index, tensor in enumerate(tensors)}
        held = {}
        for name, place in graphs.held.items():
            if place is not None:
                value = given[place] if place in given else program.own(place)
                held[name] = value.clone() if place in graphs.updates else value.detach()
        with without_autocast():
            results = list(program.run_forward(program.arguments(graphs.forward, given)))
        held.update(zip(graphs.forward.gives, results[graphs.outputs + len(graphs.updates) :], strict=True))
        for place, value in zip(graphs.updates, results[graphs.outputs :], strict=False):
            (given[place] if place in given else program.own(place)).copy_(value)
        self.held = {name: (held[name], held[name]._version) for name in graphs.held}
        self.versions = program.versions()
        return tuple(output.detach() for output in results[: graphs.outputs])

    def input_gradients(self, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
        """Run I on gradients of the outputs; gradients of the tensors among the arguments."""
        program, graphs = self.program, self.program.graphs
        if self.held is None:
            raise ExecutionError(
                f"the backward of {type(program.module).__name__} ran twice for one microbatch",
                hint="retain_graph has no effect on a split stage: what I alone needs is gone",
            )
        program.check(self.versions, self.held, "I")
        held, self.held = {name: tensor for name, (tensor, _) in self.held.items()}, None
        given: dict[Any, torch.Tensor] = dict(held)
        for index, expected in graphs.output_gradients.items():
            given[Place(PlaceKind.OUTPUT_GRADIENT, index=index)] = _as_expected(gradients[index], expected)
        kept = {name: given[name] for name in graphs.kept if name in held}
        kept.update((name, given[place]) for name, place in graphs.kept.items() if place in given)
        found: list[torch.Tensor | None] = []
        if graphs.input_gradient is not None:
            assert program.run_input_gradient is not None
            arguments = program.arguments(graphs.input_gradient, given)
            held.clear()
            given.clear()
            with without_autocast():
                results = list(program.run_input_gradient(arguments))
            kept.update(zip(graphs.input_gradient.gives, results[len(graphs.input_gradients) :], strict=True))
            by_index = dict(zip(graphs.input_gradients, results, strict=False))
            found = [by_index.get(index) for index in range(graphs.inputs)]
        self.take(Deferred(program, kept, self.versions))
        return tuple(found) or (None,) * graphs.inputs


class Deferred:
    """W of a microbatch: adds to the gradients of the weights when called, once."""

    def __init__(self, program: Program, kept: Mapping[str, torch.Tensor], versions: tuple[int, ...]) -> None:
        self.program = program
        self.versions = versions
        self.kept: dict[str, tuple[torch.Tensor, int]] | None = {n: (t, t._version) for n, t in kept.items()}

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is held for W."""
        return (tensor for tensor, _ in (self.kept or {}).values())

    def __call__(self) -> None:
        """Run W."""
        program, graphs = self.program, self.program.graphs
        if self.kept is None:
            raise ExecutionError(f"W of {type(program.module).__name__} ran twice for one microbatch")
        if graphs.weight_gradient is None:
            self.kept = None
            return
        assert program.run_weight_gradient is not None
        program.check(self.versions, self.kept, "W")
        given, self.kept = {name: tensor for name, (tensor, _) in self.kept.items()}, None
        arguments = program.arguments(graphs.weight_gradient, given)
        given.clear()
        with without_autocast(), torch.no_grad():
            taken = {_key(argument) for argument in arguments}
            gradients = [_owned(gradient, taken) for gradient in program.run_weight_gradient(arguments)]
        weights = [program.own(Place(PlaceKind.PARAMETER, name)) for name in graphs.parameter_gradients]
        with torch.enable_grad():
            total: torch.Tensor = _Accumulate.apply(gradients, *weights)  # type: ignore[no-untyped-call]
            torch.autograd.backward(total)


class _Accumulate(torch.autograd.Function):
    """Hands gradients to autograd, which adds them to ``.grad`` and runs the hooks of parameters, DDP's too."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, start: torch.Tensor) -> Any:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return (None, *gradients)


def _owned(gradient: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """``gradient`` in a storage of its own: autograd makes what it gets ``.grad``, which must not be a message."""
    if gradient.layout is not torch.strided:
        return gradient
    storage = gradient.untyped_storage()
    is_shared = _key(gradient) in taken or storage.nbytes() > gradient.numel() * gradient.element_size()
    taken.add(_key(gradient))
    return gradient.clone() if is_shared else gradient


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_expected(gradient: torch.Tensor | None, expected: torch.Tensor) -> torch.Tensor:
    """A gradient in the layout that the graph was traced with; zeros for none."""
    shape, dtype, device = expected.shape, expected.dtype, expected.device
    if gradient is not None and gradient.stride() == expected.stride() and gradient.dtype == dtype:
        return gradient.detach()
    made = torch.empty_strided(shape, expected.stride(), dtype=dtype, device=device)
    return made.zero_() if gradient is None else made.copy_(gradient)
