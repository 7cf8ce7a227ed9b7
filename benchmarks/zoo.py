"""The models that the torch.compile backend is measured and checked on, from configurations, with random weights.

``MODELS[name].build(size)`` makes one, ``.inputs(size)`` its arguments, ``.loss(outputs)`` the scalar of a training
step: ``benchmarks.numerics.result(model, inputs, entry.loss)`` runs one. Every model takes its inputs by position and
returns a flat tuple of tensors. Three sizes:

* ``tiny``: every structure of the architecture, one or two layers of it, far below a second on a CPU;
* ``small``: a few seconds on a CPU;
* ``full``: the published configuration, for a GPU. Mixtral keeps the published widths and 4 of its 32 layers, because
  all of them do not fit one device.

Dropout and dropped paths are off unless asked for: random numbers differ between eager and compiled code (but for
``torch._inductor.config.fallback_random``), so with them two runs cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Self, get_args

import torch
from torch import Tensor, nn

from opweave.errors import OptionError

from .branchy import Inception, RandomlyWired, Transformer, UnevenExperts, wiring
from .numerics import seeded
from .zoo_configurations import DIFFUSERS, TRANSFORMERS
from .zoo_parts import Family, Input, Pretrained, Size

__all__ = ["MODELS", "Family", "Outputs", "Size", "ZooModel"]

Make = Callable[[Size, torch.dtype, bool], nn.Module]


class Outputs(nn.Module):
    """``model`` called by position, its outputs as a flat tuple of tensors.

    ``arguments`` names the model's parameters in the order of the inputs, ``fields`` the outputs kept of the structure
    it returns; without fields the model returns one tensor.
    """

    def __init__(self, model: nn.Module, arguments: tuple[str, ...], fields: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.fields = fields

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs kept, in the order of ``fields``."""
        returned = self.model(**dict(zip(self.arguments, inputs, strict=True)))
        return tuple(getattr(returned, field) for field in self.fields) if self.fields else (returned,)

    def double(self) -> Self:
        """The model in float64, for which torch has no grouped matrix product: experts are computed one by one."""
        configuration = getattr(self.model, "config", None)
        if getattr(configuration, "_experts_implementation", None) == "grouped_mm":
            self.model.set_experts_implementation("eager")  # type: ignore[operator]  # a Module's attributes are Any
        return super().double()


@dataclass(frozen=True)
class ZooModel:
    """One architecture in three sizes; ``trains``: a training step makes sense; ``note``: what is special.

    ``kinks`` is for ``benchmarks.numerics.compare``: activations are clipped or chosen, so gradients jump.
    """

    name: str
    family: Family
    make: Make
    arguments: Mapping[Size, tuple[Input, ...]]
    objective: Callable[[Tensor], Tensor]
    fields: tuple[str, ...] = ()
    trains: bool = True
    kinks: bool = False
    requires: str = ""
    note: str = ""

    def build(
        self,
        size: Size = "tiny",
        *,
        train: bool = False,
        dropout: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """The model on ``device`` in ``dtype``, in eval or train mode, with weights drawn from ``seed``.

        The weights are drawn on ``device``, so they differ between kinds of device; running statistics are those of
        the first inputs. torch's generators are left as they were. ``dropout`` leaves the published rates on.
        Raises ``OptionError`` for another size, and when the package that defines the model is not installed.
        """
        place = torch.device(device)
        _known(self, size)
        with seeded(seed, [place]), place:
            made = self.make(size, dtype, dropout)
        model = Outputs(made, tuple(each.name for each in self.arguments[size]), self.fields)
        _settle(model, self.inputs(size, device=device, dtype=dtype))
        return model.train(train)

    def inputs(
        self,
        size: Size = "tiny",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Tensor, ...]:
        """Arguments for ``build(size)``, by position; the same values on every device; ``dtype`` is that of floats."""
        _known(self, size)
        generator = torch.Generator().manual_seed(seed)
        return tuple(each.draw(generator, dtype).to(device) for each in self.arguments[size])

    def loss(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """The float32 scalar whose gradients a training step takes: a function of the first output only."""
        return self.objective(outputs[0])


def cross_entropy(logits: Tensor) -> Tensor:
    """Mean cross entropy of float [..., classes] against classes counted through: 0, 1, 2, ... by row."""
    rows = logits.float().flatten(0, -2)
    targets = torch.arange(rows.shape[0], device=rows.device) % rows.shape[1]
    return nn.functional.cross_entropy(rows, targets)


def squared_error(values: Tensor) -> Tensor:
    """Mean squared distance from a wave along the elements, in float32.

    Not from zero: the mean square of what a normalisation returns is constant, and its gradients only rounding.
    """
    flat = values.float().flatten()
    return (flat - torch.arange(flat.shape[0], device=flat.device).cos()).square().mean()


def _settle(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give batch normalisations the running statistics of ``inputs``.

    With the initial ones (zero and one) a random MobileNetV2 in eval mode returns values about 1e-26.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _known(entry: ZooModel, size: str) -> None:
    if size not in entry.arguments:
        sizes = ", ".join(get_args(Size))
        raise OptionError(f"{entry.name} has no size {size!r}", hint=f"sizes are {sizes}")


def _pretrained(entry: Pretrained) -> ZooModel:
    """An architecture of transformers or diffusers, made from its configuration."""
    return ZooModel(
        entry.name,
        entry.family,
        entry.make,
        {size: case.inputs for size, case in entry.cases.items()},
        squared_error if entry.regression else cross_entropy,
        entry.fields,
        kinks=entry.kinks,
        requires=entry.package,
        note=entry.note,
    )


def _own(
    name: str,
    family: Family,
    cases: Mapping[Size, tuple[Callable[[], nn.Module], Input]],
    *,
    objective: Callable[[Tensor], Tensor] = squared_error,
    kinks: bool = False,
    note: str = "",
) -> ZooModel:
    """A network of ``benchmarks.branchy``; none of them has dropout."""

    def make(size: Size, dtype: torch.dtype, dropout: bool) -> nn.Module:
        return cases[size][0]().to(dtype)

    arguments = {size: (case[1],) for size, case in cases.items()}
    return ZooModel(name, family, make, arguments, objective, kinks=kinks, note=note)


def _randomly_wired(seed: int) -> ZooModel:
    cases: dict[Size, tuple[Callable[[], nn.Module], Input]] = {}
    wanted: tuple[tuple[Size, int, int, int, int], ...] = (
        ("tiny", 13, 1, 2, 16),
        ("small", 32, 1, 4, 32),
        ("full", 32, 4, 32, 56),
    )
    for size, nodes, scale, batch, side in wanted:
        channels = scale * wiring(nodes, seed)[1][0]
        make = partial(RandomlyWired, nodes, seed, scale)
        cases[size] = (make, Input.values("image", (batch, channels, side, side)))
    excess = {0: 10, 1: 23, 3: 9}[seed]
    note = f"tiny, in inference: Inductor's order is {excess} % above the optimum of its own estimate"
    return _own(f"randomly_wired_{seed}", "branchy", cases, kinks=True, note=note)


def _registry() -> Mapping[str, ZooModel]:
    own = (
        _own(
            "uneven_experts",
            "branchy",
            {
                "tiny": (lambda: UnevenExperts(128), Input.values("tokens", (256, 128))),
                "small": (lambda: UnevenExperts(256), Input.values("tokens", (1024, 256))),
                "full": (lambda: UnevenExperts(1024), Input.values("tokens", (8192, 1024))),
            },
            note="tiny, in inference: Inductor's order is 42 % above the optimum of its own estimate",
        ),
        _own(
            "inception",
            "branchy",
            {
                "tiny": (Inception, Input.values("image", (2, 192, 28, 28))),
                "small": (Inception, Input.values("image", (8, 192, 28, 28))),
                "full": (Inception, Input.values("image", (128, 192, 28, 28))),
            },
            kinks=True,
            note="tiny, in inference: Inductor's order is 8 % above the optimum of its own estimate",
        ),
        *(_randomly_wired(seed) for seed in (0, 1, 3)),
        _own(
            "transformer_12",
            "transformer",
            {
                "tiny": (lambda: Transformer(2, 64, 4, 128), Input.tokens("tokens", (2, 16), 128)),
                "small": (lambda: Transformer(12, 256, 4, 1024), Input.tokens("tokens", (2, 128), 1024)),
                "full": (lambda: Transformer(12, 2048, 16, 32000), Input.tokens("tokens", (4, 2048), 32000)),
            },
            objective=cross_entropy,
            note="twelve layers (two in tiny); a chain, so its order has no slack",
        ),
    )
    entries = [*(_pretrained(each) for each in (*TRANSFORMERS, *DIFFUSERS)), *own]
    return MappingProxyType({entry.name: entry for entry in entries})


#: Every model by name.
MODELS = _registry()
