"""A tensor-parallel model on real ranks, its all-reduces hidden behind compute, against eager mode.

    torchrun --nproc-per-node 2 docs/examples/tensor_parallel.py

On CPUs it talks by gloo, where overlap is computed right and nothing gets faster; on GPUs by NCCL, one rank a GPU.
``--machine`` says what the decision is made for, and ``--sizes`` fixes the parts, whatever is predicted.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import opweave
from opweave.compiler.runtime.agreement import check_same_order, collective_orders


class Block(nn.Module):
    """A residual MLP; ``up`` is cut by columns, ``down`` by rows, with an all-reduce behind."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (sequences, tokens, hidden)."""
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def main() -> None:
    """Compile the model in both ways, run them, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="8xh100-nvlink")
    parser.add_argument("--sizes", type=int, nargs="+", help="sequences in each part; chosen by prediction if left out")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")

    torch.manual_seed(0)  # the same weights and inputs on every rank
    model: nn.Module = nn.Sequential(Block(chosen.hidden), Block(chosen.hidden)).to(device)
    x = torch.randn(4, chosen.tokens, chosen.hidden, device=device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})
    overlap: Any = {"sizes": tuple(chosen.sizes)} if chosen.sizes else True

    with torch.no_grad():
        expected = model(x)
        options = {"overlap": overlap, "machine": chosen.machine}
        compiled = torch.compile(model, backend="opweave", options=options, fullgraph=True)
        compare("torch.compile", compiled, x, expected)
        planned = opweave.compile(model, (x,), machine=chosen.machine, overlap=overlap)
        check_same_order(collective_orders(planned.overlapped.module))
        compare("opweave.compile", planned, x, expected)
    if dist.get_rank() == 0:
        print(planned.summary())
    dist.destroy_process_group()


def compare(name: str, model: Any, x: Tensor, expected: Tensor) -> None:
    """Print how far off a model is, and the milliseconds of its second call."""
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    begin = time.perf_counter()
    model(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        milliseconds = 1e3 * (time.perf_counter() - begin)
        print(f"{name}: off by {float((found - expected).abs().max()):.1e} at most, {milliseconds:.1f} ms")


if __name__ == "__main__":
    main()
