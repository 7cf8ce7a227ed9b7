"""Schedules by hand, small enough to check by eye, for the tests of what shows them."""

from __future__ import annotations

import msgspec

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed

UNIT = Stage(0, 10, 10, 10, until_input_gradient_bytes=100, until_weight_gradient_bytes=300)
SENDING = msgspec.structs.replace(UNIT, forward_send_ns=3, backward_send_ns=2, forward_bytes=64, backward_bytes=32)


def one_forward_one_backward(problem: PipelineProblem, *, whole: bool = True) -> PipelineSchedule:
    """PipeDream's order: rank r runs ``ranks - r - 1`` forwards ahead; I and W apart where not ``whole``."""
    orders = []
    for rank in range(problem.ranks):
        ahead = min(problem.ranks - rank - 1, problem.microbatches)
        order = [Action(rank, ActionKind.FORWARD, m) for m in range(ahead)]
        for done in range(problem.microbatches):
            if done + ahead < problem.microbatches:
                order.append(Action(rank, ActionKind.FORWARD, done + ahead))
            kinds = (ActionKind.BACKWARD,) if whole else (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
            order += [Action(rank, kind, done) for kind in kinds]
        orders.append(tuple(order))
    return PipelineSchedule(problem, tuple(orders), "1f1b" if whole else "1f1b-split")


def plain(ranks: int = 4, microbatches: int = 8, stage: Stage = SENDING, limit: int | None = 1600) -> TimedSchedule:
    """1F1B over ranks that are alike."""
    problem = uniform(stage, placed("loop", ranks), microbatches, memory_limit=limit, name="plain")
    return timed(one_forward_one_backward(problem))


def split(ranks: int = 4, microbatches: int = 8) -> TimedSchedule:
    """The same with backward passes in halves, and gradients to reduce; over its limit."""
    stage = msgspec.structs.replace(SENDING, between_gradients_bytes=50, reduce_ns=17, resident_bytes=1000)
    problem = uniform(stage, placed("loop", ranks), microbatches, memory_limit=2000, name="split")
    return timed(one_forward_one_backward(problem, whole=False))


def orders_of(*rows: str) -> tuple[tuple[Action, ...], ...]:
    """Orders from text, a rank a row."""
    return tuple(tuple(map(Action.of, row.split())) for row in rows)


def offloading() -> TimedSchedule:
    """Two ranks, of which the first moves what it holds to the host and back."""
    first = msgspec.structs.replace(UNIT, offloaded_bytes=200, offload_ns=4, reload_ns=6)
    second = msgspec.structs.replace(UNIT, rank=1)
    problem = PipelineProblem(2, (first, second), (Route((0, 1), 2),), name="offloading")
    rows = ("0F0 0OFFLOAD0 0F1 0RELOAD0 0I0 0OFFLOAD1 0RELOAD1 0W0 0B1", "1F0 1B0 1F1 1I1 1W1")
    return timed(PipelineSchedule(problem, orders_of(*rows), "offload"))


def sharded() -> TimedSchedule:
    """Two ranks with a shard of the vocabulary each."""
    problem = uniform(SENDING, placed("loop", 2), 2, name="sharded")
    vocabulary = Vocabulary((5, 6), (4, 3), broadcast_ns=1, reduce_ns=2, shard_bytes=7)
    problem = msgspec.structs.replace(problem, vocabulary=vocabulary)
    rows = ("0F0 0F1 0S0 0T0 0S1 0T1 0B0 0B1", "1F0 1S0 1F1 1I0 1S1 1T0 1W0 1T1 1B1")
    return timed(PipelineSchedule(problem, orders_of(*rows), "vocabulary"))


def both_ways() -> TimedSchedule:
    """Two routes in opposite directions over two copies of a model of two stages."""
    stages = tuple(msgspec.structs.replace(SENDING, rank=rank) for rank in (0, 1, 1, 0))
    problem = PipelineProblem(2, stages, (Route((0, 1), 1), Route((2, 3), 1)), name="both ways")
    rows = ("0F0 3F1 3B1 0B0", "2F1 1F0 1B0 2I1 2W1")
    return timed(PipelineSchedule(problem, orders_of(*rows), "chimera"))


def idle_rank() -> TimedSchedule:
    """A rank that has no stage."""
    problem = uniform(UNIT, (0,), 1)
    problem = PipelineProblem(2, problem.stages, problem.routes, (10, 10), name="idle")
    return timed(PipelineSchedule(problem, orders_of("0F0 0B0", ""), ""))


def everything() -> dict[str, TimedSchedule]:
    """All of them, by name."""
    return {
        "plain": plain(),
        "split": split(),
        "offloading": offloading(),
        "sharded": sharded(),
        "both_ways": both_ways(),
        "idle_rank": idle_rank(),
    }
