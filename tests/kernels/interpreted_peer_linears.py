"""Ranks with buffers of their own, each launched by itself, in one process; `test_interpreted.py` runs this file."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from opweave.errors import ExecutionError
from opweave.kernels import all_gather_linear, linear_reduce_scatter
from opweave.kernels._configs import Config
from tests.kernels.guard import Guarded
from tests.support.interpreter import correct

SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2}, num_warps=1)


@pytest.fixture(autouse=True)
def _corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)


def table(buffers: list[Guarded]) -> torch.Tensor:
    return torch.tensor([buffer.tensor.data_ptr() for buffer in buffers])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestAllGatherLinear:
    """``launch_on_rank`` of ``all_gather_linear``."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("peers", "rows", "programs"), [(1, 3, 2), (2, 17, 1), (4, 5, 3)])
    def test_every_rank_computes_all_rows(self, peers: int, rows: int, programs: int, dtype: torch.dtype) -> None:
        x = random(peers, rows, 24, dtype=dtype)
        buffers = [Guarded(one) for one in x]
        for rank in range(peers):
            weight = random(24, 19, dtype=dtype, seed=rank + 1)
            out = Guarded(x.new_empty(peers * rows, 19), output=True)
            all_gather_linear.launch_on_rank(
                table(buffers), weight, None, 0, rank, programs, out=out.tensor, config=SMALL
            )
            (expected,) = all_gather_linear.KERNEL.reference(x, weight, rank, programs)
            torch.testing.assert_close(out.tensor, expected)
            assert out.is_intact()

    def test_waits_for_each_rank_s_flag(self) -> None:
        """Rows are written after the launch, one rank after the other, and their flags behind them."""
        x, weight = random(3, 16, 16, dtype=torch.float32), random(16, 16, dtype=torch.float32, seed=1)
        buffers = [Guarded(torch.full_like(one, torch.nan)) for one in x]
        buffers[1].tensor.copy_(x[1])
        flags = torch.tensor([6, 7, 5], dtype=torch.int32)
        out = torch.full((48, 16), torch.nan)
        before: list[torch.Tensor] = []

        def others() -> None:
            for rank in (2, 0):
                time.sleep(0.3)
                before.append(out.clone())
                buffers[rank].tensor.copy_(x[rank])
                flags[rank] = 7

        writing = threading.Thread(target=others, daemon=True)
        writing.start()
        all_gather_linear.launch_on_rank(table(buffers), weight, flags, 7, 1, 1, out=out, config=SMALL)
        writing.join()
        torch.testing.assert_close(out, all_gather_linear.KERNEL.reference(x, weight, 1, 1)[0])
        assert [part.isnan().view(3, -1).any(1).tolist() for part in before] == [
            [True, False, True],
            [True, False, False],
        ]
        assert flags.tolist() == [7, 7, 7]

    @pytest.mark.parametrize(("rank", "order"), [(0, [0, 1, 2]), (1, [1, 2, 0]), (2, [2, 0, 1])])
    def test_begins_with_its_own_rows(self, rank: int, order: list[int]) -> None:
        """With a buffer for all ranks whose flag is never there, what was computed before tells the order."""
        x, weight = random(3, 16, 16, dtype=torch.float32), random(16, 16, dtype=torch.float32)
        buffers = [Guarded(one) for one in x]
        flags, out = torch.zeros(3, dtype=torch.int32), torch.full((3, 256), torch.nan)
        seen: list[int] = []

        def raise_flags() -> None:
            for which in order:
                time.sleep(0.1)
                flags[which] = 1
            time.sleep(0.1)

        def watch() -> None:
            while len(seen) < 3:
                seen.extend(i for i in range(3) if i not in seen and not out[i].isnan().any())
                time.sleep(0.01)

        threads = [threading.Thread(target=work, daemon=True) for work in (raise_flags, watch)]
        for thread in threads:
            thread.start()
        all_gather_linear.launch_on_rank(table(buffers), weight, flags, 1, rank, 1, out=out.view(48, 16), config=SMALL)
        for thread in threads:
            thread.join()
        assert seen == order

    def test_refuses_what_it_cannot_compute(self) -> None:
        x, weight, out = torch.zeros(2, dtype=torch.int64), torch.zeros(8, 8), torch.zeros(6, 8)
        launch = all_gather_linear.launch_on_rank
        with pytest.raises(ExecutionError, match=r"needs x \[2\] of int64 on cpu; got \[2\] of float32"):
            launch(x.float(), weight, None, 0, 0, 1, out=out)
        with pytest.raises(ExecutionError, match=r"needs a rank of the 2 that x is of; got 2"):
            launch(x, weight, None, 0, 2, 1, out=out)
        with pytest.raises(ExecutionError, match=r"needs at least one program; got 0"):
            launch(x, weight, None, 0, 0, 0, out=out)
        with pytest.raises(ExecutionError, match=r"as many rows of each of 2 ranks; got 5"):
            launch(x, weight, None, 0, 0, 1, out=out[:5])
        with pytest.raises(ExecutionError, match=r"needs flags \[2\] of int32"):
            launch(x, weight, x, 0, 0, 1, out=out)
        with pytest.raises(ExecutionError, match=r"needs out in memory of its own; it overlaps weight"):
            launch(x, weight, None, 0, 0, 1, out=weight[:6])


class TestLinearReduceScatter:
    """Both launches of ``linear_reduce_scatter``."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("peers", "rows", "programs"), [(1, 3, 2), (2, 17, 1), (4, 5, 3)])
    def test_every_rank_keeps_its_rows_of_the_sum(
        self, peers: int, rows: int, programs: int, dtype: torch.dtype
    ) -> None:
        """Partial products come in any order of the ranks and are summed in one."""
        x, weight = random(peers, peers * rows, 24, dtype=dtype), random(peers, 24, 19, dtype=dtype, seed=1)
        staging = [Guarded(x.new_empty(peers, rows, 19), output=True) for _ in range(peers)]
        for rank in reversed(range(peers)):
            linear_reduce_scatter.launch_partials_on_rank(
                x[rank], weight[rank], rank, programs, staging=table(staging), config=SMALL
            )
        (expected,) = linear_reduce_scatter.KERNEL.reference(x, weight, programs)
        for rank in range(peers):
            out = Guarded(x.new_empty(rows, 19), output=True)
            linear_reduce_scatter.launch_sum_on_rank(staging[rank].tensor, out=out.tensor)
            torch.testing.assert_close(out.tensor, expected[rank])
            assert out.is_intact()
        assert all(buffer.is_intact() for buffer in staging)

    def test_a_rank_writes_its_own_slots_only(self) -> None:
        x, weight = random(9, 8, dtype=torch.float32), random(8, 5, dtype=torch.float32)
        staging = [Guarded(torch.empty(3, 3, 5), output=True) for _ in range(3)]
        linear_reduce_scatter.launch_partials_on_rank(x, weight, 1, 2, staging=table(staging), config=SMALL)
        for buffer in staging:
            assert buffer.tensor.isnan().flatten(1).all(1).tolist() == [True, False, True]
            assert not buffer.tensor[1].isnan().any()

    def test_sums_in_the_order_of_the_ranks(self) -> None:
        """In float32, with one rounding at the end: bfloat16 would lose each of the small addends."""
        staging = torch.ones(5, 1, 2049, dtype=torch.bfloat16)
        staging[0] = 256
        out = torch.empty(1, 2049, dtype=torch.bfloat16)
        linear_reduce_scatter.launch_sum_on_rank(staging, out=out)
        assert (out == 260).all()

    def test_refuses_what_it_cannot_compute(self) -> None:
        table, x, weight = torch.zeros(2, dtype=torch.int64), torch.zeros(6, 8), torch.zeros(8, 8)
        launch = linear_reduce_scatter.launch_partials_on_rank
        with pytest.raises(ExecutionError, match=r"needs staging \[2\] of int64"):
            launch(x, weight, 0, 1, staging=table.int())
        with pytest.raises(ExecutionError, match=r"needs a rank of the 2 that staging is of; got -1"):
            launch(x, weight, -1, 1, staging=table)
        with pytest.raises(ExecutionError, match=r"as many rows for each of 2 ranks; got 5"):
            launch(x[:5], weight, 0, 1, staging=table)
        with pytest.raises(ExecutionError, match=r"needs at least one program; got 0"):
            launch(x, weight, 0, 0, staging=table)
        with pytest.raises(ExecutionError, match=r"needs out \[3, 8\]"):
            linear_reduce_scatter.launch_sum_on_rank(torch.zeros(2, 3, 8), out=torch.zeros(2, 8))
        with pytest.raises(ExecutionError, match=r"needs staging of at least one rank"):
            linear_reduce_scatter.launch_sum_on_rank(torch.zeros(0, 3, 8), out=torch.zeros(3, 8))
