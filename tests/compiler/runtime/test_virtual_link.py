"""Virtual ranks: what collectives return, when, and that what goes wrong in flight is seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from opweave.compiler.runtime.virtual_link import virtual_link
from opweave.errors import ExecutionError, OptionError

functional = torch.ops._c10d_functional
N, RANK = 4, 1
FAST: Any = {"alpha_s": 0.0, "bandwidth_bytes_per_s": 1e12, "rank": RANK}
X = torch.arange(24.0).reshape(8, 3) + 1
OWN = X[2:4]

#: Each kind: what it does to X, what comes of it, and the bytes of its whole message.
KINDS: dict[str, tuple[Callable[[], Tensor], Tensor, int]] = {
    "sum": (lambda: functional.all_reduce(X, "sum", "0"), 4 * X, 96),
    "avg": (lambda: functional.all_reduce(X, "avg", "0"), X, 96),
    "max": (lambda: functional.all_reduce(X, "max", "0"), X, 96),
    "product": (lambda: functional.all_reduce(X, "product", "0"), X**4, 96),
    "all_gather": (lambda: functional.all_gather_into_tensor(X, N, "0"), torch.cat([X] * N), 384),
    "reduce_scatter": (lambda: functional.reduce_scatter_tensor(X, "sum", N, "0"), 4 * OWN, 96),
    "all_to_all": (lambda: functional.all_to_all_single(X, [2] * N, [2] * N, "0"), torch.cat([OWN] * N), 96),
    "broadcast": (lambda: functional.broadcast(X, 0, "0"), X, 96),
    "reduced together": (lambda: functional.all_reduce_coalesced([OWN, X], "sum", "0")[1], 4 * X, 120),
    "gathered together": (
        lambda: functional.all_gather_into_tensor_coalesced([OWN, X], N, "0")[1],
        torch.cat([X] * N),
        480,
    ),
    "scattered together": (lambda: functional.reduce_scatter_tensor_coalesced([X, X], "sum", N, "0")[1], 4 * OWN, 192),
}


@pytest.mark.parametrize("kind", KINDS)
def test_collectives_of_ranks_that_are_all_alike(kind: str) -> None:
    """Each kind returns what its definition says of equal operands, and counts the whole message."""
    start, expected, nbytes = KINDS[kind]
    with virtual_link(N, **FAST) as link:
        result = functional.wait_tensor(start())
        torch.testing.assert_close(result, expected)
        assert [transfer.nbytes for transfer in link.transfers] == [nbytes]


def test_the_link_does_one_transfer_after_the_other() -> None:
    """Two collectives take the time of both, work between start and wait counts, and what is over is not waited for."""
    with virtual_link(N, 0.02, 96 / 0.02) as link:
        begin = time.perf_counter()
        first, second = functional.all_reduce(X, "sum", "0"), functional.all_reduce(X, "sum", "0")
        assert link.waited_s == 0  # nobody waits yet
        time.sleep(0.03)
        functional.wait_tensor(second)
        assert time.perf_counter() - begin >= 0.08
        functional.wait_tensor(first)  # done before
        one, other = link.transfers
        assert one.finish_s == other.start_s
        assert one.finish_s - one.start_s == pytest.approx(0.04)
        assert link.busy_s == pytest.approx(0.08)
        assert link.waited_s <= 0.05  # it was worked for 0.03 s meanwhile, on a busy machine longer
        link.reset()
        functional.wait_tensor(functional.all_reduce(X, "sum", "0"))
        assert link.transfers[0].start_s == link.transfers[0].posted_s


def test_reading_early_and_writing_in_flight_show() -> None:
    """A result is NaN before its wait, and made of what the operand is then."""
    with virtual_link(N, **FAST):
        operand = X.clone()
        gathered = functional.all_gather_into_tensor(operand, N, "0")
        assert gathered.isnan().all()
        operand.zero_()
        assert (functional.wait_tensor(gathered) == 0).all()


def test_without_values_nothing_is_touched() -> None:
    """For measuring: an operand reduced in place stays as it is, and time passes all the same."""
    with virtual_link(N, 0.0, 1e12, values=False) as link:
        torch.testing.assert_close(functional.wait_tensor(functional.all_reduce(X, "sum", "0")), X)
        sizes = [5, 1, 1, 1]
        functional.wait_tensor(functional.all_to_all_single(X, sizes, sizes, "0"))
        assert [transfer.kind for transfer in link.transfers] == ["all_reduce", "all_to_all"]


def test_models_of_tensors_on_many_ranks_run_and_compile() -> None:
    """DTensor modules take the group like any other, in eager mode and traced; groups of fewer ranks share the link."""
    with virtual_link(N, 0.0, 1e12) as link, torch.no_grad():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        whole = [p.clone() for p in model.parameters()]
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        link.reset()
        x = torch.ones(3, 8)
        hidden = torch.relu(x @ whole[0][:8].T + whole[1][:8])
        expected = 2 * (hidden @ whole[2][:, :8].T) + whole[3]  # both ranks hold the first half
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
        assert [transfer.nbytes for transfer in link.transfers] == [96, 96]
    torch._dynamo.reset()


def test_mistakes_are_errors() -> None:
    """Links that cannot be, a process that has ranks already, blocks and operators that ranks alike cannot have."""
    for options in ({"ranks": 0}, {"rank": 4}, {"alpha_s": -1}, {"bandwidth_bytes_per_s": 0}):
        given = {"ranks": 4, "alpha_s": 0.0, "bandwidth_bytes_per_s": 1.0, **options}
        with pytest.raises(OptionError), virtual_link(**given):  # type: ignore[arg-type]
            pass
    with virtual_link(N, **FAST):
        with pytest.raises(OptionError, match="rank 1 of 4 already"), virtual_link(N, **FAST):
            pass
        with pytest.raises(ExecutionError, match="send \\[5, 1, 1, 1\\]"):
            functional.all_to_all_single(X, [5, 1, 1, 1], [5, 1, 1, 1], "0")
        with pytest.raises(ExecutionError, match="cannot reduce by"):
            functional.wait_tensor(functional.all_reduce(torch.ones(2, dtype=torch.int32), "bxor", "0"))
    assert not dist.is_initialized()
