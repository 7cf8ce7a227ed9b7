"""The host code of a planned program: straight-line Python that launches its calls in the plan's order.

Everything that is the same in each call is resolved once: kernels, operators, and tensors in the arena. What differs is
what the caller passes, what calls allocate for themselves, and the outputs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plan import Load, Residence, Store
from .backing import Backing, flat
from .layout import DevicePlan
from .program import Call, Item, Origin, Program, Ref, Storage, View, references
from .streams import Streams

__all__ = ["HostCode", "write_host_code"]

#: Origins of the storages that lie in the arena.
ARENA = (Origin.PLANNED, Origin.HOST, Origin.RETURNED)


@dataclass(frozen=True)
class HostCode:
    """``source`` defines ``bind(arena, spill)``, which returns a function of the list of inputs; ``names`` its globals.

    ``spill`` are the ``spill_bytes`` of host memory that storages leave the device for and come back from. One with
    events is not called twice at once.
    """

    source: str
    names: Mapping[str, Any] = field(repr=False)
    spill_bytes: int = 0
    has_events: bool = False

    def bind(self, arena: torch.Tensor, spill: torch.Tensor | None = None) -> Callable[[list[Any]], tuple[Any, ...]]:
        """The program over one arena."""
        scope = dict(self.names)
        exec(compile(self.source, "<opweave host code>", "exec"), scope)
        bound: Callable[[list[Any]], tuple[Any, ...]] = scope["bind"](arena, spill)
        return bound


def write_host_code(program: Program, device_plan: DevicePlan, kernels: Mapping[str, Any]) -> HostCode:
    """Host code for ``program``, all of whose sizes are integers, as ``device_plan`` has it."""
    return _Writer(program, device_plan, kernels).write()


class _Writer:
    def __init__(self, program: Program, device_plan: DevicePlan, kernels: Mapping[str, Any]) -> None:
        self.program, self.device_plan = program, device_plan
        self.calls = {call.name: call for call in program.calls}
        self.names: dict[str, Any] = {
            "placed": placed,
            "reinterpreted": reinterpreted,
            "assert_size_stride": _guards.assert_size_stride,
            "flat": flat,
            **{f"launch_{name}": _launcher(kernel, program, name) for name, kernel in kernels.items()},
        }
        self.bound: list[str] = []  # statements that run once for an arena
        self.body: list[str] = []  # statements of each call
        self.read = {name for call in program.calls for name in call.reads}
        self.read |= {program.views[name].storage for name in references(program.outputs)}
        self.variables: dict[str, str] = {}  # of views that have a variable now
        self.by_storage: dict[str, list[str]] = {}  # views, by storage, that calls or outputs use
        for name in self._used_views():
            self.by_storage.setdefault(program.views[name].storage, []).append(name)
        self.backing = Backing(program, device_plan.plan, self._table)
        self.streams = Streams(program, device_plan)
        self.names.update(self.streams.names)
        self.regions: dict[str, tuple[list[str], str, int, int]] = {}  # where each storage lies now
        self.ends = _ends(program, device_plan)  # bytes that each storage apart has to have for what is placed in it
        self.bytes_of: dict[str, str] = {}  # variables of all bytes of what is copied, by storage

    def _used_views(self) -> list[str]:
        used = [name for call in self.program.calls for name in call.views]
        used += [name for name, _ in (made for call in self.program.calls for made in call.makes)]
        return list(dict.fromkeys([*used, *references(self.program.outputs)]))

    def write(self) -> HostCode:
        self._constants()
        self._receive()
        self._without_bytes()
        residences = self.device_plan.plan.residences or ()
        begins: dict[int, list[Residence]] = {}
        for residence in residences:
            begins.setdefault(residence.begin, []).append(residence)
        ends = self._last_uses()
        self.body += self.streams.fork()
        for step, instruction in enumerate(self.device_plan.plan.instructions):
            for residence in begins.get(step, ()):
                self._begin(residence)
            if isinstance(instruction, Load | Store):
                self._copy(instruction, self.streams.before(step))
            elif instruction.op in self.calls:
                self.body += self.streams.before(step)
                self._launch(self.calls[instruction.op])
            self.body += self.streams.after(step)
            for name in ends.get(step, ()):
                self._drop(name)
        self.body += self.streams.join()
        self._return()
        inner = "\n".join(f"        {line}" for line in self.body)
        outer = "\n".join(f"    {line}" for line in self.bound)
        source = f"def bind(arena, spill):\n{outer}\n    def call(inputs):\n{inner}\n    return call\n"
        return HostCode(source, self.names, self.backing.spill_bytes, bool(self.streams.sides))

    # --- where tensors come from

    def _constants(self) -> None:
        for name, value in self.program.constants.items():
            if name in self.by_storage:
                self.names[f"constant_{name}"] = value
                self.bound.append(f"{name} = constant_{name}")
                self.variables[name] = name
                self._views_of(name, self.bound)

    def _receive(self) -> None:
        names = [f"input_{i}" for i in range(len(self.program.inputs))]
        if names:
            self.body.append(f"{', '.join(names)}, = inputs")
        self.body.append("inputs.clear()")
        kept = []
        for name, item in zip(names, self.program.inputs, strict=True):
            if isinstance(item, Ref) and self.program.storages[item.name].origin is Origin.HOST:
                self.body += self.backing.receive(item.name, name)
            elif isinstance(item, Ref) and item.name in self.by_storage:
                self.body.append(f"{item.name} = {name}")
                self.variables[item.name] = item.name
                self._views_of(item.name, self.body)
            kept.append(name)
        if kept:
            self.body.append(f"del {', '.join(kept)}")

    def _views_of(self, base: str, into: list[str]) -> None:
        """Variables for the views of a storage whose own tensor has one."""
        storage = self.program.views[base].storage
        whole = self.program.views[base]
        for name in self.by_storage.get(storage, ()):
            if name in self.variables:
                continue
            view = self.program.views[name]
            same = (view.shape, view.strides, view.offset, view.dtype) == (
                whole.shape,
                whole.strides,
                whole.offset,
                whole.dtype,
            )
            what = self.variables[base] if same else self._reinterpreted(self.variables[base], whole, view)
            into.append(f"{name} = {what}")
            self.variables[name] = name

    def _reinterpreted(self, variable: str, whole: View, view: View) -> str:
        if view.dtype == whole.dtype:
            return f"reinterpreted({variable}, {view.shape}, {view.strides}, {view.offset})"
        offset = view.offset * view.dtype.itemsize
        return f"placed({variable}, {offset}, {view.shape}, {view.strides}, {self._table(view.dtype)})"

    def _begin(self, residence: Residence) -> None:
        """Variables for a residence that begins."""
        storage = self.program.storages[residence.buffer]
        if storage.origin is Origin.OUTPUT and residence.buffer not in self.variables:
            self._allocate(storage)
        if storage.origin not in ARENA:
            return
        assert residence.offset is not None
        if residence.offset + int(storage.nbytes) <= self.device_plan.arena_bytes:
            base, into, first, dtype = "arena", self.bound, residence.offset, torch.uint8
        else:
            host = self._host(residence.offset)
            if host.name not in self.variables:
                self._allocate(host)
            if host.name == storage.name:
                self.regions[storage.name] = self.body, storage.name, 0, residence.begin
                return
            base, into = self.variables[host.name], self.body
            first = residence.offset - self.device_plan.apart[host.name]
            dtype = host.dtype
        self.regions[storage.name] = into, base, first, residence.begin
        self.bytes_of.pop(storage.name, None)
        for name in self.by_storage.get(storage.name, ()):
            view = self.program.views[name]
            variable = f"{name}_at_{residence.begin}" if into is self.bound else name
            offset = first + view.offset * view.dtype.itemsize
            if view.dtype == dtype:
                place = f"reinterpreted({base}, {view.shape}, {view.strides}, {offset // dtype.itemsize})"
            else:
                place = f"placed({base}, {offset}, {view.shape}, {view.strides}, {self._table(view.dtype)})"
            into.append(f"{variable} = {place}")
            self.variables[name] = variable

    def _host(self, offset: int) -> Storage:
        """The storage, allocated apart, whose range has ``offset``."""
        name = max(
            (n for n, first in self.device_plan.apart.items() if first <= offset),
            key=lambda n: self.device_plan.apart[n],
        )
        return self.program.storages[name]

    def _allocate(self, storage: Storage) -> None:
        view = self.program.views[storage.name]
        self.body += self.streams.main()  # what the caller may keep comes from the pool of its own stream
        empty = f"empty_{storage.device.type}"
        self.names[empty] = _empty(storage.device)
        dtype = self._table(storage.dtype)
        needed = self.ends.get(storage.name, 0)
        if needed <= int(storage.nbytes):
            self.body.append(f"{storage.name} = {empty}({view.shape}, {view.strides}, {dtype})")
        else:  # its guests use what alignment adds to it
            row = f"{empty}(({-(-needed // storage.dtype.itemsize)},), (1,), {dtype})"
            self.body.append(f"{storage.name} = reinterpreted({row}, {view.shape}, {view.strides}, 0)")
        self.variables[storage.name] = storage.name
        self._views_of(storage.name, self.body)

    def _without_bytes(self) -> None:
        """Variables for storages without bytes, which have no residence."""
        for name in self.by_storage:
            storage = self.program.storages[name]
            if storage.nbytes or name in self.variables:
                continue
            if storage.origin is Origin.OUTPUT:
                self._allocate(storage)
            elif storage.origin in ARENA:
                view = self.program.views[name]
                place = f"0, {view.shape}, {view.strides}, {self._table(view.dtype)}"
                self.bound.append(f"{name} = placed(arena, {place})")
                self.variables[name] = name
                self._views_of(name, self.bound)

    # --- what happens

    def _launch(self, call: Call) -> None:
        args = [self._text(item) for item in call.args]
        args += [f"{key}={self._text(value)}" for key, value in call.kwargs.items()]
        text = f"{self._callee(call)}({', '.join(args)})"
        if not call.makes:
            self.body.append(text)
            return
        self.body.append(f"made = {text}")
        for name, path in call.makes:
            self.body.append(f"{name} = made{''.join(f'[{index}]' for index in path)}")
            self.variables[name] = name
            view = self.program.views[name]
            if view.storage in self.read:
                # Kernels were generated for these strides; a library may choose others than were traced.
                self.body.append(f"assert_size_stride({name}, {view.shape}, {view.strides}, {call.target!r})")
        self.body.append("del made")
        for name, _ in call.makes:
            self._views_of(name, self.body)

    def _callee(self, call: Call) -> str:
        if call.target in self.program.kernels:
            return f"launch_{call.target}"
        name = call.target.replace(".", "_")
        self.names.setdefault(name, operator(call.target))
        return name

    def _copy(self, instruction: Load | Store, before: list[str]) -> None:
        device = self._all_bytes(self.program.storages[instruction.buffer])
        host, once, each = self.backing.home(instruction.buffer)
        self.bound += once
        self.body += [*each, *before]
        to, source = (device, host) if isinstance(instruction, Load) else (host, device)
        self.body.append(f"{to}.copy_({source}, True)")

    def _all_bytes(self, storage: Storage) -> str:
        """A variable for the bytes of a storage where it is now, as one row."""
        if storage.origin not in ARENA:
            return f"flat({self.variables[storage.name]}, {storage.nbytes})"
        if storage.name not in self.bytes_of:
            into, base, first, begin = self.regions[storage.name]
            variable = self.bytes_of[storage.name] = f"{storage.name}_bytes_at_{begin}"
            into.append(f"{variable} = placed({base}, {first}, ({storage.nbytes},), (1,), {self._table(torch.uint8)})")
        return self.bytes_of[storage.name]

    def _return(self) -> None:
        """Outputs: what lies in host memory there."""
        items = []
        for item in self.program.outputs:
            if isinstance(item, Ref) and self.program.storage_of(item).origin in (Origin.HOST, Origin.RETURNED):
                view = self.program.views[item.name]
                variable, each = self.backing.output(view.storage)
                self.body += each
                items.append(self._reinterpreted(variable, self.program.views[view.storage], view))
            else:
                items.append(self._text(item))
        self.body.append(f"return ({''.join(item + ', ' for item in items)})")

    def _last_uses(self) -> dict[int, list[str]]:
        """Storages to let go of after each step: those apart once nothing lies in them, and guests of others."""
        returned = {self.program.views[name].storage for name in references(self.program.outputs)}
        ends: dict[int, list[str]] = {}
        for name, allocation in self.device_plan.allocations.items():
            if name not in returned:
                ends.setdefault(allocation.end - 1, []).append(name)
        for residence in self.device_plan.plan.residences or ():
            is_guest = residence.buffer not in self.device_plan.apart
            if is_guest and residence.offset is not None and residence.offset >= self.device_plan.arena_bytes:
                ends.setdefault(residence.end - 1, []).append(residence.buffer)
        return ends

    def _drop(self, storage: str) -> None:
        variables = [n for n in self.by_storage.get(storage, ()) if n in self.variables]
        if storage in self.variables and storage not in variables:
            variables.append(storage)
        if variables:
            self.body.append(f"del {', '.join(self.variables.pop(name) for name in variables)}")

    # --- values as text

    def _text(self, item: Any) -> str:
        if isinstance(item, Ref):
            variable = self.variables[item.name]
            return f"{variable}.item()" if isinstance(item, Item) else variable
        if isinstance(item, list):
            return f"[{', '.join(map(self._text, item))}]"
        if isinstance(item, tuple):
            return f"({''.join(self._text(part) + ', ' for part in item)})"
        if item is None or isinstance(item, bool | int | str):
            return repr(item)
        if isinstance(item, float) and math.isfinite(item):
            return repr(item)
        return self._table(item)

    def _table(self, item: Any) -> str:
        """A global for a value that has no literal."""
        text = str(item).replace(".", "_").replace(":", "_").replace("-", "minus_")
        name = f"value_{text}"
        if not name.isidentifier() or self.names.get(name, item) is not item:
            name = f"value_{len(self.names)}"
        self.names[name] = item
        return name


def placed(
    base: torch.Tensor, offset_bytes: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor over ``base``'s bytes from ``offset_bytes`` on; no view of it, so that versions are counted apart."""
    first = base.storage_offset() * base.itemsize + offset_bytes
    tensor = torch.empty(0, dtype=dtype, device=base.device)
    return tensor.set_(base.untyped_storage(), first // dtype.itemsize, shape, strides)


_guards: Any = torch._C._dynamo.guards
#: A strided tensor relative to another, without the dispatcher: (tensor, shape, strides, offset in elements).
reinterpreted: Callable[..., torch.Tensor] = _guards._reinterpret_tensor


def _ends(program: Program, device_plan: DevicePlan) -> dict[str, int]:
    """For each storage allocated apart the byte, counted from its first, behind everything that lies in it."""
    owners = sorted((first, name) for name, first in device_plan.apart.items())
    ends: dict[str, int] = {}
    for residence in device_plan.plan.residences or ():
        if residence.offset is not None and residence.offset >= device_plan.arena_bytes:
            first, name = owners[bisect.bisect_right(owners, residence.offset, key=lambda owner: owner[0]) - 1]
            end = residence.offset + int(program.storages[residence.buffer].nbytes) - first
            ends[name] = max(ends.get(name, 0), end)
    return ends


def _empty(device: torch.device) -> Callable[..., torch.Tensor]:
    """Allocates by shape, strides and dtype; without the dispatcher where Inductor has a function for that."""
    quick: Callable[..., torch.Tensor] | None = getattr(_guards, f"_empty_strided_{device.type}", None)

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return quick or empty


def operator(target: str) -> Callable[..., Any]:
    """The function that a call's target names."""
    if target.startswith("extern_kernels."):
        from torch._inductor.select_algorithm import extern_kernels

        found: Callable[..., Any] = getattr(extern_kernels, target.partition(".")[2])
        return found
    overload: Any = torch.ops
    for part in target.split("."):
        overload = getattr(overload, part)
    callee: Callable[..., Any] = getattr(overload, "_op", overload)
    return callee  # without the Python layer, which adds a microsecond to each call


def _launcher(kernel: Any, program: Program, name: str) -> Callable[..., Any]:
    if program.kernels[name].language == "cpp":
        return kernel  # type: ignore[no-any-return]

    device = next(s.device for s in program.storages.values() if s.device.type == "cuda").index or 0
    raw_stream = torch._C._cuda_getCurrentRawStream

    def launch(*args: Any) -> None:
        kernel.run(*args, stream=raw_stream(device))

    return launch
