"""The command line: ``opweave compile | run | verify | fit | view | hw | passes``.

Exit codes: 0 done; 1 outputs differ from the reference; 130 stopped by Ctrl-C, with the best plan so far written
unless standard error says "abandoned"; anything else is the ``exit_code`` of the error (see ``errors.py``): 2 option,
3 model, 4 machine, 5 infeasible, 6 plan file, 7 verification, 8 execution, 70 internal.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from .compiler.report.progress import watched
from .errors import ExecutionError, InternalError, OptionError, OpweaveError

if TYPE_CHECKING:
    from .api import CompiledModel
    from .passes.fit import FitPoint


class _Abandoned(Exception):
    """Ctrl-C where nothing was there to keep."""


class _Commands(typer.core.TyperGroup):
    """Typer ends quietly on Ctrl-C, with an exit code that a command may return as well: here it is told apart."""

    def invoke(self, ctx: Any) -> Any:  # typer does not export the class of its contexts
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Abandoned from interrupt


app = typer.Typer(
    name="opweave",
    cls=_Commands,
    help="Weave a model's operators onto an accelerator: order, residency and addresses, proven and executed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
hw = typer.Typer(help="Machines opweave can plan for.", no_args_is_help=True)
app.add_typer(hw, name="hw")

INTERRUPTED = 130
DIFFERENT = 1

ModelPath = Annotated[Path, typer.Argument(help="An .onnx model, or a plain operator graph .json.")]
PlanPath = Annotated[Path, typer.Argument(help="A plan written by `opweave compile`.")]
MachineName = Annotated[str, typer.Option("--machine", "-m", help="A name from `opweave hw list`, or a TOML file.")]
RunMachineName = Annotated[
    str | None, typer.Option("--machine", "-m", help="For an .onnx model: its machine, 'edge-npu' if left out.")
]
Scratchpad = Annotated[
    str | None, typer.Option(help="Scratchpad capacity, such as 1MiB; the machine's own if left out.")
]
Weights = Annotated[str, typer.Option(help="'streamed' from backing memory, or 'resident' in the scratchpad.")]
PassOption = Annotated[str | None, typer.Option(help="A pass from `opweave passes`, options in parentheses.")]
TimeLimit = Annotated[float, typer.Option(help="Seconds for all passes together.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Same input, same plan: one worker, fixed seeds.")]
Dim = Annotated[list[str] | None, typer.Option("--dim", help="Bind a symbolic dimension: --dim batch=1.")]
FillSeed = Annotated[int | None, typer.Option(help="Replace all-equal weights by random ones from this seed.")]
Definitions = Annotated[
    Path | None, typer.Option(help="Python file whose DEFINITIONS maps operator types to functions.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse operators that have no lowering of our own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def main() -> None:
    """Run the command line and exit with the documented code."""
    try:
        code = app(standalone_mode=False)
    except OpweaveError as error:
        _fail(error)
    except (KeyboardInterrupt, _Abandoned):
        _abandon()
    except Exception as error:
        if not hasattr(error, "format_message"):
            traceback.print_exc()
            _fail(InternalError(f"unexpected {type(error).__name__}: {error}", hint="please report this"))
        if not error.format_message():  # no command was given, and the help has been shown instead
            sys.exit(OptionError.exit_code)
        _fail(OptionError(error.format_message(), hint="opweave COMMAND --help lists the options"))
    sys.exit(code if isinstance(code, int) else 0)


def _abandon() -> NoReturn:
    sys.stderr.write("opweave: abandoned\n")
    if "--json" in sys.argv:
        _print_json({"error": {"code": "interrupted", "message": "abandoned by Ctrl-C", "hint": ""}})
    sys.exit(INTERRUPTED)


def _fail(error: OpweaveError) -> NoReturn:
    if "--json" in sys.argv:
        _print_json({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    else:
        sys.stderr.write(f"error[{error.code}]: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
    sys.exit(error.exit_code)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """``value`` as JSON can say it: infinities and NaN, which it cannot, become ``None``."""
    if isinstance(value, dict):
        return {name: _finite(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


@app.command()
def compile(
    model: ModelPath,
    machine: MachineName = "edge-npu",
    scratchpad: Scratchpad = None,
    weights: Weights = "streamed",
    order: PassOption = None,
    residency: PassOption = None,
    address: PassOption = None,
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
    chosen = _fields(locals())
    if output.is_dir():
        raise OptionError(f"--output {str(output)!r} is a folder", hint="name a file, such as plan.json in it")
    if report is not None:
        _make_folder(report)
    compiled, interrupted = _compile(model, chosen)
    compiled.save(output)
    if report is not None:
        compiled.report(report)
    _show(compiled, as_json, {"plan": str(output)})
    return INTERRUPTED if interrupted else 0


@app.command()
def run(
    target: Annotated[Path, typer.Argument(help="A plan .json, or an .onnx model, which is compiled first.")],
    model: Annotated[Path | None, typer.Option(help="The plan's model, when it is not where it was.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs by name, .npz; seeded random ones if left out.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="Write the outputs to this .npz, bfloat16 as float32.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs.")] = 0,
    reference: Annotated[bool, typer.Option(help="Compare the outputs with onnxruntime's.")] = True,
    machine: RunMachineName = None,
    scratchpad: Scratchpad = None,
    dim: Dim = None,
    fill_seed: FillSeed = None,
    definitions: Definitions = None,
    as_json: AsJson = False,
) -> int:
    """Execute a plan in a scratchpad of exactly the machine's size, and compare the outputs with onnxruntime's."""
    from .api import load_plan, source_model
    from .compiler.report.words import execution_text
    from .compiler.runtime.reference import against_onnxruntime, read_inputs, write_outputs

    chosen = _fields(locals())
    if target.suffix == ".json":
        _refuse("the plan was made with its own", machine=machine, scratchpad=scratchpad, dim=dim, fill_seed=fill_seed)
        path = model or source_model(target)
        compiled = load_plan(target, path, definitions=chosen.get("definitions", {}))
    else:
        _refuse("it says where a plan's model is", model=model)
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
    _print_json(facts) if as_json else _say(execution_text(facts))
    return 0 if equal else DIFFERENT


def _refuse(reason: str, **given: object) -> None:
    """Refuse options that would be ignored."""
    for name, value in given.items():
        if value is not None and value != []:
            raise OptionError(f"--{name.replace('_', '-')} has no effect here: {reason}")


@app.command()
def verify(plan: PlanPath, as_json: AsJson = False) -> int:
    """Recount what a plan claims, whoever wrote it: faults, traffic and peak in bytes."""
    from .compiler.plan import Plan
    from .compiler.report.words import verification_text
    from .compiler.verify import verify as recount
    from .errors import VerificationError

    verification = recount(Plan.load(plan))
    facts = {
        "ok": verification.ok,
        "level": verification.level,
        "faults": [str(finding) for finding in verification.faults],
        "compulsory_bytes": verification.compulsory_bytes,
        "additional_bytes": verification.additional_bytes,
        "peak_bytes": verification.peak_bytes,
    }
    if as_json:
        _print_json(facts)
    else:
        _say(verification_text(facts))
    return 0 if verification.ok else VerificationError.exit_code


@app.command()
def fit(
    model: ModelPath,
    machine: MachineName = "edge-npu",
    weights: Weights = "streamed",
    order: PassOption = None,
    residency: PassOption = None,
    address: PassOption = None,
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
    from .api import fit as fit_model
    from .compiler.report.words import curve_text

    if report is not None:
        _make_folder(report)
    with watched() as (listen, stop):
        curve = fit_model(model, points=points, on_progress=listen, stop=stop, **_fields(locals()))
    facts = [asdict(point) for point in curve]
    if report is not None:
        _report_fit(curve, report)
    if as_json:
        _print_json({"points": facts})
    else:
        _say(curve_text(curve))
    return INTERRUPTED if stop.is_set() else 0


def _report_fit(curve: Sequence[FitPoint], folder: Path) -> None:
    from .compiler.report.pictures import traffic_curve

    try:
        (folder / "fit.json").write_text(json.dumps([asdict(point) for point in curve], indent=1))
        traffic_curve(curve, folder / "fit.png")
    except OSError as error:
        raise OptionError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from error


def _make_folder(path: Path) -> None:
    """Make a folder for reports, before the time of planning is spent on what cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write a report to {str(path)!r}: {error.strerror}") from error


@app.command()
def view(
    plan: PlanPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; beside the plan if left out.")] = None,
    as_json: AsJson = False,
) -> int:
    """Write a plan's self-contained HTML page, its Chrome/Perfetto trace and its pictures."""
    from .compiler.plan import Plan
    from .compiler.report import write_report

    written = write_report(Plan.load(plan), output or plan.parent)
    paths = {name: str(path) for name, path in written.items()}
    _print_json(paths) if as_json else _say("\n".join(paths.values()))
    return 0


@hw.command("list")
def hw_list(as_json: AsJson = False) -> None:
    """List the machines that come with opweave."""
    from .hw_models.registry import load, names

    machines = [load(name) for name in names()]
    if as_json:
        _print_json({"machines": [{"name": m.name, "description": m.description} for m in machines]})
        return
    for machine in machines:
        _say(f"{machine.name:<16} {machine.scratchpad_memory.capacity_bytes:>15,} bytes  {machine.description}")


@hw.command("show")
def hw_show(
    machine: Annotated[str, typer.Argument(help="A name from `opweave hw list`, or a TOML file.")],
    as_json: AsJson = False,
) -> None:
    """Show one machine: memories, engines, links, and where its figures come from."""
    import msgspec

    from .compiler.report.words import outline
    from .hw_models.registry import load

    facts = json.loads(msgspec.json.encode(load(machine)))
    _print_json(facts) if as_json else _say(outline(facts))


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the passes, what each decides, and its options."""
    from .passes.registry import describe, names

    rows = {name: describe(name) for name in names()}
    if as_json:
        _print_json(
            {name: {"summary": r.summary, "options": [asdict(o) for o in r.options]} for name, r in rows.items()}
        )
        return
    for name, row in rows.items():
        _say(f"{name:<24} {row.summary}")
        for option in row.options:
            _say(f"{'':<24}   {option.name}: {option.type} = {option.default!r}")


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ``api.compile`` from a command's parameters, leaving out what was not given."""
    names = ("machine", "scratchpad", "weights", "order", "residency", "address", "time_limit", "deterministic")
    fields = {name: given[name] for name in names if given.get(name) is not None}
    fields["fill_seed"] = given.get("fill_seed")
    fields["strict"] = given.get("strict", False)
    fields["dims"] = dict(_parse_dim(text) for text in given.get("dim") or ())
    if given.get("definitions") is not None:
        from .compiler.frontend.definitions import load_definitions

        fields["definitions"] = load_definitions(given["definitions"])
    return fields


def _parse_dim(text: str) -> tuple[str, int]:
    name, _, value = text.rpartition("=")
    if not name or not value.isdecimal() or int(value) < 1:
        raise OptionError(f"--dim is {text!r}; expected NAME=VALUE with a whole VALUE above 0, such as batch=1")
    return name, int(value)


def _compile(model: Path, fields: dict[str, Any]) -> tuple[CompiledModel, bool]:
    """Compile with progress on standard error; also says whether Ctrl-C ended it early."""
    from .api import compile as compile_model

    with watched() as (listen, stop):
        compiled = compile_model(model, on_progress=listen, stop=stop, **fields)
    return compiled, stop.is_set()


def _show(compiled: CompiledModel, as_json: bool, more: dict[str, Any]) -> None:
    from .compiler.report.text import summary_dict

    if as_json:
        _print_json({**summary_dict(compiled.plan), **more})
    else:
        _say(compiled.summary())
        for name, value in more.items():
            _say(f"{name}: {value}")


if __name__ == "__main__":
    main()
