"""The command that makes pipeline-parallel schedules, compares them and shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..compiler.report.progress import watched
from ..errors import OptionError
from .pipeline_problems import ANY, OPTIMAL, Source, is_file, source_of
from .shared import INTERRUPTED, AsJson, Deterministic, TimeLimit, make_folder, print_json, say

if TYPE_CHECKING:
    from ..compiler.pipeline import Budget
    from ..compiler.pipelining.problem import PipelineProblem
    from ..compiler.pipelining.schedule import TimedSchedule
    from ..compiler.report.pipelining.facts import Shown
    from ..passes.pipeline_parallel.solution import Objective, PipelineSolution

__all__ = ["pipeline"]


def pipeline(
    schedule: Annotated[str, typer.Option(help="A name from --list, 'optimal', or a schedule's .json file.")] = OPTIMAL,
    compare: Annotated[list[str] | None, typer.Option(help="Another schedule to compare with; again for more.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Pipeline ranks.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches of a step.")] = None,
    forward: Annotated[str | None, typer.Option(help="Time of F on a rank, for one microbatch: 29.7ms.")] = None,
    input_gradient: Annotated[str | None, typer.Option(help="Time of I, the gradient of the input.")] = None,
    weight_gradient: Annotated[str | None, typer.Option(help="Time of W, the gradients of the weights.")] = None,
    backward: Annotated[str | None, typer.Option(help="Time of a whole backward; I and W if left out.")] = None,
    send: Annotated[str | None, typer.Option(help="Time of a message to the next rank, or back.")] = None,
    message: Annotated[str | None, typer.Option(help="Its size.")] = None,
    reduce: Annotated[str | None, typer.Option(help="Time of a rank's gradient all-reduce, behind its last W.")] = None,
    until_input_gradient: Annotated[str | None, typer.Option(help="Bytes that a microbatch holds from F to I.")] = None,
    until_weight_gradient: Annotated[
        str | None, typer.Option(help="Bytes from F to W; without any sizes, 1MiB counts a microbatch.")
    ] = None,
    between_gradients: Annotated[str | None, typer.Option(help="Bytes from I to W, if split.")] = None,
    resident: Annotated[
        str | None, typer.Option(help="Bytes that a rank holds all the time: weights and so on.")
    ] = None,
    placement: Annotated[str | None, typer.Option(help="Of chunks, for 'optimal': loop, v, wave, or any.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks that a rank's part is divided into.")] = None,
    problem: Annotated[Path | None, typer.Option(help="Problem as .json or .toml, in place of the above.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Of a rank: 40GiB, or 1.5x of what activations need in 1F1B.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="'makespan', or 'span': the longest rank, if nothing synchronises ranks between steps.")
    ] = "makespan",
    time_limit: TimeLimit = 60.0,
    deterministic: Deterministic = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the schedule here, as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write it as torch.distributed.pipelining reads it.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the page, the picture and the trace.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Name the schedules there are.")] = False,
    as_json: AsJson = False,
) -> int:
    """Make a pipeline-parallel schedule: optimal with a proof or its gap, or one that has a name; compare and show."""
    given = dict(locals())
    if list_only:
        return _list(as_json)
    source = source_of(given)
    aim = _objective(objective)
    if not time_limit > 0:  # nan too
        raise OptionError(f"--time-limit is {time_limit} s; it must be above 0")
    if report is not None:
        make_folder(report)
    if csv is not None and not is_file(schedule):
        _check_csv(source.problem_of(schedule))
    from ..compiler.pipeline import Budget

    with watched() as (listen, stop):
        found: dict[int, Shown] = {}
        names = (schedule, *(compare or ()))
        # What takes long comes last: no time is spent before it is known that all others can be made.
        for number in sorted(range(len(names)), key=lambda number: names[number] == OPTIMAL):
            budget = Budget.of_seconds(time_limit, listen=listen, stop=stop, deterministic=deterministic)
            fixed = number == 0 or names[number] == OPTIMAL
            found[number] = _made(names[number], source, aim, budget, fixed=fixed)
    made = [found[number] for number in range(len(names))]
    files = _write(made[0], made[1] if compare else None, output=output, csv=csv, report=report)
    _tell(made, files, as_json)
    return INTERRUPTED if stop.is_set() else 0


def _objective(text: str) -> Objective:
    if text == "makespan":
        return "makespan"
    if text == "span":
        return "span"
    raise OptionError(f"--objective is {text!r}; it is 'makespan' or 'span'")


def _made(name: str, source: Source, objective: Objective, budget: Budget, *, fixed: bool) -> Shown:
    from ..compiler.pipelining.simulate import timed
    from ..compiler.report.pipelining import load_schedule
    from ..passes.pipeline_parallel.named import named

    if is_file(name):
        return _bounded(timed(load_schedule(name)), objective)
    problem = source.problem_of(name, fixed=fixed)
    if name == OPTIMAL:
        from ..compiler.pipelining.verdict import verified
        from ..passes.pipeline_parallel.placing import choose_placement
        from ..passes.pipeline_parallel.solve import solve

        solve_by = choose_placement if source.placement == ANY else solve
        found = solve_by(problem, budget, objective=objective)
        verified(found.timed)
        return found
    return _bounded(timed(named(name, problem, objective=objective)), objective)


def _bounded(timed: TimedSchedule, objective: Objective) -> TimedSchedule | PipelineSolution:
    """With the analytic bound; alone if it is over its limit, since bounds are those of what keeps it."""
    from ..passes.pipeline_parallel.bounds import lower_bound
    from ..passes.pipeline_parallel.solution import PipelineSolution, within_limit

    if not within_limit(timed):
        return timed
    return PipelineSolution(timed, objective, lower_bound(timed.schedule.problem, objective))


def _check_csv(problem: PipelineProblem) -> None:
    """What torch cannot execute whatever the orders are, before time is spent on them. Raises ExecutionError."""
    from ..compiler.pipelining.schedule import PipelineSchedule
    from ..compiler.runtime.pipelining.emit import check_emittable

    check_emittable(PipelineSchedule(problem, ((),) * problem.ranks))


def _write(
    shown: Shown, other: Shown | None, *, output: Path | None, csv: Path | None, report: Path | None
) -> dict[str, str]:
    from ..compiler.report.pipelining import save_schedule, write_pipeline_report
    from ..compiler.report.pipelining.facts import timed_of
    from ..compiler.runtime.pipelining.emit import renumbered, write_csv

    schedule, files = timed_of(shown).schedule, {}
    if output is not None:
        save_schedule(schedule, output)
        files["schedule"] = str(output)
    if csv is not None:
        try:
            csv.parent.mkdir(parents=True, exist_ok=True)
            files["csv"] = str(write_csv(renumbered(schedule), csv))
        except OSError as error:
            raise OptionError(f"cannot write {str(csv)!r}: {error.strerror}") from error
    if report is not None:
        files |= {name: str(path) for name, path in write_pipeline_report(shown, report, other).items()}
    return files


def _tell(made: list[Shown], files: dict[str, str], as_json: bool) -> None:
    from ..compiler.report.pipelining.facts import facts_of
    from ..compiler.report.pipelining.text import differences_text, facts_text

    first, *others = map(facts_of, made)

    if as_json:
        print_json({"schedule": first.to_dict(), "compared": [each.to_dict() for each in others], "files": files})
        return
    say(facts_text(first))
    for other in others:
        say(f"\n{differences_text(first, other)}")
    if files:
        say("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))


def _list(as_json: bool) -> int:
    from ..passes.pipeline_parallel.named import NAMES

    if as_json:
        fields = ("description", "placement", "chunks", "source")
        print_json({name: {field: getattr(about, field) for field in fields} for name, about in NAMES.items()})
        return 0
    for name, about in NAMES.items():
        chunks = "any number of chunks" if about.chunks is None else f"{about.chunks} chunk{'s' * (about.chunks > 1)}"
        say(f"{name:<18}{about.description} ({about.placement}, {chunks}; {about.source})")
    say(f"{OPTIMAL:<18}the best that is found within the memory limit, with a bound (any placement)")
    return 0
