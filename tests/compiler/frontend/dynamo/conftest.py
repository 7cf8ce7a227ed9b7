"""Every program runs in poisoned, guarded memory, and every test starts from a compiler that knows nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opweave import torch_backend
from opweave.compiler.frontend.dynamo import planned
from tests.compiler.frontend.dynamo.poisoned import PoisonedExecutor, PoisonedPool


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[PoisonedPool]:
    """The pool that arenas come from; the test fails if anything beside them was written."""
    pool = PoisonedPool()
    monkeypatch.setattr(PoisonedExecutor, "shared", pool, raising=False)
    monkeypatch.setattr(planned, "Executor", PoisonedExecutor)
    torch._dynamo.reset()
    torch_backend.reset()
    torch.manual_seed(0)
    yield pool
    torch._dynamo.reset()
    assert pool.faults == []
