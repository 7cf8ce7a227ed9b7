"""The H100 that is not there: what torch says of it, and that it is gone afterwards."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from torch._dynamo.device_interface import get_interface_for_device
from torch._inductor.runtime.hints import DeviceProperties
from torch.utils._triton import has_triton

from tests.support.hopper import DEVICE, h100


def told() -> tuple[object, ...]:
    """What Inductor asks for."""
    return torch.cuda.is_available(), torch.cuda.device_count(), has_triton()


def test_torch_believes_in_one_h100_and_only_within() -> None:
    before = told()
    with h100() as device:
        assert device == DEVICE
        assert told() == (True, 1, True)
        assert get_interface_for_device("cuda").get_compute_capability(device) == 90
        properties = DeviceProperties.create(device)
        assert (properties.type, properties.cc, properties.multi_processor_count) == ("cuda", 90, 132)
    assert told() == before


def test_it_goes_when_its_block_fails() -> None:
    before = told()
    with pytest.raises(KeyError, match="reason"), h100():
        raise KeyError("reason")
    assert told() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to launch on")
def test_nothing_can_be_allocated_on_it() -> None:
    with h100() as device, pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        torch.empty(1, device=device)
