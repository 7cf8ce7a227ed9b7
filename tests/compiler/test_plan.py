"""Plans as data: derived properties, JSON in and out, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.plan import SCHEMA_VERSION, Certificate, Load, PassRecord, Plan, Residence, Run, Source
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from opweave.errors import PlanError
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.odd import odd_graphs
from tests.graphs.plans import keep_everything, keep_nothing
from tests.graphs.strategies import graphs

DIAMOND = all_graphs()["diamond"]
CERTIFICATE = Certificate("additional_traffic_bytes", 12, 9, "lp", "residency")


def test_an_order_has_decided_nothing_else() -> None:
    plan = Plan.of_order(DIAMOND, machine(), (0, 2, 1, 3), streamed=("w", "a"))
    assert plan.order == (0, 2, 1, 3)
    assert plan.residences is None
    assert plan.streamed == ("a", "w")
    assert Plan.of_order(DIAMOND, machine()).order == (0, 1, 2, 3)


def test_another_order_drops_what_hung_on_the_old_one_and_keeps_the_records() -> None:
    record = PassRecord("order/given", 0.5, CERTIFICATE)
    plan = simulate(keep_everything(DIAMOND)).with_record(record)
    again = msgspec.structs.replace(plan, source=Source("onnx", fill_seed=3)).with_order((0, 2, 1, 3))
    assert again.residences is None
    assert all(i.start_s is None and isinstance(i, Run) for i in again.instructions)
    assert (again.passes, again.source.fill_seed) == ((record,), 3)
    assert again.certificates == (CERTIFICATE,)


def test_gaps() -> None:
    assert CERTIFICATE.gap == 0.25
    assert Certificate("peak_bytes", 0, 0, "analytic", "order").gap == 0


@given(odd_graphs(alone=True), st.booleans(), st.booleans())
def test_plans_survive_json(graph: Graph, keep: bool, timed: bool) -> None:
    plan = (keep_everything if keep else keep_nothing)(graph)
    plan = simulate(plan) if timed else plan
    plan = plan.with_record(PassRecord("residency/ilp", 1.5, CERTIFICATE, "a remark"))
    data = plan.to_json()
    assert Plan.from_json(data) == plan
    assert Plan.from_json(data).to_json() == data
    assert verify(Plan.from_json(data)) == verify(plan)


def test_plans_survive_files(tmp_path: Path) -> None:
    plan = keep_everything(DIAMOND)
    path = tmp_path / "new" / "folder" / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read plan '.*missing\.json': No such file"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot read plan"):
        Plan.load(tmp_path)
    (tmp_path / "half.json").write_text('{"schema_version": 1, ')
    with pytest.raises(PlanError, match=r"cannot read plan '.*half\.json': not a plan"):
        Plan.load(tmp_path / "half.json")


def changed(*path: str | int, to: Any) -> bytes:
    """The JSON of a plan with one value changed, or left out where ``to`` is ``...``."""
    document = json.loads(simulate(keep_everything(DIAMOND)).to_json())
    place = document
    for key in path[:-1]:
        place = place[key]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a plan"),
        (b"{", "not a plan"),
        (b"[]", "not a plan"),
        (b"null", "not a plan"),
        (b'{"schema_version": 1}', "not a plan: Object missing required field `graph`"),
        (b'{"schema_version": "1"}', "not a plan"),
        (b"{}", "missing required field `schema_version`"),
        (b"\xff\xfe", "not a plan"),
        (b"[" * 100_000, "not a plan"),
        (b'{"schema_version": 1, "graph": ' + b'{"a":' * 100_000, "not a plan"),
        (changed("schema_version", to=2), "schema version 2; this opweave reads version 1"),
        (changed("schema_version", to=...), "schema_version"),
        (changed("graph", to=...), "graph"),
        (changed("instructions", 0, "do", to="dance"), "dance"),
        (changed("instructions", 0, "do", to=...), "do"),
        (changed("instructions", 0, "start_s", to="soon"), "start_s"),
        (changed("residences", 0, "begin", to=0.5), "begin"),
        (changed("residences", 0, "offset", to="far"), "offset"),
        (changed("graph", "tensors", 0, "dtype", to="float33"), "the plan contradicts itself: tensor 'x' has dtype"),
        (changed("graph", "tensors", 0, "shape", to=[-1]), "the plan contradicts itself: tensor 'x' has shape"),
        (changed("graph", "ops", 1, "inputs", to=["gone"]), "names tensor 'gone'"),
        (changed("graph", "outputs", to=["gone"]), "names tensor 'gone'"),
        (changed("machine", "scratchpad", to="dram"), "the plan contradicts itself"),
        (changed("machine", "memories", 0, "capacity_bytes", to=0), "capacity_bytes"),
        (changed("machine", "engines", to=[]), "no engine"),
        (changed("residence", to=[]), "unknown field `residence`"),  # a slip must not pass for "undecided"
        (changed("instructions", 0, "begin_s", to=0.0), "unknown field `begin_s`"),
        (changed("graph", "tensors", 0, "bufer", to="x"), "unknown field `bufer`"),
    ],
)
def test_malformed_plans_end_in_one_error(data: bytes, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(data)
    assert message in str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=4), children, max_size=2),
    max_leaves=4,
)


@given(st.data())
def test_damaged_plans_are_refused_or_can_be_judged(data: st.DataObject) -> None:
    """Whatever one value is replaced by: a PlanError, or a plan that verify can judge without raising."""
    document = json.loads(simulate(keep_nothing(all_graphs()["in_place"])).to_json())
    place: Any = document
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 4)) == 0:
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    try:
        plan = Plan.from_json(json.dumps(document))
    except PlanError:
        return
    verification = verify(plan)
    assert verification.total_bytes == verification.compulsory_bytes + verification.additional_bytes


@given(graphs(), st.data())
def test_truncated_plans_are_refused(graph: Graph, data: st.DataObject) -> None:
    whole = keep_everything(graph).to_json()
    with pytest.raises(PlanError):
        Plan.from_json(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_a_hundred_thousand_instructions_load_and_verify() -> None:
    """25,000 operators, each with two loads before it and a store behind it."""
    g = GraphBuilder("long")
    w = g.weight("w", 1, 4)
    y = g.input("x", 1, 4)
    for i in range(25_000):
        y = g.binary("add", y, w, f"y{i}")
    plan = keep_nothing(g.build(y))
    assert len(plan.instructions) == 100_000
    again = Plan.from_json(plan.to_json())
    assert again == plan
    verification = verify(again)
    assert verification.ok
    assert verification.peak_bytes == 3 * 16
    assert verification.total_bytes == 75_000 * 16


def test_instructions_say_what_they_do_in_json() -> None:
    plan = Plan(DIAMOND, machine(), (Load("x"),), (Residence("x", "sram", 0, 1),))
    document = json.loads(plan.to_json())
    assert document["instructions"] == [{"do": "load", "buffer": "x"}]
    assert document["residences"] == [{"buffer": "x", "memory": "sram", "begin": 0, "end": 1}]
