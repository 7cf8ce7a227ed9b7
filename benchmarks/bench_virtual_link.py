"""How much of the communication does a cut hide on a clock, and does the simulator foresee it?

Llama-like tensor-parallel layers run as one of eight virtual ranks (``compiler/runtime/virtual_link.py``): collectives
take the time of a link and no compute. The link is as fast as makes it busy for a given share of the time that the
module computes. Three ways are timed in turns: as given, cut in two without overlap (the control: smaller operators
alone may be faster on a processor), and cut with overlap; by our executor, call by call, and by Inductor's code, there
also in an order that is not frozen. Predictions are the simulator's, for two rates that are fitted to the module as
given on a link that takes no time; everything about cuts, orders and the link is predicted.

``python -m benchmarks.bench_virtual_link [--quick] [--json FILE]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from opweave.compiler.runtime.virtual_link import VirtualLink, virtual_link
from opweave.errors import ExecutionError

from .parallel_models import DenseTensorParallel, Sizes
from .runner import Options, Row, print_table, run
from .virtual_ways import CONTROL, Rates, Run, Ways, timed_in_turns

RANKS = 8
ALPHA_S = 2e-4
SIZES = Sizes("four layers of 512", hidden=512, intermediate=4096, heads=8, key_heads=8, layers=4)
GIVEN, HIDDEN, LOOSE = "as given", "split and overlap", "split and overlap, not frozen"
TURNS = {True: 3, False: 7}
CALLS = {True: 2, False: 5}


@dataclass(frozen=True)
class Case:
    """``tokens`` in two sequences, and the time the link is busy as a share of the time that the module computes."""

    tokens: int
    share: float

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.tokens} tokens, link {self.share:.0%}"


CASES = {
    True: (Case(512, 0.4),),
    False: tuple(Case(tokens, share) for tokens in (1024, 2048) for share in (0.1, 0.3, 0.6)),
}


def measure(options: Options) -> Iterator[Row]:
    """Time every case; prints the table."""
    from torch._inductor.decomposition import select_decomp_table

    torch.set_num_threads(1)
    lines: list[list[str | float | None]] = []
    over_control: list[float] = []
    tokens = dict.fromkeys(case.tokens for case in CASES[options.quick])
    for count in tokens:
        with virtual_link(RANKS, 0.0, 1e18, values=False) as link, torch.no_grad():
            torch.manual_seed(0)
            model = DenseTensorParallel(SIZES, dtype=torch.float32)
            x = torch.randn(2, count // 2, SIZES.hidden)
            makers = {
                "executor": Ways(model, x, (1, 1), None),
                "Inductor": Ways(model, x, (1, 1), select_decomp_table()),
            }
            for runner, ways in makers.items():
                rates = ways.rates(TURNS[options.quick] * 2)
                link.reset()
                ways.given()
                moved = sum(transfer.nbytes for transfer in link.transfers), len(link.transfers)
                computing = median(timed_in_turns({GIVEN: ways.given}, 3, CALLS[options.quick], link.reset)[GIVEN])
                for case in (case for case in CASES[options.quick] if case.tokens == count):
                    found = _Measured(case, runner, ways, rates, link, computing, moved, options.quick)
                    yield from found.rows()
                    lines += found.lines()
                    over_control.append(found.medians[CONTROL] / found.medians[HIDDEN])
    head = (
        "case",
        "runs",
        "way",
        "ms",
        "fastest",
        "slowest",
        "foreseen ms",
        "x given",
        "foreseen",
        "x control",
        "waits",
    )
    print_table(head, lines)
    print(
        f"bench_virtual_link: against the cut without overlap, overlap is {median(over_control):.2f} times as fast "
        f"(median of {len(over_control)}; {min(over_control):.2f} to {max(over_control):.2f})"
    )


class _Measured:
    """One case by one runner: all ways, timed in turns, and what was foreseen."""

    def __init__(
        self,
        case: Case,
        runner: str,
        ways: Ways,
        rates: Rates,
        link: VirtualLink,
        computing_s: float,
        moved: tuple[int, int],
        quick: bool,
    ) -> None:
        nbytes, count = moved
        bandwidth = nbytes / max(case.share * computing_s - count * ALPHA_S, 0.1 * case.share * computing_s)
        machine = rates.machine(RANKS, ALPHA_S, bandwidth)
        runs: dict[str, Run] = {GIVEN: ways.given, CONTROL: ways.control, HIDDEN: ways.hidden(machine)}
        self.predicted = dict(zip((GIVEN, CONTROL, HIDDEN), ways.predicted(machine), strict=True))
        if ways.is_compiled:
            runs[LOOSE] = ways.hidden(machine, freezes=False)
        _agree(runs, link)
        link.alpha_s, link.bandwidth_bytes_per_s = ALPHA_S, bandwidth
        self.case, self.runner, self.rates, self.machine = case, runner, rates, machine
        self.waited = {name: _waited(each, link) for name, each in runs.items()}
        self.seconds = timed_in_turns(runs, TURNS[quick], CALLS[quick], link.reset)
        link.reset()
        link.alpha_s, link.bandwidth_bytes_per_s = 0.0, 1e18

    @property
    def medians(self) -> Mapping[str, float]:
        """Of all turns, by way."""
        return {name: median(times) for name, times in self.seconds.items()}

    def rows(self) -> Iterator[Row]:
        """Figures of each way."""
        where = f"{self.case.name}, {self.runner}"
        yield Row(where, "host", "flops_per_s", self.rates.flops_per_s, "1/s", note="fitted")
        yield Row(where, "host", "bytes_per_s", self.rates.bytes_per_s, "B/s", note="fitted")
        yield Row(where, "link", "bandwidth", self.machine.links[0].bandwidth_bytes_per_s, "B/s", note="chosen")
        for name, times in self.seconds.items():
            spread = f"{len(times)} turns, {min(times):.6f} to {max(times):.6f} s"
            yield Row(where, name, "seconds", median(times), "s", note=spread)
            yield Row(where, name, "waited", self.waited[name], "s", note="of one call")
            if name in self.predicted:
                yield Row(where, name, "predicted", self.predicted[name], "s", note="simulated at the fitted rates")

    def lines(self) -> list[list[str | float | None]]:
        """Figures of each way, for the table."""
        found: list[list[str | float | None]] = []
        for name, seconds in self.medians.items():
            foreseen = self.predicted.get(name)
            times = [round(1e3 * t, 1) for t in (seconds, min(self.seconds[name]), max(self.seconds[name]))]
            ratio = self.medians[GIVEN] / seconds
            predicted = None if foreseen is None else round(self.predicted[GIVEN] / foreseen, 2)
            control = self.medians[CONTROL] / seconds
            shown = None if foreseen is None else round(1e3 * foreseen, 1)
            waited = round(1e3 * self.waited[name], 1)
            found.append([self.case.name, self.runner, name, *times, shown, ratio, predicted, control, waited])
        return found


def _agree(runs: Mapping[str, Run], link: VirtualLink) -> None:
    """All ways compute the same, with real sums. Raises ExecutionError."""
    link.values = True
    expected = runs[GIVEN]()[0]
    for name, each in runs.items():
        if not torch.allclose(each()[0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ExecutionError(f"{name!r} computes something else than the module as given")
    link.values = False


def _waited(each: Run, link: VirtualLink) -> float:
    link.reset()
    each()
    return link.waited_s


if __name__ == "__main__":
    sys.exit(run("bench_virtual_link", "How much of the communication does a cut hide on a clock?", measure))
