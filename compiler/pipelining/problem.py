"""What a pipeline schedule decides about: stages on ranks, the routes that microbatches take, and a memory limit.

A stage works on a microbatch three times: forward (F), gradient of its input (I), gradients of its weights (W). The
notation, and I and W as one full backward (B), are torch.distributed.pipelining's; that a backward comes in two parts
is Zero Bubble's idea (Qi et al., arXiv 2401.10241, which calls them B and W). All times are integers of nanoseconds,
or of any other unit that all of them share; all sizes are bytes, likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated

import msgspec

from ...errors import OptionError

__all__ = ["PipelineProblem", "Route", "Stage", "Vocabulary"]

Amount = Annotated[int, msgspec.Meta(ge=0)]

_MOST_RANKS, _MOST_ACTIONS = 1 << 16, 1 << 20
_MOST_TIME, _MOST_BYTES, _MOST_BYTES_EACH = 1 << 52, 1 << 60, 1 << 50


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of the model on ``rank``, with what one microbatch costs there.

    ``backward_ns`` is what B takes, the sum of I and W when ``None``. Memory: F allocates
    ``until_input_gradient_bytes``, freed when I is done, and ``until_weight_gradient_bytes``, freed when W is done; I
    allocates ``between_gradients_bytes``, freed when W is done. B frees at its end what F allocated and allocates
    nothing: an eager backward that is split keeps the gradients between its halves, a whole one does not. Zero
    Bubble's M_B is the sum of the first two, its M_W the second.

    ``forward_send_ns`` passes between the end of F and the start of the next stage's F on another rank,
    ``backward_send_ns`` between the end of I, or B, and the start of I, or B, of the stage before it on another rank;
    transfers occupy no rank. ``forward_bytes`` and ``backward_bytes`` are the sizes of these messages.

    ``offloaded_bytes``, a part of ``until_weight_gradient_bytes``, leave for host memory behind F, which takes
    ``offload_ns`` on the rank's copy engine, and come back, in ``reload_ns``, before I. ``reduce_ns`` is what the
    all-reduce of the stage's gradients takes on the rank's network, behind its last W. ``resident_bytes`` are held all
    the time: weights, gradients, the optimizer's state.
    """

    rank: Amount
    forward_ns: Amount
    input_gradient_ns: Amount
    weight_gradient_ns: Amount
    backward_ns: Amount | None = None
    until_input_gradient_bytes: Amount = 0
    until_weight_gradient_bytes: Amount = 0
    between_gradients_bytes: Amount = 0
    forward_send_ns: Amount = 0
    backward_send_ns: Amount = 0
    forward_bytes: Amount = 0
    backward_bytes: Amount = 0
    offloaded_bytes: Amount = 0
    offload_ns: Amount = 0
    reload_ns: Amount = 0
    reduce_ns: Amount = 0
    resident_bytes: Amount = 0

    @property
    def whole_backward_ns(self) -> int:
        """What B takes."""
        return self.input_gradient_ns + self.weight_gradient_ns if self.backward_ns is None else self.backward_ns

    @property
    def work_ns(self) -> int:
        """F, I and W of one microbatch; the least that it takes the rank, if B is not faster."""
        return self.forward_ns + min(self.whole_backward_ns, self.input_gradient_ns + self.weight_gradient_ns)


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``microbatches`` of the step go through ``stages``, in this order.

    Most pipelines have one route through all stages. Two that run in opposite directions over two copies of the model
    are a bidirectional pipeline (Chimera); routes that leave stages out skip them (SkipPipe).

    ``forward_send_ns`` and ``backward_send_ns`` are for links that are not all alike: for each of the route's hops,
    what passes between its two stages, one way and back, in place of what the sending stage says. Between stages on
    one rank nothing passes all the same.
    """

    stages: tuple[int, ...]
    microbatches: int
    forward_send_ns: tuple[int, ...] = ()
    backward_send_ns: tuple[int, ...] = ()


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The output layer, cut along the vocabulary into one shard on every rank (Yeung et al., arXiv 2411.05288).

    Behind F of a route's last stage every rank computes its shard's logits (S, ``output_ns[rank]``), then its part of
    the gradients (T, ``gradient_ns[rank]``). ``broadcast_ns`` passes between that F and any S. With ``barriers`` 1 (the
    paper's Vocab-2), I of the last stage follows all S, ``reduce_ns`` later, and T of a rank follows all S likewise, at
    any later time; with 2 (Vocab-1) I follows all T, ``reduce_ns`` later, and T all S, ``reduce_ns`` later.
    ``shard_bytes`` are held on each rank from the start of S to the end of T.
    """

    output_ns: tuple[int, ...]
    gradient_ns: tuple[int, ...]
    broadcast_ns: Amount = 0
    reduce_ns: Amount = 0
    barriers: int = 1
    shard_bytes: Amount = 0


class PipelineProblem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, omit_defaults=True):
    """One training step: every microbatch of every route, forward and backward through its stages.

    Microbatches are numbered through the routes: the first route's first. ``memory_limit`` holds the bytes that each
    rank has, for what is resident and what its stages hold; ``None`` is no limit.

    Raises:
        OptionError: a stage on a rank that there is not, a route through a stage that there is not or twice through
            one, no microbatch, a limit, vocabulary or hops in another number, a time or size that is no whole number
            from 0 on, or more than anything can count: times of the whole step are below 2^52, bytes below 2^60, those
            of one microbatch on a stage or shard below 2^50.
    """

    ranks: int
    stages: tuple[Stage, ...]
    routes: tuple[Route, ...]
    memory_limit: tuple[int, ...] | None = None
    vocabulary: Vocabulary | None = None
    name: str = "pipeline"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def microbatches(self) -> int:
        """Microbatches of the step, over all routes."""
        return sum(route.microbatches for route in self.routes)

    @cached_property
    def route_of(self) -> tuple[int, ...]:
        """The route that each microbatch takes."""
        return tuple(index for index, route in enumerate(self.routes) for _ in range(route.microbatches))

    @cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """Stages on each rank, ascending."""
        return tuple(
            tuple(index for index, stage in enumerate(self.stages) if stage.rank == rank) for rank in range(self.ranks)
        )

    @cached_property
    def work_ns(self) -> tuple[int, ...]:
        """What each rank has to compute in the step, vocabulary shards included."""
        work = [0] * self.ranks
        for route in self.routes:
            for index in route.stages:
                work[self.stages[index].rank] += route.microbatches * self.stages[index].work_ns
        if self.vocabulary is not None:
            for rank, pair in enumerate(zip(self.vocabulary.output_ns, self.vocabulary.gradient_ns, strict=True)):
                work[rank] += self.microbatches * sum(pair)
        return tuple(work)

    @cached_property
    def resident_bytes(self) -> tuple[int, ...]:
        """What each rank holds all the time."""
        held = [0] * self.ranks
        for stage in self.stages:
            held[stage.rank] += stage.resident_bytes
        return tuple(held)


def _check(problem: PipelineProblem) -> None:
    if problem.ranks < 1 or not problem.stages or not problem.routes:
        raise OptionError(
            f"pipeline {problem.name!r} has {problem.ranks} ranks, {len(problem.stages)} stages and "
            f"{len(problem.routes)} routes; each is at least 1"
        )
    for index, stage in enumerate(problem.stages):
        _check_stage(problem, index, stage)
    for route in problem.routes:
        _check_route(problem, route)
    if problem.memory_limit is not None:
        if len(problem.memory_limit) != problem.ranks:
            raise OptionError(f"{len(problem.memory_limit)} memory limits for {problem.ranks} ranks")
        _check_amounts("the memory limit", {f"of rank {r}": limit for r, limit in enumerate(problem.memory_limit)})
    if problem.vocabulary is not None:
        _check_vocabulary(problem, problem.vocabulary)
    _check_extent(problem)


def _check_extent(problem: PipelineProblem) -> None:
    """Sums stay exact where they are counted in 64 bits, or in the floats of solvers; what is listed fits in memory."""
    shards = 0 if problem.vocabulary is None else problem.ranks
    actions = sum(route.microbatches * (len(route.stages) + shards) for route in problem.routes)
    if problem.ranks > _MOST_RANKS or actions > _MOST_ACTIONS:
        raise OptionError(
            f"pipeline {problem.name!r} has {problem.ranks:,} ranks and {actions:,} forwards and shards of all "
            f"microbatches; the most are {_MOST_RANKS:,} and {_MOST_ACTIONS:,}"
        )
    counted = (
        ("all of the step", "time", _all_time(problem), _MOST_TIME),
        ("all of the step", "bytes", _all_bytes(problem), _MOST_BYTES),
        ("a microbatch", "bytes", max(map(_bytes_of, problem.stages)), _MOST_BYTES_EACH),
        ("a shard", "bytes", 0 if problem.vocabulary is None else problem.vocabulary.shard_bytes, _MOST_BYTES_EACH),
    )
    for where, what, amount, most in counted:
        if amount >= most:
            raise OptionError(
                f"pipeline {problem.name!r} has {amount:,} units of {what} in {where}; the most is {most - 1:,}",
                hint="count in a coarser unit, times and sizes each in one of their own",
            )


def _all_time(problem: PipelineProblem) -> int:
    """All there is, one after another, as if every backward were done both ways."""
    total = sum(stage.reduce_ns for stage in problem.stages)
    for route in problem.routes:
        each = sum(route.forward_send_ns) + sum(route.backward_send_ns)
        for stage in (problem.stages[index] for index in route.stages):
            each += stage.forward_ns + stage.input_gradient_ns + stage.weight_gradient_ns + stage.whole_backward_ns
            each += stage.forward_send_ns + stage.backward_send_ns + stage.offload_ns + stage.reload_ns
        if (shards := problem.vocabulary) is not None:
            each += sum(shards.output_ns) + sum(shards.gradient_ns) + shards.broadcast_ns + 2 * shards.reduce_ns
        total += route.microbatches * each
    return total


def _all_bytes(problem: PipelineProblem) -> int:
    """What all microbatches hold and send together, if nothing is freed."""
    total = sum(problem.resident_bytes)
    for route in problem.routes:
        each = problem.ranks * problem.vocabulary.shard_bytes if problem.vocabulary is not None else 0
        total += route.microbatches * (each + sum(_bytes_of(problem.stages[index]) for index in route.stages))
    return total


def _bytes_of(stage: Stage) -> int:
    held = stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes + stage.between_gradients_bytes
    return held + stage.forward_bytes + stage.backward_bytes


def _check_amounts(owner: str, amounts: Mapping[str, int | None]) -> None:
    """All amounts are whole numbers from 0 on: a struct that is made in Python is not checked against its types."""
    for name, amount in amounts.items():
        if amount is not None and (not isinstance(amount, int) or amount < 0):
            raise OptionError(
                f"{owner} has {name} {amount!r}",
                hint="times and bytes are whole numbers from 0 on: round what was measured",
            )


def _check_stage(problem: PipelineProblem, index: int, stage: Stage) -> None:
    _check_amounts(f"stage {index}", {name: getattr(stage, name) for name in stage.__struct_fields__})
    if stage.rank >= problem.ranks:
        raise OptionError(f"stage {index} is on rank {stage.rank}; there are ranks 0 to {problem.ranks - 1}")
    if stage.offloaded_bytes > stage.until_weight_gradient_bytes:
        raise OptionError(
            f"stage {index} offloads {stage.offloaded_bytes} bytes of the "
            f"{stage.until_weight_gradient_bytes} that it holds until W"
        )


def _check_route(problem: PipelineProblem, route: Route) -> None:
    known = {index for index in route.stages if 0 <= index < len(problem.stages)}
    if not route.stages or len(known) != len(route.stages):
        raise OptionError(
            f"a route goes through stages {list(route.stages)}; they are different ones of 0 to "
            f"{len(problem.stages) - 1}, and one at least"
        )
    if route.microbatches < 1:
        raise OptionError(f"a route has {route.microbatches} microbatches; the least is 1")
    for way, sends in (("forward", route.forward_send_ns), ("backward", route.backward_send_ns)):
        if sends and len(sends) != len(route.stages) - 1:
            raise OptionError(
                f"a route through {len(route.stages)} stages has times of {len(sends)} hops {way}; it has "
                f"{len(route.stages) - 1} hops"
            )
        _check_amounts("a route", {f"hop {hop} {way}": time for hop, time in enumerate(sends)})


def _check_vocabulary(problem: PipelineProblem, vocabulary: Vocabulary) -> None:
    if not len(vocabulary.output_ns) == len(vocabulary.gradient_ns) == problem.ranks:
        raise OptionError(
            f"the vocabulary has times for {len(vocabulary.output_ns)} and {len(vocabulary.gradient_ns)} "
            f"shards; there are {problem.ranks} ranks, each with one"
        )
    if vocabulary.barriers not in (1, 2):
        raise OptionError(f"the vocabulary has {vocabulary.barriers} barriers; there are 1 or 2")
    for name in ("broadcast_ns", "reduce_ns", "shard_bytes"):
        _check_amounts("the vocabulary", {name: getattr(vocabulary, name)})
    for name in ("output_ns", "gradient_ns"):
        _check_amounts("the vocabulary", {f"{name} of rank {r}": t for r, t in enumerate(getattr(vocabulary, name))})
