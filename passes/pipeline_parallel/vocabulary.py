"""The output layer of a language model: on the last stage, made up for by fewer layers there, or cut over all ranks.

With a large vocabulary the output layer takes as long as many layers, which no order of actions can make up for.
Vocabulary Parallelism (Yeung et al., arXiv 2411.05288) cuts it along the vocabulary into shards, one on each rank,
whose passes S and T are scheduled like others; with one barrier (the paper's Vocab-2) or two (Vocab-1) in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.pipelining.placement import placed
from ...compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from ...errors import OptionError
from ._choosing import Choice, best_choice
from .solution import Objective, PipelineSolution

__all__ = ["LanguageModel", "OutputLayer", "choose_output", "output_problems", "shards_of"]


@dataclass(frozen=True)
class OutputLayer:
    """What the output layer with its loss takes for one microbatch on one rank: integers of ns and bytes.

    ``logits_bytes`` are held from its forward to its backward, ``resident_bytes`` all the time. ``broadcast_ns`` is
    what its input takes to all ranks, ``reduce_ns`` a reduction of its results over all ranks. ``shard_efficiency`` is
    how much of a rank's speed is left when it computes a shard of it: 1 where n shards take an n-th each.
    """

    forward_ns: int
    input_gradient_ns: int
    weight_gradient_ns: int
    logits_bytes: int = 0
    resident_bytes: int = 0
    broadcast_ns: int = 0
    reduce_ns: int = 0
    shard_efficiency: float = 1.0


@dataclass(frozen=True)
class LanguageModel:
    """``layers`` layers that are all alike, each costing what ``layer`` says, behind an embedding, before ``output``.

    ``layer.rank`` means nothing; its send times and message sizes are those of every stage. ``embedding`` is computed
    by the first stage, in addition.
    """

    layer: Stage
    layers: int
    output: OutputLayer
    embedding: Stage = field(default_factory=lambda: Stage(0, 0, 0, 0))


def shards_of(output: OutputLayer, ranks: int, *, barriers: int = 1) -> Vocabulary:
    """``output`` in ``ranks`` equal shards, times and bytes rounded up.

    With two barriers S computes logits and T both gradients; with one, S computes the gradient of the input as well,
    so that I of the last stage waits for S alone, and T that of the weights (sections 4.2 and 4.3 of the paper).

    Raises:
        OptionError: another number of barriers, no rank, or an efficiency that is not in (0, 1].
    """
    if barriers not in (1, 2) or ranks < 1 or not 0 < output.shard_efficiency <= 1:
        raise OptionError(
            f"an output layer over {ranks} ranks with {barriers} barriers and efficiency {output.shard_efficiency}",
            hint="at least one rank, 1 or 2 barriers, an efficiency above 0 and up to 1",
        )
    share = ranks * Fraction(output.shard_efficiency).limit_denominator(1_000_000)
    first = output.forward_ns + (output.input_gradient_ns if barriers == 1 else 0)
    both = output.forward_ns + output.input_gradient_ns + output.weight_gradient_ns

    def shard(amount: int) -> int:
        return -(-amount * share.denominator // share.numerator)

    return Vocabulary(
        output_ns=(shard(first),) * ranks,
        gradient_ns=(shard(both - first),) * ranks,
        broadcast_ns=output.broadcast_ns,
        reduce_ns=output.reduce_ns,
        barriers=barriers,
        shard_bytes=-(-output.logits_bytes // ranks),
    )


def choose_output(
    model: LanguageModel,
    ranks: int,
    microbatches: int,
    budget: Budget,
    *,
    memory_limit: int | None = None,
    objective: Objective = "makespan",
) -> PipelineSolution:
    """The best schedule of any of ``output_problems``; the solution's attempts have one line for each of them.

    Raises:
        Infeasible: the memory limit can be kept with none of them.
        OptionError: as ``output_problems``.
    """
    problems = output_problems(model, ranks, microbatches, memory_limit=memory_limit)
    choices = [Choice(name, problem) for name, problem in problems.items()]
    return best_choice(choices, budget, objective=objective, all_valued=True)


def output_problems(
    model: LanguageModel, ranks: int, microbatches: int, *, memory_limit: int | None = None
) -> dict[str, PipelineProblem]:
    """What there is to choose from, by name: where the output layer is, and where the layers are.

    ``"last stage"`` has as many layers on every rank; ``"fewer layers"`` so many that the longest stage is as short as
    can be (what the paper calls redistribution); ``"vocab-1"`` and ``"vocab-2"`` have shards on all ranks, and an equal
    part of the embedding as well, whose collective is taken to be hidden. With ``", v"`` each rank has two chunks,
    placed in a V, if there are layers for them.

    Raises:
        OptionError: no rank, microbatch or layer; or an efficiency of shards outside (0, 1].
    """
    if ranks < 1 or model.layers < 1:
        raise OptionError(f"{model.layers} layers on {ranks} ranks; the least is one of each")
    problems = {}
    for shape, chunks in (("", 1), (", v", 2)):
        if chunks > 1 and chunks * ranks > model.layers:
            continue
        places = placed("wave", ranks, chunks)
        for name, extra, by_work in _arrangements(model, places, ranks):
            counts = _counts(extra, model, places, by_work=by_work)
            problem = _problem(model, places, counts, extra, microbatches, memory_limit, name + shape)
            if name.startswith("vocab"):
                shards = shards_of(model.output, ranks, barriers=1 if name == "vocab-2" else 2)
                problem = msgspec.structs.replace(problem, vocabulary=shards)
            problems[name + shape] = problem
    return problems


def _arrangements(model: LanguageModel, places: Sequence[int], ranks: int) -> Iterator[tuple[str, list[Stage], bool]]:
    """Each way by name, what each stage does beside layers, and whether layers even out work or are even themselves."""
    ends = [_NOTHING] * len(places)
    ends[0] = model.embedding
    ends[-1] = _sum(ends[-1], _as_stage(model.output))
    yield "last stage", ends, False
    yield "fewer layers", ends, True
    part = _divided(model.embedding, ranks)
    held = -(-model.output.resident_bytes // ranks)
    shards = [msgspec.structs.replace(part, resident_bytes=part.resident_bytes + held)] * ranks
    shards += [_NOTHING] * (len(places) - ranks)
    yield "vocab-2", shards, True
    yield "vocab-1", shards, True


_NOTHING = Stage(0, 0, 0, 0)


def _as_stage(output: OutputLayer) -> Stage:
    return Stage(
        0,
        output.forward_ns,
        output.input_gradient_ns,
        output.weight_gradient_ns,
        until_weight_gradient_bytes=output.logits_bytes,
        resident_bytes=output.resident_bytes,
    )


def _divided(stage: Stage, parts: int) -> Stage:
    """An equal part of ``stage``, rounded up."""
    halves = {name: -(-getattr(stage, name) // parts) for name in _SUMMED}
    whole = None if stage.backward_ns is None else -(-stage.backward_ns // parts)
    return msgspec.structs.replace(stage, **halves, backward_ns=whole)


def _sum(one: Stage, other: Stage) -> Stage:
    """Both, one behind the other, in one stage."""
    summed = {name: getattr(one, name) + getattr(other, name) for name in _SUMMED}
    whole = one.whole_backward_ns + other.whole_backward_ns
    split = summed["input_gradient_ns"] + summed["weight_gradient_ns"]
    return msgspec.structs.replace(one, **summed, backward_ns=None if whole == split else whole)


_SUMMED = (
    "forward_ns",
    "input_gradient_ns",
    "weight_gradient_ns",
    "until_input_gradient_bytes",
    "until_weight_gradient_bytes",
    "between_gradients_bytes",
    "resident_bytes",
)


def _times(layer: Stage, count: int) -> Stage:
    scaled = {name: getattr(layer, name) * count for name in _SUMMED}
    whole = None if layer.backward_ns is None else layer.backward_ns * count
    return msgspec.structs.replace(layer, **scaled, backward_ns=whole, reduce_ns=layer.reduce_ns * count)


def _counts(extra: Sequence[Stage], model: LanguageModel, places: Sequence[int], *, by_work: bool) -> list[int]:
    """Layers of each stage: one after another to the rank that has least to do, or fewest; late ranks first."""
    ranks = max(places) + 1
    loads = [sum(more.work_ns for more, rank in zip(extra, places, strict=True) if rank == own) for own in range(ranks)]
    of_rank = [0] * ranks

    def filled(rank: int) -> tuple[int, int, int]:
        load = loads[rank] + of_rank[rank] * model.layer.work_ns if by_work else 0
        return load, of_rank[rank], -rank

    for _ in range(model.layers):
        of_rank[min(range(ranks), key=filled)] += 1
    chunks = len(places) // ranks
    numbered = [(place // ranks, of_rank[rank]) for place, rank in enumerate(places)]
    return [count // chunks + (chunk < count % chunks) for chunk, count in numbered]


def _problem(
    model: LanguageModel,
    places: Sequence[int],
    counts: Sequence[int],
    extra: Sequence[Stage],
    microbatches: int,
    memory_limit: int | None,
    name: str,
) -> PipelineProblem:
    ranks = max(places) + 1
    stages = tuple(
        msgspec.structs.replace(_sum(_times(model.layer, count), more), rank=rank)
        for rank, count, more in zip(places, counts, extra, strict=True)
    )
    limit = None if memory_limit is None else (memory_limit,) * ranks
    return PipelineProblem(ranks, stages, (Route(tuple(range(len(stages))), microbatches),), limit, name=name)
