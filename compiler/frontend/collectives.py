"""Which calls of a traced module are collectives, what they move among whom, and which wait for one.

PyTorch traces a functional collective as two calls: a start (``_c10d_functional.all_reduce``), whose result may not be
read yet, and ``wait_tensor``, which hands over the same memory once it may be. Here the pair is one operator of kind
collective, named as the start; the wait is an alias. In-place and out variants write memory that exists.

Bytes are those of the whole message (``compiler.graph.Collective``), once: what is reduced or broadcast, what is
gathered, what is reduced before it is scattered, and what one rank hands over to all in an all-to-all.
``torch._inductor.comm_analysis.estimate_fx_collective_size`` adds the result's bytes to the operand's, and so counts
an all-reduce twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ...errors import ModelError
from ..graph import Collective, CollectiveKind
from .aten import bind_arguments, tensors_in

__all__ = ["collective_of", "group_ranks", "is_communication", "is_wait", "unwrapped"]

_PREFIXES = ("_c10d_functional::", "_c10d_functional_autograd::")
_KINDS: Mapping[str, CollectiveKind] = MappingProxyType(
    {
        "all_reduce": CollectiveKind.ALL_REDUCE,
        "all_reduce_": CollectiveKind.ALL_REDUCE,
        "all_reduce_coalesced": CollectiveKind.ALL_REDUCE,
        "all_reduce_coalesced_": CollectiveKind.ALL_REDUCE,
        "all_gather_into_tensor": CollectiveKind.ALL_GATHER,
        "all_gather_into_tensor_coalesced": CollectiveKind.ALL_GATHER,
        "all_gather_into_tensor_out": CollectiveKind.ALL_GATHER,
        "reduce_scatter_tensor": CollectiveKind.REDUCE_SCATTER,
        "reduce_scatter_tensor_coalesced": CollectiveKind.REDUCE_SCATTER,
        "reduce_scatter_tensor_out": CollectiveKind.REDUCE_SCATTER,
        "all_to_all_single": CollectiveKind.ALL_TO_ALL,
        "broadcast": CollectiveKind.BROADCAST,
        "broadcast_": CollectiveKind.BROADCAST,
    }
)
#: Every operator of these namespaces talks to other ranks, whether or not it is a collective known here.
_COMMUNICATION = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem")
_GROUP_HINT = (
    "capture in the processes that run the model, after torch.distributed.init_process_group, or in one process with "
    "opweave.compiler.frontend.ranks.fake_ranks(world_size)"
)


def unwrapped(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """The call itself where ``target`` is a higher-order operator that only orders it or makes it functional.

    ``with_effects(token, operator, *args)`` keeps the order of effects; ``auto_functionalized(operator, **kwargs)``
    returns what the operator writes.
    """
    name = str(target) if isinstance(target, torch._ops.HigherOrderOperator) else ""
    if name == "with_effects" and len(args) > 1:
        return args[1], args[2:], dict(kwargs)
    if name == "auto_functionalized" and args:
        return args[0], (), dict(kwargs)
    return target, args, dict(kwargs)


def is_wait(target: Any) -> bool:
    """Whether a call of ``target`` waits for a collective and returns its operand."""
    return _name(target) == "wait_tensor"


def is_communication(target: Any) -> bool:
    """Whether a call of ``target`` talks to other ranks; collectives do, and so do sends, receives and barriers."""
    is_operator = isinstance(target, torch._ops.OpOverload)
    return is_operator and (target.namespace in _COMMUNICATION or target._schema.name == "_dtensor::shard_dim_alltoall")


def collective_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], node: str) -> Collective | None:
    """What ``target(*args, **kwargs)`` does among ranks; ``None`` where it is no collective.

    Args:
        target: what a node calls.
        args: its arguments; tensors, of which only sizes and dtypes are read, in the place of nodes.
        kwargs: the same.
        node: its name, for messages.

    Raises:
        ModelError: the group is not known to this process, is itself a value of the graph, or has another size than
            the call says.
    """
    kind = _kind(target)
    if kind is None:
        return None
    bound = bind_arguments(target, args, kwargs)
    operands = list(tensors_in(bound.get("input", bound.get("inputs"))))
    group, ranks = group_ranks(bound["group_name"], node)
    size = bound.get("group_size", len(ranks))
    if size != len(ranks):
        raise ModelError(
            f"node {node!r} calls {target} for {size} ranks, but process group {group!r} has {len(ranks)}",
            hint="trace the model with the process groups that it runs with",
        )
    nbytes = sum(int(operand.numel()) * operand.element_size() for operand in operands)
    return Collective(kind, group, ranks, nbytes * len(ranks) if kind is CollectiveKind.ALL_GATHER else nbytes)


def group_ranks(group: Any, node: str) -> tuple[str, tuple[int, ...]]:
    """Name and global ranks, in the group's order, of what a call gives as its process group.

    Raises:
        ModelError: as for ``collective_of``.
    """
    import torch.distributed as dist

    name = group if isinstance(group, str) else getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise ModelError(
            f"node {node!r} takes its process group from a value of the graph ({group!s:.80})",
            hint="trace with torch.distributed.config.compile_on_one_rank off, so that groups have names",
        )
    if not dist.is_available() or not dist.is_initialized():
        raise ModelError(
            f"node {node!r} communicates in process group {name!r}, but this process has none", hint=_GROUP_HINT
        )
    from torch._C._distributed_c10d import _resolve_process_group

    try:
        ranks = dist.get_process_group_ranks(_resolve_process_group(name))  # type: ignore[arg-type]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"node {node!r} communicates in process group {name!r}, which this process does not know", hint=_GROUP_HINT
        ) from error
    return name, tuple(int(rank) for rank in ranks)


def _name(target: Any) -> str:
    """Name of a functional collective or wait without its namespace; empty for anything else."""
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    prefix, found, name = target._schema.name.partition("::")
    return name if prefix + found in _PREFIXES else ""


def _kind(target: Any) -> CollectiveKind | None:
    if isinstance(target, torch._ops.OpOverload) and target._schema.name == "_dtensor::shard_dim_alltoall":
        return CollectiveKind.ALL_TO_ALL
    return _KINDS.get(_name(target))
