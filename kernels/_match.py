"""Patterns of operators, and the walk that finds them in a graph from their result backwards.

A pattern says what computed a tensor: ``call("mul", a, call("sigmoid", a))`` is the product of a tensor and its
sigmoid, in either order. `any_tensor` binds an operand by name, `number` and `literal` other arguments, ``either``
tries alternatives. Models that compute partly in float32 need no patterns of their own: casts between a kernel's
floating-point dtypes are looked through. Nor do views that only regroup dimensions: an operand is known by its
elements in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import cached_property
from typing import Any

import torch
from msgspec.structs import replace

from ..compiler.fusion import Cost, Match, Scalar, Uses, is_row_major
from ..compiler.graph import DTYPE_BYTES, Graph, Op, Tensor
from ..compiler.runtime.calls import InputRef, parse_call

__all__ = [
    "CASTS",
    "Cost",
    "Found",
    "Match",
    "Pattern",
    "Walk",
    "any_tensor",
    "bytes_of",
    "call",
    "either",
    "is_row_major",
    "literal",
    "number",
    "reshaped",
    "transposed",
]

_FLOATS = ("float32", "float16", "bfloat16")
#: What changes a dtype.
CASTS = ("aten._to_copy.default", "aten.to.dtype", "prims.convert_element_type.default")
_NEUTRAL = (("alpha", 1), ("dtype", torch.float32))  # computing in float32 is what kernels do anyway
_COMMUTATIVE = ("add", "mul", "maximum", "minimum")


@dataclass(frozen=True)
class Pattern:
    """What may have computed a tensor; made by ``call``, ``either``, ``any_tensor`` and ``number``."""

    kind: str
    name: str = ""
    parts: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()


def any_tensor(name: str) -> Pattern:
    """Any tensor, bound to ``name``; where the name comes again, it must be the same elements."""
    return Pattern("tensor", name)


def literal(name: str) -> Pattern:
    """Anything that is no tensor: a number, a list, ``None``; bound to ``name``."""
    return Pattern("literal", name)


def number(name: str) -> Pattern:
    """A number in the call itself, bound to ``name``."""
    return Pattern("number", name)


def either(*options: Pattern) -> Pattern:
    """The first of ``options`` that fits, then the others."""
    return Pattern("either", parts=options)


def call(name: str, *arguments: Any, **keywords: Any) -> Pattern:
    """The first result of a call of ``aten.<name>``, whatever its overload, or of ``prims.<name>``.

    Arguments are patterns, or literals to equal (lists, numbers, ``None``); numbers are equal within float32. Sums and
    products match in either order. The call may have no other arguments, but for ``alpha=1`` and, at the end,
    ``None``, ``False`` and empty lists. Results in another place than the first: ``call("var_mean", ...)`` takes
    ``result=1`` as a keyword.
    """
    return Pattern("call", name, arguments, tuple(keywords.items()))


@dataclass(frozen=True)
class Found:
    """One way in which a pattern fits: what its names are bound to; ``found["x"]`` is the tensor ``x``."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    literals: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class Walk:
    """Finds patterns in one graph, and makes matches."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._uses = Uses(graph)

    @cached_property
    def _written(self) -> Mapping[str, Op]:
        """The operator that wrote each tensor."""
        return {name: op for op in self.graph.ops for name in op.outputs}

    def results(self, *names: str) -> Iterator[Tensor]:
        """First results of all calls of ``aten.<name>`` for one of ``names``, in program order."""
        for op in self.graph.ops:
            if op.outputs and _called(op) in names:
                yield self.graph.tensor[op.outputs[0]]

    def writer(self, tensor: Tensor) -> tuple[Op, int] | None:
        """The operator whose result ``tensor`` is, and which result; dimensions may have been regrouped since."""
        found = self._written.get(tensor.name)
        if found is not None:
            return found, found.outputs.index(tensor.name)
        base = self.graph.buffers.get(tensor.buffer)
        if base is None or not _same_elements(tensor, base) or len(self._uses.writers(tensor.buffer)) != 1:
            return None
        found = self._written.get(base.name)
        return None if found is None else (found, found.outputs.index(base.name))

    def uncast(self, tensor: Tensor, result: str, *, far: bool = True) -> Tensor:
        """What ``tensor`` was cast from, as long as that is a float32 or a ``result``: no digit was lost there.

        Not ``far`` stops at the first ``result``: what a kernel reads that takes its operands in this dtype.
        """
        made = self.writer(tensor)
        while made is not None and made[0].target in CASTS:
            source = self.graph.tensor[made[0].inputs[0]]
            allowed = {"float32", result}
            if not {source.dtype, self.graph.tensor[made[0].outputs[0]].dtype} <= allowed or result not in _FLOATS:
                break
            if not far and tensor.dtype == result != source.dtype:
                break
            tensor = reshaped(source, tensor.shape) or source
            made = self.writer(tensor)
        return tensor

    def find(
        self, pattern: Pattern, tensor: Tensor, bound: Found | None = None, *, result: str = ""
    ) -> Iterator[Found]:
        """Each way in which ``pattern`` computed ``tensor``, given what is ``bound`` already.

        Casts are looked through between float32 and ``result``: the dtype of the launch's result, where ``tensor`` is a
        step on the way and has another; else that of ``tensor``.
        """
        yield from self._find(pattern, tensor, bound or Found(), result or tensor.dtype)

    def _find(self, pattern: Any, value: Any, bound: Found, result: str) -> Iterator[Found]:
        if not isinstance(pattern, Pattern):
            if not isinstance(value, Tensor) and _equal(pattern, value):
                yield bound
        elif pattern.kind == "either":
            for option in pattern.parts:
                yield from self._find(option, value, bound, result)
        elif pattern.kind in ("literal", "number"):
            fits = not isinstance(value, Tensor) if pattern.kind == "literal" else type(value) in (int, float)
            if fits and _equal(bound.literals.get(pattern.name, value), value):
                yield changed(bound, literals={**bound.literals, pattern.name: value})
        elif isinstance(value, Tensor):
            yield from self._tensor(pattern, self.uncast(value, result, far=pattern.kind == "call"), bound, result)

    def _tensor(self, pattern: Pattern, value: Tensor, bound: Found, result: str) -> Iterator[Found]:
        if pattern.kind == "call":
            yield from self._call(pattern, value, bound, result)
        elif pattern.name not in bound.tensors:
            yield changed(bound, tensors={**bound.tensors, pattern.name: value})
        elif _same_elements(value, bound[pattern.name]):
            yield bound

    def _call(self, pattern: Pattern, tensor: Tensor, bound: Found, result: str) -> Iterator[Found]:
        made = self.writer(tensor)
        keywords = dict(pattern.keywords)
        if made is None or made[1] != keywords.pop("result", 0) or _called(made[0]) != pattern.name:
            return
        arguments, given = self.arguments(made[0])
        given = {key: value for key, value in given.items() if (key, value) not in _NEUTRAL}
        if given.keys() != keywords.keys() or not all(_equal(keywords[key], given[key]) for key in given):
            return
        extra = arguments[len(pattern.parts) :]
        if len(arguments) < len(pattern.parts) or not all(item in (None, []) or item is False for item in extra):
            return
        parts = pattern.parts
        orders = [parts, parts[::-1]] if pattern.name in _COMMUTATIVE and len(parts) == 2 else [parts]
        for order in orders:
            yield from self._all(order, arguments, bound, result)

    def _all(self, patterns: Sequence[Any], values: Sequence[Any], bound: Found, result: str) -> Iterator[Found]:
        if not patterns:
            yield bound
            return
        for found in self._find(patterns[0], values[0], bound, result):
            yield from self._all(patterns[1:], values[1:], found, result)

    def arguments(self, op: Op) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keywords of a call, operands as tensors."""
        parsed = parse_call(op.body)

        def value(item: Any) -> Any:
            if isinstance(item, list | tuple):
                return [value(one) for one in item]
            return self.graph.tensor[op.inputs[item.index]] if isinstance(item, InputRef) else item

        return [value(item) for item in parsed.arguments], {key: value(item) for key, item in parsed.keywords}

    def readers(self, tensor: Tensor, *names: str) -> list[Op]:
        """Calls of ``aten.<name>``, for one of ``names``, that read the tensor's buffer, in program order."""
        return [
            op
            for op, read in zip(self.graph.ops, self.graph.reads, strict=True)
            if tensor.buffer in read and _called(op) in names
        ]

    def match(
        self,
        kernel: str,
        arguments: Mapping[str, Tensor | Scalar],
        outputs: Sequence[Tensor],
        cost: Cost,
        *,
        row_major: bool = True,
        updates: bool = False,
    ) -> Match | None:
        """A launch of ``kernel`` that computes ``outputs``; ``None`` where the graph does not allow it.

        Views among the arguments that the graph does not have are named here. An output that nobody needs may be a new
        tensor; ``Walk.fresh`` makes one. Outputs have to be row-major, unless the rule has checked that they have the
        strides that the kernel's ``allocate`` gives them, and fresh memory, unless the kernel ``updates`` operands.
        """
        if not updates and any(tensor.name != tensor.buffer for tensor in outputs):
            return None
        named = {key: self._named(value) if isinstance(value, Tensor) else value for key, value in arguments.items()}
        operands = [value for value in named.values() if isinstance(value, Tensor)]
        gone = self._uses.replaced(outputs, operands)
        if not gone:
            return None
        before = self._uses.place(gone, operands, outputs, row_major=row_major)
        if before is None:
            return None
        return Match(kernel, tuple(self.graph.ops[i].name for i in gone), before, named, tuple(outputs), cost)

    def _named(self, tensor: Tensor) -> Tensor:
        """The tensor of the graph with this layout, or ``tensor`` under a name that says how it lies."""
        for known in self._by_buffer.get(tensor.buffer, ()):
            if replace(tensor, name=known.name, strides=tensor.element_strides, role=known.role) == replace(
                known, strides=known.element_strides
            ):
                return known
        shape, strides = ("x".join(map(str, sizes)) for sizes in (tensor.shape, tensor.element_strides))
        return replace(tensor, name=f"{tensor.buffer}_{shape}_by_{strides}_at_{tensor.offset_bytes}")

    @cached_property
    def _by_buffer(self) -> Mapping[str, Sequence[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for tensor in self.graph.tensors:
            if tensor.name == tensor.buffer or len(self._uses.writers(tensor.buffer)) < 2:
                found.setdefault(tensor.buffer, []).append(tensor)
        return found

    def fresh(self, near: Tensor, suffix: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A new tensor for a result of a kernel that nobody reads; named after ``near``."""
        return Tensor(f"{near.name}_{suffix}", shape, dtype)


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A view with the same elements in row-major order in another shape; ``None`` where strides do not allow it.

    Only row-major tensors can be regrouped here, but dimensions of extent 1 may come and go anywhere.
    """
    wanted = tuple(shape)
    if wanted == tensor.shape:
        return tensor
    if math.prod(wanted) != math.prod(tensor.shape) or not is_row_major(tensor):
        return None
    return replace(tensor, name="", shape=wanted, strides=None)


def transposed(tensor: Tensor) -> Tensor:
    """A view with the last two dimensions exchanged."""
    shape, strides = tensor.shape, tensor.element_strides
    return replace(
        tensor,
        name="",
        shape=(*shape[:-2], shape[-1], shape[-2]),
        strides=(*strides[:-2], strides[-1], strides[-2]),
    )


def _called(op: Op) -> str:
    """``mul`` of ``aten.mul.Tensor``; empty for other namespaces than ``aten`` and ``prims``."""
    namespace, _, rest = op.target.partition(".")
    return rest.partition(".")[0] if namespace in ("aten", "prims") else ""


def _same_elements(one: Tensor, other: Tensor) -> bool:
    """Whether both read the same elements in the same row-major order."""
    if (one.buffer, one.offset_bytes, one.dtype) != (other.buffer, other.offset_bytes, other.dtype):
        return False
    if (one.shape, one.element_strides) == (other.shape, other.element_strides):
        return True
    same = math.prod(one.shape) == math.prod(other.shape)
    return same and is_row_major(one) and is_row_major(other)


def _equal(wanted: Any, value: Any) -> bool:
    """Whether two literals are equal, numbers within what float32 can tell apart."""
    if isinstance(wanted, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(wanted) == len(value)
            and all(_equal(one, other) for one, other in zip(wanted, value, strict=True))
        )
    plain = isinstance(wanted, int | float) and isinstance(value, int | float)
    if plain and not isinstance(wanted, bool) and not isinstance(value, bool):
        return math.isclose(wanted, value, rel_tol=1e-6)
    return type(wanted) is type(value) and bool(wanted == value)


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of the elements of all ``tensors``."""
    return sum(math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] for tensor in tensors)
