"""What the benchmarks of the torch.compile backend run: which models, how large, where, by whom, for how long."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

from opweave.errors import OptionError

from .worker import Provider, Spec

if TYPE_CHECKING:
    from .zoo_parts import Size

__all__ = ["EAGER", "INDUCTOR", "OURS", "Case", "Defaults", "Scope", "add_scope", "providers", "scope_of"]

EAGER, INDUCTOR, OURS = "eager", "inductor", "opweave"

PLAIN = (Provider(EAGER), Provider(INDUCTOR, INDUCTOR), Provider(OURS, OURS))
ORDERED = Provider(f"{OURS} T0", OURS, options={"tier": "T0"})
REDUCED = Provider("reduce-overhead", INDUCTOR, mode="reduce-overhead")
TUNED = Provider("max-autotune", INDUCTOR, mode="max-autotune")

#: Cases in the order in which they are measured, those that show most first; all others of the zoo follow.
FIRST = (
    *("inception:train", "gpt2:infer", "resnet50:train", "uneven_experts:infer", "llama:infer", "bert:infer"),
    *("transformer_12:train", "mobilenet_v2:infer", "unet:infer", "resnet50:infer", "vit:infer", "gpt2:train"),
    *("randomly_wired_1:train", "whisper:infer", "t5:infer", "convnext:infer", "swin:infer", "mixtral:infer"),
    *("uneven_experts:train", "inception:infer", "mixtral_grouped:infer"),
)
QUICK = ("uneven_experts:infer",)
ON_CPU = (*QUICK, "transformer_12:train", "inception:train", "resnet50:infer", "gpt2:infer", "mobilenet_v2:infer")


@dataclass(frozen=True)
class Case:
    """One model in inference or training."""

    model: str
    training: bool

    @property
    def name(self) -> str:
        """As the command line names it, and by which rows are told apart."""
        return f"{self.model}:{'train' if self.training else 'infer'}"

    def spec(self, scope: Scope, provider: Provider, *, check: bool = True) -> Spec:
        """The case as ``provider`` runs it."""
        return Spec(self.model, scope.size, scope.device, scope.dtype, self.training, provider, check)


@dataclass(frozen=True)
class Defaults:
    """What is measured unless the command line says otherwise; without ``gpu``, all of the zoo there."""

    gpu: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ON_CPU
    quick: tuple[str, ...] = QUICK
    gpu_jobs: int = 16


@dataclass(frozen=True)
class Scope:
    """What is measured where, and for how long: ``jobs`` processes prepare at a time, for ``patience_s`` at most.

    Nothing is begun with less than ``least_s`` left of ``minutes``.
    """

    cases: tuple[Case, ...]
    device: str
    size: Size
    dtype: str
    minutes: float
    jobs: int
    quick: bool
    samples: int = 9
    sample_s: float = 0.1
    patience_s: float = 150.0
    least_s: float = 20.0

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean more than their shape."""
        return self.device.startswith("cuda")

    @property
    def description(self) -> str:
        """What the figures are of, and what they are good for."""
        text = f"{len(self.cases)} cases, {self.size}, {self.dtype}, on {self.device}, {self.jobs} processes at a time"
        return text if self.on_gpu else f"{text}: small models on a CPU, which show the shape of the results only"


def providers(scope: Scope, *, warm: bool) -> tuple[Provider, ...]:
    """Who runs each case, once with empty caches and once with warm ones."""
    if scope.quick and not scope.on_gpu:
        return PLAIN if not warm else PLAIN[1:]
    if warm:
        return (*PLAIN[1:], ORDERED, TUNED)
    return (*PLAIN, *((REDUCED,) if scope.on_gpu else ()))


def add_scope(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``scope_of`` reads."""
    parser.add_argument("--device", help="such as cuda or cpu (default: the first GPU, or the CPU)")
    parser.add_argument("--size", help="tiny, small or full (default: full on a GPU, tiny on a CPU)")
    parser.add_argument("--dtype", help="of weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--models", nargs="+", help="cases, such as gpt2:infer or resnet50:train, or models for both")
    parser.add_argument("--minutes", type=float, help="begin nothing more after this time")
    parser.add_argument("--jobs", type=int, help="processes that compile at a time")


def scope_of(own: argparse.Namespace, defaults: Defaults, *, quick: bool) -> Scope:
    """The scope that the command line asks for. Raises ``OptionError`` for what is not in the zoo."""
    import torch

    from .zoo_parts import Size

    device = own.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.startswith("cuda")
    size = own.size or ("full" if on_gpu else "tiny")
    if size not in get_args(Size):
        raise OptionError(f"there is no size {size!r}", hint=f"sizes are {', '.join(get_args(Size))}")
    usual = defaults.quick if quick else (defaults.gpu or _of_zoo()) if on_gpu else defaults.cpu
    return Scope(
        cases=tuple(case for name in own.models or usual for case in _cases(name)),
        device=device,
        size=cast(Size, size),
        dtype=own.dtype or ("bfloat16" if on_gpu else "float32"),
        minutes=own.minutes or (1.0 if quick else 8.0 if on_gpu else 30.0),
        jobs=own.jobs or (defaults.gpu_jobs if on_gpu else 1),
        quick=quick,
        samples=5 if quick else 9,
        sample_s=0.1 if on_gpu else 0.05,
        least_s=40.0 if on_gpu else 15.0,
    )


def _cases(name: str) -> tuple[Case, ...]:
    from .zoo import MODELS

    model, _, way = name.partition(":")
    if model not in MODELS or way not in ("", "train", "infer"):
        hint = f"models are {', '.join(MODELS)}, each also followed by :infer or :train"
        raise OptionError(f"there is no case {name!r}", hint=hint)
    ways = [way] if way else ["infer", *(["train"] if MODELS[model].trains else [])]
    return tuple(Case(model, each == "train") for each in ways)


def _of_zoo() -> tuple[str, ...]:
    from .zoo import MODELS

    known = [case.name for model in MODELS for case in _cases(model)]
    return (*(name for name in FIRST if name in known), *(name for name in known if name not in FIRST))
