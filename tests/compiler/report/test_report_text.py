"""The summary states the verifier's and simulator's figures, in words that fit them."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import msgspec
import pytest

from opweave.compiler.plan import Certificate, PassRecord
from opweave.compiler.report.text import OBJECTIVES, PROVERS, SCOPES, summary, summary_dict
from opweave.compiler.simulate import latency_ns, timeline_summary
from opweave.compiler.verify import verify
from tests.compiler.report.report_plans import (
    HOSTILE_NAME,
    at_every_level,
    decided,
    faulty,
    hostile,
    recorded,
    spilling,
)
from tests.graphs.build import all_graphs


def test_the_summary_states_the_recounted_figures() -> None:
    plan = spilling()
    counted, text = verify(plan), summary(plan)
    assert counted.additional_bytes > 0
    for figure in (counted.compulsory_bytes, counted.additional_bytes, counted.total_bytes, counted.peak_bytes):
        assert f"{figure:,} B" in text
    assert f"verified; {len(plan.graph.ops)} runs, " in text
    assert "none of the passes proved a bound" in text


def test_the_summary_names_what_moved_most() -> None:
    """The buffers listed as spilled are the verifier's, most additional bytes first."""
    plan = spilling()
    extra = {t.buffer: t.total_bytes - t.compulsory_bytes for t in verify(plan).traffic}
    listed = [row["buffer"] for row in summary_dict(plan)["moved"]]
    assert [extra[name] for name in listed] == sorted(extra.values(), reverse=True)
    assert f"  {listed[0]} (" in summary(plan).partition("\nadditional ")[2]


def test_certificates_are_put_into_words() -> None:
    plan = recorded()
    text = summary(plan)
    value = verify(plan).additional_bytes
    assert f"residency/ilp: additional traffic {value:,} B, bound {value - value // 8:,} B\n" in text
    assert "gap 12.5 % over every residency of this order, by integer programming\n" in text
    assert "optimal over every order, with nothing spilled, by exhaustive search; of the plan before later" in text


def test_every_certificate_there_can_be_has_words() -> None:
    kinds = {name: set(get_args(hint)) for name, hint in get_type_hints(Certificate).items() if get_args(hint)}
    assert kinds == {"objective": set(OBJECTIVES), "proved_by": set(PROVERS), "scope": set(SCOPES)}
    plan = decided(all_graphs()["chain"])
    for objective in kinds["objective"]:
        counted = getattr(verify(plan), objective.replace("additional_traffic", "additional"), latency_ns(plan))
        stands = Certificate(objective, counted, counted, "lp", "address")
        differs = Certificate(objective, counted + 1, 0, "lp", "address")
        recorded = msgspec.structs.replace(plan, passes=(PassRecord("p", 0, stands), PassRecord("q", 0, differs)))
        assert [c["stands"] for c in summary_dict(recorded)["certificates"]] == [True, False]


def test_passes_and_imported_operators_are_listed() -> None:
    text = summary(recorded())
    assert "order/exact" in text
    assert "searched everything" in text
    assert "14 native, 2 fallback" in text
    assert "fallback: TopK 2" in text
    assert "opaque" not in text


def test_the_time_section_states_the_simulators_figures() -> None:
    plan = spilling()
    timeline, facts = timeline_summary(plan), summary_dict(plan)["time"]
    assert facts["latency_s"] == timeline.latency_s
    assert facts["bound_s"] == timeline.bound_s
    assert facts["terms"][facts["bound_by"]] == timeline.bound_s
    assert [e["busy_s"] for e in facts["engines"]] == [e.busy_s for e in timeline.engines]
    assert f"set by {timeline.bound_by}" in summary(plan)


def test_faults_come_first() -> None:
    plan = faulty()
    lines = summary(plan).splitlines()
    faults = verify(plan).faults
    assert lines[0] == f"THIS PLAN IS WRONG: {len(faults)} faults"
    assert str(faults[0]) in lines[1]
    assert "DOES NOT VERIFY" in summary(plan)
    assert "verified;" not in summary(plan)


@pytest.mark.parametrize("name", all_graphs())
def test_every_graph_has_a_summary_at_every_level(name: str) -> None:
    for level, plan in at_every_level(all_graphs()[name]).items():
        if all_graphs()[name].ops:
            assert summary_dict(plan)["level"] == level
        assert summary(plan).startswith("model")


@pytest.mark.parametrize("plan", [spilling(), recorded(), hostile(), faulty()])
def test_the_dictionary_survives_json(plan: object) -> None:
    facts = summary_dict(plan)  # type: ignore[arg-type]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_names_cannot_command_the_terminal() -> None:
    plan = spilling()
    graph = msgspec.structs.replace(plan.graph, name="a\x1b[2Jb\nverified\u202e")
    text = summary(msgspec.structs.replace(plan, graph=graph))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"a\x1b[2Jb\nverified" in text
    assert HOSTILE_NAME.replace("\u2028", r"\u2028") in summary(hostile())
