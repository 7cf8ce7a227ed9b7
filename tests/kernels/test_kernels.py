"""What every kernel has to have, and to agree with itself on; a new one is found by its file's name."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

import torch
import triton
from triton.runtime.jit import JITFunction

from opweave import kernels
from opweave.compiler.graph import Graph
from opweave.kernels import registry
from opweave.kernels._checks import dtype_name
from opweave.kernels._configs import Config
from opweave.kernels._kernel import Kernel
from opweave.kernels._match import Cost
from opweave.kernels.bench.offline import choice
from opweave.kernels.bench.problem import tensors_in
from tests.graphs.build import all_graphs
from tests.kernels.conforming import Case, Cases, cases_of
from tests.kernels.matching import check_matches

HERE = Path(__file__).parent
FOLDER = Path(kernels.__path__[0])
NAMES = tuple(name for name in registry.names() if (FOLDER / f"{name}.py").is_file())
ARCHITECTURES = (80, 90)
MOST_ROWS = 6  # of an architecture: all of them are compiled in CI


@functools.cache
def kernel_of(name: str) -> Kernel:
    return registry.load(name)


def module_of(name: str) -> Any:
    return import_module(f"opweave.kernels.{name}")


@pytest.fixture(params=NAMES)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return kernel_of(request.param)


def smallest(cases: Cases) -> Case:
    """The smallest case of sizes above 0."""
    found = [case for case in cases.cases if all(v != 0 for v in case.sizes.values()) and not case.config]
    return min(found or cases.cases, key=lambda case: sum(v for v in case.sizes.values() if isinstance(v, int)))


def inputs_of(cases: Cases, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return case.change(cases.kernel.arguments(dtype, "cpu", **case.sizes))


def test_there_are_kernels() -> None:
    assert "add_rms_norm" in NAMES
    with pytest.raises(Exception, match="did you mean 'add_rms_norm'"):
        registry.load("add_rms_nrom")


def test_opweave_imports_neither_kernels_nor_triton() -> None:
    code = "import sys, opweave; sys.exit(any(n.split('.')[0] == 'triton' or 'kernels' in n for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_names_are_listed_without_importing_them() -> None:
    code = (
        "import sys; from opweave.kernels import registry; names = registry.names(); "
        "sys.exit(any(n.split('.')[0] in ('torch', 'triton') or n.endswith(names) for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_has_its_files(name: str) -> None:
    """Cases of its own; configurations and tests too, or those of the kernel it belongs to."""
    configs = kernel_of(name).configs.kernel
    for path in (HERE / "cases" / f"{name}.py", FOLDER / "configs" / f"{configs}.toml"):
        assert path.is_file(), f"{path.name} is missing"
    tests = [path for path in HERE.glob("test_*.py") if re.search(rf"\b{name}\b", path.read_text())]
    assert tests, f"no test file of tests/kernels speaks of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_its_parts_are_documented_and_named_for_it(name: str) -> None:
    kernel, module = kernel_of(name), module_of(name)
    assert kernel.name == name
    assert "KERNEL" in module.__all__
    assert module.__doc__
    parts = (kernel.launch, kernel.allocate, kernel.reference, kernel.eager, kernel.cost, kernel.matches)
    for part in (*parts, kernel.arguments):
        assert part.__doc__, f"{part.__name__} has no docstring"
    functions = [value for value in vars(module).values() if isinstance(value, JITFunction)]
    assert all(function.fn.__doc__ for function in functions), "a @triton.jit function has no docstring"


def test_its_functions_agree_on_their_arguments(kernel: Kernel) -> None:
    """What is computed from inputs takes the launcher's, in its order; what is computed from sizes takes the same."""
    inputs = list(kernel.inputs)
    for function in (kernel.allocate, kernel.reference, kernel.eager):
        assert list(inspect.signature(function).parameters) == inputs, function.__name__
    launch = inspect.signature(kernel.launch).parameters
    assert launch["config"].default is None
    assert all(p.default is p.empty for p in launch.values() if p.name in kernel.written)
    assert set(kernel.scratch) < set(kernel.written)
    assert set(kernel.mutates) <= set(inputs)


def test_the_operators_write_only_what_they_say(kernel: Kernel) -> None:
    """The functional one writes nothing; the other its outputs and what the kernel mutates."""
    functional = getattr(torch.ops.opweave, kernel.name).default._schema
    writing = getattr(torch.ops.opweave, f"{kernel.name}_out").default._schema
    assert [argument.name for argument in functional.arguments] == list(kernel.inputs)
    assert [argument.name for argument in writing.arguments] == [*kernel.inputs, *kernel.written]
    assert not functional.is_mutable
    assert len(functional.returns) == len(kernel.results)
    assert not writing.returns
    written = [a.name for a in writing.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert sorted(written) == sorted((*kernel.mutates, *kernel.written))


@pytest.mark.parametrize("name", NAMES)
def test_workloads_work_at_full_size_without_memory(name: str) -> None:
    """On ``meta``, sizes are as large as they come; cost, arguments and outputs go by the same sizes."""
    kernel = kernel_of(name)
    assert kernel.workloads
    assert len({workload.name for workload in kernel.workloads}) == len(kernel.workloads)
    assert set(kernel.dtypes) <= {torch.float32, torch.float16, torch.bfloat16}
    for workload in kernel.workloads:
        for dtype in kernel.dtypes:
            made = kernel.arguments(dtype, "meta", **workload.sizes)
            assert list(made) == list(kernel.inputs)
            assert all(v.is_meta for v in made.values() if isinstance(v, torch.Tensor))
            outputs = kernel.allocate(*made.values())
            assert len(outputs) == len(kernel.written)
            assert all(output.is_meta for output in outputs)
            cost = kernel.cost(dtype_name(dtype), **workload.sizes)
            assert isinstance(cost, Cost)
            assert cost.flops >= 0
            check_traffic(kernel, dict(zip(kernel.written, outputs, strict=True)), cost)


def check_traffic(kernel: Kernel, outputs: Mapping[str, torch.Tensor], cost: Cost) -> None:
    """Every result is written, so it is in the bytes that are counted."""
    results = sum(outputs[name].nbytes for name in kernel.results if name not in kernel.mutates)
    assert results <= cost.traffic_bytes, "less traffic than the results have bytes"


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_the_same_for_the_same_seed(name: str) -> None:
    cases = cases_of(name)
    case = smallest(cases)
    dtype = (case.dtypes or cases.kernel.dtypes)[0]
    first, second, other = (cases.kernel.arguments(dtype, "cpu", seed, **case.sizes) for seed in (0, 0, 1))
    tensors = {name: value for name, value in first.items() if isinstance(value, torch.Tensor)}
    assert tensors
    assert all(torch.equal(value, second[name]) for name, value in tensors.items())
    assert any(not torch.equal(value, other[name]) for name, value in tensors.items())


@pytest.mark.parametrize("name", NAMES)
def test_reference_allocation_and_eager_agree_on_results(name: str) -> None:
    """In number, shape and dtype; what a user says may leave out results at the end."""
    cases = cases_of(name)
    kernel = cases.kernel
    assert kernel is kernel_of(name)
    case = smallest(cases)
    for dtype in case.dtypes or kernel.dtypes:
        inputs = inputs_of(cases, case, dtype)
        made = dict(zip(kernel.written, kernel.allocate(*inputs.values()), strict=True))
        references = kernel.reference(*inputs.values())
        assert isinstance(references, tuple)
        assert len(references) == len(kernel.results)
        for result, value in zip(kernel.results, references, strict=True):
            wanted = inputs[result] if result in kernel.mutates else made[result]
            assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype), f"the reference's {result}"
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs.values()]
        spoken = tensors_in(kernel.eager(*copies))
        shapes = [value.shape for value in references]
        assert spoken, "eager gives nothing"
        assert [value.shape for value in spoken] == shapes[: len(spoken)], "eager"


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_few_and_valid(name: str) -> None:
    """Powers of two, up to what Triton takes; the last row holds for every size."""
    configs = kernel_of(name).configs
    assert configs.kernel in NAMES
    assert configs.fingerprint
    for architecture in ARCHITECTURES:
        rows = configs.of_architecture(architecture)
        assert 1 <= len(rows) <= MOST_ROWS + 1
        assert not rows[-1].up_to, "the last row has to hold for all sizes"
        assert len({str((row.options, row.up_to)) for row in rows}) == len(rows)
        names = {frozenset(row.constants) for row in rows}
        assert len(names) == 1, "rows name different constants"
        for row in rows:
            check_row(row)


def test_an_architecture_without_rows_takes_those_that_fit_it() -> None:
    """Of the nearest older one; but GPUs of 12.x have less shared memory than the Hopper rows may need."""
    configs = kernel_of("gated_linear").configs
    for architecture, expected in {75: 80, 86: 80, 89: 80, 90: 90, 100: 90, 120: 80, 121: 80}.items():
        assert configs.of_architecture(architecture) is configs.rows[expected], architecture


def check_row(row: Config) -> None:
    assert row.num_warps in (1, 2, 4, 8, 16, 32)
    assert 1 <= row.num_stages <= 8
    for name, value in row.constants.items():
        assert name == name.lower()
        assert value >= 0
        if name.startswith("block"):
            assert value == triton.next_power_of_2(value), f"{name} = {value} is no power of two"
    assert all(bound >= 0 for bound in row.up_to.values())


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_chosen_by_dtype_and_sizes(name: str) -> None:
    """Or results of tuning could neither be stored nor found."""
    kernel = kernel_of(name)
    for workload in kernel.workloads:
        found = choice(kernel, workload.sizes, kernel.dtypes[0])
        assert found is not None, "the launch does not choose among the kernel's configurations"
        assert found.dtype in kernel.dtypes
        assert found.sizes


@pytest.mark.parametrize("name", NAMES)
def test_cases_cover_dtypes_tails_and_forced_configurations(name: str) -> None:
    """Every dtype, an empty input, and several tiles, with the blocks that force them where rows have blocks."""
    cases = cases_of(name)
    for dtype in cases.kernel.dtypes:
        assert any(dtype in (case.dtypes or cases.kernel.dtypes) for case in cases.cases)
    assert any(0 in case.sizes.values() for case in cases.cases), "no case without elements"
    assert len(cases.cases) >= 4


@pytest.mark.parametrize("graph", all_graphs().values(), ids=all_graphs())
def test_matches_on_small_graphs_are_well_formed(kernel: Kernel, graph: Graph) -> None:
    check_matches(kernel, graph)
