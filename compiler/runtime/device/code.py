"""The host code of a planned program: straight-line Python that launches its calls in the plan's order.

Everything that is the same in each call is resolved once: kernels, operators, and tensors in the arena. What differs is
what the caller passes, what calls allocate for themselves, and the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plan import Load, Residence, Run, Store
from .layout import DevicePlan
from .program import Call, Origin, Program, Ref, Storage, View, references

__all__ = ["HostCode", "write_host_code"]


@dataclass(frozen=True)
class HostCode:
    """``source`` defines ``bind(arena)``, which returns a function of the list of inputs; ``names`` are its globals."""

    source: str
    names: Mapping[str, Any] = field(repr=False)

    def bind(self, arena: torch.Tensor) -> Callable[[list[Any]], tuple[Any, ...]]:
        """The program over one arena."""
        scope = dict(self.names)
        exec(compile(self.source, "<opweave host code>", "exec"), scope)
        bound: Callable[[list[Any]], tuple[Any, ...]] = scope["bind"](arena)
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
            "empty": torch.empty_strided,
            **{f"launch_{name}": _launcher(kernel, program, name) for name, kernel in kernels.items()},
        }
        self.bound: list[str] = []  # statements that run once for an arena
        self.body: list[str] = []  # statements of each call
        self.variables: dict[str, str] = {}  # of views that have a variable now
        self.by_storage: dict[str, list[str]] = {}  # views, by storage, that calls or outputs use
        for name in self._used_views():
            self.by_storage.setdefault(program.views[name].storage, []).append(name)

    def _used_views(self) -> list[str]:
        used = [name for call in self.program.calls for name in call.views]
        used += [name for name, _ in (made for call in self.program.calls for made in call.makes)]
        return list(dict.fromkeys([*used, *references(self.program.outputs)]))

    def write(self) -> HostCode:
        self._constants()
        self._receive()
        residences = self.device_plan.plan.residences or ()
        begins: dict[int, list[Residence]] = {}
        for residence in residences:
            begins.setdefault(residence.begin, []).append(residence)
        ends = self._last_uses()
        for step, instruction in enumerate(self.device_plan.plan.instructions):
            for residence in begins.get(step, ()):
                self._begin(residence)
            if isinstance(instruction, Run) and instruction.op in self.calls:
                self._launch(self.calls[instruction.op])
            elif isinstance(instruction, Load | Store):
                self._copy(instruction)
            for name in ends.get(step, ()):
                self._drop(name)
        self.body.append(f"return ({''.join(self._text(item) + ', ' for item in self.program.outputs)})")
        inner = "\n".join(f"        {line}" for line in self.body)
        outer = "\n".join(f"    {line}" for line in self.bound)
        source = f"def bind(arena):\n{outer}\n    def call(inputs):\n{inner}\n    return call\n"
        return HostCode(source, self.names)

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
            if isinstance(item, Ref) and item.name in self.by_storage:
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
        if storage.origin is not Origin.PLANNED:
            return
        assert residence.offset is not None
        if residence.offset + int(storage.nbytes) <= self.device_plan.arena_bytes:
            base, into, first = "arena", self.bound, residence.offset
        else:
            host = self._host(residence.offset)
            if host.name not in self.variables:
                self._allocate(host)
            base, into, first = self.variables[host.name], self.body, residence.offset - self.device_plan.apart[host.name]
        for name in self.by_storage.get(storage.name, ()):
            view = self.program.views[name]
            variable = f"{name}_at_{residence.begin}" if into is self.bound else name
            offset = first + view.offset * view.dtype.itemsize
            into.append(
                f"{variable} = placed({base}, {offset}, {view.shape}, {view.strides}, {self._table(view.dtype)})"
            )
            self.variables[name] = variable

    def _host(self, offset: int) -> Storage:
        """The storage, allocated apart, whose range has ``offset``."""
        name = max((n for n, first in self.device_plan.apart.items() if first <= offset), key=self.device_plan.apart.get)
        return self.program.storages[name]

    def _allocate(self, storage: Storage) -> None:
        view = self.program.views[storage.name]
        device = self._table(storage.device)
        dtype = self._table(storage.dtype)
        self.body.append(f"{storage.name} = empty({view.shape}, {view.strides}, dtype={dtype}, device={device})")
        self.variables[storage.name] = storage.name
        self._views_of(storage.name, self.body)

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
        self.body.append("del made")
        for name, _ in call.makes:
            self._views_of(name, self.body)

    def _callee(self, call: Call) -> str:
        if call.target in self.program.kernels:
            return f"launch_{call.target}"
        name = call.target.replace(".", "_")
        self.names.setdefault(name, operator(call.target))
        return name

    def _copy(self, instruction: Load | Store) -> None:
        raise NotImplementedError(instruction)

    def _last_uses(self) -> dict[int, list[str]]:
        """Storages to let go of after each step: those not in the arena, behind their last residence."""
        returned = {self.program.views[name].storage for name in references(self.program.outputs)}
        ends: dict[int, list[str]] = {}
        last: dict[str, int] = {}
        for residence in self.device_plan.plan.residences or ():
            last[residence.buffer] = max(last.get(residence.buffer, 0), residence.end)
        for name, end in last.items():
            if self.program.storages[name].origin in (Origin.GIVEN, Origin.CALL) and name not in returned:
                ends.setdefault(end - 1, []).append(name)
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
            return self.variables[item.name]
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


reinterpreted: Callable[..., torch.Tensor] = torch._C._dynamo.guards._reinterpret_tensor


def operator(target: str) -> Callable[..., Any]:
    """The function that a call's target names."""
    if target.startswith("extern_kernels."):
        from torch._inductor.select_algorithm import extern_kernels

        found: Callable[..., Any] = getattr(extern_kernels, target.partition(".")[2])
        return found
    overload: Any = torch.ops
    for part in target.split("."):
        overload = getattr(overload, part)
    return getattr(overload, "_op", overload)  # without the Python layer, which adds a microsecond to each call


def _launcher(kernel: Any, program: Program, name: str) -> Callable[..., Any]:
    if program.kernels[name].language == "cpp":
        return kernel  # type: ignore[no-any-return]

    def launch(*args: Any) -> None:
        kernel.run(*args, stream=torch.cuda.current_stream().cuda_stream)

    return launch
