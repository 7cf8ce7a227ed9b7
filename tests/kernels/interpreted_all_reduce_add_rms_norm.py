"""Ranks with buffers of their own, each launched by itself, in one process; `test_interpreted.py` runs this file."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch

from opweave.errors import ExecutionError
from opweave.kernels import all_reduce_add_rms_norm
from opweave.kernels._configs import Config
from opweave.kernels.all_reduce_add_rms_norm import (
    all_reduce_add_rms_norm_kernel,
    launch_on_rank,
    reference,
    rows_of_rank,
)
from tests.kernels.guard import Guarded
from tests.support.interpreter import correct

EPSILON = 1e-5
SMALL = Config({"block": 32}, num_warps=1)


@pytest.fixture(autouse=True)
def _corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)


class Ranks:
    """Buffers of each rank, which begin at multiples of 16, and tables of their addresses."""

    def __init__(self, peers: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        made = [torch.randn(rows, columns, generator=random).to(dtype) for _ in range(peers)]
        self.residual = torch.randn(rows, columns, generator=random).to(dtype)
        self.weight = torch.randn(columns, generator=random).to(dtype)
        self.partials = [Guarded(value) for value in made]
        self.hidden, self.out = ([Guarded(self.residual, output=True) for _ in range(peers)] for _ in range(2))
        self.expected = reference(torch.stack(made), self.residual, self.weight, EPSILON, 1)

    def launch(self, rank: int, programs: int, config: Config | None, *, own: bool = False) -> None:
        """What one rank does; with ``own``, it keeps ``hidden`` to itself."""
        partials, hidden, out = (
            torch.tensor([buffer.tensor.data_ptr() for buffer in buffers])
            for buffers in (self.partials, self.hidden[rank : rank + 1] if own else self.hidden, self.out)
        )
        launch_on_rank(
            partials, self.residual, self.weight, EPSILON, rank, programs, hidden=hidden, out=out, config=config
        )


@pytest.mark.parametrize("config", [None, SMALL], ids=["whole rows", "in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("peers", "rows", "columns", "programs"), [(1, 3, 40, 2), (2, 7, 48, 1), (4, 9, 33, 2), (8, 5, 32, 8)]
)
def test_every_rank_gets_all_rows(
    peers: int, rows: int, columns: int, programs: int, dtype: torch.dtype, config: Config | None
) -> None:
    """The order of ranks does not matter; all of them get the same bits and nothing else is written."""
    ranks = Ranks(peers, rows, columns, dtype)
    for rank in reversed(range(peers)):
        ranks.launch(rank, programs, config)
    for buffers, expected in zip((ranks.hidden, ranks.out), ranks.expected, strict=True):
        torch.testing.assert_close(buffers[0].tensor, expected)
        assert all(torch.equal(buffer.tensor, buffers[0].tensor) for buffer in buffers)
    assert torch.equal(ranks.hidden[0].tensor, ranks.expected[0])
    assert all(buffer.is_intact() for buffer in (*ranks.partials, *ranks.hidden, *ranks.out))


@pytest.mark.parametrize("config", [None, SMALL], ids=["whole rows", "in blocks"])
def test_a_rank_writes_its_own_rows_only(config: Config | None) -> None:
    ranks = Ranks(4, 10, 40, torch.float32)
    ranks.launch(2, 1, config)
    first, end = rows_of_rank(2, 4, 10)
    for buffer in (*ranks.hidden, *ranks.out):
        untouched = buffer.tensor.isnan()
        assert not untouched[first:end].any()
        assert untouched[:first].all()
        assert untouched[end:].all()


@pytest.mark.parametrize("config", [None, SMALL], ids=["whole rows", "in blocks"])
def test_a_rank_may_keep_its_sums_to_itself(config: Config | None) -> None:
    ranks = Ranks(3, 7, 40, torch.float16)
    for rank in range(3):
        ranks.launch(rank, 2, config, own=True)
    for rank in range(3):
        first, end = rows_of_rank(rank, 3, 7)
        assert torch.equal(ranks.hidden[rank].tensor[first:end], ranks.expected[0][first:end])
        assert ranks.hidden[rank].tensor.isnan().sum() == (7 - (end - first)) * 40
        torch.testing.assert_close(ranks.out[rank].tensor, ranks.expected[1])


@pytest.mark.parametrize(("own", "place"), [(False, 2), (True, 0)])
def test_a_rank_reads_its_own_sums_again(own: bool, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a peer's copy, which has the same bits but lies behind a link."""
    launched: list[Any] = []
    grid = MappingProxyType({(3,): lambda *arguments, **_: launched.append(arguments)})
    monkeypatch.setattr(all_reduce_add_rms_norm, "all_reduce_add_rms_norm_kernel", grid)
    Ranks(3, 9, 40, torch.float32).launch(2, 8, SMALL, own=own)
    names = all_reduce_add_rms_norm_kernel.arg_names
    assert dict(zip(names, launched[0], strict=False))["own_hidden"] == place


def test_ranks_without_rows_have_nothing_to_do() -> None:
    ranks = Ranks(4, 2, 8, torch.float32)
    for rank in range(4):
        ranks.launch(rank, 3, None)
    torch.testing.assert_close(ranks.out[3].tensor, ranks.expected[1])


def test_refuses_tables_that_do_not_fit() -> None:
    ranks = Ranks(2, 4, 8, torch.float32)
    table = torch.zeros(2, dtype=torch.int64)
    given = (table, ranks.residual, ranks.weight, EPSILON)
    for rank, programs, hidden, out, message in (
        (2, 1, table, table, "needs a rank from 0 to 1; got 2"),
        (0, 0, table, table, "needs at least one program"),
        (0, 1, torch.zeros(3, dtype=torch.int64), table, r"needs hidden \[2\]"),
        (0, 1, table, table[:1], r"needs out \[2\]"),
        (0, 1, table, table.int(), r"needs out \[2\] of int64"),
    ):
        with pytest.raises(ExecutionError, match=message):
            launch_on_rank(*given, rank, programs, hidden=hidden, out=out)
