"""Which rank has which stage, in the ways the field knows; and problems whose stages are all alike."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...errors import OptionError
from .problem import PipelineProblem, Route, Stage

__all__ = ["PLACEMENTS", "placed", "uniform"]

#: Names that ``placed`` knows.
PLACEMENTS = ("loop", "v", "wave")


def placed(kind: str, ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """The rank of each of ``ranks * chunks`` stages.

    ``"loop"``: 0 1 2 0 1 2 (Narayanan et al., arXiv 2104.04473). ``"v"``: 0 1 2 2 1 0, two chunks (Qi et al., arXiv
    2405.15362). ``"wave"``: that again and again, 0 1 2 2 1 0 0 1 2 ..., any number of chunks (Liu et al., Hanayo).

    Raises:
        OptionError: there is no such placement, or not with so many ranks or chunks.
    """
    if ranks < 1 or chunks < 1:
        raise OptionError(f"{ranks} ranks with {chunks} chunks; the least is one of each")
    if kind == "loop":
        return tuple(range(ranks)) * chunks
    if kind == "v" and chunks != 2:
        raise OptionError(f"a V has two chunks on each rank, not {chunks}", hint="'wave' takes any number")
    if kind not in PLACEMENTS:
        raise OptionError(f"there is no placement {kind!r}", hint=f"choose among {', '.join(PLACEMENTS)}")
    down, up = tuple(range(ranks)), tuple(reversed(range(ranks)))
    return tuple(rank for chunk in range(chunks) for rank in (up if chunk % 2 else down))


def uniform(
    stage: Stage,
    ranks: Sequence[int],
    microbatches: int,
    *,
    memory_limit: int | None = None,
    name: str = "pipeline",
) -> PipelineProblem:
    """One route of ``microbatches`` through stages that are like ``stage``, the n-th on rank ``ranks[n]``.

    ``memory_limit`` is that of every rank, in bytes.

    Raises:
        OptionError: there is no stage, or no microbatch.
    """
    stages = tuple(msgspec.structs.replace(stage, rank=rank) for rank in ranks)
    number = max(ranks, default=-1) + 1
    limit = None if memory_limit is None else (memory_limit,) * number
    return PipelineProblem(number, stages, (Route(tuple(range(len(stages))), microbatches),), limit, name=name)
