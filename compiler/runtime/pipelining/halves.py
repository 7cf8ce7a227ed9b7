"""A pipeline stage whose backward comes in two halves that are graphs: what I alone needs is free when I has run.

torch.distributed.pipelining splits an eager backward by walking the graph of autograd twice, which keeps everything
until W, and beside it the gradients where it stopped. A ``SplitStage`` runs three graphs instead, and gives W to the
runtime through ``dw_builder``::

    stage = SplitStage(block, (x,))  # x as the stage will get it: shape, dtype, requires_grad
    pipe = SplitPipelineStage(stage, index, stages, device)  # a PipelineStage with dw_builder and static metadata
    schedule = _PipelineScheduleRuntime([pipe], microbatches, loss_fn=...)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from ....errors import ExecutionError, OptionError
from ...frontend.dynamo.halves import StageGraphs, split
from .halves_microbatch import Deferred, Microbatch, Program
from .halves_run import Compile, decompositions, eager, inductor

__all__ = ["SplitStage"]


class SplitStage(nn.Module):
    """``module`` as a stage of a pipeline, its backward in two halves.

    Called like ``module``. ``backward`` from its outputs runs I and gives the gradients of the inputs; the gradients
    of the weights are added to ``.grad`` by what ``dw_builder`` returns, which is to be called right behind that
    backward, once: PipelineStage does so. Microbatches may be in flight in any order.

    Without gradients (``torch.no_grad``) it is ``module`` itself. For other shapes, dtypes, training modes, autocast
    states or gradients that are required it is captured again at the first such call.

    Args:
        module: parameters and buffers stay its own; later changes of their values, not of the code, take effect.
        example_inputs: arguments as the stage will get them, with ``requires_grad`` set; no values are used. Without
            them the stage is captured at its first call.
        example_kwargs: those by name.
        compile: run the graphs compiled by Inductor, or by a function that takes a graph and the name of its phase
            ("forward", "input_gradient", "weight_gradient") and returns what runs it on a list of arguments.

    Raises:
        ModelError: the module cannot be traced on the examples, or its backward cannot be split; the message says why.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Sequence[Any] | torch.Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        compile: bool | Compile = False,
    ) -> None:
        super().__init__()
        self.module = module
        self._compile: Compile = (inductor if compile else eager) if isinstance(compile, bool) else compile
        self._is_compiled = bool(compile)
        self._programs: dict[Any, Program] = {}
        self._deferred: Deferred | None = None
        self._flying: weakref.WeakSet[Microbatch | Deferred] = weakref.WeakSet()
        self._example: tuple[tuple[torch.Tensor, ...], StageGraphs] | None = None
        if example_inputs is not None:
            args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
            with torch.enable_grad():
                program = self._program(args, dict(example_kwargs or {}))
            given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self._example = (tuple(_without_values(tensor, tensor.requires_grad) for tensor in given), program.graphs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` returns; behind it the backward is split."""
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        required = any(tensor.requires_grad for tensor in (*tensors, *self.module.parameters()))
        if not torch.is_grad_enabled() or not required:
            return self.module(*args, **kwargs)
        microbatch = Microbatch(self._program(args, kwargs), self._take)
        self._flying.add(microbatch)
        anchor = torch.empty(0, requires_grad=True)  # weights are no operands: autograd would add to their gradients
        outputs = iter(_Split.apply(microbatch, anchor, *tensors))  # type: ignore[no-untyped-call]
        graphs = microbatch.program.graphs
        pairs = zip(graphs.is_tensor, graphs.constants, strict=True)
        return pytree.tree_unflatten([next(outputs) if tensor else leaf for tensor, leaf in pairs], graphs.result)

    def dw_builder(self) -> Callable[[], None]:
        """W of the microbatch whose backward has just run: call what this returns to add to the weights' gradients.

        Raises:
            ExecutionError: no backward has run since the last call.
        """
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            return deferred
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            return lambda: None
        raise ExecutionError(
            f"there is no weight gradient of {self._name} to compute",
            hint="run the backward of the stage's outputs first; each backward has one W",
        )

    def boundary(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Tensors without values, on ``meta``, like the example's positional inputs and what is returned for them.

        Raises:
            OptionError: the stage was made without an example.
        """
        inputs, graphs = self._sample()
        made = enumerate(graphs.examples)
        return inputs, tuple(_without_values(tensor, index in graphs.differentiable) for index, tensor in made)

    def graphs(self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None) -> StageGraphs:
        """The graphs for such arguments, or for the example.

        Raises:
            OptionError: the stage was made without an example, and no arguments are given.
            ModelError: the module cannot be traced on these arguments, or its backward cannot be split.
        """
        if args is None:
            return self._sample()[1]
        with torch.enable_grad():
            return self._program(tuple(args), dict(kwargs or {})).graphs

    def held_bytes(self) -> int:
        """Bytes that microbatches in flight hold between their F, I and W, beside weights; views count as their base.

        Storages that several microbatches hold count once.
        """
        storages = {}
        for part in self._flying:
            for tensor in part.tensors():
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        return sum(storages.values())

    def _sample(self) -> tuple[tuple[torch.Tensor, ...], StageGraphs]:
        if self._example is None:
            raise OptionError(f"{self._name} has no example inputs", hint="SplitStage(module, example_inputs)")
        return self._example

    def _take(self, deferred: Deferred) -> None:
        """Keep what W needs until ``dw_builder`` takes it."""
        if self._deferred is not None:
            raise ExecutionError(
                f"a backward of {self._name} ran, and nobody took its W before the next one",
                hint="give PipelineStage dw_builder=stage.dw_builder, and input_args and output_args: without them it "
                "runs a backward of its own to infer shapes; SplitPipelineStage does so",
            )
        self._deferred = deferred
        self._flying.add(deferred)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are captured again at their first call: graphs belong to this module."""
        fresh: dict[str, Any] = {"_programs": {}, "_deferred": None, "_example": None, "_flying": None}
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flying = weakref.WeakSet()

    @property
    def _name(self) -> str:
        return f"SplitStage({type(self.module).__name__})"

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        key = self._key(args, kwargs)
        try:
            program = self._programs.get(key)
        except TypeError as error:
            raise OptionError(
                f"an argument of {self._name} is neither a tensor nor hashable: {error}",
                hint="arguments are tensors, containers of them, and constants that a graph can be kept for",
            ) from error
        if program is None:
            table = decompositions() if self._is_compiled else None
            program = Program(split(self.module, args, kwargs, decompositions=table), self.module, self._compile)
            self._programs[key] = program
        return program

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All that a graph depends on."""
        leaves, call = pytree.tree_flatten((args, kwargs))
        given = tuple(_kind(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves)
        own = tuple(map(_kind, (*self.module.parameters(), *self.module.buffers())))
        modes = tuple(part.training for part in self.module.modules())
        devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)})
        casts = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in devices)
        return call, given, own, modes, casts


def _without_values(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(requires_grad)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


class _Split(torch.autograd.Function):
    """F forward, I backward."""

    @staticmethod
    def forward(ctx: Any, microbatch: Microbatch, anchor: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.microbatch = microbatch
        ctx.set_materialize_grads(False)
        outputs = microbatch.forward(tensors)
        differentiable = microbatch.program.graphs.differentiable
        ctx.mark_non_differentiable(*(output for i, output in enumerate(outputs) if i not in differentiable))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return (None, None, *ctx.microbatch.input_gradients(gradients))
