"""What each rank does in the tests of the torch.compile backend with real ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from opweave import torch_backend
from tests.overlap.rank_programs import MODELS, SIZES, difference, inputs_for

__all__ = ["compiled"]


def compiled(names: Sequence[str]) -> dict[str, Any]:
    """Models compiled with overlap, parts of a given size, against eager mode: differences, and what was cut."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name in names:
        model, x = MODELS[name](), inputs_for(name, rank, ranks)
        twin = copy.deepcopy(model)
        axis = "sequence" if name == "sequence parallel" else "batch"
        options: Any = {"overlap": {"sizes": SIZES[name], "axis": axis}, "machine": "8xh100-nvlink", "cache": False}
        torch_backend.reset()
        run = torch.compile(model, backend="opweave", options=options, fullgraph=True)
        with torch.no_grad():
            found[f"{name} inference"] = difference([run(x)], [twin(x)])
        outputs = [each(x) for each in (run, twin)]
        tangent = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64).reshape(outputs[0].shape)
        for output in outputs:
            output.backward(tangent)
        gradients = [[p.grad for p in each.parameters()] for each in (model, twin)]
        found[f"{name} forward"] = difference(outputs[:1], outputs[1:])
        found[f"{name} backward"] = difference(*gradients)
        found[f"{name} sizes"] = [
            (report.phase, report.tier, report.overlap and report.overlap.sizes)
            for report in torch_backend.backend_reports()
        ]
        torch._dynamo.reset()
    return found
