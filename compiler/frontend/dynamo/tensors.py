"""The tensors of a program being recorded, out of Inductor's IR: storages, views, and what else calls are given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen import wrapper as lines
from torch._inductor.codegen.common import WorkspaceArg

from ...runtime.device.program import Origin, Ref, Storage, View, span_elements

__all__ = ["Tensors", "Unrecorded"]


class Unrecorded(NotImplementedError):
    """Inductor's host code does something that a ``Program`` cannot say; the message names it."""


class Tensors:
    """Storages and views by Inductor's names for them, and the symbols that their sizes depend on."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.views: dict[str, View] = {}
        self.alias: dict[str, str] = {}  # one name for another's view
        self.constants: dict[str, torch.Tensor] = {}
        self.symbols: dict[sympy.Symbol, tuple[str, str, int]] = {}
        self._symbol_named: dict[str, sympy.Symbol] = {}  # C++ kernels are called with symbols by name

    def inputs(self, nodes: Mapping[str, Any]) -> tuple[Ref | sympy.Symbol | None, ...]:
        """The graph's inputs, by name, as a program lists them."""
        inputs = tuple(self._input(name, node) for name, node in nodes.items())
        given = {item for item in inputs if isinstance(item, sympy.Symbol)}
        for item in inputs:
            if isinstance(item, Ref):
                self._symbols_of(self.views[item.name], given)
        self._symbol_named = {str(symbol): symbol for symbol in (*given, *self.symbols)}
        needed = {symbol for node in nodes.values() if isinstance(node, sympy.Expr) for symbol in node.free_symbols}
        needed |= {symbol for view in self.views.values() for symbol in _symbols(view)}
        for symbol in sorted(map(str, needed)):
            if symbol not in self._symbol_named:
                raise Unrecorded(f"a size {symbol} that no input says")
        return inputs

    def _input(self, name: str, node: Any) -> Ref | sympy.Symbol | None:
        if node is None or isinstance(node, int | float | sympy.Number):
            return None
        if isinstance(node, sympy.Symbol):
            return node
        if isinstance(node, sympy.Expr):
            return None  # what it says follows from its symbols, which come as well
        if not isinstance(node, ir.TensorBox):
            raise Unrecorded(f"an input of type {type(node).__name__}")
        self.own(name, node.get_layout(), Origin.INPUT)
        return Ref(name)

    def _symbols_of(self, view: View, given: Collection[sympy.Symbol]) -> None:
        """Where to read symbols that are no inputs of their own."""
        for what, sizes in (("size", view.shape), ("stride", view.strides)):
            for dimension, size in enumerate(sizes):
                if isinstance(size, sympy.Symbol) and size not in given:
                    self.symbols.setdefault(size, (view.name, what, dimension))

    def constant(self, name: str, value: torch.Tensor) -> None:
        """A tensor that the program keeps."""
        self.constants[name] = value
        layout = ir.FixedLayout(value.device, value.dtype, tuple(value.shape), value.stride())
        self.own(name, layout, Origin.CONSTANT)

    def outputs(self, nodes: Iterable[Any]) -> tuple[Any, ...]:
        """The graph's outputs; planned storages that the caller gets are allocated afresh in each call."""
        outputs = tuple(self.operand(node) for node in nodes)
        for item in outputs:
            if isinstance(item, Ref):
                storage = self.storages[self.views[item.name].storage]
                if storage.origin is Origin.PLANNED:
                    self.storages[storage.name] = replace(storage, origin=Origin.OUTPUT)
        return outputs

    def own(self, name: str, layout: Any, origin: Origin) -> None:
        """A storage, and the view of all of it, of the same name."""
        shape, strides = tuple(map(_size, layout.size)), tuple(map(_size, layout.stride))
        nbytes = span_elements(shape, strides) * layout.dtype.itemsize
        self.storages[name] = Storage(name, nbytes, layout.dtype, layout.device, origin)
        self.views[name] = View(name, name, shape, strides, 0, layout.dtype)

    def view(self, name: str, of: str, layout: Any, offset: Any) -> None:
        """A view of what ``of`` is a view of, ``offset`` elements behind its first."""
        base = self.views[self.known(of)]
        start = base.offset
        if layout.dtype != base.dtype:
            start = start * base.dtype.itemsize // layout.dtype.itemsize
        shape, strides = tuple(map(_size, layout.size)), tuple(map(_size, layout.stride))
        self.views[name] = View(name, base.storage, shape, strides, start + _size(offset), layout.dtype)

    def known(self, name: str) -> str:
        """The name of the view that ``name`` is. Raises Unrecorded."""
        name = self.alias.get(name, name)
        if name not in self.views:
            raise Unrecorded(f"the value {name!r}")
        return name

    def storage_of(self, name: str) -> str:
        """The storage of the view that ``name`` is. Raises Unrecorded."""
        return self.views[self.known(name)].storage

    def operand(self, node: Any) -> Any:
        """What an IR node is as an argument of a call. Raises Unrecorded."""
        if node is None or isinstance(node, ir.NoneAsConstantBuffer):
            return None
        if isinstance(node, ir.ShapeAsConstantBuffer):
            return _size(node.expr)
        if isinstance(node, ir.ReinterpretView):
            return Ref(self._reinterpreted(node))
        if isinstance(node, ir.MutableBox):
            return self.operand(node.data)
        if isinstance(node, ir.Buffer | WorkspaceArg):
            return Ref(self.known(node.get_name()))
        if isinstance(node, sympy.Expr):
            return _size(node)
        raise Unrecorded(f"an operand of type {type(node).__name__}")

    def _reinterpreted(self, node: ir.ReinterpretView) -> str:
        base: Any = node.data
        while not isinstance(base, ir.Buffer):
            base = base.data
        name = f"{base.get_name()}_view_{len(self.views)}"
        self.view(name, base.get_name(), node.layout, node.layout.offset)
        return name

    def argument(self, value: Any) -> Any:
        """What an argument of an operator is, as in IR, sympy or Python."""
        if isinstance(value, ir.IRNode):
            return self.operand(value)
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return _size(value.node.expr)
        if isinstance(value, tuple | list):
            return type(value)(self.argument(part) for part in value)
        return _size(value)

    def kernel_argument(self, value: Any) -> Any:
        """What an argument of a generated kernel is, as in its printed call."""
        if isinstance(value, lines.SymbolicCallArg):
            return _size(value.inner_expr)
        if isinstance(value, str):
            symbol = self._symbol_named.get(value)
            return Ref(self.known(value)) if symbol is None else symbol
        if isinstance(value, int | float | bool | sympy.Expr | torch.dtype | type(None)):
            return _size(value)
        raise Unrecorded(f"a kernel argument of type {type(value).__name__}")


def _symbols(view: View) -> set[sympy.Symbol]:
    """Symbols that the shape and the strides of a tensor depend on."""
    sizes = (*view.shape, *view.strides)
    return {symbol for size in sizes if isinstance(size, sympy.Expr) for symbol in size.free_symbols}


def _size(value: Any) -> Any:
    """Plain integers where there is nothing symbolic."""
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, sympy.Basic) and not value.free_symbols and value.is_number:
        return int(value) if value.is_integer else float(value)
    return value
