"""A split stage as a PipelineStage of torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from ....errors import OptionError
from .halves import SplitStage

__all__ = ["SplitPipelineStage"]


class SplitPipelineStage(PipelineStage):
    """A PipelineStage of ``module``: a SplitStage, also one to which fully_shard was applied, or one inside of DDP.

    What passes to and from its neighbours is taken from the example that the SplitStage was made with, so that torch
    does not run it to find out; torch does so anyway if another stage has no static metadata. DDP reduces the
    gradients in the last W of a step, or the last B.

    Raises:
        OptionError: ``module`` is none of these; the SplitStage has no example; DDP looks for unused parameters, which
            it does in the graph of a backward that has no weights.
    """

    def __init__(
        self,
        module: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        split = module.module if isinstance(module, DistributedDataParallel) else module
        if not isinstance(split, SplitStage):
            raise OptionError(
                f"stage {stage_index} is a {type(module).__name__}, not a SplitStage",
                hint="split the module, then wrap it: DistributedDataParallel(SplitStage(module, inputs))",
            )
        if isinstance(module, DistributedDataParallel) and module.find_unused_parameters:
            raise OptionError(
                f"stage {stage_index}: DDP looks for unused parameters in a backward that has no weights",
                hint="leave out find_unused_parameters",
            )
        inputs, outputs = split.boundary()
        super().__init__(
            module,
            stage_index,
            num_stages,
            device,
            input_args=inputs,
            output_args=outputs,
            group=group,
            dw_builder=split.dw_builder,
        )

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """W; torch tells DDP only of a last B that it is the last."""
        wrapped: Any = self.submod
        if isinstance(wrapped, DistributedDataParallel) and last_backward:
            wrapped.reducer.prepare_for_backward([])
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
