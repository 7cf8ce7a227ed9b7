"""A process that trains a network and prints, as JSON, what the backend had to do: for ``test_contract_cache``."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from opweave import torch_backend
from opweave.compiler.frontend.dynamo import backend


def step(**options: Any) -> list[torch.Tensor]:
    """The result and the gradients of a training step."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    function = torch.compile(module, backend="opweave", options=options)
    y = function(torch.linspace(-1, 1, 20).reshape(5, 4))
    y.pow(2).sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def main() -> None:
    """Count what is lowered and planned."""
    done = {"lowered": 0, "planned": 0}
    namespace: Any = backend
    originals: dict[str, Any] = {"lowered": namespace.lower, "planned": torch_backend._plan}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return originals[name](*args, **kwargs)

        return call

    namespace.lower = counting("lowered")
    torch_backend._plan = counting("planned")
    values = [value.tolist() for value in step()]
    from_cache = [report.from_cache for report in torch_backend.backend_reports()]
    print(json.dumps({**done, "from_cache": from_cache, "values": values}))  # noqa: T201 # what it is for


if __name__ == "__main__":
    main()
