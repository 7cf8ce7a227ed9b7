"""What the ranks of a pipeline must agree about: one decides for all, and what one refuses all refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from ....errors import ExecutionError, OptionError, OpweaveError

__all__ = ["agreed", "decided", "gathered", "together"]

_T = TypeVar("_T")
Group = Any  # torch's process group; None is the default one


def gathered(mine: _T, group: Group = None) -> list[_T]:
    """``mine`` of every rank of ``group``, by rank; it can be pickled."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def together(work: Callable[[], _T], group: Group = None) -> _T:
    """What ``work`` returns on this rank, once it has succeeded on every rank of ``group``.

    Raises:
        OpweaveError: on every rank, if any rank's ``work`` raised one: its own there, and an ExecutionError that
            names the first such rank and quotes it elsewhere. Nobody goes on to wait for a rank that has given up.
    """
    error: Exception | None = None
    result: list[_T] = []
    try:
        result.append(work())
    except Exception as raised:  # another rank would hang, whatever it is
        error = raised
    said = None if error is None else f"{type(error).__name__}: {getattr(error, 'message', None) or error}"
    hint = error.hint if isinstance(error, OpweaveError) else ""
    errors = gathered((said, hint), group)
    if error is not None:
        raise error
    for rank, (other, its_hint) in enumerate(errors):
        if other is not None:
            raise ExecutionError(f"rank {rank} gave up: {other}", hint=its_hint)
    return result[0]


def decided(decide: Callable[[], _T], group: Group = None, *, by: int = 0) -> _T:
    """What ``decide`` returns on rank ``by`` of ``group``, on every rank of it; elsewhere it is not called.

    Raises:
        OpweaveError: ``decide`` raised; on every rank, as `together` does.
    """
    mine = together(lambda: decide() if dist.get_rank(group) == by else None, group)
    box: list[Any] = [mine]
    dist.broadcast_object_list(box, group=group, group_src=by)
    result: _T = box[0]
    return result


def agreed(facts: Mapping[str, object], group: Group = None) -> None:
    """``facts``, by what they are called, are the same on every rank of ``group``; they can be pickled.

    Raises:
        OptionError: on every rank: one of them differs; it is named, with what two ranks have.
    """
    for rank, others in enumerate(everywhere := gathered(dict(facts), group)):
        for name, value in everywhere[0].items():
            if others.get(name) != value:
                raise OptionError(
                    f"ranks differ in {name}: {value!r:.80} on rank 0, {others.get(name)!r:.80} on rank {rank}",
                    hint="call it with the same arguments on every rank",
                )
