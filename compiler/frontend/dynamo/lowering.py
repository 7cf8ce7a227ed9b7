"""A graph from AOTAutograd, lowered to a ``Program``: Inductor's passes, fusion and kernels; our order and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.codegen import common as codegen
from torch._inductor.compile_fx import compile_fx_inner

from ...runtime.device.program import Program
from .recorder import ProgramCodegen, Unrecorded, recording
from .repairs import repaired

__all__ = ["Unrecorded", "lower"]

#: Inductor reuses no memory but in place, and prints nothing we could not read. It keeps the order it would have, so
#: that ours is compared with it, and is it where no other is better.
_SETTINGS: Mapping[str, Any] = {
    "fx_wrapper": True,
    "cpp_wrapper": False,
    "allow_buffer_reuse": False,
    "inplace_buffers": True,
    "reorder_for_peak_memory": True,
    "memory_planning": False,
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "nan_asserts": False,
    "graph_partition": False,
    "triton.cudagraphs": False,
    "triton.autotune_at_compile_time": False,
    "combo_kernels": False,
}


def lower(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    *,
    is_inference: bool,
    is_backward: bool = False,
    static_inputs: Sequence[int] = (),
    graph_id: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Program:
    """The program of ``module``, which is changed by it, for (fake) ``inputs``.

    ``settings`` are more of Inductor's options.

    Raises:
        Unrecorded: its host code cannot be said as a ``Program``.
    """
    with ExitStack() as stack:
        stack.enter_context(inductor_config.patch({**_SETTINGS, **(settings or {})}))
        stack.enter_context(_our_codegen())
        stack.enter_context(repaired())
        programs = stack.enter_context(recording())
        try:
            compile_fx_inner(
                module,
                inputs,
                is_inference=is_inference,
                is_backward=is_backward,
                static_input_idxs=static_inputs,
                graph_id=graph_id,
                fx_wrapper=True,
            )
        except Exception as error:
            cause = _unrecorded(error)
            if cause is None:
                raise
            raise cause from error
    if len(programs) != 1:
        raise Unrecorded(f"a graph in {len(programs)} parts" if programs else "a graph without tensors")
    return programs[0]


def _unrecorded(error: BaseException | None) -> Unrecorded | None:
    """The cause among ``error`` and what it was raised from."""
    while error is not None:
        if isinstance(error, Unrecorded):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


@contextmanager
def _our_codegen() -> Iterator[None]:
    """Give every device that Inductor knows ``ProgramCodegen`` as its FX wrapper, and its own one back afterwards."""
    codegen.init_backend_registration()
    before = {name: device.fx_wrapper_codegen for name, device in codegen.device_codegens.items()}
    try:
        for device in codegen.device_codegens.values():
            device.fx_wrapper_codegen = ProgramCodegen
        yield
    finally:
        for name, original in before.items():
            codegen.device_codegens[name].fx_wrapper_codegen = original
