"""Commands that look at what there is: plans, machines, passes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .shared import AsJson, PlanPath, print_json, refuse, say

__all__ = ["export", "hw_list", "hw_show", "passes", "verify", "view"]

PLACING_S = 30.0  # the default of planning as well


def verify(plan: PlanPath, as_json: AsJson = False) -> int:
    """Recount what a plan claims, whoever wrote it: faults, traffic and peak in bytes."""
    from ..compiler.plan import Plan
    from ..compiler.report.words import verification_text
    from ..compiler.verify import verify as recount
    from ..errors import VerificationError

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
        print_json(facts)
    else:
        say(verification_text(facts))
    return 0 if verification.ok else VerificationError.exit_code


def export(
    plan: PlanPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; plan.h or planned.tflite if left out.")
    ] = None,
    tflite: Annotated[Path | None, typer.Option(help="A .tflite model: write it with the plan's offsets.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="What names in the header begin with; 'opweave' if left out.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help=f"For a .tflite file: seconds to place its tensors, {PLACING_S:g} if left out.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Export a plan as a C header, or as offsets inside a .tflite model for TensorFlow Lite Micro."""
    from ..compiler.plan import Plan

    loaded = Plan.load(plan)
    if tflite is None:
        from ..compiler.export import save_c_header

        refuse("a header is written without planning", time_limit=time_limit)
        output = output or Path("plan.h")
        save_c_header(loaded, output, prefix="opweave" if prefix is None else prefix)
    else:
        from ..compiler.pipeline import Budget
        from ..passes.whole_life import save_planned_tflite

        refuse("a .tflite file has no names to prefix", prefix=prefix)
        output = output or Path("planned.tflite")
        budget = Budget.of_seconds(PLACING_S if time_limit is None else time_limit)
        save_planned_tflite(loaded, tflite, output, budget)
    print_json({"output": str(output)}) if as_json else say(str(output))
    return 0


def view(
    plan: PlanPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; beside the plan if left out.")] = None,
    as_json: AsJson = False,
) -> int:
    """Write a plan's self-contained HTML page, its Chrome/Perfetto trace and its pictures."""
    from ..compiler.plan import Plan
    from ..compiler.report import write_report

    written = write_report(Plan.load(plan), output or plan.parent)
    paths = {name: str(path) for name, path in written.items()}
    print_json(paths) if as_json else say("\n".join(paths.values()))
    return 0


def hw_list(as_json: AsJson = False) -> None:
    """List the machines that come with opweave."""
    from ..hw_models.registry import load, names

    machines = [load(name) for name in names()]
    if as_json:
        print_json({"machines": [{"name": m.name, "description": m.description} for m in machines]})
        return
    width = max(len(machine.name) for machine in machines)
    for machine in machines:
        say(f"{machine.name:<{width}} {machine.scratchpad_memory.capacity_bytes:>15,} bytes  {machine.description}")


def hw_show(
    machine: Annotated[str, typer.Argument(help="A name from `opweave hw list`, or a TOML file.")],
    as_json: AsJson = False,
) -> None:
    """Show one machine: memories, engines, links, what collectives take, and where its figures come from."""
    import msgspec

    from ..compiler.report.words import outline
    from ..hw_models.registry import load
    from ..hw_models.table import collective_table

    model = load(machine)
    facts = json.loads(msgspec.json.encode(model))
    if as_json:
        print_json(facts)
        return
    if model.fabric is not None:  # a table in the place of its rates, of which there are dozens
        facts["fabric"]["rates"] = f"{len(model.fabric.rates)} (all of them with --json)"
    say("\n\n".join(filter(None, (outline(facts), collective_table(model)))))


def passes(as_json: AsJson = False) -> None:
    """List the passes, what each decides, and its options."""
    from ..passes.registry import describe, names

    rows = {name: describe(name) for name in names()}
    if as_json:
        print_json(
            {name: {"summary": r.summary, "options": [asdict(o) for o in r.options]} for name, r in rows.items()}
        )
        return
    for name, row in rows.items():
        say(f"{name:<24} {row.summary}")
        for option in row.options:
            say(f"{'':<24}   {option.name}: {option.type} = {option.default!r}")
