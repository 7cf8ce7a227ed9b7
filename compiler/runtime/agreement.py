"""One order of collectives on every rank, asked before the first of them is started.

Ranks that start the collectives of a process group in different orders wait for one another forever, or, where sizes
happen to agree, mix up each other's values. Each rank can decide its own order from its own graph; that these agree is
seen only by comparing them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule
from torch.fx.node import map_arg

from ...errors import ExecutionError
from ..frontend.collectives import collective_of
from ..frontend.dynamo.frozen import is_start

__all__ = ["Orders", "check_same_order", "collective_orders"]

#: For each process group, by its global ranks: its collectives in the order in which they are started.
Orders = Mapping[tuple[int, ...], Sequence[str]]


def collective_orders(module: GraphModule) -> Orders:
    """The collectives of ``module``, in the order of its nodes, described by what all ranks must agree about.

    That is the operator, dtypes and shapes of its operands, and its arguments; of an all-to-all, whose sizes may differ
    by rank, neither shapes nor sizes. ``module`` is as it was before it was frozen. Sends and receives are left out.

    Raises:
        ModelError: a process group is not known here.
    """
    orders: dict[tuple[int, ...], list[str]] = {}
    for node in module.graph.nodes:
        if not is_start(node):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        collective = collective_of(node.target, args, kwargs, node.name)
        if collective is None:
            continue
        name = str(node.target).partition(".")[2]
        if "all_to_all" in name:
            description = f"{name} of {args[0].dtype}"
        else:
            description = f"{name} of {', '.join(map(_described, (*args, *kwargs.values())))}"
        orders.setdefault(collective.ranks, []).append(description)
    return orders


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "" if isinstance(value, str) and value.isdigit() else str(value)  # names of groups differ by rank


def check_same_order(orders: Orders) -> None:
    """Compare ``orders`` among all ranks of the default process group; each rank must call it, and none may start
    anything before. It costs one exchange of 64 bytes for each group, and another of everything if they differ.

    Raises:
        ExecutionError: on every rank, if two members of a group disagree; the first difference is named.
    """
    mine = {_key(ranks): _digest(order) for ranks, order in orders.items()}
    digests: list[dict[str, str]] = _of_all_ranks(mine)
    groups = sorted({key for each in digests for key in each})
    wrong = next((key for key in groups if len({digests[rank].get(key) for rank in json.loads(key)}) > 1), None)
    if wrong is None:
        return
    found: list[Sequence[str]] = _of_all_ranks(list(orders.get(tuple(json.loads(wrong)), ())))
    first, *others = json.loads(wrong)
    other = next(rank for rank in others if found[rank] != found[first])
    pairs = enumerate(zip_longest(found[first], found[other], fillvalue="nothing"))
    position, (one, another) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise ExecutionError(
        f"ranks {first} and {other} would not start the same collectives: number {position} of group {wrong} is "
        f"{one} on rank {first}, and {another} on rank {other}",
        hint="compile the same model with the same shapes, options and version on every rank",
    )


def _of_all_ranks(mine: Any) -> list[Any]:
    """``mine`` of every rank, also while a compiler traces with fake tensors: what is exchanged is real."""
    found: list[Any] = [None] * dist.get_world_size()
    with unset_fake_temporarily():
        dist.all_gather_object(found, mine)
    return found


def _key(ranks: Sequence[int]) -> str:
    return json.dumps(list(ranks))


def _digest(order: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()
