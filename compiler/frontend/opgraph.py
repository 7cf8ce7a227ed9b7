"""Plain operator graphs in JSON: names and sizes in bytes, for planning without execution.

.. code-block:: json

    {"name": "two", "weights": {"k": 64}, "tensors": {"x": 256, "y": 256},
     "ops": [{"op": "conv2d", "in": ["x"], "w": ["k"], "out": "y"}], "outputs": ["y"]}

``ops`` are in program order. A tensor that no operator makes is an input of the graph. ``name`` and ``unit`` (a remark
on what the sizes mean) may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from ...errors import ModelError
from ..graph import MAX_BUFFER_BYTES, Graph, Op, Role, Tensor
from .program import ImportedGraph

__all__ = ["load_opgraph"]

_Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_BUFFER_BYTES)]


class _Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    op: str
    inputs: tuple[str, ...] = msgspec.field(name="in")
    weights: tuple[str, ...] = msgspec.field(name="w")
    out: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    weights: dict[str, _Bytes]
    tensors: dict[str, _Bytes]
    ops: tuple[_Operator, ...]
    outputs: tuple[str, ...]
    name: str = ""
    unit: str = ""


def load_opgraph(path: str | Path) -> ImportedGraph:
    """Read an operator graph; every tensor is a row of ``uint8``, every operator has an empty body.

    An operator is named after its output; its ``origin`` is the file's ``op``. Weights come last among its inputs.

    Raises:
        ModelError: the file cannot be read, is not JSON, or has a field that is missing, unknown, of another type or
            out of range, or a name that nothing defines; says which field and where.
    """
    try:
        file = msgspec.json.decode(Path(path).read_bytes(), type=_File)
    except OSError as error:
        raise ModelError(f"operator graph {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(
            f"operator graph {path} is malformed: {error}",
            hint="fields are weights and tensors (bytes by name), ops (op, in, w, out), outputs",
        ) from error
    for field, name, known in _references(file):
        if name not in known:
            raise ModelError(f"operator graph {path} is malformed: {field} names {name!r}, which is not defined")
    produced = {operator.out for operator in file.ops}
    tensors = [
        *(Tensor(n, (size,), "uint8", Role.WEIGHT) for n, size in file.weights.items()),
        *(Tensor(n, (size,), "uint8", _role(n, file, produced)) for n, size in file.tensors.items()),
    ]
    ops = (Op(o.out, o.inputs + o.weights, (o.out,), origin=o.op) for o in file.ops)
    graph = Graph(file.name or Path(path).stem, _read_or_returned(tensors, file), tuple(ops), file.outputs)
    return ImportedGraph(graph, {}, tuple(n for n in file.tensors if n not in produced))


def _role(name: str, file: _File, produced: set[str]) -> Role:
    if name not in produced:
        return Role.INPUT
    return Role.OUTPUT if name in file.outputs else Role.ACTIVATION


def _read_or_returned(tensors: list[Tensor], file: _File) -> tuple[Tensor, ...]:
    """Without the weights that no operator reads, such as statistics that were folded away."""
    used = {name for operator in file.ops for name in operator.weights}
    return tuple(t for t in tensors if t.role is not Role.WEIGHT or t.name in used)


def _references(file: _File) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Each name the file uses: the field it stands in, the name, and where it must be defined."""
    for index, operator in enumerate(file.ops):
        for position, name in enumerate(operator.inputs):
            yield f"ops[{index}].in[{position}]", name, file.tensors
        for position, name in enumerate(operator.weights):
            yield f"ops[{index}].w[{position}]", name, file.weights
        yield f"ops[{index}].out", operator.out, file.tensors
    for position, name in enumerate(file.outputs):
        yield f"outputs[{position}]", name, file.tensors
