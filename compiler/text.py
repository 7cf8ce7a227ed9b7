"""The graph's text form: one line for each tensor and operator, printed and parsed back exactly.

.. code-block:: text

    graph "block" {
      input "x": float32[1, 3, 8, 8]
      weight "w": float32[4, 3]
      activation "pixels": float32[3, 64] in "x"
      activation "y": float32[4, 64] strides [1, 4]
      op "conv" ("w", "pixels") -> ("y") flops 1536 from "/stem/Conv" do aten.mm.default(%0, %1)
      activation "lower": float32[2, 64] in "y" strides [1, 4] offset 8
      return "y", "lower"
    }

The grammar, a statement a line; blank lines and lines that begin with ``#`` mean nothing:

.. code-block:: text

    graph   = "graph" NAME "{" { tensor | op | return } "}"
    tensor  = ROLE NAME ":" DTYPE SHAPE [ "in" NAME ] [ "strides" LIST ] [ "offset" INTEGER ]
    op      = "op" NAME NAMES "->" NAMES [ "kind" KIND ] [ moves ] [ "flops" INTEGER ] [ "outside" INTEGER ] [ "once" ]
              [ "from" NAME ] [ "do" BODY ]
    moves   = COLLECTIVE "of" NAME "ranks" LIST "bytes" INTEGER
    return  = "return" [ NAME { "," NAME } ]

``NAME`` is a JSON string, ``SHAPE`` and ``LIST`` are integers in brackets, ``NAMES`` are names in parentheses.
``BODY`` is the rest of the line, or a JSON string where the body would not survive that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TypeVar

from ..errors import ModelError
from .graph import DTYPE_BYTES, Collective, CollectiveKind, Graph, Op, OpKind, Role, Tensor

__all__ = ["parse_graph", "print_graph"]

_T = TypeVar("_T")


def print_graph(graph: Graph) -> str:
    """The text form of ``graph``; each operator follows the tensors it names."""
    lines = [f"graph {_quoted(graph.name)} {{"]
    position = {tensor.name: index for index, tensor in enumerate(graph.tensors)}
    printed = 0
    for op in graph.ops:
        needed = max((position[name] + 1 for name in (*op.inputs, *op.outputs)), default=0)
        lines += [f"  {_print_tensor(tensor)}" for tensor in graph.tensors[printed:needed]]
        lines.append(f"  {_print_op(op)}")
        printed = max(printed, needed)
    lines += [f"  {_print_tensor(tensor)}" for tensor in graph.tensors[printed:]]
    lines.append(f"  return {', '.join(map(_quoted, graph.outputs))}".rstrip())
    return "\n".join([*lines, "}", ""])


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=not name.isprintable())


def _print_tensor(tensor: Tensor) -> str:
    text = f"{tensor.role.value} {_quoted(tensor.name)}: {tensor.dtype}{list(tensor.shape)}"
    if tensor.buffer != tensor.name:
        text += f" in {_quoted(tensor.buffer)}"
    if tensor.strides is not None:
        text += f" strides {list(tensor.strides)}"
    return text + (f" offset {tensor.offset_bytes}" if tensor.offset_bytes else "")


def _print_op(op: Op) -> str:
    inputs, outputs = (", ".join(map(_quoted, names)) for names in (op.inputs, op.outputs))
    text = f"op {_quoted(op.name)} ({inputs}) -> ({outputs})"
    if op.kind is not OpKind.COMPUTE:
        text += f" kind {op.kind.value}"
    if op.collective is not None:
        what = op.collective
        text += f" {what.kind.value} of {_quoted(what.group)} ranks {list(what.ranks)} bytes {what.nbytes}"
        text += f" tag {_quoted(what.tag)}" if what.tag else ""
    if op.flops:
        text += f" flops {op.flops}"
    if op.outside_bytes:
        text += f" outside {op.outside_bytes}"
    if not op.repeatable:
        text += " once"
    if op.origin:
        text += f" from {_quoted(op.origin)}"
    if op.body:
        plain = op.body.isprintable() and op.body == op.body.strip() and not op.body.startswith('"')
        text += f" do {op.body if plain else _quoted(op.body)}"
    return text


def parse_graph(text: str) -> Graph:
    """Read the text form.

    Raises:
        ModelError: the text does not follow the grammar (with line, column and what was expected), or the graph
            contradicts itself.
    """
    lines = [_Line(number, content) for number, content in enumerate(text.split("\n"), 1)]
    statements = [line for line in lines if not line.is_blank()]
    if not statements:
        raise ModelError('line 1, column 1: expected "graph", found nothing')
    name = _parse_header(statements[0])
    tensors: list[Tensor] = []
    ops: list[Op] = []
    outputs: tuple[str, ...] | None = None
    for position, line in enumerate(statements[1:], 2):
        word = line.word("a role, op, return or }", (*_ROLES, "op", "return", "}"))
        if word == "}":
            line.end()
            if position < len(statements):
                raise statements[position].error("nothing after }")
            if outputs is None:
                raise line.error("a return before }")
            return Graph(name, tuple(tensors), tuple(ops), outputs)
        if word == "op":
            ops.append(_parse_op(line))
        elif word == "return":
            if outputs is not None:
                raise line.error("a single return")
            outputs = line.names_until("")
        else:
            tensors.append(_parse_tensor(line, Role(word)))
        line.end()
    raise statements[-1].error("a line with } behind this one")


_ROLES = tuple(role.value for role in Role)


def _parse_header(line: _Line) -> str:
    line.word('"graph"', ("graph",))
    name = line.name("the graph's name")
    line.word("{", ("{",))
    line.end()
    return name


def _parse_tensor(line: _Line, role: Role) -> Tensor:
    name = line.name("the tensor's name")
    line.word(":", (":",))
    dtype = line.word("a dtype", tuple(DTYPE_BYTES))
    shape = line.integers("the shape")
    buffer = line.option("in", lambda: line.name("the buffer's name")) or name
    strides = line.option("strides", lambda: line.integers("strides"))
    offset_bytes = line.option("offset", lambda: line.integer("a number of bytes")) or 0
    line.end()
    try:
        return Tensor(name, shape, dtype, role, buffer, strides, offset_bytes)
    except ModelError as error:
        raise ModelError(f"line {line.number}: {error.message}") from error


def _parse_op(line: _Line) -> Op:
    name = line.name("the operator's name")
    line.word("(", ("(",))
    inputs = line.names_until(")")
    line.word("->", ("->",))
    line.word("(", ("(",))
    outputs = line.names_until(")")
    kinds = tuple(kind.value for kind in OpKind)
    kind_name = line.option("kind", lambda: line.word("a kind of operator", kinds))
    collective = _parse_collective(line) if kind_name == OpKind.COLLECTIVE else None
    flops = line.option("flops", lambda: line.integer("a number of operations"))
    outside = line.option("outside", lambda: line.integer("a number of bytes"))
    once = line.option("once", lambda: True)
    origin = line.option("from", lambda: line.name("the name of the model's node"))
    body = line.option("do", line.body)
    kind = OpKind(kind_name or "compute")
    return Op(name, inputs, outputs, kind, flops or 0, body or "", origin or "", outside or 0, not once, collective)


def _parse_collective(line: _Line) -> Collective:
    kind = CollectiveKind(line.word("a kind of collective", tuple(kind.value for kind in CollectiveKind)))
    line.word("of", ("of",))
    group = line.name("the process group's name")
    line.word("ranks", ("ranks",))
    ranks = line.integers("the ranks")
    line.word("bytes", ("bytes",))
    nbytes = line.integer("a number of bytes")
    tag = line.option("tag", lambda: line.name("what the collective carries"))
    try:
        return Collective(kind, group, ranks, nbytes, tag or "")
    except ModelError as error:
        raise ModelError(f"line {line.number}: {error.message}") from error


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9]{1,40}(?![0-9])|[A-Za-z_][A-Za-z0-9_]*|->|[\[\](){},:]')
_SPACE = re.compile(r"[ \t\r]*")


class _Line:
    """A cursor over one line; every method raises ModelError with the place where it expected something else."""

    def __init__(self, number: int, content: str) -> None:
        self.number = number
        self.content = content
        self.column = 0

    def is_blank(self) -> bool:
        return self._peek() == "" or self.content.lstrip().startswith("#")

    def error(self, expected: str) -> ModelError:
        found = self._peek() or "the end of the line"
        return ModelError(f"line {self.number}, column {self.column + 1}: expected {expected}, found {found}")

    def _peek(self) -> str:
        """The next token, or all that is left where there is none; the cursor moves to its beginning."""
        space = _SPACE.match(self.content, self.column)
        self.column = space.end() if space else self.column
        token = _TOKEN.match(self.content, self.column)
        return token[0] if token else self.content[self.column :].rstrip()

    def _take(self, token: str) -> None:
        self.column += len(token)

    def word(self, expected: str, allowed: tuple[str, ...]) -> str:
        token = self._peek()
        if token not in allowed:
            raise self.error(expected)
        self._take(token)
        return token

    def name(self, expected: str) -> str:
        token = self._peek()
        try:
            value = json.loads(token)
        except ValueError:
            value = None
        if not isinstance(value, str):
            raise self.error(f"{expected} in double quotes")
        self._take(token)
        return value

    def integer(self, expected: str) -> int:
        token = self._peek()
        if not re.fullmatch("-?[0-9]{1,40}", token):
            raise self.error(expected)
        self._take(token)
        return int(token)

    def integers(self, expected: str) -> tuple[int, ...]:
        self.word(f"{expected} in brackets", ("[",))
        values: list[int] = []
        while self._peek() != "]":
            if values:
                self.word(", or ]", (",",))
            values.append(self.integer("an integer"))
        self._take("]")
        return tuple(values)

    def names_until(self, close: str) -> tuple[str, ...]:
        """Names between commas up to ``close``, or to the end of the line where that is empty."""
        values: list[str] = []
        while self._peek() != close:
            if values:
                self.word(f", or {close or 'the end of the line'}", (",",))
            values.append(self.name("a tensor's name"))
        self._take(close)
        return tuple(values)

    def option(self, keyword: str, parse: Callable[[], _T]) -> _T | None:
        if self._peek() != keyword:
            return None
        self._take(keyword)
        return parse()

    def body(self) -> str:
        if self._peek().startswith('"'):
            return self.name("the body")
        text = self.content[self.column :].rstrip(" \t\r")
        if not text:
            raise self.error("a body")
        self._take(text)
        return text

    def end(self) -> None:
        if self._peek():
            raise self.error("the end of the line")
