"""The roof: frontends, passes and runtimes meet here, and nowhere else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .compiler.compiled import CompiledModel
from .compiler.graph import Graph, Role
from .compiler.pipeline import Budget, Progress
from .compiler.plan import Plan, Source
from .compiler.rewritten import computes_same
from .compiler.simulate import simulate
from .compiler.verify import verify
from .errors import ModelError, OptionError, PlanError, VerificationError
from .hw_models.model import HardwareModel
from .hw_models.registry import load as hardware
from .hw_models.registry import parse_bytes

if TYPE_CHECKING:
    from .compiler.frontend.onnx import ImportedModel
    from .compiler.frontend.onnx.backend import Executable, OpweaveBackend
    from .compiler.frontend.program import ImportedGraph
    from .passes.fit import FitPoint
    from .passes.planner import Planner

    onnx_backend: type[OpweaveBackend]

__all__ = ["CompiledModel", "Options", "compile", "fit", "hardware", "load_plan", "read_model", "source_model"]

#: What a frontend reads: a path to an ``.onnx`` model or to an operator graph ``.json``, an ``onnx.ModelProto``,
#: a ``torch.export.ExportedProgram``, or an ``nn.Module`` with example inputs.
Model = Any
#: Example inputs in order, or by name.
Inputs = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """How to read and plan a model; each field is a keyword of ``compile`` and an option of the command line.

    ``scratchpad`` overrides the machine's capacity, in bytes or as text such as ``"1MiB"``. ``weights`` says whether
    operators stream weights and constants from backing memory or find them in the scratchpad like any other tensor.
    ``time_limit`` is in seconds, for all passes together. ``fill_seed`` replaces all-equal weights of an ONNX model
    by seeded random ones. ``definitions`` gives meaning to operators of other domains, by operator type.
    """

    machine: str | Path | HardwareModel = "edge-npu"
    scratchpad: int | str | None = None
    weights: Literal["streamed", "resident"] = "streamed"
    order: str = "order/beam"
    residency: str = "residency/ilp"
    address: str = "address/exact"
    time_limit: float = 30.0
    deterministic: bool = False
    dims: Mapping[str, int] = field(default_factory=dict)
    definitions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    strict: bool = False
    fill_seed: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in ("streamed", "resident"):
            raise OptionError(f"weights is {self.weights!r}; allowed are 'streamed' and 'resident'")
        for name in ("order", "residency", "address"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"{name} is {getattr(self, name)!r}; a pass is given by name, such as 'order/beam'")
        if not isinstance(self.scratchpad, int | str | None) or isinstance(self.scratchpad, bool):
            raise OptionError(f"scratchpad is {self.scratchpad!r}; give whole bytes, or text such as '1MiB'")
        if not isinstance(self.time_limit, int | float):
            raise OptionError(f"time_limit is {self.time_limit!r}; it is a number of seconds")
        if not self.time_limit > 0:
            raise OptionError(f"time_limit is {self.time_limit} s; it must be above 0")

    def target(self) -> HardwareModel:
        """The machine with its overrides."""
        machine = self.machine if isinstance(self.machine, HardwareModel) else hardware(str(self.machine))
        if self.scratchpad is None:
            return machine
        size = parse_bytes(self.scratchpad) if isinstance(self.scratchpad, str) else self.scratchpad
        return machine.with_scratchpad(size)

    def planner(self) -> Planner:
        """The passes by name."""
        from .passes.planner import Planner

        return Planner(self.order, self.residency, self.address)


def compile(  # the name users expect, as in torch.compile; shadows the builtin only here
    model: Model,
    inputs: Inputs | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> CompiledModel:
    """Read ``model``, plan it for a machine, verify the plan, and return it ready to be called.

    ``inputs`` are example tensors, in order or by name: needed for an ``nn.Module``, and binding symbolic dimensions
    of an ONNX model.
    ``options`` are the fields of ``Options``. Setting ``stop`` ends planning early with the best plan so far.

    Raises:
        ModelError: the model cannot be read, or has operators without shapes.
        Infeasible: an operator does not fit the scratchpad; says which, and the least capacity that works.
        MachineError, OptionError: the machine or an option is unknown or out of range.
    """
    chosen = _options(options)
    target = chosen.target()
    planner = chosen.planner()
    program, source = read_model(model, inputs, chosen)
    empty = _empty_plan(program, source, target, chosen)
    plan = planner.plan(empty, _budget(chosen, on_progress, stop))
    return CompiledModel(simulate(plan), program)


def fit(
    model: Model,
    inputs: Inputs | None = None,
    *,
    points: int = 9,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> list[FitPoint]:
    """Find the least scratchpad for ``model``, and the additional traffic each larger one costs, smallest first.

    Takes what ``compile`` takes, except ``scratchpad``; ``time_limit`` is for all ``points`` together.
    Raises as ``compile``.
    """
    from .passes.fit import traffic_by_capacity

    if points < 2:
        raise OptionError(f"points is {points}; a curve takes at least 2")
    chosen = _options(options)
    if chosen.scratchpad is not None:
        raise OptionError("fit chooses the scratchpad itself; leave out 'scratchpad'")
    target, planner = chosen.target(), chosen.planner()  # mistakes in either show before the model is read
    program, source = read_model(model, inputs, chosen)
    empty = _empty_plan(program, source, target, chosen)
    return list(traffic_by_capacity(empty, planner, _budget(chosen, on_progress, stop), points))


def _options(options: Mapping[str, Any]) -> Options:
    unknown = sorted(set(options) - set(Options.__dataclass_fields__))
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r}; known are {', '.join(Options.__dataclass_fields__)}")
    return Options(**options)


def _budget(options: Options, on_progress: Callable[[Progress], None] | None, stop: threading.Event | None) -> Budget:
    fields: dict[str, Any] = {"deterministic": options.deterministic, "workers": 1 if options.deterministic else 2}
    if on_progress is not None:
        fields["listen"] = on_progress
    if stop is not None:
        fields["stop"] = stop
    return Budget.of_seconds(options.time_limit, **fields)


def _empty_plan(program: ImportedGraph, source: Source, target: HardwareModel, options: Options) -> Plan:
    streamed = streamable(program.graph) if options.weights == "streamed" else ()
    return Plan.of_order(program.graph, target, streamed=streamed, source=source)


def streamable(graph: Graph) -> tuple[str, ...]:
    """Buffers that operators may read directly from backing memory: sources other than inputs, never written."""
    written = {buffer for buffers in graph.writes for buffer in buffers}
    read = {buffer for buffers in graph.reads for buffer in buffers}
    fixed = {b for b, base in graph.buffers.items() if base.role.is_source and base.role is not Role.INPUT}
    return tuple(sorted(b for b in fixed & read - written if graph.buffers[b].nbytes))


def read_model(
    model: Model, inputs: Inputs | None = None, options: Options | None = None
) -> tuple[ImportedGraph, Source]:
    """Read ``model`` with the frontend its type asks for. Raises ModelError."""
    chosen = options or Options()
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix == ".json":
            from .compiler.frontend.opgraph import load_opgraph

            return load_opgraph(path), Source(path=str(path), sha256=_sha256(path))
        if path.suffix != ".onnx":
            raise ModelError(
                f"cannot tell what {str(path)!r} is; an .onnx model or an operator graph .json is expected"
            )
        program, source = _read_onnx(path, inputs, chosen)
        return program, msgspec.structs.replace(source, path=str(path), sha256=_sha256(path))
    import torch

    from .compiler.frontend.fx import from_exported, from_module

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


def _read_onnx(model: Model, inputs: Inputs | None, options: Options) -> tuple[ImportedGraph, Source]:
    from .compiler.frontend.onnx.program import read_program

    program = read_program(
        model,
        inputs,
        dims=options.dims,
        definitions=options.definitions,
        strict=options.strict,
        fill_seed=options.fill_seed,
    )
    operators = {way: dict(counts) for way, counts in program.operators.items()}
    return program, Source(dims=dict(options.dims), fill_seed=options.fill_seed, operators=operators)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read model {str(path)!r}: {error.strerror}") from error


def load_plan(path: str | Path, model: Model | None = None, **options: Any) -> CompiledModel:
    """Read a saved plan and verify it; with its ``model`` it can be called.

    ``model`` is what ``compile`` was given; ``options`` are those that say how it is read (``definitions``).

    Raises:
        PlanError: not a plan, or the model is not the one it was made from.
        VerificationError: the plan claims something that is not so.
    """
    plan = Plan.load(path)
    verification = verify(plan)
    if not verification.ok:
        listed = "\n".join(f"  {finding}" for finding in verification.faults[:20])
        raise VerificationError(f"plan {str(path)!r} has {len(verification.faults)} faults:\n{listed}")
    if model is None:
        return CompiledModel(plan)
    how = Options(dims=plan.source.dims, fill_seed=plan.source.fill_seed, **options)
    inputs = None
    if isinstance(model, tuple):
        model, inputs = model
    program, _ = read_model(model, inputs, how)
    if not computes_same(plan.graph, program.graph):
        raise PlanError(
            f"the model has graph {program.graph.name!r}, which is not the one plan {str(path)!r} was made from",
            hint="give the model file that was compiled, unchanged, or compile it again",
        )
    return CompiledModel(plan, program)


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


def __getattr__(name: str) -> object:
    if name == "onnx_backend":
        return _onnx_backend()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _onnx_backend() -> type[OpweaveBackend]:
    from .compiler.frontend.onnx.backend import OpweaveBackend

    class PlannedBackend(OpweaveBackend):
        """ONNX's Backend interface: every model is planned, verified, and executed in a scratchpad that just fits."""

        planner = staticmethod(_plan_imported)  # type: ignore[assignment]  # mypy unwraps the base's, not this

    return PlannedBackend


def _plan_imported(imported: ImportedModel) -> Executable:
    """Plan an imported ONNX model with fast heuristics for the least scratchpad that works."""
    from .compiler.frontend.onnx.program import program_of
    from .compiler.runtime.custom_ops import tensor_from_numpy, tensor_to_numpy
    from .passes.planner import Planner
    from .passes.residency.workset import aligned_bytes, least_capacity

    options = Options(time_limit=5.0)
    program = program_of(imported, "model")
    plan = _empty_plan(program, Source(), options.target(), options)
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    capacity = max(aligned_bytes(least_capacity(plan), alignment), alignment)
    plan = msgspec.structs.replace(plan, machine=plan.machine.with_scratchpad(capacity))
    planner = Planner("order/given", "residency/least_cost", "address/first_fit")
    model = CompiledModel(simulate(planner.plan(plan, _budget(options, None, None))), program)

    def execute(arrays: Sequence[Any]) -> list[Any]:
        return [tensor_to_numpy(output) for output in model(*map(tensor_from_numpy, arrays))]

    return execute
