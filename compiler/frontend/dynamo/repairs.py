"""What this project corrects in Inductor while it compiles for us: errors that upstream has mended, or will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._inductor import scheduler

from ....errors import OpweaveError

__all__ = ["repaired"]


@contextmanager
def repaired() -> Iterator[None]:
    """While it lasts, a scheduler node keeps its dependency on the write in place that comes before its read.

    Inductor of torch 2.13 and older may compute the loops of a node anew, to fuse it with a node of other loops. Its
    reads are then found anew, under the name that a buffer had before it was written in place (as the zeros that
    ``index_put`` fills), and the node may run before that write. Seen in the backward half of a UNet, whose upsampling
    got gradients of zero: pytorch issue 185509, mended by pull request 185873. Where that is in, nothing is left to
    rename, and nothing changes.

    Raises:
        OpweaveError: this torch's scheduler is not built as expected; the message names what is missing.
    """
    node_class: Any = getattr(scheduler, "SchedulerNode", None)
    original = getattr(node_class, "recompute_size_and_body", None)
    if original is None:
        raise OpweaveError(
            "this torch has no torch._inductor.scheduler.SchedulerNode.recompute_size_and_body",
            hint="use a release of torch that this backend supports",
        )

    def recompute_size_and_body(node: Any, *args: Any, **kwargs: Any) -> None:
        original(node, *args, **kwargs)
        if any(dependency.name in node.mutation_renames for dependency in node.read_writes.reads_and_writes()):
            node.set_read_writes(node.read_writes.rename(node.mutation_renames))

    node_class.recompute_size_and_body = recompute_size_and_body
    try:
        yield
    finally:
        node_class.recompute_size_and_body = original
