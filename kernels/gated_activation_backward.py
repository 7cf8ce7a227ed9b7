"""The backward of a gated activation, element by element, in one pass over memory.

    product = activation(gate) * up
    gate_gradient = gradient * up * activation'(gate)
    up_gradient = gradient * activation(gate)

for SwiGLU, GeGLU and ReGLU (Shazeer, 2020): what ``gated_linear`` needs between the matrix products of its backward.
``gate`` and ``up`` are the pre-activations, computed again there; ``product``, which the layer above needs for the
gradient of its own weight, can be had in the same pass. All arithmetic is in float32 and each result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._activations import ACTIVATIONS, activated_with_slope, slope_of
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Found, Match, Pattern, Walk, any_tensor, call, either, is_row_major, reshaped
from ._patterns import activations

__all__ = ["GATES", "KERNEL"]

NAME = "gated_activation_backward"
CONFIGS = Configs.beside(__file__)
#: Activations of the gate.
GATES = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def gated_activation_backward_kernel(
    gate_pointer: tl.tensor,
    up_pointer: tl.tensor,
    gradient_pointer: tl.tensor,
    gate_gradient_pointer: tl.tensor,
    up_gradient_pointer: tl.tensor,
    product_pointer: tl.tensor,
    count: tl.tensor,
    activation: tl.constexpr,
    with_product: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Compute ``block`` of ``count`` elements; all tensors are row-major. The grid covers the elements."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    gate = tl.load(gate_pointer + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_pointer + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_pointer + at, mask=inside, other=0.0).to(tl.float32)
    opened, slope = activated_with_slope(gate, activation)
    kind = gate_gradient_pointer.dtype.element_ty
    tl.store(gate_gradient_pointer + at, (gradient * up * slope).to(kind), mask=inside)
    tl.store(up_gradient_pointer + at, (gradient * opened).to(kind), mask=inside)
    if with_product:
        tl.store(product_pointer + at, (opened * up).to(kind), mask=inside)


def launch(
    gate: torch.Tensor,
    up: torch.Tensor,
    gradient: torch.Tensor,
    activation: str,
    with_product: bool,
    *,
    gate_gradient: torch.Tensor,
    up_gradient: torch.Tensor,
    product: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gradients of ``gate`` and ``up``, and their gated product if wanted, on the current stream.

    Args:
        gate: ``[...]``, float32, float16 or bfloat16, row-major, on a CUDA device; before its activation.
        up: as ``gate``.
        gradient: of the product; as ``gate``.
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        with_product: whether to write ``product``.
        gate_gradient: as ``gate``; written, shares no memory with any other argument.
        up_gradient: likewise.
        product: likewise; ``[0]`` if it is not wanted.
        config: how to launch.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, an output overlaps something, or there is
            no such activation.
    """
    _check(gate, up, gradient, activation)
    written = {"gate_gradient": gate_gradient, "up_gradient": up_gradient, "product": product}
    for name, tensor in written.items():
        shape = gate.shape if name != "product" or with_product else (0,)
        check_tensor(NAME, name, tensor, shape, gate.dtype, gate.device)
    check_apart(NAME, written, {"gate": gate, "up": up, "gradient": gradient})
    check_device(NAME, gated_activation_backward_kernel, gate)
    count = gate.numel()
    if count == 0:
        return
    config = config or CONFIGS.choose(gate.device, gate.dtype, count=count)
    with torch.accelerator.device_index(gate.device.index):
        gated_activation_backward_kernel[(-(-count // config.constants["block"]),)](
            gate,
            up,
            gradient,
            *written.values(),
            count,
            activation=activation,
            with_product=with_product,
            **config.options,
        )


def _check(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, activation: str) -> None:
    check_tensor(NAME, "gate", gate, (None,) * gate.dim(), FLOATS, gate.device)
    for name, tensor in {"up": up, "gradient": gradient}.items():
        check_tensor(NAME, name, tensor, gate.shape, gate.dtype, gate.device)
    if activation not in GATES:
        raise fail(NAME, f"knows the activations {', '.join(GATES)}; got {activation!r}")


def allocate(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, activation: str, with_product: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(gate_gradient, up_gradient, product)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(gate, up, gradient, activation)
    product = torch.empty_like(gate) if with_product else gate.new_empty(0)
    return torch.empty_like(gate), torch.empty_like(gate), product


def reference(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, activation: str, with_product: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(gate_gradient, up_gradient, product)`` by plain PyTorch on any device, with the kernel's roundings."""
    wide_gate, wide_up, wide_gradient = gate.float(), up.float(), gradient.float()
    opened = ACTIVATIONS[activation](wide_gate)
    gate_gradient = wide_gradient * wide_up * slope_of(wide_gate, activation)
    product = (opened * wide_up).to(gate.dtype) if with_product else gate.new_empty(0)
    return gate_gradient.to(gate.dtype), (wide_gradient * opened).to(gate.dtype), product


def eager(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, activation: str, with_product: bool) -> Any:
    """What PyTorch's autograd does for ``activation(gate) * up``, and that again."""
    opened = ACTIVATIONS[activation](gate)
    if activation == "relu":
        gate_gradient = torch.ops.aten.threshold_backward(gradient * up, gate, 0)
    elif activation == "silu":
        gate_gradient = torch.ops.aten.silu_backward(gradient * up, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        gate_gradient = torch.ops.aten.gelu_backward(gradient * up, gate, approximate=approximate)
    return gate_gradient, gradient * opened, opened * up if with_product else gate.new_empty(0)


def cost(dtype: str, rows: int, columns: int, activation: str = "silu", with_product: bool = False) -> Cost:
    """Flops and bytes of one launch: three matrices read, two or three written.

    Activation and derivative count one operation each, with two products for the gradient of ``gate`` and one for
    each of the others.
    """
    elements = rows * columns
    return Cost(elements * (5 + with_product), elements * (5 + with_product) * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    columns: int,
    activation: str = "silu",
    with_product: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    tensors = {name: random(rows, columns).to(dtype) for name in ("gate", "up", "gradient")}
    return {**tensors, "activation": activation, "with_product": with_product}


_GATE = any_tensor("gate")
_ARRIVING = call("mul", any_tensor("gradient"), any_tensor("up"))  # the gradient of the activation's result
_SHARE = call("reciprocal", call("add", call("exp", call("neg", _GATE)), 1))
_OPEN = either(call("sigmoid", _GATE), call("mul", _SHARE, 1), _SHARE)
_CLOSED = either(call("sub", 1, _OPEN), call("rsub", _OPEN, 1))
_SQUARE = call("mul", _GATE, _GATE)
_NORMAL = call("mul", call("add", call("erf", call("mul", _GATE, math.sqrt(0.5))), 1), 0.5)
_DENSITY = call("mul", call("exp", call("mul", _SQUARE, -0.5)), 1 / math.sqrt(2 * math.pi))
_INNER = call("add", _GATE, call("mul", call("mul", _SQUARE, _GATE), 0.044715))
_TANH = call("tanh", call("mul", _INNER, math.sqrt(2 / math.pi)))
_INNER_SLOPE = call("mul", call("add", call("mul", _SQUARE, 3 * 0.044715), 1), math.sqrt(2 / math.pi))
_TANH_SLOPE = call("mul", call("mul", call("mul", _GATE, 0.5), call("sub", 1, call("mul", _TANH, _TANH))), _INNER_SLOPE)
#: What computes the gradient of the gate: whole, as ATen has it, and as Inductor decomposes that.
_GATE_GRADIENTS: Mapping[str, Pattern] = MappingProxyType(
    {
        "silu": either(
            call("silu_backward", _ARRIVING, _GATE),
            call("mul", call("mul", _ARRIVING, _OPEN), call("add", call("mul", _GATE, _CLOSED), 1)),
        ),
        "gelu": either(
            call("gelu_backward", _ARRIVING, _GATE),
            call("gelu_backward", _ARRIVING, _GATE, approximate="none"),
            call("mul", _ARRIVING, call("add", _NORMAL, call("mul", _GATE, _DENSITY))),
        ),
        "gelu_tanh": either(
            call("gelu_backward", _ARRIVING, _GATE, approximate="tanh"),
            call("mul", _ARRIVING, call("add", call("mul", call("add", _TANH, 1), 0.5), _TANH_SLOPE)),
        ),
        "relu": either(
            call("threshold_backward", _ARRIVING, _GATE, 0),
            call("where", call("le", _GATE, 0), any_tensor("zero"), _ARRIVING),
        ),
    }
)
_BACKWARD = ("silu_backward", "gelu_backward", "threshold_backward", "where", "erf", "tanh", "sigmoid", "exp")
_LAST = ("silu_backward", "gelu_backward", "threshold_backward", "where", "mul")
_CASTS = ("_to_copy", "to", "convert_element_type")


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where autograd computes the gradients of both factors of ``activation(gate) * up``, which the forward kept.

    The product is not computed again: the forward has it, too.
    """
    walk = Walk(graph)
    if not any(walk.results(*_BACKWARD)):
        return ()
    floats = {dtype_name(dtype) for dtype in FLOATS}
    found_matches: list[Match] = []
    for out in walk.results(*_LAST, *_CASTS):
        for activation, pattern in _GATE_GRADIENTS.items() if out.dtype in floats else ():
            for found in walk.find(pattern, out):
                if "zero" not in found.tensors or _is_zero(walk, found["zero"]):
                    found_matches += _matched(walk, activation, out, found)
    return tuple(found_matches)


def _is_zero(walk: Walk, tensor: Tensor) -> bool:
    made = walk.writer(tensor)
    return made is not None and made[0].target == "aten.scalar_tensor.default" and walk.arguments(made[0])[0] == [0]


def _matched(walk: Walk, activation: str, out: Tensor, found: Found) -> Iterator[Match]:
    """Launches that compute ``out``, the gradient of the gate that was found, and that of ``up`` with it."""
    tensors = {name: reshaped(found[name], out.shape) for name in ("gate", "up", "gradient")}
    if not all(t is not None and t.dtype == out.dtype and is_row_major(t) for t in tensors.values()):
        return
    bound = Found({"gradient": found["gradient"]})
    for op in walk.readers(found["gradient"], "mul"):
        up_gradient = walk.graph.tensor[op.outputs[0]]
        for product in walk.find(call("mul", any_tensor("gradient"), any_tensor("opened")), up_gradient, bound):
            for _, inner in activations(walk, product["opened"], activation, result=out.dtype):
                if (up_gradient.shape, up_gradient.dtype) != (out.shape, out.dtype):
                    continue
                if reshaped(inner, out.shape) != tensors["gate"]:
                    continue
                columns = out.shape[-1] if out.shape else 1
                launch_cost = cost(out.dtype, math.prod(out.shape[:-1]), columns, activation)
                empty = walk.fresh(out, "product", (0,), out.dtype)
                arguments = {**tensors, "activation": activation, "with_product": False}
                match = walk.match(NAME, arguments, (out, up_gradient, empty), launch_cost)
                if match is not None:
                    yield match


KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=(
        Workload("Llama-3 8B, 4096 tokens", {"rows": 4096, "columns": 14336}),
        Workload("Llama-3 70B, 8192 tokens", {"rows": 8192, "columns": 28672}),
        Workload("Qwen2.5-7B, 4096 tokens, with product", {"rows": 4096, "columns": 18944, "with_product": True}),
        Workload("Gemma 7B, 4096 tokens", {"rows": 4096, "columns": 24576, "activation": "gelu_tanh"}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
