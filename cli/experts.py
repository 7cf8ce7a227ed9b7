"""The command that places the experts of a mixture-of-experts model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import AsJson, Deterministic, MachineName, TimeLimit, print_json, say

__all__ = ["experts"]


def experts(
    trace: Annotated[Path, typer.Argument(help="Routing trace: .npz or .json with 'chosen' and 'experts'.")],
    machine: MachineName = "8xh100-nvlink",
    devices: Annotated[int | None, typer.Option(help="How many of its devices; all if left out.")] = None,
    token_bytes: Annotated[int, typer.Option(help="Bytes of a token's row: hidden size times size of element.")] = 8192,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the placement here, as JSON.")] = None,
    time_limit: TimeLimit = 60.0,
    deterministic: Deterministic = False,
    as_json: AsJson = False,
) -> int:
    """Place a model's experts on devices: balanced, and with less to move, from a routing trace."""
    import msgspec

    from ..compiler.pipeline import Budget
    from ..hw_models.registry import load
    from ..passes.experts.placement import PlaceExperts
    from ..passes.experts.trace import read_trace

    method = PlaceExperts(devices=devices, token_bytes=token_bytes)
    budget = Budget.of_seconds(time_limit, deterministic=deterministic)
    found = method.place(read_trace(trace), load(machine), budget)
    if output is not None:
        found.save(output)
    if as_json:
        print_json(msgspec.to_builtins(found))
        return 0
    rows = (
        ("fullest device over mean", "imbalance", 1.0, ".3f"),
        ("the same, worst layer", "worst_imbalance", 1.0, ".3f"),
        ("moved between layers, MB", "moved_bytes", 1e-6, ",.1f"),
        ("of these between nodes, MB", "across_bytes", 1e-6, ",.1f"),
        ("longest transfers, ms", "transfer_s", 1e3, ".3f"),
    )
    say(f"{len(found.order)} layers of {len(found.order[0])} experts on {found.devices} devices of {found.machine}")
    say(f"{'':<28}{'default':>12}{'placed':>12}")
    for words, name, scale, form in rows:
        values = (getattr(facts, name) * scale for facts in (found.default, found.found))
        say(f"{words:<28}" + "".join(f"{value:>12{form}}" for value in values))
    for words, (value, bound), proof in zip(
        ("unevenness, tokens", "longest transfers, s"), (found.uneven, found.transfers), found.proved_by, strict=True
    ):
        say(f"{words}: {value:.6g}, proven at least {bound:.6g} ({proof})")
    if output is not None:
        say(f"written to {output}")
    return 0
