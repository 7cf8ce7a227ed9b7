"""Passes are found by path, made from a spec, and say what is wrong with one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from opweave.errors import OptionError
from opweave.passes import registry
from opweave.passes.residency.ilp import IlpResidency


def test_every_pass_is_a_frozen_dataclass_named_by_its_path_and_described() -> None:
    assert set(registry.names()) >= {f"residency/{m}" for m in ("belady", "ilp", "least_cost", "refetch")}
    for name in registry.names():
        made = registry.make(name)
        assert made.name == name
        assert dataclasses.is_dataclass(made)
        assert made.__dataclass_params__.frozen
        description = registry.describe(name)
        assert description.name == name
        assert description.summary
        assert {option.name: option.default for option in description.options} == {
            field.name: getattr(made, field.name)
            for field in dataclasses.fields(made)
            if not field.metadata.get("internal")
        }


def test_names_come_without_importing_a_solver() -> None:
    script = "import sys; from opweave.passes.registry import names; names(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"highspy", "pulp", "ortools", "torch"} & set(done.stdout.split())


def test_options_are_read_as_literals() -> None:
    assert registry.make(" residency/ilp( reserve_bytes = 64 ) ") == IlpResidency(reserve_bytes=64)
    assert registry.make("residency/ilp()") == IlpResidency()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("residency/ipl", r"no pass 'residency/ipl'.*residency/ilp.*did you mean 'residency/ilp'"),
        ("residency/gaps", "no pass 'residency/gaps'"),
        ("", "no pass ''"),
        ("residency/ilp(reserve=1)", "no option 'reserve'; it has reserve_bytes.*did you mean 'reserve_bytes'"),
        ("residency/refetch(width=1)", "no option 'width'; it has none"),
        (
            "residency/ilp(reserve_bytes='a')",
            "'reserve_bytes' .* cannot be 'a': expected int, got str",
        ),
        ("residency/ilp(reserve_bytes=much)", "cannot be 'much': expected int, got str"),
        ("residency/ilp(reserve_bytes=True)", "expected int, got bool"),
        ("residency/ilp(reserve_bytes=-1)", "reserve_bytes"),
        ("residency/ilp(64)", "cannot read.*options are written"),
        ("residency/ilp(reserve_bytes=64", "cannot read"),
        ("residency/ilp(reserve_bytes=64))", "cannot read"),
        ("residency/ilp(reserve_bytes=64)(x=1)", "cannot read"),
        ("residency/ilp(**{'a': 1})", "cannot read"),
        ("residency/ilp(reserve_bytes=__import__('os'))", "cannot read"),
    ],
)
def test_a_wrong_spec_is_explained(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"(?s){message}"):
        registry.make(spec)


def test_a_pass_that_does_not_exist_cannot_be_described() -> None:
    with pytest.raises(OptionError, match="no pass"):
        registry.describe("order/none")
