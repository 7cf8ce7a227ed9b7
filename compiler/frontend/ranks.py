"""What one rank of many computes, captured in a single process: a world of fake ranks, and graphs at the AOT level.

Fake ranks (PyTorch's ``fake`` process group) have groups, sizes and numbers, and collectives that return at once with
meaningless values: enough to trace any rank of a model, not to run it. With fake tensors, a model of any size is
traced without memory::

    with fake_ranks(8):
        mesh = init_device_mesh("cpu", (8,))
        with FakeTensorMode():
            module = parallelize_module(Model(), mesh, plan)
            inputs = (torch.empty(1, 4096, 8192),)
        graphs = captured(module, inputs)

Tracing runs the module itself under AOTAutograd, without Dynamo: hooks, tensor subclasses such as DTensor, and
in-place updates become plain ATen calls on the local shapes of this rank, and functional collectives with their waits.
What Python code decides is decided once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._functorch._aot_autograd import descriptors
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from ...errors import ModelError, OptionError

__all__ = ["Captured", "captured", "fake_ranks"]


@contextmanager
def fake_ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Let this process be rank ``rank`` of ``world_size`` that do not exist, until the block ends.

    Raises:
        OptionError: there is no such rank, or this process belongs to a process group already.
    """
    import torch.distributed as dist

    if world_size < 1 or not 0 <= rank < world_size:
        raise OptionError(f"there is no rank {rank} among {world_size}", hint="ranks count from 0 to world_size - 1")
    if not dist.is_available():
        raise OptionError(f"torch {torch.__version__} is built without torch.distributed")
    if dist.is_initialized():
        raise OptionError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already ({dist.get_backend()})",
            hint="capture with the groups there are, or in another process",
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Captured:
    """The graphs of one rank: placeholders and outputs are tensors (an output may be ``None``), with ``meta["val"]``.

    ``forward`` is the whole of inference, or the forward half of training; then ``backward`` is the other half and
    ``joint`` both before they were divided. ``parameters`` gives the module's name of each placeholder that is a
    parameter or buffer, and ``inputs`` the placeholders of the inputs, in call order; both hold for ``forward`` and
    ``joint``, and for what ``backward`` has of them. The first ``outputs`` results are the model's, and then what it
    updates; behind them ``joint`` returns gradients, ``gradients`` giving the position of each parameter's (that in
    ``backward`` is ``outputs`` fewer), and ``forward`` what ``backward`` takes under the same names. ``updated`` are
    the parameters, buffers and inputs, by placeholder, whose new values come first among the results. ``call`` and
    ``result`` are the structures of ``(args, kwargs)`` and of what the module returns. A parameter that two modules
    share is a placeholder for each, with a gradient for each.
    """

    forward: torch.fx.GraphModule
    parameters: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: int
    call: pytree.TreeSpec
    result: pytree.TreeSpec
    updated: tuple[str, ...] = ()
    backward: torch.fx.GraphModule | None = None
    joint: torch.fx.GraphModule | None = None
    gradients: Mapping[str, int] | None = None


def captured(
    module: torch.nn.Module,
    inputs: Sequence[Any],
    named_inputs: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Captured:
    """The graphs of ``module(*inputs, **named_inputs)`` on this rank.

    Args:
        module: its parameters and buffers become placeholders, DTensors by their local tensors. Fake tensors must all
            be of one mode.
        inputs: example inputs, real or fake.
        named_inputs: those given by name.
        training: trace the gradients of all parameters that require one too.
        decompositions: of ATen operators, such as ``torch._inductor.decomposition.select_decomp_table()``; none where
            ``None``.

    Raises:
        ModelError: AOTAutograd cannot trace the module, or training was asked for and nothing requires a gradient.
    """
    with ExitStack() as stack, torch.set_grad_enabled(training):
        traced = _traced(stack, module, tuple(inputs), dict(named_inputs or {}), decompositions)
        specs = pytree.tree_structure((tuple(inputs), dict(named_inputs or {}))), traced.out_spec
        if not training:
            return _inference(traced.graph_module, specs)
        if not any(node.name.startswith("tangents") for node in traced.graph_module.graph.find_nodes(op="placeholder")):
            raise ModelError(
                f"nothing that {type(module).__name__} returns requires a gradient",
                hint="capture with training=False, or let parameters require gradients",
            )
        joint = _copied(traced.graph_module)
        return _training(specs, joint, *_halves(traced))


def _traced(
    stack: ExitStack,
    module: torch.nn.Module,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
    decompositions: Mapping[Any, Any] | None,
) -> Any:
    """What AOTAutograd traced (``JointWithDescriptors``); without gradients the graph is that of inference."""
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    table = None if decompositions is None else dict(decompositions)
    if any(hasattr(part, "unshard") and hasattr(part, "reshard") for part in module.modules()):
        raise ModelError(
            f"{type(module).__name__} is sharded by fully_shard, which gathers parameters in hooks that are not traced",
            hint="let DTensor parameters gather themselves where they are used, as in SimpleFSDP",
        )
    try:
        return aot_export_joint_with_descriptors(stack, module, inputs, named_inputs, decompositions=table)
    except Exception as error:  # tracing runs the model, which may raise anything
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"AOTAutograd cannot trace {type(module).__name__}: {lines[0].strip():.300}",
            hint="run the model on the same inputs first; values may not decide shapes or control flow, and tensors "
            "that modules hold must be parameters or buffers",
        ) from error


def _halves(traced: Any) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, int]:
    """The forward and the backward half, divided as Inductor does, and how many outputs are the user's."""
    from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors

    counts: list[int] = []
    found: list[torch.fx.GraphModule] = []

    def divide(joint: torch.fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        counts.append(num_fwd_outputs)
        return min_cut_rematerialization_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **options)

    def keep(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found.append(_copied(gm))
        return make_boxed_func(gm.forward)

    aot_compile_joint_with_descriptors(traced, partition_fn=divide, fw_compiler=keep, bw_compiler=keep)
    forward, backward = found
    return forward, backward, counts[0]


def _inference(module: torch.fx.GraphModule, specs: tuple[pytree.TreeSpec, pytree.TreeSpec]) -> Captured:
    forward = _copied(module)
    parameters, inputs = _placeholders(forward)
    outputs = len(_leaves(forward.graph.output_node().args[0]))
    return Captured(forward, parameters, inputs, outputs, *specs, _updated(forward))


def _training(
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
    joint: torch.fx.GraphModule,
    forward: torch.fx.GraphModule,
    backward: torch.fx.GraphModule,
    outputs: int,
) -> Captured:
    parameters, inputs = _placeholders(joint)
    gradients: dict[str, int] = {}
    for position, description in enumerate(joint.graph.output_node().meta.get("desc", ())):
        base = _base(description)
        if isinstance(base, descriptors.GradAOTOutput):
            name = _parameter(base.grad_of)
            if name is not None:
                gradients.setdefault(name, position)
    return Captured(forward, parameters, inputs, outputs, *specs, _updated(joint), backward, joint, gradients)


def _updated(module: torch.fx.GraphModule) -> tuple[str, ...]:
    """Placeholders whose new values the module returns first."""
    places = {node.meta.get("desc"): node.name for node in module.graph.find_nodes(op="placeholder")}
    found = module.graph.output_node().meta.get("desc", ())
    return tuple(places[item.mutated_input] for item in found if isinstance(item, descriptors.InputMutationAOTOutput))


def _placeholders(module: torch.fx.GraphModule) -> tuple[dict[str, str], tuple[str, ...]]:
    """The module's name of each placeholder that is a parameter or buffer; the placeholders that are inputs."""
    parameters: dict[str, str] = {}
    inputs: list[str] = []
    for node in module.graph.find_nodes(op="placeholder"):
        base = _base(node.meta.get("desc"))
        name = _parameter(base)
        if name is not None:
            parameters[node.name] = name
        elif isinstance(base, descriptors.PlainAOTInput):
            inputs.append(node.name)
    return parameters, tuple(inputs)


def _base(description: Any) -> Any:
    """What a description is of: that of a DTensor's local tensor is of the DTensor."""
    while isinstance(description, descriptors.SubclassGetAttrAOTInput | descriptors.SubclassGetAttrAOTOutput):
        description = description.base
    return description


def _parameter(description: Any) -> str | None:
    description = _base(description)
    is_own = isinstance(description, descriptors.ParamAOTInput | descriptors.BufferAOTInput)
    return description.target if is_own else None


def _copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``module`` again, called with flat arguments, without what is no tensor: meshes of DTensors."""
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in module.graph.nodes:
        is_read = node.op != "placeholder" or any(user.op != "output" for user in node.users)
        if node.op != "output" and (is_read or _is_tensor(node)):
            values[node] = graph.node_copy(node, values.__getitem__)
    output = module.graph.output_node()
    results = tuple(values[item] if _is_tensor(item) else None for item in _leaves(output.args[0]))
    graph.output(results).meta = dict(output.meta)
    graph.lint()
    return torch.fx.GraphModule(module, graph)


def _leaves(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, torch.fx.Node) and isinstance(item.meta.get("val"), torch.Tensor)
