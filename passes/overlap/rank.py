"""A module as one rank of several runs it: captured, its collectives hidden, and ready to be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...compiler.overlap import OverlapOptions
from ...compiler.rank_model import RankModel
from ...hw_models.model import HardwareModel
from .modules import NOTHING, overlapped

if TYPE_CHECKING:
    import torch

__all__ = ["compiled_rank"]


def compiled_rank(
    module: torch.nn.Module,
    inputs: Sequence[Any],
    named_inputs: Mapping[str, Any],
    machine: HardwareModel,
    wanted: OverlapOptions | None,
) -> RankModel | None:
    """``module(*inputs, **named_inputs)`` on this rank; ``None`` if it talks to nobody.

    Without ``wanted`` nothing is cut and nothing moves; the plan is that of the module as it is.

    Raises:
        ModelError: it cannot be captured.
        Infeasible, OptionError, SplitRefused, MachineError: as ``overlapped``.
    """
    from ...compiler.frontend.dynamo.overlapping import communicates
    from ...compiler.frontend.ranks import captured

    graphs = captured(module, inputs, named_inputs)
    if not communicates(graphs.forward):
        return None
    cut = graphs.inputs if wanted is not None else ()
    done = overlapped(graphs.forward, cut, machine, wanted or OverlapOptions(margin=NOTHING))
    if wanted is None:
        done = done.left_alone("overlap is off")
    own = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return RankModel(
        plan=done.plan,
        captured=graphs,
        overlapped=done,
        weights={name: value for values in own for name, value in values},
        ranks=tuple(
            sorted({r for op in done.plan.graph.ops if op.collective is not None for r in op.collective.ranks})
        ),
        check_ranks=wanted is not None and wanted.check_ranks,
    )
