"""Commands that plan a model, and those that ask why or how much."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..compiler.report.progress import watched
from ..errors import ExecutionError, Infeasible, OptionError
from .shared import (
    DIFFERENT,
    INTERRUPTED,
    AsJson,
    Definitions,
    Deterministic,
    Dim,
    FillSeed,
    Goal,
    InPlace,
    Kernels,
    MachineName,
    MayRecompute,
    ModelPath,
    OptionalMachineName,
    OptionalWeights,
    PassOption,
    Pins,
    Scratchpad,
    Strict,
    TimeLimit,
    Weights,
    keywords,
    make_folder,
    print_json,
    refuse,
    say,
)

if TYPE_CHECKING:
    from ..api import CompiledModel
    from ..passes.fit import FitPoint

__all__ = ["compile", "explain", "fit", "run"]


def compile(
    model: ModelPath,
    machine: MachineName = "edge-npu",
    scratchpad: Scratchpad = None,
    weights: Weights = "streamed",
    order: PassOption = None,
    residency: PassOption = None,
    address: PassOption = None,
    objective: Goal = None,
    recompute: MayRecompute = False,
    inplace: InPlace = False,
    kernels: Kernels = None,
    pin: Pins = None,
    time_limit: TimeLimit = 30.0,
    deterministic: Deterministic = False,
    dim: Dim = None,
    fill_seed: FillSeed = None,
    definitions: Definitions = None,
    strict: Strict = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    report: Annotated[Path | None, typer.Option(help="Folder for the page, the trace and the pictures.")] = None,
    as_json: AsJson = False,
) -> int:
    """Plan a model for a machine: order, residency, addresses; verified, with bound and gap."""
    chosen = keywords(locals())
    if output.is_dir():
        raise OptionError(f"--output {str(output)!r} is a folder", hint="name a file, such as plan.json in it")
    if report is not None:
        make_folder(report)
    compiled, interrupted = _compile(model, chosen)
    compiled.save(output)
    if report is not None:
        compiled.report(report)
    _show(compiled, as_json, {"plan": str(output)})
    return INTERRUPTED if interrupted else 0


def run(
    target: Annotated[Path, typer.Argument(help="A plan .json, or an .onnx model, which is compiled first.")],
    model: Annotated[Path | None, typer.Option(help="The plan's model, when it is not where it was.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs by name, .npz; seeded random ones if left out.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="Write the outputs to this .npz, bfloat16 as float32.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs.")] = 0,
    reference: Annotated[bool, typer.Option(help="Compare the outputs with onnxruntime's.")] = True,
    machine: OptionalMachineName = None,
    scratchpad: Scratchpad = None,
    dim: Dim = None,
    fill_seed: FillSeed = None,
    definitions: Definitions = None,
    as_json: AsJson = False,
) -> int:
    """Execute a plan in a scratchpad of exactly the machine's size, and compare the outputs with onnxruntime's."""
    from ..api import load_plan, source_model
    from ..compiler.report.words import execution_text
    from ..compiler.runtime.reference import against_onnxruntime, read_inputs, write_outputs

    chosen = keywords(locals())
    if target.suffix == ".json":
        refuse("the plan was made with its own", machine=machine, scratchpad=scratchpad, dim=dim, fill_seed=fill_seed)
        path = model or source_model(target)
        compiled = load_plan(target, path, definitions=chosen.get("definitions", {}))
    else:
        refuse("it says where a plan's model is", model=model)
        path, (compiled, _) = target, _compile(target, chosen)
    values = compiled.random_inputs(seed) if inputs is None else compiled.named_inputs(read_inputs(inputs))
    try:
        result = compiled.execute(values)
    except ExecutionError as error:
        if inputs is None and not error.hint:
            error.hint = "the inputs were random, integers from 0 to 7; name real ones with --inputs"
        raise
    if outputs is not None:
        write_outputs(outputs, dict(zip(compiled.output_names, result.outputs, strict=True)))
    facts: dict[str, Any] = {
        "outputs": {n: list(v.shape) for n, v in zip(compiled.output_names, result.outputs, strict=True)},
        "loaded_bytes": result.loaded_bytes,
        "stored_bytes": result.stored_bytes,
        "streamed_bytes": result.streamed_bytes,
    }
    if reference:
        facts |= against_onnxruntime(compiled, Path(path), values, result.outputs)
    equal = all(c["equal"] for c in facts.get("comparison", ()))
    print_json(facts) if as_json else say(execution_text(facts))
    return 0 if equal else DIFFERENT


def explain(
    target: Annotated[Path, typer.Argument(help="A plan .json, or a model, which is compiled first.")],
    machine: OptionalMachineName = None,
    scratchpad: Scratchpad = None,
    weights: OptionalWeights = None,
    order: PassOption = None,
    residency: PassOption = None,
    address: PassOption = None,
    objective: Goal = None,
    recompute: MayRecompute = False,
    inplace: InPlace = False,
    kernels: Kernels = None,
    pin: Pins = None,
    time_limit: TimeLimit = 30.0,
    deterministic: Deterministic = False,
    dim: Dim = None,
    fill_seed: FillSeed = None,
    definitions: Definitions = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> int:
    """Say what binds a plan, or why nothing fits: the steps, the tensors, the bytes, and what would help most."""
    given = dict(locals())
    from ..api import explain as explain_model
    from ..api import load_plan
    from ..passes.explain import explanation_text

    subject: Path | CompiledModel = target
    if _is_plan(target):
        free = ("target", "time_limit", "deterministic", "as_json")
        refuse("the plan was made with its own", **{name: given[name] for name in given if name not in free})
        subject = load_plan(target)
    with watched() as (listen, stop):
        found = explain_model(subject, on_progress=listen, stop=stop, **keywords(given))
    print_json(found.to_dict()) if as_json else say(explanation_text(found))
    if stop.is_set():
        return INTERRUPTED
    return Infeasible.exit_code if found.verdict == "infeasible" else 0


def _is_plan(path: Path) -> bool:
    """Whether ``path`` is to be read as a plan: operator graphs are JSON as well, but have no schema version."""
    if path.suffix != ".json":
        return False
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # whoever reads it next says what is wrong
        return True
    return not isinstance(content, dict) or "ops" not in content


def fit(
    model: ModelPath,
    machine: MachineName = "edge-npu",
    weights: Weights = "streamed",
    order: PassOption = None,
    residency: PassOption = None,
    address: PassOption = None,
    recompute: MayRecompute = False,
    inplace: InPlace = False,
    kernels: Kernels = None,
    time_limit: TimeLimit = 60.0,
    deterministic: Deterministic = False,
    dim: Dim = None,
    fill_seed: FillSeed = None,
    definitions: Definitions = None,
    points: Annotated[int, typer.Option(min=2, max=100, help="How many capacities to try.")] = 9,
    report: Annotated[Path | None, typer.Option(help="Folder for fit.json and the picture of the curve.")] = None,
    as_json: AsJson = False,
) -> int:
    """Find the least scratchpad that works, and what each size costs in additional traffic."""
    from ..api import fit as fit_model
    from ..compiler.report.words import curve_text

    if report is not None:
        make_folder(report)
    with watched() as (listen, stop):
        curve = fit_model(model, points=points, on_progress=listen, stop=stop, **keywords(locals()))
    facts = [asdict(point) for point in curve]
    if report is not None:
        _report_fit(curve, report)
    if as_json:
        print_json({"points": facts})
    else:
        say(curve_text(curve))
    return INTERRUPTED if stop.is_set() else 0


def _report_fit(curve: Sequence[FitPoint], folder: Path) -> None:
    from ..compiler.report.pictures import traffic_curve

    try:
        (folder / "fit.json").write_text(json.dumps([asdict(point) for point in curve], indent=1))
        traffic_curve(curve, folder / "fit.png")
    except OSError as error:
        raise OptionError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from error


def _compile(model: Path, chosen: dict[str, Any]) -> tuple[CompiledModel, bool]:
    """Compile with progress on standard error; also says whether Ctrl-C ended it early."""
    from ..api import compile as compile_model

    with watched() as (listen, stop):
        compiled = compile_model(model, on_progress=listen, stop=stop, **chosen)
    return compiled, stop.is_set()


def _show(compiled: CompiledModel, as_json: bool, more: dict[str, Any]) -> None:
    from ..compiler.report.text import summary_dict

    if as_json:
        print_json({**summary_dict(compiled.plan), **more})
    else:
        say(compiled.summary())
        for name, value in more.items():
            say(f"{name}: {value}")
