"""What the torch.compile backend made of a model, in words and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from ....errors import OptionError
from ...report.overlap import overlap_text
from ...report.units import format_bytes, format_percent, format_seconds, plural
from ...simulate import simulate
from .report import GraphReport

__all__ = ["BackendExplanation", "described"]

_WIDTH = 13  # of the column of topics
_MOST_NAMES = 6
_NOTHING = "no graph was compiled: Dynamo met no operator on tensors that it does not leave to eager mode"


@dataclass(frozen=True)
class BackendExplanation:
    """The graphs that running a model once has compiled, with the fallbacks of all of them; ``str`` is the text.

    ``graph_breaks`` are the reasons for which Dynamo cut the model into more than one.
    """

    graphs: tuple[GraphReport, ...]
    fallbacks: Mapping[str, int]
    graph_breaks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def report(self, folder: str | Path) -> dict[str, Path]:
        """Write each planned graph's page, trace and pictures into a folder of its own in ``folder``, and the text.

        A graph that communicates has a folder with the timeline of all ranks as well, where overlap was asked for.

        Returns the paths by name, such as ``"graph-0-inference/index.html"``. Raises OptionError where it cannot write.
        """
        from ...report import write_report
        from ...report.ranks import write_ranks

        target = Path(folder)
        text = target / "explanation.txt"
        try:
            target.mkdir(parents=True, exist_ok=True)
            text.write_text(f"{self}\n")
        except OSError as error:
            raise OptionError(f"cannot write a report to {str(folder)!r}: {error.strerror}") from error
        paths = {"explanation.txt": text}
        for graph in self.graphs:
            if graph.plan is not None:
                name = graph.name.replace(" ", "-")
                title = f"{graph.name} (arena up to {format_bytes(graph.arena_bytes)}, memory of their own above)"
                plan = replace(graph.plan, graph=replace(graph.plan.graph, name=title))
                written = write_report(plan if graph.waits else simulate(plan), target / name)
                paths |= {f"{name}/{key}": path for key, path in written.items()}
            if graph.overlap is not None:
                name = f"{graph.name.replace(' ', '-')}-ranks"
                written = write_ranks(graph.overlap, target / name)
                paths |= {f"{name}/{key}": path for key, path in written.items()}
        return paths

    def _lines(self) -> Iterator[str]:
        tiers = ", ".join(f"{sum(g.tier == t for g in self.graphs)} in {t}" for t in ("T1", "T0"))
        yield f"{plural(len(self.graphs), 'graph')} compiled: {tiers}" if self.graphs else _NOTHING
        for reason in self.graph_breaks:
            yield f"graph break: {reason}"
        for graph in self.graphs:
            yield ""
            yield from described(graph)
        if self.fallbacks:
            yield ""
            yield "fallbacks"
            for sentence, count in self.fallbacks.items():
                yield f"  {count} x {sentence}"


def described(graph: GraphReport) -> Iterator[str]:
    """What became of one graph, in lines."""
    cached = ", from the cache" if graph.from_cache else ""
    yield f"{graph.name}: tier {graph.tier} on {graph.device}{cached}"
    for sentence in graph.fallbacks:
        yield _row("fallback", sentence)
    for kernel, replaced in graph.launches:
        yield _row("fused", f"{kernel} instead of {', '.join(replaced)}")
    if graph.overlap is not None:
        for number, line in enumerate(overlap_text(graph.overlap, _MOST_NAMES)):
            yield _row("" if number else "overlap", line)
    if graph.kernels or graph.operators:
        yield _row("generated", _counted(graph.kernels, "kernel"))
        yield _row("library", _counted(graph.operators, "operator"))
    if graph.tier == "T1":
        yield from _memory(graph)
    if graph.predicted_s is not None:
        least = "" if graph.bound_s is None else f", at least {format_seconds(graph.bound_s)} within the limit"
        yield _row("predicted", f"{format_seconds(graph.predicted_s)} on {plural(graph.streams, 'stream')}{least}")
    status = f"; {graph.status}" if graph.status else ""
    yield _row("compiled", f"{graph.lowering_s:.2f} s lowering, {graph.planning_s:.2f} s planning{status}")


def _memory(graph: GraphReport) -> Iterator[str]:
    yield _row(
        "peak", f"{format_bytes(graph.peak_before_bytes)} in Inductor's order, {format_bytes(graph.peak_bytes)} here"
    )
    bound = f"at least {format_bytes(graph.bound_bytes)} in any order, gap {format_percent(graph.gap)}"
    is_known = graph.bound_bytes > 0 or graph.peak_bytes == 0
    yield _row("", bound if is_known else "no bound over all orders: the plan moves or repeats what it holds")
    arena = f"{format_bytes(graph.arena_bytes)} in one arena"
    yield _row("allocated", f"{format_bytes(graph.allocated_bytes)} at most, {arena}")
    yield _row("held", f"{format_bytes(graph.held_bytes)} that the caller keeps: weights and inputs")
    if graph.limit_bytes is not None:
        yield _row("limit", format_bytes(graph.limit_bytes))
    if graph.loaded_bytes:
        yield _row("loaded", f"{format_bytes(graph.loaded_bytes)} from the host in each call")
    if graph.resident_bytes:
        yield _row("resident", f"{format_bytes(graph.resident_bytes)} of weights stay on the device")
    if graph.saved_bytes or graph.offloaded_bytes:
        offloaded = f"{format_bytes(graph.offloaded_bytes)} offloaded to the host"
        again = f"{format_seconds(graph.recomputed_s)} of recomputation"
        yield _row("for backward", f"{format_bytes(graph.saved_bytes)} saved, {offloaded}, {again}")


def _counted(calls: Mapping[str, int], noun: str) -> str:
    listed = sorted(calls.items(), key=lambda item: (-item[1], item[0]))
    names = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in listed[:_MOST_NAMES])
    more = f", and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return f"{plural(len(calls), noun)} in {plural(sum(calls.values()), 'call')}: {names}{more}" if calls else "none"


def _row(topic: str, text: str) -> str:
    return f"  {topic:<{_WIDTH}}{text}"
