"""Where a program may be cut, and what passes there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from ....errors import ModelError
from .capture import Program, attribute, storages_of, tensor_of, updated_storages
from .heavy import is_heavy

__all__ = ["Cut", "Tie", "cut_before", "legal_cuts", "passed", "ties"]


@dataclass(frozen=True)
class Cut:
    """A cut before ``program.body[place]``; ``tensors`` are the names of the values that pass, ``nbytes`` in all.

    ``gradient_bytes`` of them have a gradient that passes back.
    """

    place: int
    tensors: tuple[str, ...]
    nbytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Tie:
    """The parameter or updated buffer ``name``, also called ``others``, used at these ``places`` of the body."""

    name: str
    others: tuple[str, ...]
    places: tuple[int, ...]


def legal_cuts(program: Program, max_tensors: int = 1) -> tuple[Cut, ...]:
    """Cuts at which at most ``max_tensors`` tensors pass, between every two heavy calls the narrowest.

    A cut is legal if all that passes is tensors of which one at least has a gradient, if there is any in the model,
    and nothing behind it writes to what was made before it. Tensors that later stages need pass through every stage on
    the way, since stages exchange with their neighbours alone. Whether a parameter would be on two stages is not looked
    at: see ``ties``.
    """
    trained = any(node in program.differentiable for node in program.body)
    candidates = _candidates(program)
    crossing = _Crossing(program)
    found: list[Cut] = []
    for window in candidates:
        narrowest: Cut | None = None
        for place in window:
            values = crossing.at(place)
            if len(values) > max_tensors or not crossing.is_legal(place, trained):
                continue
            cut = _cut(program, place, values)
            if narrowest is None or cut.nbytes <= narrowest.nbytes:
                narrowest = cut
        if narrowest is not None:
            found.append(narrowest)
    return tuple(found)


def cut_before(program: Program, module: str) -> Cut:
    """The cut before the first call of the submodule ``module``, such as ``"model.layers.4"``.

    Raises:
        ModelError: the program calls no such submodule, or the cut is not legal.
    """
    inside = [place for place, node in enumerate(program.body) if _is_within(node, module)]
    if not inside or inside[0] == 0:
        where = "is where the model begins" if inside else "is not called by the model"
        raise ModelError(f"there is no cut before {module!r}: it {where}", hint="name a submodule further behind")
    crossing = _Crossing(program)
    trained = any(node in program.differentiable for node in program.body)
    if not crossing.is_legal(inside[0], trained):
        raise ModelError(
            f"{program.name} cannot be cut before {module!r}: something that is no tensor passes, nothing with a "
            "gradient does, or what passes is written to behind it"
        )
    return _cut(program, inside[0], crossing.at(inside[0]))


def passed(program: Program, place: int) -> tuple[fx.Node, ...]:
    """The values that pass a cut before ``program.body[place]``, in program order."""
    return _Crossing(program).at(place)


def ties(program: Program) -> tuple[Tie, ...]:
    """Parameters, and buffers that are updated, which several calls use; stages that share one are on one rank."""
    updated = {storage for node in program.module.graph.nodes for storage in updated_storages(node)}
    module = program.module
    names: dict[int, dict[str, None]] = {}
    places: dict[int, set[int]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = attribute(module, node)
        if isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.Tensor) and storages_of(node) & updated):
            names.setdefault(id(value), {})[str(node.target)] = None
            places.setdefault(id(value), set()).update(_readers(program, node))
    for name, value in module.named_parameters(remove_duplicate=False):
        if id(value) in names:
            names[id(value)][name] = None
    return tuple(Tie(*_first(own), tuple(sorted(places[key]))) for key, own in names.items() if len(places[key]) > 1)


def _first(names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    first, *others = names
    return first, tuple(others)


def _readers(program: Program, node: fx.Node) -> Iterable[int]:
    return (program.place[user] for user in node.users if user in program.place)


def _candidates(program: Program) -> list[range]:
    """Places between every two heavy calls: behind one, and up to the next."""
    heavy = [place for place, node in enumerate(program.body) if is_heavy(node)]
    return [range(first + 1, second + 1) for first, second in pairwise(heavy)]


class _Crossing:
    """What passes at each place of the body: the last place at which each value is used, light calls repeated."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.end = len(program.body)
        self.used: dict[fx.Node, int] = {}
        for node in program.returned:
            self._use(node, self.end)
        for place, node in enumerate(program.body):
            for read in node.all_input_nodes:
                self._use(read, place)
        self.writes = [(place, storage) for place, node in enumerate(program.body) for storage in _writes(node)]

    def _use(self, node: fx.Node, place: int) -> None:
        """``node`` is used at ``place``; of a light call what it is computed from, since each stage repeats it."""
        pending, seen = [node], set()
        while pending:
            read = pending.pop()
            if read in self.program.light:
                pending += [operand for operand in read.all_input_nodes if operand not in seen]
                seen.update(read.all_input_nodes)
            elif read.op in ("call_function", "placeholder"):
                self.used[read] = max(self.used.get(read, 0), place)

    def at(self, place: int) -> tuple[fx.Node, ...]:
        """Values made before ``place`` and used at it or behind, in program order."""
        made = [node for node in self.program.inputs if self.used.get(node, -1) >= place]
        return (*made, *(node for node in self.program.body[:place] if self.used.get(node, -1) >= place))

    def is_legal(self, place: int, trained: bool) -> bool:
        values = self.at(place)
        if not values or any(tensor_of(node) is None for node in values):
            return False
        if trained and not self.program.differentiable.intersection(values):
            return False
        before = {
            storage for node in (*self.program.inputs, *self.program.body[:place]) for storage in storages_of(node)
        }
        return not any(later >= place and storage in before for later, storage in self.writes)


def _writes(node: fx.Node) -> Iterable[int]:
    """Storages that ``node`` writes to, those of parameters and buffers left out."""
    own = {storage for read in node.all_input_nodes if read.op == "get_attr" for storage in storages_of(read)}
    return (storage for storage in updated_storages(node) if storage not in own)


def _cut(program: Program, place: int, values: Sequence[fx.Node]) -> Cut:
    sizes = [_nbytes(node) for node in values]
    back = [size for node, size in zip(values, sizes, strict=True) if node in program.differentiable]
    return Cut(place, tuple(node.name for node in values), sum(sizes), sum(back))


def _nbytes(node: fx.Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else value.numel() * value.element_size()


def _is_within(node: fx.Node, module: str) -> bool:
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return any(path == module or path.startswith(f"{module}.") for path in paths)
