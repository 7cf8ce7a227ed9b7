"""Kernel times follow from tiles, waves and bytes, and never from less than the machine's peaks allow."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.errors import MachineError
from opweave.hw_models import HardwareModel, load, op_seconds
from opweave.hw_models.matmul import Kernel, attention, matmul, matmul_seconds, streaming, visible_pairs
from opweave.hw_models.model import EngineKind, Tiling

H100 = load("h100-sxm")
PEAK, BANDWIDTH = 989.5e12, 3.35e12
LAUNCH = H100.engines_of(EngineKind.COMPUTE)[0].launch_s
SIZES = st.integers(1, 8192)


def _square() -> HardwareModel:
    """An H100 whose only tile is 128 x 128, at the peak, without begin and end, and whose memory nobody waits for."""
    assert H100.tiling is not None
    changes = {"tiles": ((128, 128),), "matmul_efficiency": 1.0, "operand_elements": 0.0, "tile_s": 0.0}
    tiling = msgspec.structs.replace(H100.tiling, **changes)
    memories = tuple(msgspec.structs.replace(memory, bandwidth_bytes_per_s=1e15) for memory in H100.memories)
    return msgspec.structs.replace(H100, tiling=tiling, memories=memories)


def _body(down: int, across: int, machine: HardwareModel, share: float = 1.0) -> float:
    """Seconds of as many tiles without the launch."""
    return matmul_seconds(128 * down, 128 * across, 16384, "bfloat16", machine, share) - LAUNCH


def test_one_tile_too_many_costs_a_wave() -> None:
    """132 tiles fill the multiprocessors; one more waits for all of them, and 264 cost nothing beyond that."""
    wave = 2 * 128 * 128 * 16384 / (PEAK / 132)
    machine = _square()
    assert _body(1, 1, machine) == pytest.approx(wave)
    assert _body(12, 11, machine) == pytest.approx(wave)
    assert _body(19, 7, machine) == pytest.approx(2 * wave)
    assert _body(24, 11, machine) == pytest.approx(2 * wave)
    assert _body(53, 5, machine) == pytest.approx(3 * wave)


def test_multiprocessors_taken_away_may_cost_a_wave() -> None:
    """124 of 132 are left beside a collective of 8 programs: 132 tiles then take two waves, 124 still one."""
    machine = _square()
    assert _body(31, 4, machine, 124 / 132) == pytest.approx(_body(31, 4, machine))
    assert _body(12, 11, machine, 124 / 132) == pytest.approx(2 * _body(12, 11, machine))


def test_batches_share_waves_and_ragged_ones_lose_half_a_tile_each() -> None:
    """6 products of 2 x 11 tiles are one wave; with ragged rows 3 rows of tiles come in addition, and a second wave."""
    machine = _square()
    one = _body(12, 11, machine)
    batched = matmul_seconds(256, 1408, 16384, "bfloat16", machine, batch=6) - LAUNCH
    assert batched == pytest.approx(one)
    ragged = matmul(256, 1408, 16384, "bfloat16", machine, batch=6, ragged=True)
    assert ragged.seconds - LAUNCH == pytest.approx(2 * one)
    begun = matmul(750, 1408, 16384, "bfloat16", machine, batch=2, ragged=True)  # 12 rows of tiles begun, and one lost
    assert begun.seconds - LAUNCH == pytest.approx(2 * one)


@given(SIZES, SIZES, SIZES, st.sampled_from([0.2, 0.5, 0.94, 1.0]))
def test_products_respect_both_roofs_and_monotony(m: int, n: int, k: int, share: float) -> None:
    """No product is faster than its flops or its bytes, than a smaller one, or with fewer multiprocessors."""
    kernel = matmul(m, n, k, "bfloat16", H100, share)
    assert kernel.seconds >= LAUNCH + 2 * m * n * k / (PEAK * share) * (1 - 1e-9)
    assert kernel.seconds >= LAUNCH + 2 * (m * k + k * n + m * n) / BANDWIDTH
    assert 0 < kernel.compute <= share + 1e-9
    assert 0 < kernel.memory <= 1
    assert kernel.seconds >= matmul_seconds(m, n, k, "bfloat16", H100)
    for less in ((max(1, m // 2), n, k), (m, max(1, n // 2), k), (m, n, max(1, k // 2))):
        assert matmul_seconds(*less, "bfloat16", H100, share) <= kernel.seconds * (1 + 1e-9)


@given(SIZES, SIZES)
def test_splitting_rows_never_gains_with_one_tile(first: int, second: int) -> None:
    """Two launches have at least the waves of one; only a choice of tiles can hide that."""
    machine = _square()
    whole = matmul_seconds(first + second, 1280, 4096, "bfloat16", machine)
    parts = [matmul_seconds(rows, 1280, 4096, "bfloat16", machine) for rows in (first, second)]
    assert sum(parts) >= whole * (1 - 1e-9)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_visible_pairs_are_those_counted_one_by_one(queries: int, keys: int, before: int) -> None:
    counted = sum(min(keys, before + i + 1) for i in range(queries))
    assert visible_pairs(queries, keys, before) == counted


def test_causal_attention_costs_what_it_sees() -> None:
    """The second half of a causal sequence sees three quarters of the pairs, and both halves take the whole's time."""
    whole = attention(64, 16384, 16384, 128, "bfloat16", H100, causal=True).seconds
    first = attention(64, 8192, 8192, 128, "bfloat16", H100, causal=True).seconds
    second = attention(64, 8192, 16384, 128, "bfloat16", H100, causal=True, before=8192).seconds
    square = attention(64, 16384, 16384, 128, "bfloat16", H100).seconds
    assert first + second == pytest.approx(whole, rel=0.01)
    assert second == pytest.approx(3 * first, rel=0.02)
    assert square == pytest.approx(2 * whole, rel=0.01)
    assert attention(64, 8192, 8192, 128, "bfloat16", H100, backward=True).seconds > 2 * square / 4


def test_decode_attention_waits_for_memory() -> None:
    """One query a sequence reads all keys and values once, at what a streaming kernel reaches."""
    kernel = attention(64 * 64, 1, 4096, 128, "bfloat16", H100, key_heads=64 * 8)
    nbytes = 2 * 2 * 128 * (64 * 64 + 64 * 8 * 4096)
    assert kernel.seconds == pytest.approx(LAUNCH + nbytes / (0.9 * BANDWIDTH))
    assert kernel.compute < 1


def test_streaming_needs_half_of_the_multiprocessors() -> None:
    """With half of them as fast as with all, with a quarter half as fast."""
    times = [streaming(1 << 30, H100, share).seconds - LAUNCH for share in (1.0, 0.5, 0.25)]
    assert times[0] == times[1] == pytest.approx((1 << 30) / (0.9 * BANDWIDTH))
    assert times[2] == pytest.approx(2 * times[0])


def test_without_a_tiling_the_roofline_holds() -> None:
    machine = load("tpuv4i-like")
    engine = machine.engines_of(EngineKind.COMPUTE)[0]
    nbytes = 2 * (512 * 256 + 256 * 1024 + 512 * 1024)
    expected = op_seconds(2 * 512 * 1024 * 256, "bfloat16", nbytes, 0, machine, engine)
    assert matmul_seconds(512, 1024, 256, "bfloat16", machine) == pytest.approx(expected)


def test_nothing_to_do_is_a_launch() -> None:
    assert matmul(0, 128, 128, "bfloat16", H100) == Kernel(LAUNCH, 0.0, 0.0)
    assert attention(8, 0, 0, 128, "bfloat16", H100).seconds == LAUNCH
    assert streaming(0, H100).seconds == LAUNCH


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(MachineError, match="share"):
        matmul_seconds(1, 1, 1, "bfloat16", H100, share)


def test_negative_sizes_are_refused_by_name() -> None:
    with pytest.raises(MachineError, match="k = -1"):
        matmul_seconds(1, 1, -1, "bfloat16", H100)


@pytest.mark.parametrize("tiles", [(), ((128,),), ((128, 128, 64),)])
def test_tiles_have_rows_and_columns(tiles: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(MachineError, match="rows and columns"):
        Tiling(132, tiles, 0.9, 10.0, 0.0, 0.6, 0.9, 0.5)
