"""What each kernel takes on a machine: the lane it runs on, and its modes.

A product is timed by its tiles and waves, attention by the pairs of query and key that it computes, everything else by
the bytes that it moves, each once (`hw_models/matmul.py`, docs/formulations/compute-time.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ...compiler.graph import DTYPE_BYTES, Collective, Graph, Op, OpKind, Tensor
from ...hw_models.collectives import CollectiveMode, collective_modes
from ...hw_models.matmul import Kernel, attention, matmul, streaming, visible_pairs
from ...hw_models.model import Engine, EngineKind, HardwareModel
from .problem import Mode
from .regions import called, is_attention, is_product

__all__ = ["Costs"]

#: Calls that read of their first operand no more than they return.
_LOOKUPS = frozenset({"embedding", "index", "index_select", "gather", "slice", "select", "take"})
#: Calls that return memory they need not write.
_UNWRITTEN = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted"})
#: Place of ``is_causal`` among the arguments of an attention call.
_CAUSAL_PLACE = {
    "scaled_dot_product_attention": 5,
    "_scaled_dot_product_attention_math": 5,
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_efficient_attention": 6,
    "_scaled_dot_product_cudnn_attention": 6,
    "_scaled_dot_product_fused_attention_overrideable": 5,
    "_scaled_dot_product_flash_attention_backward": 11,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 7,
    "_scaled_dot_product_efficient_attention_backward": 11,
    "_scaled_dot_product_cudnn_attention_backward": 14,
}
#: Calls whose operands are [batch, tokens, heads, features] and whose last query sees the last key.
_ALIGNED_LAST = {"_flash_attention_forward": 8}
_INPUT = re.compile(r"^%(\d+)$")


@dataclass(frozen=True)
class Costs:
    """Modes of the kernels of ``graph`` on ``machine``."""

    graph: Graph
    machine: HardwareModel

    @cached_property
    def _users(self) -> dict[str, set[int]]:
        """Operators that read each buffer, by index; -1 for the caller, who gets what is returned or updated."""
        users: dict[str, set[int]] = {}
        for index, read in enumerate(self.graph.reads):
            for buffer in read:
                users.setdefault(buffer, set()).add(index)
        for buffer in self.graph.output_buffers:
            users.setdefault(buffer, set()).add(-1)
        return users

    def computing(self, region: Sequence[int]) -> tuple[str, Mode]:
        """Lane and mode of one kernel for the operators of ``region``: units near memory, where they are faster."""
        ops = [self.graph.ops[index] for index in region]
        nbytes = self.moved_bytes(region)
        kernel = self._kernel(ops, nbytes)
        name = called(ops[-1]) or ops[-1].name
        if len(ops) == 1 and (is_product(ops[0]) or is_attention(ops[0])):
            for engine in self.machine.engines_of(EngineKind.NEAR_MEMORY):
                seconds = self._near_memory_s(ops[0], nbytes, engine)
                if seconds < kernel.seconds:
                    return engine.name, Mode(name, seconds)  # its banks, not the bus that the others share
        lane = self.machine.engines_of(EngineKind.COMPUTE)[0].name
        taken = {lane: kernel.compute, self.machine.scratchpad_memory.name: kernel.memory}
        return lane, Mode(name, kernel.seconds, _needs(taken))

    def _kernel(self, ops: Sequence[Op], nbytes: int) -> Kernel:
        if len(ops) == 1 and is_product(ops[0]) and ops[0].flops:
            return self._product(ops[0])
        if len(ops) == 1 and is_attention(ops[0]) and ops[0].flops:
            return self._attention(ops[0])
        if not nbytes or any(op.kind is OpKind.BOUNDARY for op in ops):
            return Kernel(0.0, 0.0, 0.0)
        dtype = self.graph.tensor[ops[-1].outputs[0]].dtype if ops[-1].outputs else "default"
        return streaming(nbytes, self.machine, flops=sum(op.flops for op in ops), dtype=dtype)

    def _near_memory_s(self, op: Op, nbytes: int, engine: Engine) -> float:
        dtype = self.graph.tensor[op.outputs[0]].dtype
        rate = engine.flops_per_s.get(dtype) or engine.flops_per_s["default"]
        bandwidth = engine.bandwidth_bytes_per_s or self.machine.scratchpad_memory.bandwidth_bytes_per_s
        return engine.launch_s + max(op.flops / rate, nbytes / bandwidth)

    def communicating(self, collective: Collective, *, fuses: str = "") -> tuple[tuple[str, Mode], ...]:
        """Lane and mode of each way of doing ``collective``, the fastest first; with ``fuses``, that as well.

        Raises:
            MachineError: the machine has no such collective.
        """
        ways = collective_modes(collective.kind, collective.nbytes, collective.ranks, self.machine, fuses=fuses)
        return tuple((way.link, self._way(way)) for way in ways)

    def _way(self, way: CollectiveMode) -> Mode:
        engine = self.machine.engines_of(EngineKind.COMPUTE)[0].name
        taken = {engine: way.compute_share, self.machine.scratchpad_memory.name: way.memory_share, **way.link_shares}
        name = f"{way.algorithm}/{way.programs}" if way.programs else way.algorithm
        return Mode(name, way.seconds, _needs(taken), fixed=True)

    def moved_bytes(self, region: Sequence[int]) -> int:
        """Bytes that one kernel for ``region`` moves: what it reads of others, and what others read of it."""
        outside = sum(self.graph.ops[index].outside_bytes for index in region)
        return outside + sum(nbytes for moved in self.traffic(region) for nbytes in moved.values())

    def traffic(self, region: Sequence[int]) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that one kernel for ``region`` reads of buffers of others, and writes for others, by buffer."""
        inside = set(region)
        made = {buffer for index in region for buffer in self.graph.writes[index]}
        read: dict[str, int] = {}
        written: dict[str, int] = {}
        seen: set[str] = set()
        for index in region:
            op = self.graph.ops[index]
            returned = sum(self.graph.tensor[name].nbytes for name in op.outputs)
            for place, name in enumerate(op.inputs):
                tensor = self.graph.tensor[name]
                if name in seen or self._made_inside(tensor, inside, made):
                    continue
                seen.add(name)
                nbytes = _spanned_bytes(tensor)
                if place == 0 and called(op) in _LOOKUPS:
                    nbytes = min(nbytes, returned)
                read[tensor.buffer] = read.get(tensor.buffer, 0) + nbytes
            for name in op.outputs:
                tensor = self.graph.tensor[name]
                if called(op) not in _UNWRITTEN and not self._users.get(tensor.buffer, set()) <= inside:
                    written[tensor.buffer] = written.get(tensor.buffer, 0) + _spanned_bytes(tensor)
        sizes = self.graph.buffers
        for moved in (read, written):
            moved.update({buffer: min(nbytes, sizes[buffer].nbytes) for buffer, nbytes in moved.items()})
        return read, written

    def _made_inside(self, tensor: Tensor, inside: set[int], made: set[str]) -> bool:
        """Whether the bytes of ``tensor`` come from the region: one that is updated in place was there before."""
        if tensor.buffer not in made or self.graph.buffers[tensor.buffer].role.is_source:
            return False
        return self._creator[tensor.buffer] in inside

    @cached_property
    def _creator(self) -> dict[str, int]:
        created: dict[str, int] = {}
        for index, op in enumerate(self.graph.ops):
            for name in op.outputs:
                created.setdefault(self.graph.tensor[name].buffer, index)
        return created

    def _product(self, op: Op) -> Kernel:
        """From the flops and the result's shape, which say the contracted extent whatever the call."""
        out = self.graph.tensor[op.outputs[0]]
        operands = [self.graph.tensor[name] for name in op.inputs]
        name, batch, rows = called(op), 1, math.prod(out.shape[:-1])
        columns = out.shape[-1] if out.shape else 1
        if name in ("mv", "addmv"):
            rows, columns = columns, 1
        if name in ("bmm", "baddbmm") or (name == "matmul" and min(len(t.shape) for t in operands[:2]) > 2):
            batch, rows = math.prod(out.shape[:-2]), out.shape[-2]
        if name == "_grouped_mm" and len(operands) > 1 and len(operands[1].shape) == 3 and len(out.shape) == 2:
            batch = operands[1].shape[0]  # rows are divided among the groups, evenly for all that is known
            rows = -(-rows // batch)
        if not batch * rows * columns:
            return Kernel(0.0, 0.0, 0.0)
        inner = max(1, round(op.flops / (2 * batch * rows * columns)))
        dtype, grouped, tiling = _widest(operands), name == "_grouped_mm", self.machine.tiling
        kernel = matmul(
            rows, columns, inner, dtype, self.machine, batch=batch, out_dtype=out.dtype, ragged=grouped and batch > 1
        )
        if tiling is None or not grouped:
            return kernel
        return replace(kernel, seconds=kernel.seconds / tiling.grouped_efficiency)

    def flops(self, region: Sequence[int]) -> int:
        """Flops of one kernel for ``region``; of attention those of the pairs that are visible, which it computes."""
        ops = [self.graph.ops[index] for index in region]
        if len(ops) != 1 or not is_attention(ops[0]) or not ops[0].flops:
            return sum(op.flops for op in ops)
        shape = self._attention_shape(ops[0])
        seen = visible_pairs(shape.queries, shape.keys, shape.before)
        return ops[0].flops * seen // (shape.queries * shape.keys) if shape.causal else ops[0].flops

    def _attention(self, op: Op) -> Kernel:
        shape = self._attention_shape(op)
        return attention(
            shape.heads,
            shape.queries,
            shape.keys,
            shape.size,
            shape.dtype,
            self.machine,
            key_heads=shape.key_heads,
            causal=shape.causal,
            before=shape.before,
            backward="backward" in called(op),
        )

    def _attention_shape(self, op: Op) -> _Attention:
        arguments = _arguments(op.body)
        tensors = [self.graph.tensor[op.inputs[int(m[1])]] for a in arguments if (m := _INPUT.match(a))]
        query, key = tensors[1:3] if "backward" in called(op) else tensors[:2]
        place = (_CAUSAL_PLACE | _ALIGNED_LAST).get(called(op), len(arguments))
        causal = place < len(arguments) and arguments[place] == "True"
        heads_at, tokens_at = (-2, -3) if called(op) in _ALIGNED_LAST else (-3, -2)
        queries, keys = query.shape[tokens_at], key.shape[tokens_at]
        sequences = math.prod(query.shape[:-3])
        return _Attention(
            sequences * query.shape[heads_at],
            sequences * key.shape[heads_at],
            queries,
            keys,
            query.shape[-1],
            query.dtype,
            causal,
            max(0, keys - queries) if called(op) in _ALIGNED_LAST else 0,
        )


class _Attention(NamedTuple):
    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int
    dtype: str
    causal: bool
    before: int


def _needs(parts: dict[str, float]) -> dict[str, float]:
    return {name: min(1.0, part) for name, part in parts.items() if part > 0}


def _spanned_bytes(tensor: Tensor) -> int:
    """Bytes between the first and the last element, which are fewer than the elements' where extents are broadcast."""
    return min(tensor.nbytes, tensor.end_bytes - tensor.offset_bytes)


def _widest(operands: Sequence[Tensor]) -> str:
    """Dtype at which a product of these runs: the wider one of the two largest, which are not scales or a bias."""
    factors = sorted(operands, key=lambda tensor: -math.prod(tensor.shape))[:2]
    return max((tensor.dtype for tensor in factors), key=lambda dtype: DTYPE_BYTES[dtype], default="float32")


def _arguments(body: str) -> list[str]:
    """The positional arguments of a call written as text, those of lists left together."""
    inner = body.partition("(")[2].rpartition(")")[0]
    found, depth, start = [], 0, 0
    for place, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append(inner[start:place].strip())
            start = place + 1
    last = inner[start:].strip()
    return [*found, last] if last else found
