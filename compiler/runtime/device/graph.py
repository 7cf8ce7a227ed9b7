"""The operator graph of a program: what the passes plan.

Its buffers are those whose bytes come and go while the program runs: planned ones, outputs, what calls make for
themselves, and inputs that the caller hands over. What the caller keeps occupies no planned byte and is left out; the
order it imposes is kept by tensors without bytes. Two operators frame the program: ``receive`` brings the inputs that
are handed over, ``return`` takes the outputs, so that both occupy memory as long as they do.

Tensors that the caller has in host memory are inputs of the graph, and those that it gets there are its outputs: the
plan loads and stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from ...graph import Graph, Op, OpKind, Role, Tensor
from .program import Call, Origin, Program, Ref

__all__ = ["RECEIVE", "RETURN", "planning_graph"]

RECEIVE, RETURN = "receive", "return"
#: Origins of the storages that a graph lists.
_LISTED = (Origin.PLANNED, Origin.OUTPUT, Origin.CALL, Origin.GIVEN, Origin.HOST, Origin.RETURNED)


def planning_graph(program: Program) -> Graph:
    """The graph of ``program``, whose sizes are all integers; operators are named as calls, buffers as storages."""
    return _Builder(program).graph()


class _Builder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: list[Tensor] = []
        self.version: dict[str, str] = {}  # the tensor that a storage holds now
        self.ops: list[Op] = []
        self.readers: dict[str, list[int]] = {}  # of storages that are not listed, since the last write
        self.writer: dict[str, int] = {}
        self.effect: int | None = None
        written = {name for call in program.calls for name in call.writes}
        self.updated = frozenset(name for name in written if not self._is_listed(name))

    def graph(self) -> Graph:
        given = [s.name for s in self.program.storages.values() if s.origin is Origin.GIVEN]
        if given:
            self.ops.append(Op(RECEIVE, (), tuple(self._written(name) for name in given), OpKind.BOUNDARY))
        used = {name for call in self.program.calls for name in (*call.reads, *call.writes)}
        for storage in self.program.storages.values():
            if storage.origin is Origin.HOST and storage.name in used:
                self._written(storage.name, Role.INPUT)
        for call in self.program.calls:
            self._append(call)
        returned = dict.fromkeys(self.program.storage_of(o) for o in self.program.outputs if isinstance(o, Ref))
        made = [s for s in returned if s.name in self.version and s.origin is not Origin.HOST]
        kept = tuple(self.version[s.name] for s in made if s.origin is not Origin.RETURNED)
        if kept:
            self.ops.append(Op(RETURN, kept, (), OpKind.BOUNDARY))
        stored = tuple(self.version[s.name] for s in made if s.origin is Origin.RETURNED)
        return Graph(self.program.name, tuple(self.tensors), tuple(self.ops), stored)

    def _append(self, call: Call) -> None:
        index = len(self.ops)
        listed = [name for name in call.reads if self._is_listed(name)]
        inputs = [self.version[name] for name in listed if name in self.version]
        inputs += [self._token(other) for other in sorted(self._outside_order(call, index))]
        outputs = [self._written(name) for name in call.writes if self._is_listed(name)]
        outside = sum(
            self._bytes(name) for name in dict.fromkeys((*call.reads, *call.writes)) if not self._is_listed(name)
        )
        flops = call_flops(call, self.program)
        again = not (call.effect or call.makes or self.updated.intersection((*call.reads, *call.writes)))
        self.ops.append(
            Op(
                call.name,
                tuple(inputs),
                tuple(outputs),
                flops=flops,
                outside_bytes=outside,
                origin=call.target,
                repeatable=again,
            )
        )

    def _is_listed(self, storage: str) -> bool:
        return self.program.storages[storage].origin in _LISTED

    def _bytes(self, storage: str) -> int:
        nbytes = self.program.storages[storage].nbytes
        assert isinstance(nbytes, int)
        return nbytes

    def _written(self, storage: str, role: Role = Role.ACTIVATION) -> str:
        """A new version of a storage's tensor, or its first."""
        known = self.program.storages[storage]
        before = self.version.get(storage)
        name = storage if before is None else f"{before}'"
        dtype = str(known.dtype).removeprefix("torch.")
        elements = self._bytes(storage) // known.dtype.itemsize
        self.tensors.append(Tensor(name, (elements,), dtype, role, storage))
        self.version[storage] = name
        return name

    def _outside_order(self, call: Call, index: int) -> set[int]:
        """Operators that must come before for the sake of storages that the graph does not list, or of effects."""
        before: set[int] = set()
        for name in call.reads:
            if not self._is_listed(name):
                before.update({self.writer[name]} if name in self.writer else ())
                self.readers.setdefault(name, []).append(index)
        for name in call.writes:
            if not self._is_listed(name):
                before.update(self.readers.pop(name, ()), {self.writer[name]} if name in self.writer else ())
                self.writer[name] = index
        if call.effect:
            before.update(() if self.effect is None else {self.effect})
            self.effect = index
        return before - {index}

    def _token(self, op: int) -> str:
        """A tensor without bytes that says that operator ``op`` has run."""
        name = f"after {self.ops[op].name}"
        if name not in self.ops[op].outputs:
            self.tensors.append(Tensor(name, (0,), "uint8"))
            self.ops[op] = msgspec.structs.replace(self.ops[op], outputs=(*self.ops[op].outputs, name))
        return name


def call_flops(call: Call, program: Program) -> int:
    """Multiplications and additions of a call to an operator that PyTorch's flop counter knows, 0 for any other."""
    from torch.utils.flop_counter import flop_registry

    namespace, _, rest = call.target.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), rest.partition(".")[0], None)
    count = flop_registry.get(packet)
    if count is None:
        return 0
    kwargs = dict(call.kwargs)
    out = kwargs.pop("out", None)
    if out is None:
        made = tuple(_meta(Ref(name), program) for name, _ in call.makes)
        out_value: Any = made[0] if len(made) == 1 else made
    else:
        out_value = _meta(out, program)
    try:
        return int(count(*_metas(call.args, program), **_metas(kwargs, program), out_val=out_value))
    except (TypeError, ValueError, AssertionError, IndexError, AttributeError):
        return 0  # a formula for other arguments than this overload takes: bytes alone decide the time then


def _metas(item: Any, program: Program) -> Any:
    if isinstance(item, Ref):
        return _meta(item, program)
    if isinstance(item, tuple | list):
        return type(item)(_metas(part, program) for part in item)
    if isinstance(item, Mapping):
        return {key: _metas(part, program) for key, part in item.items()}
    return item


def _meta(ref: Ref, program: Program) -> torch.Tensor:
    view = program.views[ref.name]
    return torch.empty_strided(view.shape, view.strides, dtype=view.dtype, device="meta")
