"""Forward and backward of a module on given inputs as one graph, with a name for each thing that goes in or comes out.

The module runs once, with fake tensors, under AOTAutograd: Python code is decided once, in-place updates become new
values, and what autograd would do becomes nodes behind those of the forward half. Outputs that alias an input or each
other are copied, so that each has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import descriptors
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ....errors import ModelError, OpweaveError

__all__ = ["Decompositions", "JointGraph", "Place", "PlaceKind", "joint_graph"]

Decompositions = Mapping[Any, Callable[..., Any]]


class PlaceKind(Enum):
    """What a graph is given."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    OUTPUT_GRADIENT = "output gradient"


@dataclass(frozen=True)
class Place:
    """One thing that a graph is given: a parameter or buffer by its ``name``, the rest by its ``index``."""

    kind: PlaceKind
    name: str = ""
    index: int = -1


@dataclass(frozen=True)
class JointGraph:
    """A joint graph; nodes are those of ``module.graph``.

    ``places`` says what each placeholder is. ``outputs`` are the tensors among the leaves of what the module returns,
    in order, and ``updates`` the new values of buffers and inputs that the module writes to, by placeholder.
    ``input_gradients`` are by index of the tensor among the inputs, ``parameter_gradients`` by the parameter's name;
    what requires none, or does not reach an output, is missing. ``result`` is the structure of what the module
    returns, and ``constants`` its leaves, ``None`` where a tensor stands; ``is_tensor`` tells the two apart.
    """

    module: fx.GraphModule
    places: Mapping[fx.Node, Place]
    outputs: tuple[fx.Node, ...]
    updates: Mapping[fx.Node, fx.Node]
    input_gradients: Mapping[int, fx.Node]
    parameter_gradients: Mapping[str, fx.Node]
    result: pytree.TreeSpec
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    differentiable: frozenset[int] = field(default_factory=frozenset)


class _Flat(nn.Module):
    """``module`` called with the tensors among its arguments, returning the tensors among its results."""

    def __init__(self, module: nn.Module, call: pytree.TreeSpec, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.leaves = list(leaves)
        self.result: pytree.TreeSpec | None = None
        self.returned: list[Any] = []

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.call)
        returned, self.result = pytree.tree_flatten(self.module(*args, **kwargs))
        taken = {_storage(tensor) for tensor in (*tensors, *self.module.parameters(), *self.module.buffers())}
        outputs = []
        for leaf in returned:
            if isinstance(leaf, torch.Tensor):
                outputs.append(leaf.clone() if _storage(leaf) in taken else leaf)
                taken.add(_storage(leaf))
        self.returned = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in returned]
        self.is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in returned)
        return tuple(outputs)


def joint_graph(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    decompositions: Decompositions | None = None,
) -> JointGraph:
    """The joint graph of ``module(*args, **kwargs)`` in the autocast state that is on.

    Tensors may stand anywhere in the arguments; anything else is fixed as it is. Gradients are those of inputs and
    parameters that require one. The backward half is traced without autocast, as ``Tensor.backward`` is called.

    Raises:
        ModelError: AOTAutograd cannot trace the module; nothing requires a gradient; parameters or inputs are tensor
            subclasses or aliases of each other, or the module writes to what a gradient flows through.
    """
    leaves, call = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    _check_given(module, tensors)
    flat = _Flat(module, call, leaves)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(functorch_config.patch(backward_pass_autocast="off"))
        stack.enter_context(_compiling())
        own = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)  # none is another
        traced = _traced(stack, flat, own, decompositions)
    return _read(traced, flat)


def _traced(
    stack: ExitStack, flat: _Flat, tensors: tuple[torch.Tensor, ...], decompositions: Decompositions | None
) -> fx.GraphModule:
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    name = type(flat.module).__name__
    table = None if decompositions is None else dict(decompositions)
    try:
        made = aot_export_joint_with_descriptors(stack, flat, tensors, decompositions=table)
    except OpweaveError:
        raise
    except Exception as error:  # tracing runs the module, which may raise anything
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"AOTAutograd cannot trace {name} with its backward: {lines[0].strip():.300}",
            hint="run the module on the same inputs first; values may not decide shapes or control flow, and tensors "
            "that modules hold must be parameters or buffers",
        ) from error
    traced: fx.GraphModule = made.graph_module
    return traced


def _read(traced: fx.GraphModule, flat: _Flat) -> JointGraph:
    """What goes in and comes out, by torch's descriptions."""
    places = {node: _place(node, flat) for node in traced.graph.find_nodes(op="placeholder")}
    by_description = {node.meta["desc"]: node for node in places}
    output = traced.graph.output_node()
    assert flat.result is not None
    outputs: dict[int, fx.Node] = {}
    updates: dict[fx.Node, fx.Node] = {}
    input_gradients: dict[int, fx.Node] = {}
    parameter_gradients: dict[str, fx.Node] = {}
    for made, description in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        match description:
            case descriptors.PlainAOTOutput(idx=index):
                outputs[index] = made
            case descriptors.InputMutationAOTOutput(mutated_input=written):
                updates[by_description[written]] = made
            case _ if made is None:  # the gradient of what requires none, or is not used
                pass
            case descriptors.GradAOTOutput(grad_of=of):
                place = places[by_description[of]]
                if place.kind is PlaceKind.INPUT:
                    input_gradients[place.index] = made
                elif place.kind is PlaceKind.PARAMETER:
                    parameter_gradients[place.name] = made
            case _:
                raise _unreadable(flat, f"it returns {description}")
    differentiable = frozenset(p.index for p in places.values() if p.kind is PlaceKind.OUTPUT_GRADIENT)
    if not differentiable:
        raise ModelError(
            f"nothing that {type(flat.module).__name__} returns requires a gradient",
            hint="let parameters or inputs require gradients, or run it under torch.no_grad()",
        )
    return JointGraph(
        traced,
        places,
        tuple(outputs[index] for index in range(len(outputs))),
        updates,
        input_gradients,
        parameter_gradients,
        flat.result,
        tuple(flat.returned),
        flat.is_tensor,
        differentiable,
    )


def _place(node: fx.Node, flat: _Flat) -> Place:
    description = node.meta.get("desc")
    match description:
        case descriptors.ParamAOTInput(target=name):
            return Place(PlaceKind.PARAMETER, name.removeprefix("module."))
        case descriptors.BufferAOTInput(target=name):
            return Place(PlaceKind.BUFFER, name.removeprefix("module."))
        case descriptors.PlainAOTInput(idx=index):
            return Place(PlaceKind.INPUT, index=index)
        case descriptors.TangentAOTInput(output=descriptors.PlainAOTOutput(idx=index)):
            return Place(PlaceKind.OUTPUT_GRADIENT, index=index)
        case descriptors.TangentAOTInput(output=descriptors.InputMutationAOTOutput()):
            raise _unreadable(flat, "it writes to an input or buffer through which a gradient flows")
    raise _unreadable(flat, f"it is given {description or node.name}")


def _unreadable(flat: _Flat, what: str) -> ModelError:
    return ModelError(
        f"the backward of {type(flat.module).__name__} cannot be split into input and weight gradients: {what}",
        hint="inputs may not be views of each other; write in place only to buffers that need no gradient",
    )


def _check_given(module: nn.Module, tensors: Sequence[torch.Tensor]) -> None:
    """Plain tensors only, none of them a view of another, and modules that do not manage their own parameters."""
    named = (*module.named_parameters(), *module.named_buffers(), *((f"input {i}", t) for i, t in enumerate(tensors)))
    for name, tensor in named:
        if is_traceable_wrapper_subclass(tensor):
            raise ModelError(
                f"{name} of {type(module).__name__} is a {type(tensor).__name__}; a stage is split on plain tensors",
                hint="apply fully_shard to the SplitStage, not inside it; tensor parallelism needs torch's own split",
            )
    compiled = [part for part in module.modules() if getattr(part, "_compiled_call_impl", None) is not None]
    if compiled or any(isinstance(part, torch._dynamo.OptimizedModule) for part in module.modules()):
        raise ModelError(
            f"{type(module).__name__} is compiled by torch.compile, whose backward is one graph",
            hint="split first, then compile: SplitStage(module, inputs, compile=True)",
        )
    managed = [
        type(part).__name__ for part in module.modules() if hasattr(part, "unshard") and hasattr(part, "reshard")
    ]
    managed += [
        type(part).__name__ for part in module.modules() if isinstance(part, nn.parallel.DistributedDataParallel)
    ]
    if managed:
        raise ModelError(
            f"{managed[0]} inside {type(module).__name__} gathers or reduces in hooks, which a graph does not have",
            hint="split first, then wrap: fully_shard(SplitStage(...)) or DistributedDataParallel(SplitStage(...))",
        )


@contextmanager
def _compiling() -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` say so: models ask it before they look at values."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
