"""Programs written by hand from ATen calls: no compiler, and the same bytes as eager PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opweave.compiler.runtime.device.code import operator, placed
from opweave.compiler.runtime.device.program import Call, Origin, Program, Ref, Storage, View, references
from opweave.hw_models.model import Direction, Engine, EngineKind, HardwareModel, Memory

__all__ = ["ProgramBuilder", "device_machine", "evaluated", "layered"]

CPU = torch.device("cpu")


def device_machine(bandwidth_bytes_per_s: float = 64e9, latency_s: float = 0.0) -> HardwareModel:
    """A device of 1 GB with an engine for each direction of the link to its host, as GPUs have."""
    link = {"kind": EngineKind.COPY, "bandwidth_bytes_per_s": bandwidth_bytes_per_s, "latency_s": latency_s}
    return HardwareModel(
        "device",
        "for tests",
        (),
        "hbm",
        "host",
        (Memory("hbm", 10**9, 64, 1e12), Memory("host", 10**12, 64, bandwidth_bytes_per_s)),
        (
            Engine("sm", EngineKind.COMPUTE, {"default": 1e13}, launch_s=1e-6),
            Engine("in", direction=Direction.LOAD, **link),  # type: ignore[arg-type]
            Engine("out", direction=Direction.STORE, **link),  # type: ignore[arg-type]
        ),
    )


@dataclass
class ProgramBuilder:
    """Collects storages and calls; all tensors are float32, row-major, and one to a storage."""

    storages: dict[str, Storage] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)

    def tensor(self, name: str, *shape: int, origin: Origin = Origin.PLANNED) -> Ref:
        """A tensor over a storage of its own."""
        strides = torch.empty(shape, device="meta").stride()
        nbytes = torch.Size(shape).numel() * 4
        self.storages[name] = Storage(name, nbytes, torch.float32, CPU, origin)
        self.views[name] = View(name, name, shape, strides, 0, torch.float32)
        return Ref(name)

    def input(self, name: str, *shape: int) -> Ref:
        """What the caller passes."""
        self.inputs.append(self.tensor(name, *shape, origin=Origin.INPUT))
        return Ref(name)

    def view(self, name: str, of: Ref, *shape: int, offset: int = 0) -> Ref:
        """A row-major view of another tensor's storage."""
        strides = torch.empty(shape, device="meta").stride()
        self.views[name] = View(name, self.views[of.name].storage, shape, strides, offset, torch.float32)
        return Ref(name)

    def out(self, target: str, *args: Any, out: Ref, effect: bool = False) -> Ref:
        """A call that writes ``out``."""
        self._call(target, args, {"out": out}, (out,), reads=tuple(references(args)), effect=effect)
        return out

    def update(self, target: str, what: Ref, *args: Any) -> Ref:
        """A call that updates its first argument."""
        self._call(target, (what, *args), {}, (what,), reads=(what.name, *references(args)))
        return what

    def make(self, target: str, name: str, *args: Any, shape: Sequence[int]) -> Ref:
        """A call that allocates its result."""
        made = self.tensor(name, *shape, origin=Origin.CALL)
        self._call(target, args, {}, (made,), reads=tuple(references(args)), makes=((name, ()),))
        return made

    def returns(self, *refs: Ref) -> None:
        """Name the outputs: planned storages become those of the caller."""
        self.outputs += refs
        for ref in refs:
            storage = self.storages[self.views[ref.name].storage]
            if storage.origin is Origin.PLANNED:
                self.storages[storage.name] = Storage(
                    storage.name, storage.nbytes, storage.dtype, storage.device, Origin.OUTPUT
                )

    def _call(
        self, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: tuple[Ref, ...], **rest: Any
    ) -> None:
        reads = tuple(dict.fromkeys(self.views[name].storage for name in rest.pop("reads")))
        writes = tuple(dict.fromkeys(self.views[ref.name].storage for ref in written))
        name = f"{len(self.calls)}_{target}"
        self.calls.append(Call(name, target, args, kwargs, reads=reads, writes=writes, **rest))

    def program(self) -> Program:
        """The program collected so far."""
        calls, inputs, outputs = tuple(self.calls), tuple(self.inputs), tuple(self.outputs)
        return Program("small", inputs, outputs, self.storages, self.views, calls, {})


def evaluated(program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the calls one after another, every storage in memory of its own; updates ``inputs`` in place."""
    memory: dict[str, torch.Tensor] = {}
    for item, tensor in zip(program.inputs, inputs, strict=True):
        assert isinstance(item, Ref)
        memory[item.name] = tensor
    for storage in program.storages.values():
        if storage.name not in memory and storage.origin is not Origin.CALL:
            memory[storage.name] = torch.empty(int(storage.nbytes) // 4)

    def value(item: Any) -> Any:
        if isinstance(item, Ref):
            view = program.views[item.name]
            assert isinstance(view.offset, int)
            return placed(memory[view.storage], view.offset * 4, view.shape, view.strides, view.dtype)
        return item

    for call in program.calls:
        args, kwargs = [value(a) for a in call.args], {k: value(v) for k, v in call.kwargs.items()}
        result = operator(call.target)(*args, **kwargs)
        for name, _ in call.makes:
            memory[name] = result
    return [value(output).clone() for output in program.outputs]


def layered(
    widths: Sequence[int], *, rows: int = 8, state: bool = True, made: bool = True
) -> tuple[Program, list[int]]:
    """Matrices in turn, each result squashed, the first kept to the end; and the positions of the weights.

    With ``state`` an input is updated in place, with ``made`` one call allocates its result.
    """
    builder = ProgramBuilder()
    x = first = builder.input("x", rows, widths[0])
    weights = []
    for layer, (before, behind) in enumerate(itertools.pairwise(widths)):
        weights.append(len(builder.inputs))
        weight = builder.input(f"w{layer}", before, behind)
        product = builder.tensor(f"p{layer}", rows, behind)
        builder.out("aten.mm.out", x, weight, out=product)
        x = builder.out("aten.tanh.out", product, out=builder.tensor(f"h{layer}", rows, behind))
        first = x if layer == 0 else first
    if made:
        x = builder.make("aten.neg.default", "negated", x, shape=(rows, widths[-1]))
    gate = builder.out("aten.sum.IntList_out", first, [1], True, out=builder.tensor("gate", rows, 1))
    last = builder.out("aten.mul.out", x, gate, out=builder.tensor("last", rows, widths[-1]))
    outputs = [last]
    if state:
        total = builder.input("total", rows, 1)
        builder.update("aten.add_.Tensor", total, gate)
        outputs.append(builder.out("aten.exp.out", total, out=builder.tensor("grown", rows, 1)))
    builder.returns(*outputs)
    return builder.program(), weights
