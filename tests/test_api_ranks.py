"""``compile`` for a machine of several devices: what one rank of a module gets, in a world of fake ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.parallel_dtensor import PlainDense, fully_sharded
from benchmarks.parallel_models import LLAMA_3_70B, TINY, DenseTensorParallel, tokens_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

import opweave
from opweave.compiler.frontend.ranks import fake_ranks
from opweave.compiler.plan import CollectiveStart, CollectiveWait
from opweave.compiler.rank_model import RankModel
from opweave.compiler.verify import verify_ranks
from opweave.errors import ExecutionError, OptionError, SplitRefused

MACHINE = "8xh100-nvlink"


@pytest.fixture(scope="module")
def hidden() -> RankModel:
    """One layer of a 70B model over 4,096 tokens."""
    with fake_ranks(8), FakeTensorMode():
        module = DenseTensorParallel(LLAMA_3_70B.with_layers(1))
        made = opweave.compile(module, (tokens_of(LLAMA_3_70B, 1, 4096),), machine=MACHINE)
    assert isinstance(made, RankModel)
    return made


def test_a_layer_of_a_large_model_is_cut_and_its_collectives_hidden(hidden: RankModel) -> None:
    assert sum(hidden.overlapped.sizes) == 4096
    before, after = hidden.overlapped.seconds
    assert after < 0.97 * before
    exposed = [sum(getattr(line, f"exposed_{when}_s") for line in hidden.collectives) for when in ("before", "after")]
    assert exposed[1] < exposed[0]
    assert any(line.hidden_by for line in hidden.collectives)
    for plan in (hidden.plan, hidden.plan_before):
        assert opweave.CompiledModel(plan).verify().ok
        assert not verify_ranks(dict.fromkeys(range(8), plan))
    kinds = [type(i) for i in hidden.plan.instructions]
    assert kinds.count(CollectiveStart) == kinds.count(CollectiveWait) > len(hidden.collectives)


def test_it_is_told_and_drawn(hidden: RankModel, tmp_path: Path) -> None:
    text = hidden.summary()
    assert "8 ranks" in text
    assert "exposed before" in text
    files = hidden.report(tmp_path)
    assert {"index.html", "trace.json", "plan.json", "timeline.png"} <= files.keys()
    assert all(path.stat().st_size > 0 for path in files.values())
    assert "rank 7 nvlink" in files["trace.json"].read_text()
    assert opweave.load_plan(files["plan.json"]).plan == hidden.plan


def test_little_is_left_alone_with_the_reason() -> None:
    with fake_ranks(8):
        module, x = DenseTensorParallel(TINY, dtype=torch.float32), tokens_of(TINY, 1, 16, torch.float32)
        made = opweave.compile(module, (x,), machine=MACHINE)
        assert isinstance(made, RankModel)
        assert "below the margin" in made.overlapped.reason
        assert all(line.reason for line in made.collectives)
        off = opweave.compile(module, (x,), machine=MACHINE, overlap=False)
        assert isinstance(off, RankModel)
        assert off.overlapped.sizes == ()
        for options in ({"time_limit": 3}, {"scratchpad": "1MiB"}, {"recompute": True}, {"kernels": "all"}):
            with pytest.raises(OptionError, match=f"'{next(iter(options))}' does not go with a module that talks"):
                opweave.compile(module, (x,), machine=MACHINE, **options)


def test_off_changes_no_order_either() -> None:
    """Weights that are gathered one after the other could be gathered early; who says off gets them as they are."""
    with fake_ranks(8):
        mesh = init_device_mesh("cpu", (8,))
        with FakeTensorMode():
            module = fully_sharded(PlainDense(LLAMA_3_70B.with_layers(1)), mesh)
        inputs = (tokens_of(LLAMA_3_70B, 1, 512),)
        on, off = (opweave.compile(module, inputs, machine=MACHINE, overlap=overlap) for overlap in (True, False))
    assert isinstance(on, RankModel)
    assert isinstance(off, RankModel)
    assert on.overlapped.seconds[1] < 0.97 * on.overlapped.seconds[0]
    assert off.plan.instructions == off.plan_before.instructions
    assert {line.reason for line in off.collectives} == {off.overlapped.reason} == {"overlap is off"}
    assert {line.exposed_before_s - line.exposed_after_s for line in off.collectives} == {0.0}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_module_is_explained_as_the_backend_overlaps_it() -> None:
    """Also one that is not compiled, and names a machine: no scratchpad is meant."""
    torch.compiler.reset()  # a size that has changed in this process is a symbol
    with fake_ranks(8), torch.no_grad():
        module, x = DenseTensorParallel(TINY, dtype=torch.float32), tokens_of(TINY, 1, 16, torch.float32)
        text = str(opweave.explain(module, (x,), machine=MACHINE, overlap={"sizes": (8, 8)}))
    assert "cut into parts of 8 + 8" in text
    assert "4 collectives" in text


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore::opweave.compiler.frontend.dynamo.fallbacks.OpweaveFallbackWarning")
def test_sizes_that_are_symbols_are_not_cut() -> None:
    """Whatever sizes of parts are wanted: they were meant for the numbers that there were before."""
    torch.compiler.reset()
    with fake_ranks(8), torch.no_grad():
        module, x = DenseTensorParallel(TINY, dtype=torch.float32), tokens_of(TINY, 1, 16, torch.float32)
        torch._dynamo.mark_dynamic(x, 1)
        text = str(opweave.explain(module, (x,), machine=MACHINE, overlap={"sizes": (8, 8)}))
    assert "symbols are not cut" in text


def test_sizes_of_parts_that_the_user_wants() -> None:
    with fake_ranks(8):
        module, x = DenseTensorParallel(TINY, dtype=torch.float32), tokens_of(TINY, 1, 16, torch.float32)
        made = opweave.compile(module, (x,), machine=MACHINE, overlap={"sizes": (5, 11)})
        assert isinstance(made, RankModel)
        assert made.overlapped.sizes == (5, 11)
        with pytest.raises((OptionError, SplitRefused), match=r"17|16"):
            opweave.compile(module, (x,), machine=MACHINE, overlap={"sizes": (5, 12)})


def test_a_rank_alone_cannot_be_called(hidden: RankModel) -> None:
    twin = RankModel(
        plan=hidden.plan, captured=hidden.captured, overlapped=hidden.overlapped, weights={}, ranks=hidden.ranks
    )
    with fake_ranks(8), pytest.raises(ExecutionError, match="was planned for a call of"):
        twin()
    with pytest.raises(ExecutionError, match="scratchpad"):
        twin.execute([])


def test_a_module_that_talks_to_nobody_is_planned_as_on_one_device() -> None:
    made = opweave.compile(torch.nn.Linear(4, 4), (torch.ones(2, 4),), machine=MACHINE)
    assert not isinstance(made, RankModel)
    assert made.verify().ok


@pytest.mark.parametrize("overlap", [3, {"margin": "much"}, {"unknown": 1}, {"sizes": (4,)}])
def test_options_that_make_no_sense(overlap: object) -> None:
    with pytest.raises(OptionError, match="overlap"):
        opweave.compile(torch.nn.Linear(4, 4), (torch.ones(2, 4),), machine=MACHINE, overlap=overlap)
