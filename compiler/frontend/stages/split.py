"""Stages as modules: a program's calls between two cuts, with the model's own parameters under their own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ....errors import ModelError, OptionError
from .capture import Program, captured_program, tensor_of
from .cuts import Cut, cut_before, passed, ties
from .modes import StageModule

__all__ = ["LayerModule", "StageModules", "layers_between", "split", "split_model"]


@dataclass(frozen=True)
class StageModules:
    """``modules``, one a stage: each takes what the one before returns, the first ``program.flatten(...)``.

    A stage returns a tensor, or a tuple of them where several pass the cut (``passes``: their names, by cut); the last
    one the tensors of the model's result, which ``program.unflatten`` puts into its structure. Parameters and buffers
    are the model's own objects, and ``state_dict`` of a stage has the model's names; nothing is copied.
    """

    program: Program
    modules: tuple[torch.nn.Module, ...]
    passes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LayerModule:
    """``module`` computes ``body``, a part of a program, of ``given``, and returns ``wanted``: the program's nodes.

    The first ``crossing`` of ``given`` pass the cut before it. The others are what light calls make, which a stage
    makes once for all its layers.
    """

    module: fx.GraphModule
    body: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    crossing: int
    wanted: tuple[fx.Node, ...]


def split_model(
    model: torch.nn.Module,
    example_inputs: Sequence[Any],
    cuts: Sequence[Cut | str],
    *,
    named_inputs: Mapping[str, Any] | None = None,
    ranks: Sequence[int] | None = None,
) -> StageModules:
    """The stages of ``model``, cut at ``cuts``: submodules before which to cut, or cuts of ``legal_cuts``.

    Stages compute what the model does, call by call, in the mode that it is in. ``example_inputs`` are one
    microbatch, real or fake. ``ranks`` gives the rank of each stage, where stages that share a parameter are meant to
    be on one rank.

    Raises:
        ModelError: as ``captured_program``, ``cut_before`` and ``split``.
        OptionError: as ``split``.
    """
    program = captured_program(model, example_inputs, named_inputs)
    return split(program, [cut_before(program, cut) if isinstance(cut, str) else cut for cut in cuts], ranks=ranks)


def split(program: Program, cuts: Sequence[Cut], *, ranks: Sequence[int] | None = None) -> StageModules:
    """The stages of ``program`` between ``cuts``.

    Raises:
        ModelError: two stages share a parameter, and are not known to be on one rank.
        OptionError: the cuts are not in order, or ``ranks`` is for another number of stages.
    """
    places = [0, *(cut.place for cut in cuts), len(program.body)]
    if any(first >= second for first, second in pairwise(places)):
        raise OptionError(f"cuts at {places[1:-1]} of {places[-1]} calls", hint="give each cut once, in program order")
    if ranks is not None and len(ranks) != len(cuts) + 1:
        raise OptionError(f"{len(ranks)} ranks are given for {len(cuts) + 1} stages")
    _check_ties(program, places, ranks)
    passes = [passed(program, place) for place in places[1:-1]]
    modules = tuple(
        _Writer(program, index, passes).written(places[index], places[index + 1]) for index in range(len(cuts) + 1)
    )
    return StageModules(program, modules, tuple(tuple(node.name for node in values) for values in passes))


def layers_between(program: Program, cuts: Sequence[Cut]) -> tuple[LayerModule, ...]:
    """What is between every two of ``cuts``; layers may share parameters."""
    places = [0, *(cut.place for cut in cuts), len(program.body)]
    passes = [passed(program, place) for place in places[1:-1]]
    found = []
    for index, (start, end) in enumerate(pairwise(places)):
        writer = _Writer(program, index, passes, light_given=True)
        crossing = len(writer.given)
        module = writer.written(start, end)
        found.append(LayerModule(module, program.body[start:end], writer.given, crossing, writer.wanted))
    return tuple(found)


def _check_ties(program: Program, places: Sequence[int], ranks: Sequence[int] | None) -> None:
    for tie in ties(program):
        stages = sorted({sum(place >= start for start in places[1:-1]) for place in tie.places})
        if len(stages) == 1 or (ranks is not None and len({ranks[stage] for stage in stages}) == 1):
            continue
        also = f" ({', '.join(tie.others)} is the same)" if tie.others else ""
        raise ModelError(
            f"{tie.name!r}{also} is used by stages {' and '.join(map(str, stages))}, whose gradients would never meet",
            hint="untie the weights, or put these stages on one rank, as a V does with the first and the last one",
        )


class _Writer:
    """Writes the graph of one stage; with ``light_given`` light calls are not repeated but given, behind the rest."""

    def __init__(
        self, program: Program, index: int, passes: Sequence[Sequence[fx.Node]], *, light_given: bool = False
    ) -> None:
        self.program, self.index, self.light_given = program, index, light_given
        self.given = program.inputs if index == 0 else tuple(passes[index - 1])
        self.is_last = index == len(passes)
        self.wanted = program.returned if self.is_last else tuple(passes[index])
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}

    def written(self, start: int, end: int) -> fx.GraphModule:
        body = self.program.body[start:end]
        if self.light_given:
            read = dict.fromkeys(read for node in (*body, *self.wanted) for read in (*node.all_input_nodes, node))
            self.given += tuple(node for node in read if node in self.program.light and tensor_of(node) is not None)
        for node in self.given:
            self.values[node] = self.graph.placeholder(node.name)
            self.values[node].meta = dict(node.meta)
        for node in body:
            self.copy(node)
        results = [self.result(node) for node in self.wanted]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        self.graph.lint()
        module = StageModule(self.program.module, self.graph, f"Stage{self.index}")
        _mark_temporary(module, self.program.temporary)
        return module

    def copy(self, node: fx.Node) -> fx.Node:
        """``node`` here, behind what it reads: attributes, and light calls, which every stage repeats for itself."""
        pending = [node]
        while pending:
            own = pending[-1]
            missing = [] if own in self.values else [read for read in own.all_input_nodes if read not in self.values]
            pending += missing
            if missing:
                continue
            if own not in self.values:
                self.values[own] = self.graph.node_copy(own, self.values.__getitem__)
            pending.pop()
        return self.values[node]

    def result(self, node: fx.Node) -> fx.Node:
        """``node`` as this stage returns it; what it was given itself is copied: a leaf is no result of autograd."""
        value = self.copy(node)
        if value.op != "placeholder" or self.is_last:
            return value
        copied = self.graph.call_function(torch.ops.aten.clone.default, (value,))
        copied.meta = {key: item for key, item in node.meta.items() if key == "val"}
        return copied


def _mark_temporary(module: torch.nn.Module, temporary: frozenset[str]) -> None:
    """Leave out of ``state_dict`` what the model's own leaves out: constants, and buffers that do not persist."""
    for path, inner in module.named_modules():
        for name in inner._buffers:
            full = f"{path}.{name}" if path else name
            if full in temporary:
                inner._non_persistent_buffers_set.add(name)
