"""From an ONNX model to a graph with its weights: the importer, then the FX frontend, and the checks between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch

from ....errors import ExecutionError, OptionError
from ...runtime.custom_ops import tensor_from_numpy
from ..fx import from_graph_module
from ..program import ImportedGraph
from .model import ImportedModel, load
from .operands import Definition
from .reading import input_names

__all__ = ["program_of", "read_program"]


def read_program(
    source: str | Path | onnx.ModelProto,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dims: Mapping[str, int],
    definitions: Mapping[str, Definition],
    strict: bool = False,
    fill_seed: int | None = None,
) -> ImportedGraph:
    """Read a model for planning. ``inputs`` are example tensors or arrays, in order or by name; they bind dimensions.

    The other arguments, and what is raised, are those of ``load``; OptionError also for too many ``inputs``.
    """
    names = input_names(source)
    if not isinstance(inputs, Mapping) and len(inputs or ()) > len(names):
        raise OptionError(f"{len(inputs or ())} example inputs given, the model takes {len(names)}: {', '.join(names)}")
    given = inputs if isinstance(inputs, Mapping) else dict(zip(names, inputs or (), strict=False))
    examples = {n: v if isinstance(v, torch.Tensor) else tensor_from_numpy(numpy.asarray(v)) for n, v in given.items()}
    imported = load(source, dims=dims, definitions=definitions, strict=strict, fill_seed=fill_seed, examples=examples)
    name = Path(source).stem if isinstance(source, str | Path) else source.graph.name
    return program_of(imported, name or "model")


def program_of(imported: ImportedModel, name: str) -> ImportedGraph:
    """The graph of an imported model. Raises as ``from_graph_module``."""
    program = from_graph_module(
        imported.module,
        name=name,
        input_names=imported.input_names,
        weights=imported.weights,
        output_names=imported.output_names,
    )
    ways = {"native": imported.native, "fallback": imported.fallbacks, "opaque": imported.opaque}
    operators = {way: counts for way, counts in ways.items() if counts}
    program = replace(program, operators=operators, output_names=tuple(imported.output_names))
    return _checking(program, imported.specialized)


def _checking(program: ImportedGraph, specialized: Mapping[str, torch.Tensor]) -> ImportedGraph:
    """The program, refusing calls with other values than those its graph was specialised to."""
    flatten = program.flatten
    if flatten is None or not specialized:
        return program

    def checked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        values = flatten(args, kwargs)
        for name, value in zip(program.input_names, values, strict=True):
            if name in specialized and not value.equal(specialized[name]):
                raise ExecutionError(
                    f"input {name!r} decides shapes, and the plan was made for the value {specialized[name].tolist()}",
                    hint="compile again with this value among the example inputs",
                )
        return values

    return replace(program, flatten=checked)
