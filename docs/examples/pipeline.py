"""A model in stages on real ranks: measured, scheduled, trained, measured again, and compared with one rank.

    torchrun --nproc-per-node 2 docs/examples/pipeline.py
    torchrun --nproc-per-node 2 docs/examples/pipeline.py --placement v --chunks 2 --schedule zbv --out out/pipeline

On CPUs the ranks talk by gloo, on GPUs by NCCL, one rank a GPU. ``--split graph`` cuts each stage's backward in two
graphs, so that what a stage holds shrinks between them; ``--split eager`` leaves that to torch. With ``--out`` rank 0
draws the schedule.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import opweave


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (sequences, tokens, hidden)."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    """Train for a few steps, by a schedule for what was measured, and say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--placement", default="loop", help="loop, v or wave")
    parser.add_argument("--chunks", type=int, default=1, help="stages on each rank")
    parser.add_argument("--schedule", default="optimal", help="or a name of `opweave pipeline --list`")
    parser.add_argument("--split", choices=("graph", "eager"), default="graph")
    parser.add_argument("--microbatches", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="that choosing a schedule may take")
    parser.add_argument("--out", help="folder for the picture")
    chosen = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)  # the same weights and batch on every rank
    count = dist.get_world_size() * chosen.chunks
    stages = [nn.Sequential(Block(chosen.hidden), Block(chosen.hidden)).to(device) for _ in range(count)]
    reference = nn.Sequential(*copy.deepcopy(stages))
    x = torch.randn(2 * chosen.microbatches, 64, chosen.hidden, device=device)
    y = torch.randn_like(x)

    pipe = opweave.pipeline(
        stages,
        x,
        nn.functional.mse_loss,
        microbatches=chosen.microbatches,
        example_target=y,
        placement=chosen.placement,
        chunks=chosen.chunks,
        schedule=chosen.schedule,
        split=chosen.split,
        time_limit=chosen.seconds,
    )
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss = pipe.step(x, target=y, measure=step in (1, 2))
        if step == 0:
            compare(pipe.modules, reference, x, y)
        optimizer.step()
        if loss is not None:  # on the rank of the last stage
            print(f"step {step}: loss {loss:.6f}, schedule {pipe.schedule.method!r}", flush=True)
        if step == 2 and chosen.schedule == "optimal":
            pipe.replan()  # for the times of the steps that were measured
    if dist.get_rank() == 0:
        timed = pipe.timed
        print(f"predicted: {timed.makespan_ns / 1e6:.2f} ms a step, bubble {timed.bubble:.1%}")
    if chosen.out:
        for name in pipe.report(chosen.out):
            print(f"wrote {chosen.out}/{name}")
    pipe.close()
    dist.destroy_process_group()


def compare(own: dict[int, nn.Module], reference: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Say how far gradients are from those of the model on one rank."""
    torch.autograd.backward(nn.functional.mse_loss(reference(x), y))
    worst = 0.0
    for stage, module in own.items():
        for found, wanted in zip(module.parameters(), reference[stage].parameters(), strict=True):
            assert found.grad is not None
            assert wanted.grad is not None
            worst = max(worst, float((found.grad - wanted.grad).abs().max() / wanted.grad.abs().max()))
    print(f"rank {dist.get_rank()}: gradients are within {worst:.1e} of the model's on one rank", flush=True)
    assert worst < 1e-4


if __name__ == "__main__":
    main()
