"""Any model a frontend reads, read by the frontend its type asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...errors import ModelError, OptionError, PlanError
from ..plan import Plan, Source

if TYPE_CHECKING:
    from .program import ImportedGraph

__all__ = ["Inputs", "Model", "Reading", "read_model", "source_model"]

#: What a frontend reads: a path to an ``.onnx`` model or to an operator graph ``.json``, an ``onnx.ModelProto``,
#: a ``torch.export.ExportedProgram``, or an ``nn.Module`` with example inputs.
Model = Any
#: Example inputs in order, or by name.
Inputs = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """How an ONNX model is read: symbolic dimensions, operators of other domains, and what is not taken as it is."""

    dims: Mapping[str, int] = field(default_factory=dict)
    definitions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    strict: bool = False
    fill_seed: int | None = None


def read_model(model: Model, inputs: Inputs | None = None, how: Reading | None = None) -> tuple[ImportedGraph, Source]:
    """Read ``model`` with the frontend its type asks for. Raises ModelError."""
    chosen = how or Reading()
    if isinstance(model, str | Path):
        return _read_file(Path(model), inputs, chosen)
    import torch

    from .fx import from_exported, from_module

    if isinstance(model, torch.export.ExportedProgram):
        return from_exported(model), Source()
    if isinstance(model, torch.nn.Module):
        if isinstance(inputs, torch.Tensor):
            raise OptionError("inputs is one tensor; it takes all of them, in order or by name", hint="write (x,)")
        if inputs is None:
            raise ModelError("an nn.Module needs example inputs", hint="opweave.compile(module, (x,))")
        if isinstance(inputs, Mapping):
            return from_module(model, (), inputs), Source()
        return from_module(model, tuple(inputs)), Source()
    if hasattr(model, "SerializeToString"):
        return _read_onnx(model, inputs, chosen)
    raise ModelError(f"cannot read a {type(model).__name__}; expected a path, ModelProto, ExportedProgram or nn.Module")


def _read_file(path: Path, inputs: Inputs | None, how: Reading) -> tuple[ImportedGraph, Source]:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"a plan cannot name {str(path)!r}, which is not Unicode", hint="rename the file") from error
    if path.suffix == ".json":
        from .opgraph import load_opgraph

        ignored = {"dims": how.dims, "fill_seed": how.fill_seed is not None, "definitions": how.definitions}
        for name in [name for name, is_given in ignored.items() if is_given]:
            raise OptionError(f"{name} has no effect on an operator graph, which has sizes and names only")
        return load_opgraph(path), Source(path=str(path), sha256=_sha256(path))
    if path.suffix != ".onnx":
        raise ModelError(f"cannot tell what {str(path)!r} is; an .onnx model or an operator graph .json is expected")
    program, source = _read_onnx(path, inputs, how)
    return program, msgspec.structs.replace(source, path=str(path), sha256=_sha256(path))


def _read_onnx(model: Model, inputs: Inputs | None, how: Reading) -> tuple[ImportedGraph, Source]:
    from .onnx.program import read_program

    program = read_program(
        model, inputs, dims=how.dims, definitions=how.definitions, strict=how.strict, fill_seed=how.fill_seed
    )
    operators = {way: dict(counts) for way, counts in program.operators.items()}
    return program, Source(dims=dict(how.dims), fill_seed=how.fill_seed, operators=operators)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read model {str(path)!r}: {error.strerror}") from error


def source_model(path: str | Path) -> str:
    """Path of the model file a saved plan was made from, checked to be unchanged. Raises PlanError.

    A model that is not where it was is looked for beside the plan.
    """
    source = Plan.load(path).source
    if not source.path:
        raise PlanError(f"plan {str(path)!r} was not made from a file", hint="load_plan(path, model) takes any model")
    beside = Path(path).parent  # a relative path is the compiling user's; plan and model may have moved together
    places = (Path(source.path), beside / source.path, beside / Path(source.path).name)
    found = [place for place in places if place.is_file()]
    if not found:
        raise PlanError(f"the plan's model {source.path!r} is not there", hint="say where it is: --model PATH")
    for place in found:
        if _sha256(place) == source.sha256:
            return str(place)
    raise PlanError(f"the plan's model {str(found[0])!r} has changed since", hint="compile it again")
