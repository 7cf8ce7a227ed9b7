"""The roof: frontends, passes and runtimes meet here, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import msgspec

from .compiler.compiled import CompiledModel
from .compiler.frontend.read import Inputs, Model, Reading, read_model, source_model
from .compiler.fusion import fused
from .compiler.overlap import OverlapOptions
from .compiler.pins import pins_of
from .compiler.pipeline import Budget, Progress
from .compiler.plan import Plan, Source
from .compiler.rewritten import computes_same
from .compiler.simulate import simulate
from .compiler.verify import verify
from .errors import Infeasible, OptionError, PlanError, VerificationError
from .fusing import KERNELS, as_planned, checked, choose, rules
from .hw_models.model import HardwareModel
from .hw_models.registry import load as hardware
from .hw_models.registry import parse_bytes
from .passes.residency.workset import least_capacity
from .passes.residency.workset import streamable_buffers as streamable

if TYPE_CHECKING:
    from .compiler.frontend.dynamo.explain import BackendExplanation
    from .compiler.frontend.onnx import ImportedModel
    from .compiler.frontend.onnx.backend import Executable, OpweaveBackend
    from .compiler.frontend.program import ImportedGraph
    from .compiler.rank_model import RankModel
    from .passes.explain import Explanation
    from .passes.fit import FitPoint
    from .passes.objective.measures import Objective
    from .passes.planner import Planner

    onnx_backend: type[OpweaveBackend]

__all__ = [
    "CompiledModel",
    "Options",
    "compile",
    "explain",
    "fit",
    "hardware",
    "load_plan",
    "read_model",
    "source_model",
    "streamable",
]


_SIZE, _NUMBER = int | str | None, int | float
_PASS = (str, "a pass is given by name, such as 'order/beam'")
_EXPECTED: Mapping[str, tuple[Any, str]] = {
    "order": _PASS,
    "residency": _PASS,
    "address": _PASS,
    "objective": (str, "it is text, such as 'traffic,latency'"),
    "recompute": (bool, "it takes True or False"),
    "inplace": (bool | str, "it takes True, False or the name of a pass"),
    "pins": (Mapping, "it takes tensor names with what is decided of each, such as {'x': {'offset': 0}}"),
    "scratchpad": (_SIZE, "give whole bytes, or text such as '1MiB'"),
    "kernels": (str, f"it takes {KERNELS}"),
    "overlap": (bool | Mapping, "it takes True, False or a mapping of options"),
    "time_limit": (_NUMBER, "it is a number of seconds"),
}


@dataclass(frozen=True)
class Options:
    """How to read and plan a model; each field is a keyword of ``compile`` and an option of the command line.

    ``scratchpad`` overrides the machine's capacity, in bytes or as text such as ``"1MiB"``. ``weights`` says whether
    operators stream weights and constants from backing memory or find them in the scratchpad like any other tensor.
    ``objective`` is what is to be least, the most important first: ``"traffic"``, ``"traffic,latency"``, ``"peak"``.
    ``recompute`` lets dropped tensors be computed again: short for ``residency="residency/recompute"``. ``inplace``
    lets elementwise results be written over operands nobody needs afterwards: ``True``, or the name of a pass.
    ``pins`` are what is decided by tensor name: ``{"x": {"offset": 0}, "y": {"bank": 1}, "w": {"resident": True}}``.
    ``time_limit`` is in seconds, for all passes together. ``fill_seed`` replaces all-equal weights of an ONNX model
    by seeded random ones. ``definitions`` gives meaning to operators of other domains, by operator type. ``kernels``
    says which fused kernels may replace operators: ``"auto"`` those that are predicted to be faster on the machine,
    ``"all"`` wherever one fits, ``"off"`` none, or names with commas between them. ``overlap`` says, of a module that
    talks to other ranks and a machine of several devices, whether its collectives are hidden behind compute; a mapping
    says how, as ``compiler.overlap.OverlapOptions`` has it.
    """

    machine: str | Path | HardwareModel = "edge-npu"
    scratchpad: int | str | None = None
    weights: Literal["streamed", "resident"] = "streamed"
    order: str = "joint/best_first"
    residency: str = "residency/ilp"
    address: str = "address/exact"
    objective: str = "traffic"
    recompute: bool = False
    inplace: bool | str = False
    pins: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    time_limit: float = 30.0
    deterministic: bool = False
    dims: Mapping[str, int] = field(default_factory=dict)
    definitions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    strict: bool = False
    fill_seed: int | None = None
    kernels: str = "off"
    overlap: bool | Mapping[str, Any] = True

    def __post_init__(self) -> None:
        if self.weights not in ("streamed", "resident"):
            raise OptionError(f"weights is {self.weights!r}; allowed are 'streamed' and 'resident'")
        for name, (kind, expected) in _EXPECTED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind in (_SIZE, _NUMBER)):
                raise OptionError(f"{name} is {value!r}; {expected}")
        checked(self.kernels)
        OverlapOptions.of(self.overlap)
        if not self.time_limit > 0:
            raise OptionError(f"time_limit is {self.time_limit} s; it must be above 0")

    def check_of_rank(self) -> None:
        """Raises OptionError where an option is set that a module of one rank of several does not know."""
        unknown = [name for name in _OF_ONE_DEVICE if getattr(self, name) != getattr(_DEFAULTS, name)]
        if unknown:
            raise OptionError(
                f"option {unknown[0]!r} does not go with a module that talks to other ranks",
                hint="what is decided of one is said by 'overlap', such as overlap={'memory_limit': '8GiB'}",
            )

    def target(self) -> HardwareModel:
        """The machine with its overrides."""
        machine = self.machine if isinstance(self.machine, HardwareModel) else hardware(str(self.machine))
        if self.scratchpad is None:
            return machine
        size = parse_bytes(self.scratchpad) if isinstance(self.scratchpad, str) else self.scratchpad
        return machine.with_scratchpad(size)

    def planner(self) -> Planner:
        """The passes by name, rewriting in place first. Raises OptionError."""
        from .passes.planner import Planner

        residency = self.residency
        if self.recompute and residency == Options.residency:
            residency = "residency/recompute"
        elif self.recompute and not residency.startswith("residency/recompute"):
            raise OptionError(f"recompute=True asks for 'residency/recompute', but residency is {residency!r}")
        inplace = "inplace/elementwise" if self.inplace is True else self.inplace or ""
        return Planner(self.order, residency, self.address, inplace)

    def objectives(self) -> tuple[Objective, ...]:
        """What is to be least. Raises OptionError."""
        from .passes.objective.measures import objectives

        return objectives(self.objective)

    def reading(self) -> Reading:
        """How the model is read."""
        return Reading(self.dims, self.definitions, self.strict, self.fill_seed)


_DEFAULTS = Options()
_OF_ONE_DEVICE = (
    *("scratchpad", "weights", "order", "residency", "address", "objective"),
    *("recompute", "inplace", "pins", "time_limit", "kernels"),
)


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
    of an ONNX model. For a machine of several devices, a module that talks to other ranks becomes a ``RankModel``: its
    collectives are hidden behind compute, and it is called on every rank.
    ``options`` are the fields of ``Options``. Setting ``stop`` ends planning early with the best plan so far.

    Raises:
        ModelError: the model cannot be read, or has operators without shapes.
        Infeasible: an operator does not fit the scratchpad; says which, and the least capacity that works.
        MachineError, OptionError: the machine or an option is unknown or out of range.
    """
    from .passes.by_objective import plan_by

    chosen = _options(options)
    rank = _of_one_rank(model, inputs, chosen)
    if rank is not None:
        return rank
    started = _Start.of(model, inputs, chosen, on_progress, stop)
    try:
        plan = plan_by(started.plan, started.planner, started.wanted, started.budget)
    except Infeasible as error:
        if _exceeds(started.plan):
            error.hint += "; `opweave explain` lists what does not fit, and what would help"
        raise
    return CompiledModel(simulate(plan), started.program)


def _of_one_rank(model: Model, inputs: Inputs | None, options: Options) -> RankModel | None:
    """``model`` for one rank of the machine's devices; ``None`` where it is alone, or not a module."""
    import torch

    target = options.target()
    if target.fabric is None or not isinstance(model, torch.nn.Module) or inputs is None:
        return None
    from .passes.overlap.rank import compiled_rank

    if isinstance(inputs, torch.Tensor):
        raise OptionError("inputs is one tensor; it takes all of them, in order or by name", hint="write (x,)")
    args, named = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    made = compiled_rank(model, args, named, target, OverlapOptions.of(options.overlap))
    if made is not None:
        options.check_of_rank()
    return made


@overload
def explain(model: str | Path | CompiledModel, inputs: Inputs | None = None, **options: Any) -> Explanation: ...


@overload
def explain(model: Model, inputs: Any = None, **options: Any) -> Explanation | BackendExplanation: ...


def explain(
    model: Model | CompiledModel,
    inputs: Any = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> Explanation | BackendExplanation:
    """Plan ``model`` as ``compile`` does, and say why it moves what it moves, or why nothing fits; what would help.

    A ``CompiledModel`` is explained as it is. Takes what ``compile`` takes and raises as it; an operator that does not
    fit the scratchpad is explained, not raised. A PyTorch module or function, compiled by ``torch.compile`` or not, is
    explained as ``torch.compile(model, backend="opweave")`` runs it, with that backend's options, unless an option
    says which scratchpad it is for, as ``machine`` without ``overlap`` does of a module that is not compiled. Its
    ``inputs`` may be one tensor, too.
    """
    if callable(model) and not isinstance(model, CompiledModel) and _runs_in_torch(model, options):
        from .torch_backend import explain as explain_backend

        return explain_backend(model, () if inputs is None else inputs, **options)
    from .passes.by_objective import plan_by
    from .passes.explain import explain as explained

    chosen = _options(options)
    if isinstance(model, CompiledModel):
        return explained(model.plan, _budget(chosen, on_progress, stop))
    started = _Start.of(model, inputs, chosen, on_progress, stop)
    plan, budget = started.plan, started.budget
    if not _exceeds(plan):
        plan = plan_by(plan, started.planner, started.wanted, budget.share(0.5))
    return explained(plan, budget)


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

    Takes what ``compile`` takes, except ``scratchpad``, ``pins`` and other objectives; ``time_limit`` is for all
    ``points`` together. Raises as ``compile``.
    """
    from .passes.fit import traffic_by_capacity

    if points < 2:
        raise OptionError(f"points is {points}; a curve takes at least 2")
    chosen = _options(options)
    if chosen.scratchpad is not None:
        raise OptionError("fit chooses the scratchpad itself; leave out 'scratchpad'")
    if chosen.pins:
        raise OptionError("fit moves the end of the scratchpad, and pins may lie beyond it; leave out 'pins'")
    if chosen.objectives() != Options().objectives():
        raise OptionError(f"fit shows additional traffic; objective {chosen.objective!r} has no effect")
    if chosen.target().scratchpad_memory.banks_bytes:
        raise OptionError("fit needs a scratchpad of one bank, whose size it can choose", hint="compile for the banks")
    started = _Start.of(model, inputs, chosen, on_progress, stop)
    return traffic_by_capacity(started.plan, started.planner, started.budget, points)


@dataclass(frozen=True)
class _Start:
    """A model that has been read, and everything needed to plan it."""

    program: ImportedGraph
    plan: Plan
    planner: Planner
    wanted: tuple[Objective, ...]
    budget: Budget

    @classmethod
    def of(
        cls,
        model: Model,
        inputs: Inputs | None,
        options: Options,
        on_progress: Callable[[Progress], None] | None,
        stop: threading.Event | None,
    ) -> _Start:
        """Check the options, then read the model; the time limit begins when that is done."""
        target, planner, wanted = options.target(), options.planner(), options.objectives()
        program, source = read_model(model, inputs, options.reading())
        budget = _budget(options, on_progress, stop)
        program = _launching(program, options.kernels, target, budget)
        plan = planner.rewritten(_empty_plan(program, source, target, options), budget)
        plan = msgspec.structs.replace(plan, pins=pins_of(options.pins, plan))
        return cls(program, plan, planner, wanted, budget)


def _launching(program: ImportedGraph, kernels: str, machine: HardwareModel, budget: Budget) -> ImportedGraph:
    """``program`` with fused kernels in the place of what they replace."""
    if kernels == "off":
        return program
    matches = rules(kernels)(program.graph)
    chosen = choose(program.graph, matches, kernels, machine, budget.share(0.2), others_fuse=False)
    return replace(program, graph=fused(program.graph, chosen.matches)) if chosen.matches else program


def _exceeds(plan: Plan) -> bool:
    """Whether some operator alone does not fit the scratchpad."""
    return least_capacity(plan) > plan.machine.scratchpad_memory.capacity_bytes


#: Options of ``compile`` that the backend of torch.compile does not have.
_FOR_A_SCRATCHPAD = frozenset(field.name for field in fields(Options)) - {
    "time_limit",
    "deterministic",
    "strict",
    "overlap",
    "kernels",
}


def _runs_in_torch(model: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether ``model`` is to be explained as the backend of torch.compile runs it."""
    import torch

    if isinstance(model, torch.export.ExportedProgram):
        return False
    told = _FOR_A_SCRATCHPAD.intersection(options)
    if told != {"machine"}:
        return not told
    from .compiler.frontend.dynamo.options import BackendOptions

    only_the_backends = {field.name for field in fields(BackendOptions)} - {field.name for field in fields(Options)}
    is_plain = isinstance(model, torch.nn.Module) and not hasattr(model, "_orig_mod")
    return not is_plain or "overlap" in options or not only_the_backends.isdisjoint(options)


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
    program, _ = read_model(model, inputs, how.reading())
    program = replace(program, graph=as_planned(program.graph, plan.graph))
    if not computes_same(plan.graph, program.graph):
        raise PlanError(
            f"the model has graph {program.graph.name!r}, which is not the one plan {str(path)!r} was made from",
            hint="give the model file that was compiled, unchanged, or compile it again",
        )
    return CompiledModel(plan, program)


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
    from .hw_models.model import aligned_bytes
    from .passes.planner import Planner
    from .passes.residency.workset import least_capacity

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
