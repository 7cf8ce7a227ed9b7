"""The memory that programs share: freed when outgrown, whole after an error, apart for each thread."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from opweave.compiler.frontend.dynamo import planned
from opweave.compiler.runtime.device.arena import ArenaPool
from opweave.compiler.runtime.device.executor import POOL, Executor
from tests.compiler.frontend.dynamo.contract import compiled, reports, same, tiers
from tests.compiler.frontend.dynamo.poisoned import POISON, PoisonedPool

CPU = torch.device("cpu")


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ArenaPool:
    """The pool of the process, not the poisoned one."""
    monkeypatch.setattr(planned, "Executor", Executor)
    return POOL


def test_a_block_that_is_outgrown_is_freed() -> None:
    """Even while host code is bound to it."""
    pool = ArenaPool()
    with pool.lend(1000, CPU) as small:
        assert small.data_ptr() % 512 == 0
    with pool.lend(500, CPU) as again:
        assert again is small
    with pool.lend(2000, CPU) as large:
        assert small.untyped_storage().nbytes() == 0
        assert pool.allocated_bytes == 2000
        with pool.lend(3000, CPU) as second:
            assert pool.allocated_bytes == 5000
    assert pool.allocated_bytes == 3000
    assert large.untyped_storage().nbytes() == 0
    pool.clear()
    assert pool.allocated_bytes == second.untyped_storage().nbytes() == 0


def test_blocks_made_in_inference_mode_serve_other_modes() -> None:
    pool = ArenaPool()
    with torch.inference_mode(), pool.lend(8, CPU) as block:
        pass
    block.fill_(1)
    assert not block.is_inference()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Has temporaries that lie in the arena: two at a time, and no result is as large."""
    y = (x.t() @ x).sin()
    return ((y @ y).cos() @ y).sum(1)


def test_programs_share_one_block(shared: ArenaPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size of the largest; each runs again after another has made it grow, and after it was given back."""
    wanted: list[int] = []

    def executor(*args: Any, **kwargs: Any) -> Executor:
        made = Executor(*args, **kwargs)
        wanted.append(made.arena_bytes)
        return made

    monkeypatch.setattr(planned, "Executor", executor)
    function = compiled(_wide, dynamic=True)
    sizes = (8, 32, 16, 64, 8)
    for size in sizes:
        x = torch.linspace(-1, 1, 2 * size).reshape(2, size)
        same(function(x), _wide(x), 1e-4)
    held = shared.allocated_bytes
    assert 64 * 64 * 4 <= held == max(wanted) < sum(wanted)
    shared.clear()
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    same(function(x), _wide(x), 1e-4)
    assert 0 < shared.allocated_bytes < held
    assert tiers() == {"T1"}


def test_threads(shared: ArenaPool) -> None:
    """Calls at the same time have arenas of their own."""
    function = compiled(_wide)
    xs = [torch.linspace(-1, 1, 64).reshape(2, 32) * (k + 1) for k in range(2)]
    expected = [_wide(x) for x in xs]
    function(xs[0])  # compile once
    wrong: list[str] = []
    together = threading.Barrier(2)

    def work(k: int) -> None:
        together.wait()
        for _ in range(200):
            try:
                same(function(xs[k]), expected[k], 1e-4)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.library.custom_op("opweave_contract::refuse", mutates_args=())
def refuse(x: torch.Tensor) -> torch.Tensor:
    if float(x.flatten()[0]) < 0:
        raise ValueError("refused")
    return x * 2


@refuse.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_error_within_a_call(poisoned: PoisonedPool) -> None:
    """Reaches the caller as it is; the next call gives right results."""
    function = compiled(lambda x: refuse((x.t() @ x).sin()).sum(1))
    good, bad = torch.ones(2, 8), torch.full((2, 8), 1.4)
    for x in (good, bad, good):
        if x is bad:
            with pytest.raises(ValueError, match="refused"):
                function(x)
        else:
            same(function(x), (x.t() @ x).sin().sum(1) * 2)
    assert poisoned.lent == 3


def test_an_error_leaves_the_pool_whole(shared: ArenaPool) -> None:
    function = compiled(lambda x: refuse((x.t() @ x).sin()).sum(1) * 2)
    function(torch.ones(2, 8))
    before = shared.allocated_bytes
    with pytest.raises(ValueError, match="refused"):
        function(torch.full((2, 8), 1.4))
    assert shared.allocated_bytes == before


@torch.library.custom_op("opweave_contract::call_back", mutates_args=())
def call_back(x: torch.Tensor) -> torch.Tensor:
    inner: Any = _CALLED_BACK[0]
    result: torch.Tensor = inner(x) + 1
    return result


@call_back.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_CALLED_BACK: list[Any] = []


def test_a_call_within_a_call(shared: ArenaPool) -> None:
    """An operator that runs another program: its arena is not the one that is in use."""

    def inner(x: torch.Tensor) -> torch.Tensor:
        return ((x @ x.t()).sin() @ x).cos()

    def outer(x: torch.Tensor) -> torch.Tensor:
        y = (x.t() @ x).sin()
        total: torch.Tensor = call_back(y + 1) + y
        return total.sum(0)

    _CALLED_BACK[:] = [compiled(inner)]
    x = torch.linspace(-1, 1, 64).reshape(8, 8)
    y = (x.t() @ x).sin()
    expected = (inner(y + 1) + 1 + y).sum(0)
    function = compiled(outer)
    for _ in range(2):
        same(function(x), expected, 1e-4)
    assert {report.tier for report in reports()} == {"T1"}


def test_results_outlive_later_calls() -> None:
    """Nothing that the caller holds lies in the arena, nor in what the next call writes."""
    function = compiled(lambda x: ((x @ x).sin() @ x, x.cos().sum(0)))
    x = torch.linspace(-1, 1, 16).reshape(4, 4)
    first = function(x)
    kept = [item.clone() for item in first]
    function(x * 2)
    same(list(first), kept)


def test_poison_is_what_it_says() -> None:
    """The test's own means: bytes beside the arena, and bytes never written, do not go unnoticed."""
    pool = PoisonedPool()
    with pool.lend(64, CPU) as block:
        assert block.numel() == 64
        assert bool(block.view(torch.float32).isnan().all())
        assert bool((block == POISON).all())
    assert pool.faults == []
    with pool.lend(64, CPU) as block:
        torch.empty(0, dtype=torch.uint8).set_(block.untyped_storage(), block.storage_offset() + 64, (1,), (1,)).zero_()
    assert len(pool.faults) == 1


def test_copies_and_pickles_of_a_compiled_module() -> None:
    """A deep copy is compiled anew and has parameters of its own; what is pickled is the module."""
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    function = compiled(module)
    x = torch.ones(2, 4)
    with torch.no_grad():
        expected = function(x)
        same(expected, module(x))
        twin = copy.deepcopy(function)
        module.get_parameter("0.bias").add_(1)
        same(twin(x), expected)
        same(function(x), module(x))
    loaded = pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        same(compiled(loaded)(x), module(x))


def test_dynamo_starts_over() -> None:
    """After ``torch._dynamo.reset`` the same function is compiled again."""
    function = compiled(torch.sin)
    function(torch.ones(3))
    torch._dynamo.reset()
    same(function(torch.ones(3)), torch.sin(torch.ones(3)))
    first, second = reports()
    assert first.name != second.name
