"""Inductor's wrapper code, recorded as a ``Program`` instead of printed.

Inductor writes its host code as typed lines, and lets a converter visit them (``WrapperLine.codegen_fx``): the hook of
its FX wrapper, which only knows Triton kernels and fixed launch configurations. The recorder is such a converter. It
keeps kernels as source, whatever their language, and leaves launching them to Inductor's own launchers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen import wrapper as lines
from torch._inductor.codegen.common import FileBackedGraphModule
from torch._inductor.codegen.wrapper_fxir import WrapperFxCodegen
from torch._inductor.utils import LineContext
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

from ...runtime.device.program import Call, Item, Kernel, Origin, Program, Ref
from .effects import has_effect
from .tensors import Tensors, Unrecorded

__all__ = ["ProgramCodegen", "Unrecorded", "recording"]

#: Operators whose result is the bytes of their first argument, from its first byte on, as other elements.
_SAME_BYTES = ("aten.view.dtype", "aten.view_as_real.default", "aten.view_as_complex.default")
_CPP_POINTER = re.compile(r"\*\s*$")
_recorded: ContextVar[list[Program] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Program]]:
    """Collect the program that ``ProgramCodegen`` makes while a graph is compiled within."""
    programs: list[Program] = []
    token = _recorded.set(programs)
    try:
        yield programs
    finally:
        _recorded.reset(token)


class ProgramCodegen(WrapperFxCodegen):
    """Inductor's wrapper code generator that makes a ``Program``."""

    def make_zero_buffer(self, name: str) -> Any:
        """A typed line where Inductor prints ``name.zero_()``."""
        return _ZeroLine(self, name)

    def codegen_device_copy(self, src: Any, dst: Any, non_blocking: Any) -> None:
        """A typed line where Inductor prints ``dst.copy_(src, non_blocking)``."""
        self.writeline(_CopyLine(self, str(dst), str(src)))  # type: ignore[no-untyped-call]

    def _generate(self, is_inference: bool) -> tuple[FileBackedGraphModule, None]:
        if isinstance(self, lines.SubgraphPythonWrapperCodegen):
            raise Unrecorded("a subgraph, as control flow has")
        self.run_wrapper_ir_passes(is_inference)
        recorder = _Recorder(self)
        programs = _recorded.get()
        if programs is None:
            raise Unrecorded("a graph compiled outside of `recording`")
        programs.append(recorder.program())
        empty = torch.fx.GraphModule({}, torch.fx.Graph())
        return FileBackedGraphModule(empty, _never_called), None


def _never_called(*_: Any) -> Any:
    raise AssertionError("the program recorded is what runs")


class _ZeroLine(lines.WrapperLine):
    def __init__(self, wrapper: ProgramCodegen, name: str) -> None:
        self.wrapper, self.name = wrapper, name

    def codegen_fx(self, converter: Any) -> Callable[[Any], None]:
        return converter._generate_zero  # type: ignore[no-any-return]


class _CopyLine(lines.WrapperLine):
    def __init__(self, wrapper: ProgramCodegen, to: str, source: str) -> None:
        self.wrapper, self.to, self.source = wrapper, to, source

    def codegen_fx(self, converter: Any) -> Callable[[Any], None]:
        return converter._generate_copy  # type: ignore[no-any-return]


class _Recorder:
    """Visits the lines of one graph; the names of its ``_generate_*`` methods are Inductor's."""

    def __init__(self, wrapper: ProgramCodegen) -> None:
        self.wrapper = wrapper
        self.tensors = Tensors()
        self.calls: list[Call] = []
        self.same_bytes: dict[str, str] = {}  # views, by the name of what reads them as other elements
        self.fallbacks: dict[str, Any] = {}  # nodes of calls with several results, by name
        self.made: dict[str, int] = {}  # calls by the name of what they return, for the parts of a tuple
        self.kernels: dict[str, Kernel] = {}
        self.written: set[str] = set()

    def program(self) -> Program:
        """Everything recorded. Raises Unrecorded."""
        if len(V.graph.device_idxs) > 1:
            raise Unrecorded("tensors on several devices")
        tensors = self.tensors
        inputs = tensors.inputs(self.wrapper.get_graph_inputs())
        for name, value in V.graph.constants.items():
            tensors.constant(name, value)
        for line in self.wrapper.lines:
            if isinstance(line, LineContext):
                continue
            if not isinstance(line, lines.WrapperLine):
                raise Unrecorded(f"the statement {str(line)!r}")
            visitor: Any = self
            line.codegen_fx(visitor)(line)
        self._results_nobody_reads()
        outputs = tensors.outputs(self.wrapper.get_graph_outputs())
        prologue = "\n".join((self.wrapper.imports.getvalue(), self.wrapper.header.getvalue()))
        return Program(
            V.graph.name or "graph",
            inputs,
            outputs,
            tensors.storages,
            tensors.views,
            tuple(self.calls),
            self.kernels,
            prologue,
            tensors.constants,
            tensors.symbols,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_generate_"):
            raise Unrecorded(name.removeprefix("_generate_").replace("_", " "))
        raise AttributeError(name)

    # --- lines that allocate, free and rename

    def _generate_allocate(self, line: Any) -> None:
        node = line.node
        if getattr(line, "comm_buffer", False):
            raise Unrecorded("a buffer for communication")
        if node.get_layout().device.type == "cpu" and V.graph.device_types - {"cpu", "meta"}:
            self._allocate_on_host(node)
        else:
            self.tensors.own(node.get_name(), node.get_layout(), Origin.PLANNED)

    def _allocate_on_host(self, node: Any) -> None:
        """What lies on the host beside a device's tensors has no place in the device's arena: a call makes it."""
        layout, target = node.get_layout(), "aten.empty_strided.default"
        sizes = tuple(self.tensors.argument(list(numbers)) for numbers in (layout.size, layout.stride))
        self._record(target, sizes, {"dtype": layout.dtype, "device": layout.device}, ())
        self.made[node.get_name()] = len(self.calls) - 1
        self._made(node.get_name(), node.get_name(), layout, ())

    def _generate_reinterpret(self, line: Any) -> None:
        layout = line.layout
        if isinstance(layout, ir.NonOwningLayout):
            layout = layout.view.get_layout()
        self.tensors.view(line.reused_as.get_name(), line.node.get_name(), layout, layout.offset)

    def _generate_reuse(self, line: Any) -> None:
        self.tensors.view(line.reused_as.get_name(), line.node.get_name(), line.reused_as.get_layout(), 0)

    def _generate_zero(self, line: _ZeroLine) -> None:
        ref = Ref(self.tensors.known(line.name))
        storage = self.tensors.storage_of(ref.name)
        self._record("aten.zero_.default", (ref,), {}, (storage,))

    def _generate_copy(self, line: _CopyLine) -> None:
        to, source = Ref(self.tensors.known(line.to)), Ref(self.tensors.known(line.source))
        self._record("aten.copy_.default", (to, source), {}, (self.tensors.storage_of(to.name),))

    def _nothing(self, line: Any) -> None:
        """Freeing is for the planner to decide; comments and device contexts do nothing here."""

    _generate_free = _generate_free_if_not_reused = _generate_comment = _generate_null = _nothing
    _generate_enter_device_context_manager = _generate_exit_device_context_manager = _nothing
    _generate_line_context = _generate_assert_size_stride = _nothing

    def _generate_unbacked_symbol_defs(self, line: Any) -> None:
        if line.unbacked_bindings:
            raise Unrecorded(f"a size that depends on data: {next(iter(line.unbacked_bindings))}")

    # --- lines that call

    def _record(
        self,
        target: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: tuple[str, ...],
        read: tuple[str, ...] = (),
    ) -> None:
        effect = target not in self.kernels and has_effect(target, args, kwargs)
        call = Call(f"{len(self.calls)}_{target}", target, args, kwargs, effect=effect)
        touched = dict.fromkeys((*(self.tensors.storage_of(name) for name in call.views), *read))
        # What a kernel writes it may read before, too, but for bytes that nothing has been written to: those begin with
        # the first call that touches them, even if it does no more than read what `torch.empty` happens to hold.
        planned = (name for name in touched if self.tensors.storages[name].origin is Origin.PLANNED)
        fresh = [name for name in planned if name not in self.written]
        self.written.update((*written, *fresh))
        reads = tuple(name for name in touched if name not in fresh)
        self.calls.append(replace(call, reads=reads, writes=tuple(dict.fromkeys((*written, *fresh)))))

    def _generate_kernel_definition(self, line: Any) -> None:
        source = self.wrapper._format_kernel_definition(line.kernel_name, line.kernel_body, metadata=line.metadata)
        language = "triton" if line.gpu else "cpp"
        self.kernels[line.kernel_name] = Kernel(line.kernel_name, source, language)

    def _generate_kernel_call(self, line: Any) -> None:
        kernel = self.kernels.get(line.kernel_name)
        if kernel is None:
            raise Unrecorded(f"kernel {line.kernel_name!r}, which is defined elsewhere")
        kernel = self.kernels[line.kernel_name] = replace(kernel, language="triton" if line.triton else "cpp")
        args = tuple(self.tensors.kernel_argument(value) for value in line.call_args)
        if line.triton:
            args = tuple(map(self._on_device, args))
        parameters = _triton_parameters(kernel) if line.triton else ()
        parameters = parameters or tuple(map(str, line.arg_types))
        written = tuple(
            self.tensors.storage_of(value.name)
            for value, parameter in zip(args, parameters, strict=False)
            if isinstance(value, Ref) and _writes(parameter) and not self._is_operand(value, kernel, parameter)
        )
        self._record(line.kernel_name, args, {}, written)

    def _on_device(self, value: Any) -> Any:
        """An argument as a Triton kernel takes it: numbers that lie on the host by value."""
        if not isinstance(value, Ref):
            return value
        view = self.tensors.views[value.name]
        if self.tensors.storages[view.storage].device.type != "cpu":
            return value
        if view.shape:
            raise Unrecorded(f"a tensor on the host, {value.name!r}, as the argument of a kernel on the device")
        return Item(value.name)

    def _is_operand(self, value: Ref, kernel: Kernel, parameter: str) -> bool:
        """Whether it is an operand of a template's (``arg_A``) that the template does not change."""
        is_template = parameter.startswith("arg_") and kernel.name.startswith("triton_tem")
        return is_template and not {value.name, self.tensors.storage_of(value.name)} & set(V.graph.mutated_buffers)

    def _generate_symbolic_call_arg(self, line: Any) -> None:
        """Its expression travels with the calls that use it."""

    def _generate_extern_kernel_out(self, line: Any) -> None:
        node = line.node
        out = self.tensors.operand(node.output_view if node.output_view is not None else node)
        args, kwargs = self._arguments(node)
        target = "" if isinstance(node, ir.DeviceCopy) else _target(node)
        written = self.tensors.storage_of(out.name)
        if isinstance(node, ir.DeviceCopy):
            self._record("aten.copy_.default", (out, args[0]), {}, (written,))
        else:
            self._record(target, args, {**kwargs, "out": out}, (written,))

    def _generate_extern_kernel_alloc(self, line: Any) -> None:
        node = line.node
        args, kwargs = self._arguments(node)
        self._fallback(node, args, kwargs)

    def _generate_index_put_fallback(self, line: Any) -> None:
        node = line.node
        target, values = (self.tensors.operand(item) for item in node.inputs[:2])
        indices = [self.tensors.operand(item) for item in line.indices]
        self._fallback(node, (target, indices, values, node.constant_args[0]), {})

    def _generate_scatter_fallback(self, line: Any) -> None:
        node = line.node
        operands = [self.tensors.operand(item) for item in node.inputs]
        source = operands[2] if node.src_is_tensor else node.constant_args[1]
        known = {argument.name for argument in node.op_overload._schema.arguments}
        kwargs = {key: value for key, value in node.kwargs.items() if key in known and value is not None}
        self._fallback(node, (operands[0], node.constant_args[0], operands[1], source), kwargs)

    def _arguments(self, node: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = tuple(self.tensors.operand(item) for item in node.inputs)
        kwargs = {key: self.tensors.argument(value) for key, value in (node.kwargs or {}).items()}
        constants = tuple(self.tensors.argument(value) for value in node.constant_args)
        if hasattr(node, "unflatten_args"):
            args, named = node.unflatten_args(tensors, constants)
            return tuple(args), {**kwargs, **named}
        return (*tensors, *constants), kwargs

    def _fallback(self, node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = _target(node)
        aliased = [name for name in node.get_inputs_that_alias_output() if name not in node.get_mutation_names()]
        if aliased and target in _SAME_BYTES and isinstance(args[0], Ref):
            self.same_bytes[node.get_name()] = args[0].name
            return
        if aliased and isinstance(node, ir._CollectiveKernel):
            # PyTorch finds what to wait for by storage: in an arena, a wait would be for every collective in flight.
            raise Unrecorded(f"{target}, a collective that writes in place")
        if aliased:
            raise Unrecorded(f"{target}, whose result is a view of {aliased[0]!r}")
        # An operator of the user's that writes to its arguments says so by further outputs of its node.
        changed = [name for output in node.get_outputs() for name in output.get_mutation_names()]
        written = tuple(map(self.tensors.storage_of, changed))
        self._record(target, args, kwargs, written, tuple(self._in_flight(node)))
        name = node.get_name()
        self.made[name] = len(self.calls) - 1
        if isinstance(node.layout, ir.MultiOutputLayout):
            self.fallbacks[name] = node
        if isinstance(node.layout, ir.MultiOutputLayout | ir.NoneLayout):
            return
        if not isinstance(node.layout, ir.Layout):
            raise Unrecorded(f"the result of {target}")
        if isinstance(node.layout, ir.MutationLayoutSHOULDREMOVE):
            return
        self._made(name, name, node.layout, ())

    def _in_flight(self, node: Any) -> Iterator[str]:
        """Storages that a collective reads until ``node``, its wait, is done: nobody gets their bytes before."""
        if isinstance(node, ir._WaitKernel):
            for item in node.get_volatile_reads():
                yield self.tensors.storage_of(self.tensors.operand(item).name)

    def _made(self, call: str, name: str, layout: Any, path: tuple[int, ...]) -> None:
        self.tensors.own(name, layout, Origin.CALL)
        index = self.made[call]
        made = self.calls[index]
        self.calls[index] = replace(made, makes=(*made.makes, (name, path)), writes=(*made.writes, name))

    def _results_nobody_reads(self) -> None:
        """Results that Inductor has dropped: the call allocates them all the same."""
        for name, node in self.fallbacks.items():
            read = {path for _, path in self.calls[self.made[name]].makes}
            for number, result in enumerate(pytree.tree_leaves(getattr(node, "outputs", ()))):
                if not isinstance(result, ir.MultiOutput) or not isinstance(result.layout, ir.Layout):
                    continue
                path = tuple(int(index) for _, index in result.indices)
                if path not in read and () not in read and result.layout.device == node.get_device():
                    self._made(name, f"{name}_unread_{number}", result.layout, path)

    def _generate_multi_output(self, line: Any) -> None:
        if line.arg_name in self.same_bytes:
            self.tensors.view(line.result_name, self.same_bytes[line.arg_name], self._layout(line.result_name), 0)
            return
        if not line.indices:
            self.tensors.alias[line.result_name] = line.arg_name
            if line.arg_name not in self.tensors.views:
                self._made(line.arg_name, line.result_name, self._layout(line.result_name), ())
                del self.tensors.alias[line.result_name]
            return
        path = tuple(int(index) for _, index in line.indices)
        self._made(line.arg_name, line.result_name, self._layout(line.result_name), path)

    def _layout(self, name: str) -> Any:
        buffer = V.graph.get_buffer(name)
        if buffer is None:
            raise Unrecorded(f"the layout of {name!r}")
        return buffer.get_layout()


def _target(node: Any) -> str:
    overload = node.op_overload
    if isinstance(overload, torch._ops.OpOverload):
        return str(overload)
    if overload is None and node.python_kernel_name and node.python_kernel_name.startswith("extern_kernels."):
        return str(node.python_kernel_name)
    raise Unrecorded(f"{node.python_kernel_name or type(node).__name__}, which is no operator")


def _triton_parameters(kernel: Kernel) -> tuple[str, ...]:
    """Names of a Triton kernel's parameters, in order."""
    found = re.search(rf"def {re.escape(kernel.name)}\(([^)]*)\)", kernel.source)
    if found is None:  # a kernel of the user's, under its own name
        return ()
    return tuple(part.split(":")[0].split("=")[0].strip() for part in found[1].split(","))


def _writes(parameter: str) -> bool:
    """Whether a kernel may write through a parameter, given a Triton parameter's name or a C++ type."""
    if _CPP_POINTER.search(parameter):
        return not parameter.startswith("const ")
    return not parameter.startswith("in_ptr")
