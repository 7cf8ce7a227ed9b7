"""What Inductor makes of a graph, as data: kernels as source, storages, views of them, and calls in program order.

The form is destination-passing: a call writes into storages that exist, so that their addresses, and the order of the
calls, are ours to choose. Only calls that cannot write where they are told make storages of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeAlias

import sympy
import torch

__all__ = ["Call", "Item", "Kernel", "Origin", "Program", "Ref", "Size", "Storage", "View", "references"]

#: A number of elements or bytes: an integer once symbols have values.
Size: TypeAlias = int | sympy.Expr


class Origin(StrEnum):
    """Who provides a storage's bytes."""

    INPUT = "input"  # the caller, who keeps it
    GIVEN = "given"  # the caller, who hands it over: its bytes are free after the last use
    CONSTANT = "constant"  # the program itself
    PLANNED = "planned"  # the planner: in the arena
    OUTPUT = "output"  # the executor, afresh in each call: the caller keeps it
    CALL = "call"  # the call that makes it
    HOST = "host"  # the caller, in host memory: the plan loads it, and stores back what calls wrote
    RETURNED = "returned"  # the planner: in the arena; the caller gets a copy in host memory, which the plan stores


@dataclass(frozen=True)
class Ref:
    """A tensor, by the name of its view."""

    name: str


@dataclass(frozen=True)
class Item(Ref):
    """The number in a tensor without dimensions on the host, which kernels on a device take by value."""


@dataclass(frozen=True)
class Storage:
    """Bytes on one device: ``nbytes`` of them, as elements of ``dtype``."""

    name: str
    nbytes: Size
    dtype: torch.dtype
    device: torch.device
    origin: Origin


@dataclass(frozen=True)
class View:
    """A tensor: ``shape`` and ``strides`` in elements, from element ``offset`` of ``storage`` on."""

    name: str
    storage: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: ``source`` defines ``name`` as an object of Inductor's; ``language`` says how to run it."""

    name: str
    source: str
    language: str  # "triton" or "cpp"


@dataclass(frozen=True)
class Call:
    """One step: ``target`` is a kernel's name, or an operator such as ``aten.mm.out``.

    ``reads`` and ``writes`` name storages; one that is written again keeps what is not overwritten. ``makes`` are the
    views over storages of its own, with the path to each in what the call returns. ``effect`` marks a call that must
    stay in order with all others so marked, as random numbers must.
    """

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    makes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    effect: bool = False

    @property
    def views(self) -> tuple[str, ...]:
        """Views it is called with."""
        return tuple(dict.fromkeys(references((self.args, dict(self.kwargs)))))


@dataclass(frozen=True)
class Program:
    """A graph of calls. ``inputs`` are views in the caller's order, symbols, or ``None`` for what is unused.

    ``outputs`` are views, numbers (of symbols, too) or ``None``. ``symbols`` that are not inputs are read off one:
    its name, ``"size"`` or ``"stride"``, and the dimension.
    """

    name: str
    inputs: tuple[Ref | sympy.Symbol | None, ...]
    outputs: tuple[Any, ...]
    storages: Mapping[str, Storage]
    views: Mapping[str, View]
    calls: tuple[Call, ...]
    kernels: Mapping[str, Kernel]
    prologue: str = ""
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    symbols: Mapping[sympy.Symbol, tuple[str, str, int]] = field(default_factory=dict)

    @cached_property
    def free_symbols(self) -> tuple[sympy.Symbol, ...]:
        """Symbols that sizes depend on, by name."""
        given = [item for item in self.inputs if isinstance(item, sympy.Symbol)]
        return tuple(sorted({*given, *self.symbols}, key=str))

    def at(self, values: Mapping[sympy.Symbol, int]) -> Program:
        """The program with ``values`` for its symbols: every size an integer."""
        if not self.free_symbols:
            return self
        known = _Substitution(values)
        return replace(
            self,
            # Without elements, the bytes from the first to the last of padded rows would be negative.
            storages={k: replace(s, nbytes=max(0, known(s.nbytes))) for k, s in self.storages.items()},
            views={k: _view_at(v, known) for k, v in self.views.items()},
            calls=tuple(_call_at(c, known) for c in self.calls),
            outputs=tuple(known(o) for o in self.outputs),
        )

    @property
    def has_negative_sizes(self) -> bool:
        """Whether the values that were put in the place of symbols are none that they can have."""
        return any(extent < 0 for view in self.views.values() for extent in view.shape)

    @property
    def source(self) -> str:
        """Python source of a module that defines all kernels."""
        return "\n".join((self.prologue, *(kernel.source for kernel in self.kernels.values())))

    def provided_by(self, *origins: Origin) -> frozenset[str]:
        """Names of the storages of these origins."""
        return frozenset(name for name, storage in self.storages.items() if storage.origin in origins)

    @property
    def apart(self) -> frozenset[str]:
        """Storages that cannot lie in an arena: what the caller gets or hands over, and what calls make."""
        return self.provided_by(Origin.OUTPUT, Origin.GIVEN, Origin.CALL)

    @property
    def held_bytes(self) -> int:
        """Bytes on the device that the caller keeps, and constants, where all sizes are integers."""
        held = self.provided_by(Origin.INPUT, Origin.CONSTANT)
        return sum(int(self.storages[name].nbytes) for name in held)

    def storage_of(self, ref: Ref) -> Storage:
        """The storage that a tensor lies in."""
        return self.storages[self.views[ref.name].storage]


class _Substitution:
    """Puts values in the place of symbols, in numbers and in whatever holds them."""

    def __init__(self, values: Mapping[sympy.Symbol, int]) -> None:
        self.values = {symbol: sympy.Integer(value) for symbol, value in values.items()}
        self.known: dict[sympy.Expr, Any] = {}

    def __call__(self, item: Any) -> Any:
        if isinstance(item, sympy.Basic):
            if item not in self.known:
                self.known[item] = _number(item.xreplace(self.values))
            return self.known[item]
        if isinstance(item, tuple | list):
            return type(item)(self(part) for part in item)
        if isinstance(item, dict):
            return {key: self(part) for key, part in item.items()}
        return item


def _number(value: sympy.Basic) -> Any:
    if getattr(value, "is_integer", False):
        return int(value)
    if value in (sympy.true, sympy.false):
        return bool(value)
    return float(value)


def _view_at(view: View, known: Callable[[Any], Any]) -> View:
    return replace(view, shape=known(view.shape), strides=known(view.strides), offset=known(view.offset))


def _call_at(call: Call, known: Callable[[Any], Any]) -> Call:
    return replace(call, args=known(call.args), kwargs=known(dict(call.kwargs)))


def references(item: Any) -> Iterator[str]:
    """Names of all tensors in arguments, in order."""
    if isinstance(item, Ref):
        yield item.name
    elif isinstance(item, tuple | list):
        for part in item:
            yield from references(part)
    elif isinstance(item, Mapping):
        for part in item.values():
            yield from references(part)


def span_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last that a strided tensor touches."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
