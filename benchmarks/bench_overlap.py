"""Do our costs and schedules predict what others have measured of compute that overlaps communication?

Nothing is measured here: published times and ratios are put beside what machine models, graphs, overlap problems, list
schedules and the simulator of this project say, so the figures do not depend on the device. Each row says whether ours
is *predicted*, or *fitted* because the published figure, or one of its group, has set a constant; and which constants
were fitted on what. **TokenWeave** (prefill on 8 and 4 H100, three dense and two expert models): the trivial predictor
of an overlapped latency is the measured one without communication, which ours never reads. **Figure 9** (what splitting
a MLP costs; trivial: nothing), **NanoFlow** (kernels; nano-batches alone, and overlapped), **FSMoE** (closed form
beside the simulator on 162 layers; gain over Tutel), **T3** (contention with 8 and 16 compute units), **flux** (torch's
times; its own kernels beside our splits), and **PyTorch pull request 143160**.

``python -m benchmarks.bench_overlap [--quick] [--json FILE] [--fit]``. ``--quick`` leaves out most of TokenWeave;
``--fit`` fits the constants again, and prints them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from .overlap_cases import figure_9, flux, fsmoe, nanoflow, pull_request, t3
from .overlap_comparison import Comparison
from .overlap_tokenweave import FITTED, comparisons, fit
from .runner import Options, Row, print_table, run

__all__ = ["measure", "summary"]

HEAD = ("case", "metric", "published", "ours", "unit", "error", "trivial's", "how", "remark")
QUESTION = "Do our costs and schedules predict what others have measured of compute that overlaps communication?"


def measure(options: Options) -> Iterator[Row]:
    """Compare case by case; prints the table, how large the errors are, and what was fitted on what."""
    if options.own.fit:
        found, error = fit()
        print(f"fitted on Llama-3.3-70B TP8: {found}, mean error {100 * error:.2f} %; in use: {FITTED}")
    groups: tuple[Callable[[], Iterable[Comparison]], ...] = (
        lambda: comparisons(options.quick),
        figure_9,
        nanoflow,
        fsmoe,
        t3,
        flux,
        pull_request,
    )
    kept: list[Comparison] = []
    for group in groups:
        compared = list(group())
        kept += compared
        print_table(HEAD, [_line(each) for each in compared])
        for each in compared:
            yield from each.rows()
    for name, chosen in _groups(kept):
        yield from _report(name, chosen)
    for text in sorted({f"{each.case.partition('/')[0]}: {each.inputs}" for each in kept}):
        print(text)
    print(summary(kept))


def _line(each: Comparison) -> list[str | float | None]:
    unit = " pt" if each.unit == "x" else " %"
    trivial = None if each.trivial_error is None else f"{each.trivial_error:+.1f}{unit}"
    how = "fitted" if each.fitted else "predicted"
    return [
        each.case,
        each.metric,
        each.published,
        each.ours,
        each.unit,
        f"{each.error:+.1f}{unit}",
        trivial,
        how,
        each.remark,
    ]


def _groups(kept: Sequence[Comparison]) -> Iterator[tuple[str, list[Comparison]]]:
    """Speed-ups of TokenWeave: its 21 points on 8 ranks, those that set no constant, and the others."""
    speedups = [each for each in kept if each.case.startswith("tokenweave/") and each.metric == "speed-up"]
    points = [e for e in speedups if "/tp8/" in e.case and "Qwen3" not in e.case]
    long = [each for each in points if _tokens(each) >= 4096]
    groups = {
        f"the {len(points)} points on 8 ranks": points,
        "of these 4096 tokens and more": long,
        "of these 1024 and 2048 tokens": [each for each in points if _tokens(each) < 4096],
        "held out (Qwen2.5, Mixtral)": [each for each in points if not each.fitted],
        "held out, 4096 tokens and more": [each for each in long if not each.fitted],
        "held out, 4 ranks": [each for each in speedups if "/tp4/" in each.case],
        "Qwen3-235B (set the launches)": [each for each in speedups if "Qwen3" in each.case],
    }
    yield from ((name, chosen) for name, chosen in groups.items() if chosen)


def _tokens(each: Comparison) -> int:
    return int(each.case.rpartition("/")[2])


def _report(name: str, chosen: Sequence[Comparison]) -> Iterator[Row]:
    """Mean errors of a group and how often the sign is right: a gain predicted for a gain, a loss for a loss."""
    ours, trivial = _mean(chosen), _mean(chosen, trivial=True)
    signs = sum((each.ours > 1) == (each.published > 1) for each in chosen)
    trivial_signs = sum(((each.trivial or 1.0) > 1) == (each.published > 1) for each in chosen)
    text = f"mean error {ours:.1f} points (communication is free: {trivial:.1f})"
    print(f"{name}: {text}; sign right in {signs} of {len(chosen)} ({trivial_signs})")
    yield Row(f"tokenweave, {name}", "opweave", "mean speed-up error", round(ours, 3), "points")
    yield Row(f"tokenweave, {name}", "trivial", "mean speed-up error", round(trivial, 3), "points")
    yield Row(f"tokenweave, {name}", "opweave", "signs right", signs, "points", len(chosen))
    yield Row(f"tokenweave, {name}", "trivial", "signs right", trivial_signs, "points", len(chosen))


def _mean(chosen: Sequence[Comparison], *, trivial: bool = False) -> float:
    errors = [each.trivial_error if trivial else each.error for each in chosen]
    return sum(abs(error) for error in errors if error is not None) / len(errors)


def summary(kept: Sequence[Comparison]) -> str:
    """One line: TokenWeave's points against the trivial predictor, and the share of other figures that are near."""
    found = dict(_groups(kept))
    text = f"bench_overlap: {len(kept)} published figures"
    for name in list(found)[:2]:
        ours, trivial = _mean(found[name]), _mean(found[name], trivial=True)
        text += f"; {name}: {ours:.1f} points off, communication is free {trivial:.1f}"
    expert = [e for name in list(found)[:1] for e in found[name] if "Mixtral" in e.case and _tokens(e) < 4096]
    right = sum((each.ours > 1) == (each.published > 1) for each in expert)
    text += f"; sign right at {right} of {len(expert)} of Mixtral's short prompts"
    others = [each for each in kept if not each.fitted]
    near = sum(abs(each.error) <= 10 for each in others)
    return f"{text}; {near} of {len(others)} predictions within 10 % or points"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fit", action="store_true", help="fit the constants on Llama-70B again (minutes), and print them"
    )


if __name__ == "__main__":
    sys.exit(run("bench_overlap", QUESTION, measure, add_arguments=_add_arguments))
