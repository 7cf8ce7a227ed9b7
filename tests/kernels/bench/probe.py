"""A kernel that computes on a CPU and takes as much time as it says, and the clock it says it to."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from opweave.kernels._configs import Config, Configs
from opweave.kernels._kernel import Kernel, Workload, normal
from opweave.kernels._match import Cost
from opweave.kernels.bench.problem import Problem
from opweave.kernels.bench.providers import OURS, Prepared, Provider, providers_of
from opweave.kernels.bench.roofline import Roofline

__all__ = ["CLOCK", "MEASURED", "PROBE", "STATED", "ProbeClock", "probe_providers"]

STATED = Roofline("data sheet", 4e9, {"default": 1e9, "bfloat16": 8e9})
MEASURED = Roofline("measured", 2e9, {"default": 5e8, "bfloat16": 4e9})


class ProbeClock:
    """Time goes on only when somebody says so."""

    device = torch.device("cpu")
    name = "a probe"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.faster: Callable[[Config], float] = lambda config: 1.0
        self.wrong: Callable[[Config], bool] = lambda config: False

    def now(self) -> float:
        return self.seconds

    def tick(self, ms: float) -> None:
        self.seconds += ms / 1e3

    def captured(self, step: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        return step, ""

    def milliseconds(self, step: Callable[[], Any], ms: float) -> list[float]:
        begin = self.seconds
        step()
        return [1e3 * (self.seconds - begin)]

    def peak_bytes(self, step: Callable[[], Any]) -> int:
        return sum(tensor.nbytes for tensor in step() if tensor is not None)

    def finish(self) -> None: ...

    def forget(self) -> None: ...

    def measured(self) -> Roofline:
        return MEASURED


CLOCK = ProbeClock()
CONFIGS = Configs(
    "bench_probe",
    MappingProxyType({90: (Config({"block": 32}, 2, 2, {"rows": 64}), Config({"block": 64}, 4, 1))}),
    "one",
)


def launch(x: torch.Tensor, y: torch.Tensor, factor: float, *, out: torch.Tensor, config: Config | None = None) -> None:
    """Write ``x * factor + y``."""
    config = config or CONFIGS.choose(x.device, x.dtype, rows=x.shape[0])
    CLOCK.tick(2.0 * CLOCK.faster(config))
    if config.num_warps > 8:
        raise RuntimeError("out of resources")
    out.copy_(x * factor + y + (1 if CLOCK.wrong(config) else 0))


def allocate(x: torch.Tensor, y: torch.Tensor, factor: float) -> tuple[torch.Tensor]:
    return (torch.empty_like(x),)


def reference(x: torch.Tensor, y: torch.Tensor, factor: float) -> tuple[torch.Tensor]:
    return (x * factor + y,)


def eager(x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    CLOCK.tick(6.0)
    return x * factor + y


def cost(dtype: str, rows: int) -> Cost:
    return Cost(2 * rows * 8, 3 * rows * 8 * 4)


def arguments(dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, rows: int) -> dict[str, Any]:
    random = normal(device, seed)
    return {"x": random(rows, 8).to(dtype), "y": random(rows, 8).to(dtype), "factor": 0.5}


PROBE = Kernel(
    name="bench_probe",
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=lambda graph: (),
    arguments=arguments,
    workloads=(Workload("small", {"rows": 16}), Workload("large, of a model", {"rows": 1000})),
    dtypes=(torch.float32, torch.bfloat16),
    configs=CONFIGS,
)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.factor = inputs[2]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return gradient * ctx.factor, gradient, None


PROBE.operator.register_autograd(_backward, setup_context=_setup)


def probe_providers(kernel: str) -> tuple[Provider, ...]:
    """Ours and eager, one that is not installed, one of each later tier, one that fails and one that is wrong."""
    ours, plain = providers_of(kernel)[:2]
    assert (ours.name, plain.name) == (OURS, "eager")

    def fails(problem: Problem) -> Prepared:
        raise NotImplementedError("no such thing\nand more")

    def wrong(problem: Problem) -> Prepared:
        given = problem.given()
        return Prepared(lambda: [given[0] * 0], lambda: CLOCK.tick(1.0))

    def slow(problem: Problem) -> Prepared:
        CLOCK.tick(10_000.0)
        return plain.prepare(problem)

    return (
        *(ours, plain),
        Provider("missing", 0, fails, "not installed"),
        Provider("failing", 0, fails),
        Provider("wrong", 0, wrong),
        Provider("compiler", 1, slow),
        Provider("searching compiler", 2, slow),
    )
