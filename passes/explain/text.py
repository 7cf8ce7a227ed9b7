"""An explanation in words: about fifteen lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...compiler.report.units import format_bytes, format_percent, plural
from .facts import BindingStep, Explanation, LiveBuffer, Relaxation

__all__ = ["explanation_text"]

STEPS = 3
BUFFERS = 4
DROPPED = 3
RELAXATIONS = 6
_WIDTH = 10  # of the column of topics


def explanation_text(explanation: Explanation) -> str:
    """``explanation`` as plain text, without a final line break."""
    infeasible = explanation.verdict == "infeasible"
    sections = (
        ("result", _infeasible(explanation) if infeasible else _result(explanation)),
        ("because", _steps(explanation)),
        ("moved", _dropped(explanation)),
        ("would help", _relaxations(explanation)),
        ("fused", (f"{launch.kernel} instead of {launch.replaced}" for launch in explanation.launches)),
    )
    lines = []
    for topic, section in sections:
        for i, line in enumerate(section):
            lines.append(_printable(f"{topic if i == 0 else '':<{_WIDTH}} {line}".rstrip()))
    return "\n".join(lines)


def _printable(line: str) -> str:
    """Without control characters: names come from a model, and a terminal obeys what it is shown."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _result(e: Explanation) -> Iterator[str]:
    yield f"{e.graph}: {format_bytes(e.additional_bytes)} of additional traffic in {format_bytes(e.capacity_bytes)}"
    yield f"{e.verdict}; proven are {format_bytes(e.order_bound_bytes)} for this order, " + (
        f"{format_bytes(e.graph_bound_bytes)} for any"
    )
    if e.unavoidable_bytes:
        yield f"{format_bytes(e.unavoidable_bytes)} move whatever is resident: streamed weights that are read again"


def _infeasible(e: Explanation) -> Iterator[str]:
    few = plural(len(e.steps), "operator")
    yield f"{e.graph}: infeasible, {few} of {e.operators} cannot fit {format_bytes(e.capacity_bytes)} in any order"


def _steps(e: Explanation) -> Iterator[str]:
    for step in e.steps[:STEPS]:
        yield _step(e, step)
        yield f"  {_listed(step.live)}"
    rest = e.steps[STEPS:]
    if rest and e.verdict != "infeasible":
        yield f"{plural(len(rest), 'more step')} force {format_bytes(sum(step.forced_bytes for step in rest))}"
    elif rest:
        yield f"{plural(len(rest), 'more operator')}"
    if e.steps and e.order_bound_bytes and e.verdict != "infeasible":
        share = format_percent(e.forced_bytes / e.order_bound_bytes)
        yield f"together {format_bytes(e.forced_bytes)}: {share} of what is proven for this order"


def _step(e: Explanation, step: BindingStep) -> str:
    short = f"{format_bytes(step.needed_bytes)} are needed at once, {format_bytes(step.short_bytes)} more than there is"
    forced = f"; that alone forces {format_bytes(step.forced_bytes)}" if step.forced_bytes else ""
    return f"operator {step.position + 1} of {e.operators}, {step.operator}: {short}{forced}"


def _listed(live: Sequence[LiveBuffer]) -> str:
    parts = []
    for state in ("operand", "kept", "dropped"):
        of_state = [buffer for buffer in live if buffer.state == state]
        if of_state:
            named = ", ".join(f"{b.buffer} {format_bytes(b.nbytes)}" for b in of_state[:BUFFERS])
            rest = of_state[BUFFERS:]
            more = f", {len(rest)} more {format_bytes(sum(b.nbytes for b in rest))}" if rest else ""
            parts.append(f"{'operands' if state == 'operand' else state}: {named}{more}")
    return "; ".join(parts)


def _dropped(e: Explanation) -> Iterator[str]:
    for gap in e.dropped[:DROPPED]:
        how = f"moves {format_bytes(gap.moved_bytes)}" if gap.returns == "fetched" else "is computed again"
        yield f"{gap.buffer} ({format_bytes(gap.nbytes)}) {how}: dropped after {gap.after_operator}, " + (
            f"back for {gap.before_operator}"
        )
    rest = e.dropped[DROPPED:]
    if rest:
        yield f"{plural(len(rest), 'more gap')} move {format_bytes(sum(gap.moved_bytes for gap in rest))}"


def _relaxations(e: Explanation) -> Iterator[str]:
    for relaxation in e.relaxations[:RELAXATIONS]:
        room = f" ({format_bytes(relaxation.capacity_bytes)})" if relaxation.capacity_bytes else ""
        yield f"{relaxation.what}{room}: {_saving(relaxation, e.verdict == 'infeasible')}"
    if e.untried:
        yield f"no time was left to try: {', '.join(e.untried)}"
    if not e.relaxations and not e.untried:
        yield "nothing that this machine, order or residency could give"


def _saving(relaxation: Relaxation, infeasible: bool) -> str:
    unit = " of the shortage" if infeasible else ""
    limit = format_bytes(relaxation.limit_bytes)
    if relaxation.saved_bytes is None:
        return f"saves at most {limit}{unit}"
    saved = f"saves {format_bytes(relaxation.saved_bytes)}{unit}"
    return saved if relaxation.is_exact else f"{saved}, at most {limit}"
