"""Ranks that really are: processes with gloo, and PyTorch's local tensors, which are all ranks of one process."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from opweave.compiler.frontend.ranks import fake_ranks

__all__ = ["local_ranks", "run_local", "spawn"]

TIMEOUT_S = 900


def spawn(ranks: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``ranks`` processes with gloo; what it raises fails the test.

    ``function`` is found by its module and name; what it returns can be pickled. Processes that hang are ended.
    """
    context = get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, ranks, str(folder), function, args), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    results = []
    for rank in range(ranks):
        path = folder / f"rank_{rank}"
        assert path.exists(), f"rank {rank} has not finished; its exit code is {processes[rank].exitcode}"
        kind, value = pickle.loads(path.read_bytes())
        assert kind == "returned", f"rank {rank} raised:\n{value}"
        results.append(value)
    return results


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined] # torch does not say it exports it
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S // 2)
        )
        outcome = "returned", function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = "raised", traceback.format_exc()
    Path(folder, f"rank_{rank}").write_bytes(pickle.dumps(outcome))


@contextmanager
def local_ranks(ranks: int) -> Iterator[Any]:
    """Let this process be all of ``ranks``: what runs in the mode that it yields runs on each rank's own tensors."""
    from torch.distributed._local_tensor import LocalTensorMode

    with fake_ranks(ranks):
        yield LocalTensorMode(ranks)


def run_local(module: GraphModule, inputs: Sequence[Sequence[Any]], mode: Any) -> list[tuple[Any, ...]]:
    """What ``module`` returns on each rank, given the inputs of each rank, all ranks in lock-step."""
    from torch.distributed import _local_tensor

    make: Any = _local_tensor.LocalTensor
    together = [
        make(dict(enumerate(each))) if isinstance(each[0], Tensor) else each[0] for each in zip(*inputs, strict=True)
    ]
    with torch.no_grad(), mode:
        outputs = module(*together)
    return [tuple(_of_rank(item, rank) for item in outputs) for rank in range(len(inputs))]


def _of_rank(item: Any, rank: int) -> Any:
    return item._local_tensors[rank] if hasattr(item, "_local_tensors") else item
