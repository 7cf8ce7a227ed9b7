"""Programs for an H100 with tensors on the host beside those on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.dynamo.lowering import lower
from opweave.compiler.runtime.device.program import Item, Origin, Program
from tests.support.hopper import DEVICE, h100

HOST = torch.device("cpu")
Place = tuple[tuple[int, ...], torch.device]


@pytest.fixture(scope="module", autouse=True)
def _one_h100() -> Iterator[None]:
    with h100():
        yield


def program_of(function: Callable[..., tuple[torch.Tensor, ...]], *places: Place) -> Program:
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(shape, device=device) for shape, device in places]
        module = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
        return lower(module, inputs, is_inference=True)


def test_kernels_take_numbers_on_the_host_by_value() -> None:
    program = program_of(lambda x, number: (x.sin() * number,), ((64, 64), DEVICE), ((), HOST))
    (call,) = program.calls
    (number,) = (item for item in call.args if isinstance(item, Item))
    assert program.storage_of(number).device == HOST
    assert number.name in call.views  # still read, and kept as long


def test_what_lies_on_the_host_has_no_place_in_the_arena() -> None:
    """There and back, with a kernel on each side."""
    program = program_of(lambda x: ((x.sin().cpu() + 1).cos().to(DEVICE) * 2,), ((64, 64), DEVICE))
    targets = [call.target for call in program.calls]
    assert targets.count("aten.copy_.default") == 2
    assert {kernel.language for kernel in program.kernels.values()} == {"triton", "cpp"}
    for storage in program.storages.values():
        if storage.device == HOST:
            assert storage.origin is Origin.CALL
    assert any(storage.device == HOST for storage in program.storages.values())


def test_results_on_the_host() -> None:
    program = program_of(lambda x: (x.sin().cpu(), x.cos()), ((64, 64), DEVICE))
    assert [program.storage_of(ref).device for ref in program.outputs] == [HOST, DEVICE]
