"""What matrix products, attention and streaming kernels take on a machine of multiprocessors: tiles, in waves.

A library cuts the result of a product into tiles, one of a few shapes, and gives each multiprocessor one at a time. All
multiprocessors work through the tiles in *waves*; the last wave takes as long as a full one, however few its tiles
(docs/formulations/compute-time.md). A machine that states no ``tiling`` runs everything at its roofline.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import MachineError
from .model import Engine, EngineKind, HardwareModel, Tiling

__all__ = ["Kernel", "attention", "matmul", "matmul_seconds", "streaming", "visible_pairs"]

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: Matrix products of the backward pass of attention beside the two of the forward pass (Dao, arXiv 2307.08691).
_BACKWARD_PRODUCTS = 2.5


@dataclass(frozen=True)
class Kernel:
    """``seconds`` of one kernel with its launch, alone on its ``share`` of the multiprocessors.

    ``compute`` is the fraction of all multiprocessors that it occupies, ``memory`` the fraction of the bandwidth that
    it draws meanwhile; both are in [0, 1].
    """

    seconds: float
    compute: float
    memory: float


def matmul_seconds(
    m: int, n: int, k: int, dtype: str, machine: HardwareModel, share: float = 1.0, *, batch: int = 1
) -> float:
    """Seconds of ``batch`` products of an ``m`` x ``k`` with a ``k`` x ``n`` matrix of ``dtype``.

    ``share`` in (0, 1] is the part of the multiprocessors that is left to it while a collective holds the others.

    Raises:
        MachineError: a size below 0, a share outside (0, 1], or a machine without a compute engine's rate.
    """
    return matmul(m, n, k, dtype, machine, share, batch=batch).seconds


def matmul(
    m: int,
    n: int,
    k: int,
    dtype: str,
    machine: HardwareModel,
    share: float = 1.0,
    *,
    batch: int = 1,
    engine: Engine | None = None,
    out_dtype: str | None = None,
    ragged: bool = False,
) -> Kernel:
    """The product of ``matmul_seconds`` with what it occupies; the operands are read once and the result is written.

    The tile is the one of the machine's candidates with which it ends first, as a library's heuristic chooses. Rows of
    ``ragged`` products are ``m`` on average, as those of experts: each ends somewhere in a tile, half a tile is lost.

    Raises:
        MachineError: as ``matmul_seconds``.
    """
    _check(share, m=m, n=n, k=k, batch=batch)
    engine = engine or machine.engines_of(EngineKind.COMPUTE)[0]
    item = _item_bytes(dtype)
    nbytes = batch * (item * (m * k + k * n) + _item_bytes(out_dtype or dtype) * m * n)
    rate = _rate(engine, dtype, machine)
    tiling = machine.tiling
    if tiling is None:
        return _roofline(2 * batch * m * n * k, nbytes, rate, machine, engine, share)
    if not nbytes or not m * n:
        return Kernel(engine.launch_s, 0.0, 0.0)
    available = _available(tiling, share)
    body, used = min(_tiled(batch, m, n, k, rate, tile, tiling, available, ragged) for tile in tiling.tiles)
    return _bounded(body, nbytes, used / tiling.multiprocessors, machine, engine, tiling, share)


def _tiled(
    batch: int,
    m: int,
    n: int,
    k: int,
    rate: float,
    tile: tuple[int, ...],
    tiling: Tiling,
    available: int,
    ragged: bool,
) -> tuple[float, int]:
    """Seconds of all waves with one shape of tile, and the multiprocessors that have any."""
    rows, columns = tile
    down = -(-batch * m // rows) + batch // 2 if ragged else batch * -(-m // rows)
    tiles = down * -(-n // columns)
    waves = -(-tiles // available)
    efficiency = tiling.matmul_efficiency / (1 + tiling.operand_elements * (1 / rows + 1 / columns))
    one = 2 * rows * columns * k / (rate / tiling.multiprocessors * efficiency) + tiling.tile_s
    return waves * one, min(tiles, available)


def attention(
    heads: int,
    queries: int,
    keys: int,
    head_size: int,
    dtype: str,
    machine: HardwareModel,
    share: float = 1.0,
    *,
    key_heads: int | None = None,
    causal: bool = False,
    before: int = 0,
    backward: bool = False,
    engine: Engine | None = None,
) -> Kernel:
    """One kernel of exact attention (FlashAttention): ``heads`` (of all sequences) x ``queries`` x ``head_size``.

    There are ``key_heads`` heads of ``keys`` keys and values, as many as ``heads`` where not given. With ``causal``,
    query ``i`` sees keys ``0`` to ``before + i``. A tile is 128 queries of one head; it ends no sooner than the longest
    tile, nor than all tiles spread evenly, which scheduling the longest first comes near to.

    Raises:
        MachineError: as ``matmul_seconds``.
    """
    _check(share, heads=heads, queries=queries, keys=keys, head_size=head_size, before=before)
    engine = engine or machine.engines_of(EngineKind.COMPUTE)[0]
    key_heads = heads if key_heads is None else key_heads
    products = _BACKWARD_PRODUCTS if backward else 1.0
    pairs = visible_pairs(queries, keys, before) if causal else queries * keys
    flops = 4 * heads * pairs * head_size * products
    nbytes = int(2 * products) * _item_bytes(dtype) * head_size * (heads * queries + key_heads * keys)
    rate, tiling = _rate(engine, dtype, machine), machine.tiling
    if tiling is None:
        return _roofline(flops, nbytes, rate, machine, engine, share)
    if not nbytes or not flops:
        return Kernel(engine.launch_s, 0.0, 0.0)
    available = _available(tiling, share)
    rows = min(queries, 128)
    tiles = heads * -(-queries // 128)
    if queries < 128:  # short queries: the keys are divided among multiprocessors too (FlashDecoding)
        tiles = max(tiles, min(available, tiles * -(-keys // 256)))
    seen = min(keys, before + queries) if causal else keys
    longest = 4 * rows * seen * head_size * products if queries >= 128 else flops / tiles
    one = rate / tiling.multiprocessors * tiling.attention_efficiency
    body = max(flops / available, longest) / one + tiling.tile_s
    return _bounded(body, nbytes, min(tiles, available) / tiling.multiprocessors, machine, engine, tiling, share)


def visible_pairs(queries: int, keys: int, before: int = 0) -> int:
    """Pairs of a query and a key that causal attention computes: query ``i`` sees keys ``0`` to ``before + i``."""
    growing = max(0, min(queries, keys - before))
    return growing * before + growing * (growing + 1) // 2 + (queries - growing) * keys


def streaming(
    nbytes: int, machine: HardwareModel, share: float = 1.0, *, flops: int = 0, dtype: str = "float32"
) -> Kernel:
    """One kernel that reads and writes ``nbytes`` in all, and computes little: pointwise operators, norms, copies.

    Raises:
        MachineError: as ``matmul_seconds``.
    """
    _check(share, nbytes=nbytes, flops=flops)
    engine = machine.engines_of(EngineKind.COMPUTE)[0]
    tiling = machine.tiling
    rate = engine.flops_per_s.get(dtype) or engine.flops_per_s["default"]
    if tiling is None:
        return _roofline(flops, nbytes, rate, machine, engine, share)
    return _bounded(flops / (rate * share), nbytes, 0.0, machine, engine, tiling, share)


def _bounded(
    body: float, nbytes: float, used: float, machine: HardwareModel, engine: Engine, tiling: Tiling, share: float
) -> Kernel:
    """The slower of ``body`` and the memory, of which ``share`` of the multiprocessors may not saturate all."""
    bandwidth = machine.scratchpad_memory.bandwidth_bytes_per_s
    reached = tiling.memory_efficiency * min(1.0, share / tiling.saturating_share)
    moving = nbytes / (bandwidth * reached)
    seconds = max(body, moving)
    if seconds <= 0.0:
        return Kernel(engine.launch_s, 0.0, 0.0)
    # Waiting for memory, the multiprocessors that could be spared are those beyond what saturates it.
    waiting = min(share, tiling.saturating_share) * moving / seconds
    compute = min(1.0, max(used * body / seconds, waiting))
    return Kernel(engine.launch_s + seconds, compute, min(1.0, nbytes / bandwidth / seconds))


def _roofline(flops: float, nbytes: float, rate: float, machine: HardwareModel, engine: Engine, share: float) -> Kernel:
    moving = nbytes / machine.scratchpad_memory.bandwidth_bytes_per_s
    seconds = max(flops / (rate * share), moving)
    if seconds <= 0.0:
        return Kernel(engine.launch_s, 0.0, 0.0)
    return Kernel(engine.launch_s + seconds, flops / rate / seconds, moving / seconds)


def _available(tiling: Tiling, share: float) -> int:
    return max(1, int(tiling.multiprocessors * share + 1e-9))


def _rate(engine: Engine, dtype: str, machine: HardwareModel) -> float:
    rate = engine.flops_per_s.get(dtype) or engine.flops_per_s.get("default")
    if rate is None:
        raise MachineError(
            f"engine {engine.name!r} of machine {machine.name!r} states no flops_per_s; it cannot compute"
        )
    return rate


def _item_bytes(dtype: str) -> int:
    return _ITEM_BYTES.get(dtype, 1 if "8" in dtype else 4)


def _check(share: float, **sizes: int) -> None:
    if not 0.0 < share <= 1.0:
        raise MachineError(
            f"a kernel was given the share {share} of the multiprocessors; it takes a part above 0 and at most 1",
            hint="what is left to it is 1 less the compute_share of the collectives that run beside it",
        )
    for name, size in sizes.items():
        if size < 0:
            raise MachineError(f"a kernel was given {name} = {size}; sizes are 0 or more")
