"""Reading a model: the file, its external data, and everything that can be wrong with either."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import AttributeProto

from ....errors import ModelError, OptionError, UnsupportedOperator
from .external import parse_file
from .types import TORCH_DTYPES, shape_elements, stored_dtype_of

__all__ = [
    "InputSpec",
    "SourceModel",
    "captured_names",
    "input_names",
    "read_model",
    "require_tensors",
]

OLDEST_OPSET = 7
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class InputSpec:
    """One input of the model: its name, its shape with all dimensions bound, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: The name of an ONNX type of less than 8 bits, which ``dtype`` holds widened; empty for all others.
    packed: str = ""


@dataclass(frozen=True)
class SourceModel:
    """A model that was read and found well formed; ``folder`` is where its external data may lie."""

    proto: onnx.ModelProto
    folder: Path | None
    inputs: tuple[InputSpec, ...]
    #: The nodes in topological order.
    nodes: tuple[onnx.NodeProto, ...]
    opsets: Mapping[str, int]
    #: The shapes and dtypes that the model declares for its own values, where they are complete.
    declared: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def read_model(
    source: str | Path | onnx.ModelProto, dims: Mapping[str, int], examples: Mapping[str, torch.Tensor]
) -> SourceModel:
    """Read ``source`` and check what can be checked before any operator is looked at.

    Raises ModelError for files that are not ONNX models, for graphs that are not in SSA form and topological order,
    for unbound dimensions and for shapes beyond 2**40 elements; OptionError for ``dims`` that the model does not have.
    """
    folder = None
    if isinstance(source, onnx.ModelProto):
        proto = source
    else:
        path = Path(source)
        proto = parse_file(path)
        folder = path.resolve().parent
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError("the file holds no ONNX graph", hint="is it an ONNX model, and was it copied completely?")
    opsets = _opsets(proto.opset_import)
    _check_names(proto.graph)
    require_tensors(proto.graph)
    _check_graph(proto.graph)
    _check_dims(proto.graph, dims)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_input_spec(info, dims, examples) for info in proto.graph.input if info.name not in initializers)
    return SourceModel(proto, folder, inputs, _in_order(proto.graph), opsets, _declared(proto.graph, dims))


def input_names(source: str | Path | onnx.ModelProto) -> tuple[str, ...]:
    """Names of the model's inputs in order, initializers left out. Raises ModelError for a file that is no model."""
    proto = source if isinstance(source, onnx.ModelProto) else parse_file(Path(source))
    initializers = {tensor.name for tensor in proto.graph.initializer}
    return tuple(info.name for info in proto.graph.input if info.name not in initializers)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """The operator-set versions; the highest counts where a domain is imported twice, as some exporters do."""
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain in STANDARD_DOMAINS else entry.domain
        opsets[domain] = max(opsets.get(domain, 0), entry.version)
    version = opsets.get("")
    newest = onnx.defs.onnx_opset_version()
    if version is not None and version > newest:
        raise ModelError(f"the model uses opset {version}, the installed onnx knows up to {newest}",
                         hint="update the onnx package")  # fmt: skip
    if version is not None and version < OLDEST_OPSET:
        raise ModelError(f"the model uses opset {version}, supported are {OLDEST_OPSET} to {newest}",
                         hint="convert it with onnx.version_converter")  # fmt: skip
    return opsets


def _check_names(root: onnx.GraphProto) -> None:
    """Names are text: protobuf hands out bytes where a name is not valid UTF-8."""
    pending = [root]
    while pending:
        graph = pending.pop()
        named = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        names = [entry.name for entry in named]
        for node in graph.node:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
            names += [attribute.name for attribute in node.attribute]
            pending.extend(_subgraphs(node))
        for name in names:
            if not isinstance(name, str):
                raise ModelError(f"a name in the graph is not valid UTF-8: {name!r}")


def _check_graph(graph: onnx.GraphProto) -> None:
    """Every value has one name and one maker, and whatever is used is made."""
    if graph.sparse_initializer:
        raise UnsupportedOperator("the model stores sparse initializers, which opweave does not read")
    known = _unique((info.name for info in graph.input), "graph input")
    known |= _unique((tensor.name for tensor in graph.initializer), "initializer")
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and name in known:
                raise ModelError(f"{_where(node, index)} makes {name!r} a second time; ONNX values are assigned once")
            known.update([name] if name else [])
    for index, node in enumerate(graph.node):
        for name in (*node.input, *captured_names(node)):
            if name and name not in known:
                raise ModelError(
                    f"{_where(node, index)} uses {name!r}, which no node makes and which is no input or initializer"
                )
    for info in graph.output:
        if info.name not in known:
            raise ModelError(f"graph output {info.name!r} is made by no node")


def _unique(names: Iterator[str], what: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if not name or name in found:
            raise ModelError(f"{what} {name!r} is declared twice" if name else f"one {what} has no name")
        found.add(name)
    return found


def _where(node: onnx.NodeProto, index: int) -> str:
    return f"node {node.name or index!r} ({node.op_type})"


def _in_order(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, ...]:
    """The nodes so that each comes after what it uses, otherwise in the model's order; ModelError if there is a cycle.

    ONNX asks for topological order, but exporters are known that do not keep it.
    """
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    missing: list[int] = []
    users: dict[int, list[int]] = {}
    for index, node in enumerate(graph.node):
        makers = {maker[name] for name in (*node.input, *captured_names(node)) if name in maker}
        missing.append(len(makers))
        for other in makers:
            users.setdefault(other, []).append(index)
    ready = [index for index, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users.get(index, ()):
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(graph.node):
        stuck = next(index for index, count in enumerate(missing) if count > 0)
        raise ModelError(f"the graph is cyclic: {_where(graph.node[stuck], stuck)} depends on its own result")
    return tuple(graph.node[index] for index in order)


def captured_names(node: onnx.NodeProto) -> list[str]:
    """Names that the node's subgraphs use from outside, each once, found without recursion."""
    found: dict[str, None] = {}
    pending = [(graph, frozenset[str]()) for graph in _subgraphs(node)]
    while pending:
        graph, outer = pending.pop()
        local = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer} | outer
        for inner in graph.node:
            found.update((name, None) for name in inner.input if name and name not in local)
            local.update(inner.output)
            pending.extend((subgraph, frozenset(local)) for subgraph in _subgraphs(inner))
        found.update((info.name, None) for info in graph.output if info.name not in local)
    return list(found)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def require_tensors(graph: onnx.GraphProto) -> None:
    """UnsupportedOperator if an input or output of the graph is a sequence, an optional, a map or of no type."""
    initializers = {tensor.name for tensor in graph.initializer}
    for what, infos in (("input", graph.input), ("output", graph.output)):
        for info in infos:
            kind = info.type.WhichOneof("value")
            untyped_output = what == "output" and kind is None
            if kind != "tensor_type" and info.name not in initializers and not untyped_output:
                described = (kind or "value of no type").removesuffix("_type")
                raise UnsupportedOperator(f"graph {what} {info.name!r} is of kind {described}, not a tensor")


def _dimension_names(graph: onnx.GraphProto) -> list[str]:
    names = {
        dim.dim_param
        for info in (*graph.input, *graph.output, *graph.value_info)
        for dim in info.type.tensor_type.shape.dim
        if dim.dim_param
    }
    unnamed = {
        f"{info.name}[{index}]"
        for info in graph.input
        for index, dim in enumerate(info.type.tensor_type.shape.dim)
        if not dim.WhichOneof("value")
    }
    return sorted(names) + sorted(unnamed)


def _check_dims(graph: onnx.GraphProto, dims: Mapping[str, int]) -> None:
    names = _dimension_names(graph)
    for name, size in dims.items():
        if name not in names:
            known = ", ".join(names) if names else "none"
            raise OptionError(f"the model has no dimension {name!r}", hint=f"its dimensions are: {known}")
        if size < 0:
            raise OptionError(f"dimension {name!r} is set to {size}; a size is at least 0")


def _input_spec(info: onnx.ValueInfoProto, dims: Mapping[str, int], examples: Mapping[str, torch.Tensor]) -> InputSpec:
    what = f"graph input {info.name!r}"
    dtype, packed = stored_dtype_of(info.type.tensor_type.elem_type, what)
    if info.name in examples:
        return InputSpec(info.name, tuple(examples[info.name].shape), dtype, packed)
    if not info.type.tensor_type.HasField("shape"):
        raise ModelError(f"{what} declares no shape", hint="give an example input, or store the shape in the model")
    shape = []
    for index, dim in enumerate(info.type.tensor_type.shape.dim):
        name = dim.dim_param or f"{info.name}[{index}]"
        if dim.WhichOneof("value") == "dim_value":
            shape.append(dim.dim_value)
        elif name in dims:
            shape.append(dims[name])
        else:
            raise ModelError(
                f"dimension {name!r} of {what} has no value",
                hint=f"bind it with --dim {name}=VALUE (dims={{{name!r}: VALUE}})",
            )
    shape_elements(tuple(shape), what)
    return InputSpec(info.name, tuple(shape), dtype, packed)


def _declared(graph: onnx.GraphProto, dims: Mapping[str, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    declared = {}
    for info in (*graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if info.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
            continue
        sizes = [dims.get(dim.dim_param, -1) if dim.dim_param else dim.dim_value for dim in tensor.shape.dim]
        complete = all(dim.WhichOneof("value") for dim in tensor.shape.dim) and all(size >= 0 for size in sizes)
        if complete and tensor.elem_type in TORCH_DTYPES:
            declared[info.name] = (tuple(sizes), TORCH_DTYPES[tensor.elem_type])
    return declared
