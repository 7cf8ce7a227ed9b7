"""Finds rotary position embeddings in a graph; shared by the match rules of the kernels that rotate.

Three spellings are known, with two tables of a column for each pair or for each element:

* halves or neighbours apart, ``cat(first * cos - second * sin, second * cos + first * sin)``, or ``stack``;
* Hugging Face's ``x * cos + cat(-second, first) * sin``;
* either of them for the first elements of a head, with the others put behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from ..compiler.graph import DTYPE_BYTES, Tensor, contiguous_strides
from ._checks import FLOATS, dtype_name
from ._match import Walk, any_tensor, bytes_of, call, reshaped
from ._rope import dense_strides

__all__ = ["Angles", "Rotation", "rotations", "row_major"]

_A, _B, _C, _S, _X = (any_tensor(name) for name in "abcsx")
_FIRST = call("sub", call("mul", _A, _C), call("mul", _B, _S))
_SECOND = call("add", call("mul", _B, _C), call("mul", _A, _S))
_TOGETHER = call("add", call("mul", _X, _C), call("mul", any_tensor("turned"), _S))
_NEGATIVE = call("neg", _B)
_ROTATED = ("cat", "stack", "add", "to", "_to_copy", "convert_element_type")


@dataclass(frozen=True)
class Angles:
    """Tables ``[rows, columns]``, and which rows: those at ``positions``, else one for each token, batches in order."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    heads_first: bool

    @property
    def key(self) -> tuple[object, ...]:
        """What is equal where the same angles are meant."""
        return (*(None if t is None else _place(t) for t in (self.cos, self.sin, self.positions)), self.heads_first)

    @property
    def moved_bytes(self) -> int:
        """Bytes of positions, and of a row of both tables for each token that has one of its own."""
        if self.positions is None:
            return bytes_of(self.cos, self.sin)
        rows = math.prod(self.positions.shape)
        return bytes_of(self.positions) + 2 * rows * self.cos.shape[1] * DTYPE_BYTES[self.cos.dtype]


@dataclass(frozen=True)
class Rotation:
    """``out`` is ``x`` rotated; both ``[..., dim]``, with tokens and heads before it as ``angles`` says."""

    out: Tensor
    x: Tensor
    rotary_dim: int
    interleaved: bool
    angles: Angles

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.x.shape[-2 if self.angles.heads_first else -3]

    @property
    def heads(self) -> int:
        """Heads of a token."""
        return self.x.shape[-3 if self.angles.heads_first else -2]

    @property
    def key(self) -> tuple[object, ...]:
        """What is equal for queries and keys that one launch can rotate."""
        batch = self.x.shape[:-3]
        return (batch, self.tokens, self.x.shape[-1], self.x.dtype, self.rotary_dim, self.interleaved, self.angles.key)


@dataclass(frozen=True)
class _Turned:
    """All of ``x`` rotated by broadcast cosines and sines."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotations(walk: Walk) -> list[Rotation]:
    """All rotations of a graph, in program order; of one inside another, for a part of a head, only the outer."""
    found: list[Rotation] = []
    inner: set[str] = set()
    for out in walk.results(*_ROTATED):
        if out.dtype in map(dtype_name, FLOATS) and len(out.shape) in (3, 4):
            for rotation, part in _rotations(walk, out):
                found.append(rotation)
                inner |= part - {out.buffer}
                break
    return [rotation for rotation in found if rotation.out.name not in inner]


def _rotations(walk: Walk, out: Tensor) -> Iterator[tuple[Rotation, set[str]]]:
    """Rotations whose result is ``out``, each with the buffers of what was rotated before it was put together."""
    made = walk.uncast(out, out.dtype)
    joined = _joined(walk, made)
    parts: list[tuple[Tensor, Tensor | None]] = [(made, None)]
    if joined is not None and not joined[1]:
        parts.append(joined[0])
    for part, rest in parts:
        wide = walk.uncast(part, out.dtype)
        for turned in _turned(walk, wide, out.dtype):
            x = turned.x if rest is None else _with_rest(turned.x, _origin(walk, rest, out.dtype))
            if x is None or x.dtype != out.dtype or x.shape != out.shape:
                continue
            angles = _angles(walk, turned, x)
            if angles is not None:
                yield Rotation(out, x, turned.x.shape[-1], turned.interleaved, angles), {part.buffer, wide.buffer}


def _joined(walk: Walk, tensor: Tensor) -> tuple[tuple[Tensor, Tensor], bool] | None:
    """Two tensors put behind each other in the last dimension, or, and that is said, alternating in it."""
    made = walk.writer(tensor)
    name = made[0].target.split(".")[1] if made is not None else ""
    if made is None or name not in ("cat", "stack"):
        return None
    arguments, keywords = walk.arguments(made[0])
    parts, dim = arguments[0], keywords.get("dim", arguments[1] if len(arguments) > 1 else 0)
    result = walk.graph.tensor[made[0].outputs[0]]
    if len(parts) != 2 or dim not in (-1, len(result.shape) - 1):
        return None
    if name == "cat" and all(part.shape[-1:] == (1,) for part in parts) and result.shape[-2] > 1:
        one, two = (replace(p, name="", shape=p.shape[:-1], strides=p.element_strides[:-1]) for p in parts)
        return (one, two), True  # as stack decomposes
    return (parts[0], parts[1]), name == "stack"


def _turned(walk: Walk, made: Tensor, dtype: str) -> Iterator[_Turned]:
    joined = _joined(walk, made)
    if joined is not None:
        (first, second), alternating = joined
        for one in walk.find(_FIRST, first):
            for both in walk.find(_SECOND, second, one):
                whole = _whole(walk, both["a"], both["b"], dtype)
                if whole is not None and whole[1] == alternating and both["a"].shape == first.shape:
                    yield _Turned(whole[0], both["c"], both["s"], alternating)
    for found in walk.find(_TOGETHER, made):
        exchanged = _joined(walk, found["turned"])
        for negative in walk.find(_NEGATIVE, exchanged[0][0]) if exchanged is not None else ():
            whole = _whole(walk, exchanged[0][1], negative["b"], dtype) if exchanged is not None else None
            x = _origin(walk, found["x"], dtype)
            if exchanged is None or whole is None or x is None or whole[1] != exchanged[1]:
                continue
            if _place(x) == _place(whole[0]):
                yield _Turned(x, found["c"], found["s"], whole[1])


def _whole(walk: Walk, first: Tensor, second: Tensor, dtype: str) -> tuple[Tensor, bool] | None:
    """What two tensors are the halves of, or, and that is said, the even and odd elements."""
    one, two = _origin(walk, first, dtype), _origin(walk, second, dtype)
    if one is None or two is None or (one.buffer, one.shape, one.dtype) != (two.buffer, two.shape, two.dtype):
        return None
    *leading, pairs = one.shape
    *outer, step = one.element_strides
    apart = (two.offset_bytes - one.offset_bytes) / DTYPE_BYTES[one.dtype]
    if one.element_strides != two.element_strides or (step, apart) not in ((1, pairs), (2, 1)):
        return None
    return replace(one, name="", shape=(*leading, 2 * pairs), strides=(*outer, 1)), step == 2


def _with_rest(x: Tensor, rest: Tensor | None) -> Tensor | None:
    """A head whose first elements are ``x`` and whose others ``rest``."""
    if rest is None or (rest.buffer, rest.dtype, rest.shape[:-1]) != (x.buffer, x.dtype, x.shape[:-1]):
        return None
    behind = x.offset_bytes + x.shape[-1] * DTYPE_BYTES[x.dtype]
    if rest.offset_bytes != behind or rest.element_strides != x.element_strides:
        return None
    return replace(x, name="", shape=(*x.shape[:-1], x.shape[-1] + rest.shape[-1]), strides=x.element_strides)


def _origin(walk: Walk, part: Tensor, dtype: str) -> Tensor | None:
    """The same elements of what the buffer of ``part`` was cast from without losing any digit."""
    base = walk.graph.buffers[part.buffer]
    source = walk.uncast(base, dtype)
    if source.buffer == base.buffer:
        return part
    size, start = DTYPE_BYTES[base.dtype], part.offset_bytes // DTYPE_BYTES[base.dtype]
    if source.shape != base.shape or start * size != part.offset_bytes:
        return None
    strides, step = part.element_strides, source.element_strides[-1:]
    if source.element_strides != base.element_strides:  # then a slice of the last dimension is understood
        inside = 0 <= start < base.shape[-1] and base.element_strides[-1] == 1
        if not inside or part.shape[:-1] != base.shape[:-1] or strides[:-1] != base.element_strides[:-1]:
            return None
        strides, start = (*source.element_strides[:-1], strides[-1] * step[0]), start * step[0]
    offset = source.offset_bytes + start * DTYPE_BYTES[source.dtype]
    return replace(source, name="", shape=part.shape, strides=strides, offset_bytes=offset)


def _angles(walk: Walk, turned: _Turned, x: Tensor) -> Angles | None:
    """The tables behind broadcast cosines and sines, and where they are gathered from, if they are."""
    if turned.sin.dtype != turned.cos.dtype or turned.cos.dtype not in ("float32", x.dtype):
        return None
    for heads_first in (True, False):
        cos, sin = (_rows(table, x, heads_first, turned.x.shape[-1]) for table in (turned.cos, turned.sin))
        if cos is not None and sin is not None and cos.shape == sin.shape:
            tokens = x.shape[-2 if heads_first else -3]
            one, two = (_gathered(walk, table, tokens, x.dtype) for table in (cos, sin))
            if one is None or two is None or _place(one[1]) != _place(two[1]) or one[0].dtype != two[0].dtype:
                return Angles(cos, sin, None, heads_first)
            return Angles(one[0], two[0], one[1], heads_first)
    return None


def _rows(table: Tensor, x: Tensor, heads_first: bool, width: int) -> Tensor | None:
    """A table that broadcasts over heads as ``[rows, columns]``, a row for each token, of each batch or of all."""
    missing = len(x.shape) - len(table.shape)
    if missing < 0 or table.shape[-1] not in (width, width // 2):
        return None
    shape, strides = (1,) * missing + table.shape, (0,) * missing + table.element_strides
    head, token = (-3, -2) if heads_first else (-2, -3)
    tokens, batch = x.shape[token], math.prod(x.shape[:-3])
    if shape[head] != 1 or shape[token] != tokens or tokens == 0:
        return None
    rows, stride = tokens, strides[token]
    if shape[:-3] not in ((), (1,)) and strides[0] != 0:
        stride = strides[0] if tokens == 1 else stride
        if shape[0] != batch or strides[0] != tokens * stride:
            return None
        rows *= batch
    return replace(table, name="", shape=(rows, shape[-1]), strides=(stride, strides[-1]))


def _gathered(walk: Walk, rows: Tensor, tokens: int, dtype: str) -> tuple[Tensor, Tensor] | None:
    """The table that ``rows`` are rows of, and their positions; ``None`` where they are no rows of another."""
    made = walk.writer(rows)
    arguments = walk.arguments(made[0])[0] if made is not None else []
    name = made[0].target.split(".")[1] if made is not None else ""
    match name, arguments:
        case ("index", [Tensor() as table, [Tensor() as positions]]):
            pass
        case ("embedding", [Tensor() as table, Tensor() as positions]):
            pass
        case ("index_select", [Tensor() as table, 0, Tensor() as positions]):
            pass
        case _:
            return None
    shape = (tokens,) if rows.shape[0] == tokens else (rows.shape[0] // tokens, tokens)
    chosen = reshaped(positions, shape) if positions.dtype in ("int32", "int64") else None
    fits = len(table.shape) == 2 and table.shape[1] == rows.shape[1]
    return (table, chosen) if fits and chosen is not None and table.dtype in ("float32", dtype) else None


def row_major(rotation: Rotation) -> bool | None:
    """Whether the result is row-major; ``False`` where it lies as ``x`` does, ``None`` where it does neither."""
    strides, x = rotation.out.element_strides, rotation.x
    if strides == dense_strides(x.shape, x.element_strides):
        return False
    return True if strides == contiguous_strides(x.shape) else None


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's elements are: equal for equal views, whatever their names."""
    strides = tuple(s if e > 1 else 0 for e, s in zip(tensor.shape, tensor.element_strides, strict=True))
    return tensor.buffer, tensor.offset_bytes, tensor.dtype, tensor.shape, strides
