"""Where kernels and passes meet: which fused kernels take which operators of a graph."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .compiler.fusion import Called, Match
from .compiler.graph import Graph
from .compiler.pipeline import Budget
from .errors import ModelError, OptionError
from .hw_models.model import HardwareModel

if TYPE_CHECKING:
    from .passes.fusion.choice import Choice

__all__ = ["KERNELS", "as_planned", "checked", "called", "choose", "rules"]

#: What an option ``kernels`` takes, in words.
KERNELS = "'auto', 'all', 'off', or names of kernels with commas between them"


def checked(kernels: str) -> str:
    """The option ``kernels``, which names what there is.

    Raises:
        OptionError: there is no kernel of a name, or no Triton to make any.
    """
    from .kernels import registry

    if kernels in ("auto", "off"):
        return kernels
    if importlib.util.find_spec("triton") is None:
        raise OptionError(f"kernels is {kernels!r}, and there is no triton here", hint="kernels='off' needs none")
    unknown = set() if kernels == "all" else {name.strip() for name in kernels.split(",")} - set(registry.names())
    if unknown:
        raise OptionError(
            f"kernels is {kernels!r}; there is no {' or '.join(map(repr, sorted(unknown)))}; it takes {KERNELS}",
            hint=f"the kernels are {', '.join(registry.names())}",
        )
    return kernels


def rules(kernels: str, *, differentiable: bool = False) -> Callable[[Graph], Sequence[Match]]:
    """All matches, in a graph, of the kernels that ``kernels`` allows, of those with gradients if they have to be
    ``differentiable``. A broken one of another package is left out, with a warning, unless it was asked for by name.
    """
    from .kernels import registry

    if kernels == "off" or importlib.util.find_spec("triton") is None:
        return lambda graph: ()
    named = kernels not in ("auto", "all")
    loaded = []
    for name in [name.strip() for name in kernels.split(",")] if named else registry.names():
        try:
            loaded.append(registry.load(name))
        except OptionError as error:
            if named:
                raise
            warnings.warn(f"kernel {name!r} is left out: {error.message}", stacklevel=2)
    allowed = [kernel for kernel in loaded if kernel.is_differentiable or not differentiable]
    return lambda graph: [match for kernel in allowed for match in kernel.matches(graph)]


def choose(
    graph: Graph,
    matches: Sequence[Match],
    kernels: str,
    machine: HardwareModel,
    budget: Budget,
    *,
    others_fuse: bool,
) -> Choice:
    """The matches to launch: under ``"auto"`` those predicted to gain on ``machine``, else all that go together."""
    from .passes.fusion.choice import choose_matches

    return choose_matches(graph, matches, machine, budget, others_fuse=others_fuse, required=kernels != "auto")


def called(name: str) -> Called | None:
    """How the kernel of that name is called; ``None`` where there is none."""
    from .kernels import registry

    if name not in registry.names():
        return None
    kernel = registry.load(name)
    return Called(kernel.name, kernel.inputs, kernel.written, kernel.results, kernel.allocate)


def as_planned(graph: Graph, planned: Graph) -> Graph:
    """``graph`` with the launches that ``planned`` has, where the same match makes them.

    Raises:
        OptionError: ``planned`` launches a kernel that is not here.
    """
    from .compiler.fusion import fused
    from .kernels import registry

    wanted = {op.name: op for op in planned.ops if op.target.startswith("opweave.")}
    names = {op.target.split(".")[1] for op in wanted.values()} & set(registry.names())
    if not names:
        return graph
    found = []
    for match in rules(",".join(sorted(names)))(graph):
        try:
            launched = fused(graph, [match])
        except ModelError:
            continue
        made = next(op for op in launched.ops if op.outputs == tuple(t.name for t in match.outputs))
        if wanted.get(made.name) == made:
            found.append(match)
    unique = list({match.outputs: match for match in found}.values())
    return fused(graph, unique) if unique else graph
