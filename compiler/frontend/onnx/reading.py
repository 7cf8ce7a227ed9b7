"""Reading a model: the file, its external data, and everything that can be wrong with either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from ....errors import ModelError, OptionError
from .external import parse_file
from .types import TORCH_DTYPES, shape_elements, stored_dtype_of
from .wellformed import check_graph, check_names, in_order, require_tensors

__all__ = ["InputSpec", "SourceModel", "input_names", "read_model"]

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
    check_names(proto.graph)
    require_tensors(proto.graph)
    check_graph(proto.graph)
    _check_dims(proto.graph, dims)
    dims = _bind_by_examples(proto.graph, dims, examples)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_input_spec(info, dims, examples) for info in proto.graph.input if info.name not in initializers)
    return SourceModel(proto, folder, inputs, in_order(proto.graph), opsets, _declared(proto.graph, dims))


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


def _bind_by_examples(
    graph: onnx.GraphProto, dims: Mapping[str, int], examples: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """``dims`` and what the examples add; OptionError where an example contradicts the model, ``dims`` or another."""
    bound = dict(dims)
    initializers = {tensor.name for tensor in graph.initializer}
    names = [info.name for info in graph.input if info.name not in initializers]
    for name in examples:
        if name not in names:
            raise OptionError(f"the model has no input {name!r}", hint=f"its inputs are: {', '.join(names) or 'none'}")
    for info in graph.input:
        example, declared = examples.get(info.name), info.type.tensor_type
        if example is None or not declared.HasField("shape"):
            continue
        sizes = declared.shape.dim
        expected = [bound.get(dim.dim_param, dim.dim_param) if dim.dim_param else dim.dim_value for dim in sizes]
        fits = len(sizes) == example.dim() and all(
            not dim.WhichOneof("value") or wanted == size or isinstance(wanted, str)
            for dim, wanted, size in zip(sizes, expected, example.shape, strict=True)
        )
        if not fits:
            raise OptionError(
                f"the example for input {info.name!r} has shape {list(example.shape)}, the model takes {expected}"
            )
        bound.update({dim.dim_param: size for dim, size in zip(sizes, example.shape, strict=True) if dim.dim_param})
    return bound


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
