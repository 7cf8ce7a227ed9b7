"""Finds the fastest configuration of a kernel on the device it runs on, among its rows and what is near them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton

from ...errors import OptionError
from .._checks import dtype_name
from .._configs import Config, Configs, architecture_of
from ..tuning import TunedResult, bucket
from .choices import noted
from .measuring import Clock, quantiles
from .problem import TOLERANCE, Case, Problem, error_of
from .rows import Row

__all__ = ["Tuning", "candidates", "tune"]

MOST_WARPS = 16
MOST_STAGES = 6
TRIAL_MS = 10.0
FINAL_MS = 50.0
FINALISTS = 3


@dataclass
class Tuning:
    """What was found: the best configuration, ``None`` if there is none to store, and times of all that ran."""

    best: TunedResult | None = None
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def candidates(configs: Configs, architecture: int, sizes: Mapping[str, int]) -> list[Config]:
    """Rows that hold for all sizes in the bucket, each as it is, then with half and twice the warps and a stage less
    and more. Without repeats; rows come first.
    """
    largest = bucket(sizes)
    rows = [row for row in configs.of_architecture(architecture) if row.holds_for(largest)]
    near = [
        replace(row, num_warps=warps, num_stages=stages)
        for row in rows
        for warps in (row.num_warps, row.num_warps // 2, row.num_warps * 2)
        for stages in (row.num_stages, row.num_stages - 1, row.num_stages + 1)
        if 1 <= warps <= MOST_WARPS and 1 <= stages <= MOST_STAGES
    ]
    return list({str(config.options): replace(config, up_to={}) for config in (*rows, *near)}.values())


def tune(case: Case, clock: Clock, seconds: float) -> Tuning:
    """Time every candidate whose results are right, the best few again, and keep the fastest.

    Candidates that do not compile, need more than the device has or compute something else are passed over; those for
    which no time is left are counted in ``left_out``. The row that would have been taken is always timed.
    """
    found = Tuning()
    until = clock.now() + seconds
    problem = Problem(case, clock.device)
    kernel = case.kernel
    given = problem.given()
    outputs = dict(zip(kernel.written, kernel.allocate(*given), strict=True))
    with noted() as seen:
        kernel.launch(*given, **outputs)
    chosen = next((choice for choice in seen if choice.configs is kernel.configs), None)
    if chosen is None or chosen.dtype is None:
        raise OptionError(f"kernel {kernel.name} chooses no configuration by dtype and sizes; nothing can be stored")
    truths, _ = problem.truth()
    everything = candidates(chosen.configs, architecture_of(clock.device), chosen.sizes)
    default = replace(chosen.config, up_to={})
    order = [default, *(config for config in everything if config.options != default.options)]
    times: list[tuple[float, Config]] = []
    for number, config in enumerate(order):
        if number and clock.now() > until:
            found.left_out.append(f"{len(order) - number} of {len(order)} configurations")
            break
        ms, why = _trial(problem, config, truths, clock, TRIAL_MS)
        found.rows.append(Row(case.name, _said(config), "time", ms, "ms", note=why))
        if ms is not None:
            times.append((ms, config))
    finalists = {str(config.options): config for _, config in sorted(times, key=lambda item: item[0])[:FINALISTS]}
    if not any(config is default for _, config in times):
        found.left_out.append("everything: the default configuration does not run right")
        return found
    finalists.setdefault(str(default.options), default)
    final: dict[str, float] = {}
    for key, config in finalists.items():
        ms, _ = _trial(problem, config, truths, clock, FINAL_MS)
        if ms is not None:
            final[key] = ms
    if str(default.options) not in final:
        return found
    best = min(final, key=lambda key: final[key])
    winner = finalists[best]
    found.best = TunedResult(
        chosen.configs.kernel,  # whose rows they are: another kernel may launch by them
        chosen.configs.fingerprint,
        clock.name,
        dtype_name(chosen.dtype),
        triton.__version__,
        bucket(chosen.sizes),
        dict(winner.constants),
        winner.num_warps,
        winner.num_stages,
        final[best],
        final[str(default.options)],
    )
    return found


def _trial(
    problem: Problem, config: Config, truths: list[torch.Tensor], clock: Clock, ms: float
) -> tuple[float | None, str]:
    """The median time of a launch, after its results were compared; or why there is none."""
    kernel = problem.kernel
    try:
        given = problem.given()
        outputs = dict(zip(kernel.written, kernel.allocate(*given), strict=True))
        kernel.launch(*given, **outputs, config=config)
        clock.finish()
        everything: dict[str, Any] = {**dict(zip(kernel.inputs, given, strict=True)), **outputs}
        error = error_of([everything[name] for name in kernel.results], truths)
        if not error <= TOLERANCE.get(problem.case.dtype, 0.0):
            return None, f"wrong by {error:.1e} of the largest"
        step, _ = clock.captured(lambda: kernel.launch(*given, **outputs, config=config))
        return quantiles(clock.milliseconds(step, ms)).p50, ""
    except Exception as met:  # whatever a compiler says of a configuration is that it cannot be taken
        return None, f"{type(met).__name__}: {str(met).strip().splitlines()[0][:100] if str(met).strip() else ''}"


def _said(config: Config) -> str:
    constants = " ".join(f"{name}={value}" for name, value in config.constants.items())
    return f"{constants} num_warps={config.num_warps} num_stages={config.num_stages}"
