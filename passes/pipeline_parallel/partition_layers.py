"""Layers with what each costs, and the pipeline problem that cuts between them make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...compiler.pipelining.problem import Amount, PipelineProblem, Route, Stage, Vocabulary
from ...errors import OptionError

__all__ = ["Cuts", "LayerCost", "Line"]

#: Fields that a stage has the sum of.
_ADDED = (
    *("forward_ns", "input_gradient_ns", "weight_gradient_ns", "whole_backward_ns", "reduce_ns", "parameter_bytes"),
    *("until_input_gradient_bytes", "until_weight_gradient_bytes", "between_gradients_bytes"),
)
#: The first layer of every stage but the first.
Cuts = tuple[int, ...]


class LayerCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one microbatch costs in a layer, the least that a stage is made of; times and bytes as in ``Stage``.

    Costs of a stage are the sums over its layers. ``backward_ns`` is what a whole backward takes, I and W together
    where ``None``. ``parameter_bytes`` are held all the time: weights, gradients, optimizer state. ``forward_bytes``
    and ``backward_bytes`` pass a cut behind this layer, one way and back, which takes ``forward_send_ns`` and
    ``backward_send_ns`` between two ranks. Layers that name the same thing in ``shared``, such as a tied weight, must
    be on one rank.
    """

    name: str
    forward_ns: Amount
    input_gradient_ns: Amount
    weight_gradient_ns: Amount
    backward_ns: Amount | None = None
    until_input_gradient_bytes: Amount = 0
    until_weight_gradient_bytes: Amount = 0
    between_gradients_bytes: Amount = 0
    parameter_bytes: Amount = 0
    forward_bytes: Amount = 0
    backward_bytes: Amount = 0
    forward_send_ns: Amount = 0
    backward_send_ns: Amount = 0
    reduce_ns: Amount = 0
    shared: tuple[str, ...] = ()

    @property
    def whole_backward_ns(self) -> int:
        """What a whole backward takes."""
        return self.input_gradient_ns + self.weight_gradient_ns if self.backward_ns is None else self.backward_ns

    @property
    def work_ns(self) -> int:
        """The least that a microbatch takes."""
        return self.forward_ns + min(self.whole_backward_ns, self.input_gradient_ns + self.weight_gradient_ns)


@dataclass(frozen=True)
class Line:
    """``layers`` in order, to be cut into one stage for each rank of ``placement``.

    ``slowness`` multiplies what each rank computes: 1.25 is a rank that takes a quarter longer. ``vocabulary`` is the
    output layer in shards, which then is none of the layers. Without ``input_gradient`` the model's inputs have no
    gradient, as tokens have none: the first stage sends nothing back, all of its backward is W, and what it holds is
    held until then, with the gradient of its results.

    Raises:
        OptionError: fewer layers than stages, no microbatch, a rank without a stage, or a slowness, limit or
            vocabulary for another number of ranks.
    """

    layers: tuple[LayerCost, ...]
    placement: tuple[int, ...]
    microbatches: int
    memory_limit: tuple[int, ...] | None = None
    slowness: tuple[float, ...] = ()
    vocabulary: Vocabulary | None = None
    input_gradient: bool = True
    name: str = "pipeline"

    def __post_init__(self) -> None:
        stages, ranks = len(self.placement), self.ranks
        if len(self.layers) < stages:
            raise OptionError(
                f"{len(self.layers)} layers are to be cut into {stages} stages",
                hint="use fewer ranks or chunks, or cut the model finer",
            )
        if not stages or set(self.placement) != set(range(ranks)) or self.microbatches < 1:
            raise OptionError(
                f"the placement is {self.placement} with {self.microbatches} microbatches; each rank from 0 on has a "
                "stage, and there is a microbatch"
            )
        for what, given in (("memory limits", self.memory_limit), ("slownesses", self.slowness)):
            if given and len(given) != ranks:
                raise OptionError(f"{len(given)} {what} for {ranks} ranks")
        if any(not factor > 0 for factor in self.slowness):
            raise OptionError(f"slowness is {self.slowness}; each is above 0")

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return max(self.placement, default=-1) + 1

    @cached_property
    def ties(self) -> Mapping[str, tuple[int, ...]]:
        """Layers that must be on one rank, by what they share; one layer alone is left out."""
        found: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            for name in layer.shared:
                found.setdefault(name, []).append(index)
        return {name: tuple(own) for name, own in found.items() if len(own) > 1}

    def bounds_of(self, cuts: Cuts) -> tuple[tuple[int, int], ...]:
        """First layer of each stage, and the one behind its last."""
        return tuple(pairwise((0, *cuts, len(self.layers))))

    def is_legal(self, cuts: Cuts) -> bool:
        """Whether every stage has a layer, and what layers share is on one rank."""
        bounds = self.bounds_of(cuts)
        if len(bounds) != len(self.placement) or any(first >= end for first, end in bounds):
            return False
        stage_of = [stage for stage, (first, end) in enumerate(bounds) for _ in range(first, end)]
        return all(len({self.placement[stage_of[layer]] for layer in tied}) == 1 for tied in self.ties.values())

    @cached_property
    def sums(self) -> Mapping[str, NDArray[np.int64]]:
        """By field of ``LayerCost``, the sum over the first ``n`` layers, for every ``n``."""
        return {
            name: np.cumsum([0, *(getattr(layer, name) for layer in self.layers)], dtype=np.int64) for name in _ADDED
        }

    def slow(self, rank: int) -> float:
        """By what the rank multiplies times."""
        return self.slowness[rank] if self.slowness else 1.0

    def problem(self, cuts: Cuts) -> PipelineProblem:
        """The pipeline that ``cuts`` make."""
        stages = [
            self.stage(first, end, rank)
            for (first, end), rank in zip(self.bounds_of(cuts), self.placement, strict=True)
        ]
        route = Route(tuple(range(len(stages))), self.microbatches)
        return PipelineProblem(self.ranks, tuple(stages), (route,), self.memory_limit, self.vocabulary, self.name)

    def stage(self, first: int, end: int, rank: int) -> Stage:
        """The stage of ``layers[first:end]`` on ``rank``."""

        def total(name: str) -> int:
            return int(self.sums[name][end] - self.sums[name][first])

        def time(name: str) -> int:
            return int(scaled(np.array(total(name)), self.slow(rank)))

        own = self.layers[first:end]
        before, last = self.layers[first - 1] if first else None, own[-1] if end < len(self.layers) else None
        stage = Stage(
            rank,
            time("forward_ns"),
            time("input_gradient_ns"),
            time("weight_gradient_ns"),
            backward_ns=None if all(layer.backward_ns is None for layer in own) else time("whole_backward_ns"),
            until_input_gradient_bytes=total("until_input_gradient_bytes"),
            until_weight_gradient_bytes=total("until_weight_gradient_bytes"),
            between_gradients_bytes=total("between_gradients_bytes"),
            forward_send_ns=0 if last is None else last.forward_send_ns,
            backward_send_ns=0 if before is None else before.backward_send_ns,
            forward_bytes=0 if last is None else last.forward_bytes,
            backward_bytes=0 if before is None else before.backward_bytes,
            reduce_ns=total("reduce_ns"),
            resident_bytes=total("parameter_bytes"),
        )
        return stage if first or self.input_gradient else _without_input_gradient(stage, own[-1].backward_bytes)


def _without_input_gradient(stage: Stage, gradient_bytes: int) -> Stage:
    return msgspec.structs.replace(
        stage,
        input_gradient_ns=0,
        weight_gradient_ns=stage.input_gradient_ns + stage.weight_gradient_ns,
        until_input_gradient_bytes=0,
        until_weight_gradient_bytes=stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes,
        between_gradients_bytes=gradient_bytes,
    )


def scaled(time: NDArray[np.int64], slow: float) -> NDArray[np.int64]:
    """``time`` on a rank that is ``slow``, whole."""
    return time if slow == 1.0 else np.rint(time * slow).astype(np.int64)
