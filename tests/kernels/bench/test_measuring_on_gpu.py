"""The clock of a CUDA device, and one whole case and one tuning there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels import registry
from opweave.kernels.bench import command
from opweave.kernels.bench.figures import lines_of
from opweave.kernels.bench.measuring import Gpu
from opweave.kernels.bench.problem import Case
from opweave.kernels.bench.roofline import machine_of, roofline_of
from opweave.kernels.bench.rows import read_rows
from opweave.kernels.bench.tuner import tune

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


def test_times_are_taken_on_a_gpu_only() -> None:
    with pytest.raises(ExecutionError, match="not on cpu"):
        Gpu(torch.device("cpu"))


@pytest.mark.parametrize("nbytes", [1 << 20, 1 << 24])
class TestOnGpu:
    """Marked one by one, so that the test above runs everywhere."""

    pytestmark = GPU

    def test_the_peak_is_what_a_step_allocates(self, nbytes: int) -> None:
        gpu = Gpu(CUDA)
        assert gpu.peak_bytes(lambda: torch.empty(nbytes, dtype=torch.uint8, device=CUDA)) == nbytes

    def test_a_step_is_captured_and_does_the_same(self, nbytes: int) -> None:
        gpu, x = Gpu(CUDA), torch.zeros(nbytes, device=CUDA)
        step, note = gpu.captured(lambda: x.add_(1))
        assert note == ""
        x.zero_()
        step()
        step()
        gpu.finish()
        assert x[0].item() == 2
        assert all(ms > 0 for ms in gpu.milliseconds(step, 5.0))

    def test_a_step_that_waits_is_called_as_it_is(self, nbytes: int) -> None:
        gpu, x = Gpu(CUDA), torch.zeros(nbytes, device=CUDA)
        step, note = gpu.captured(lambda: x.sum().item())
        assert note == "waits for the device: not captured"
        assert step() == 0.0
        assert gpu.captured(lambda: x.add_(1))[1] == "", "the failure before must leave nothing behind"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_exceed_its_data_sheet() -> None:
    gpu = Gpu(CUDA)
    measured = gpu.measured()
    assert measured.bytes_per_s > 1e11
    assert measured.rate("bfloat16") > measured.rate("float32")
    machine = machine_of(gpu.name)
    if machine is not None:
        stated = roofline_of(machine)
        assert 0.5 < measured.bytes_per_s / stated.bytes_per_s < 1.02
        assert 0.3 < measured.rate("bfloat16") / stated.rate("bfloat16") < 1.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_case_is_measured_from_start_to_end(tmp_path: Path) -> None:
    asked = command.Asked(filters=("add_rms_norm/*8B, 4096 tokens",), modes=("forward",), minutes=2.0, out=tmp_path)
    command.kernels(asked, lambda line: None)
    rows = read_rows(tmp_path / "kernels.json")[1]
    lines = {line.provider: line for line in lines_of(rows) if line.case.startswith("add_rms_norm/")}
    assert {"opweave", "eager", "Inductor"} <= set(lines)
    for name in ("opweave", "eager", "Inductor"):
        assert lines[name]["ms"], lines[name].note
        assert "DIFFERS" not in lines[name].note
    assert 5 < (lines["opweave"]["percent_of_measured"] or 0) < 110


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_finds_something_at_least_as_fast() -> None:
    kernel = registry.load("add_rms_norm")
    found = tune(Case(kernel, kernel.workloads[1], torch.bfloat16), Gpu(CUDA), 60.0)
    assert found.best is not None
    assert found.best.ms <= found.best.default_ms
