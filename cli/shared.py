"""What commands share: the options that several take, keywords of the Python interface from them, and printing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from ..hw_models.registry import parse_bytes

__all__ = ["DIFFERENT", "INTERRUPTED", "UNREAD", "keywords", "make_folder", "print_json", "refuse", "say"]

DIFFERENT = 1
INTERRUPTED = 130
UNREAD = 141  # what shells say of a program whose reader has gone

ModelPath = Annotated[Path, typer.Argument(help="An .onnx model, or a plain operator graph .json.")]
PlanPath = Annotated[Path, typer.Argument(help="A plan written by `opweave compile`.")]
MachineName = Annotated[str, typer.Option("--machine", "-m", help="A name from `opweave hw list`, or a TOML file.")]
OptionalMachineName = Annotated[
    str | None, typer.Option("--machine", "-m", help="For a model: its machine, 'edge-npu' if left out.")
]
Scratchpad = Annotated[
    str | None, typer.Option(help="Scratchpad capacity, such as 1MiB; the machine's own if left out.")
]
Weights = Annotated[str, typer.Option(help="'streamed' from backing memory, or 'resident' in the scratchpad.")]
OptionalWeights = Annotated[str | None, typer.Option(help="For a model: 'streamed' (if left out) or 'resident'.")]
PassOption = Annotated[str | None, typer.Option(help="A pass from `opweave passes`, options in parentheses.")]
Goal = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="What is to be least, the most important first: traffic, peak, arena, latency; traffic,latency.",
    ),
]
MayRecompute = Annotated[bool, typer.Option("--recompute", help="Dropped tensors may be computed again.")]
InPlace = Annotated[
    bool, typer.Option("--inplace", help="Write elementwise results over operands that nobody needs afterwards.")
]
Kernels = Annotated[
    str | None, typer.Option(help="Fused kernels that may replace operators: auto, all, off, or names with commas.")
]
Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", help="Decide of a tensor: --pin NAME=OFFSET, NAME=bank:NUMBER or NAME=resident."),
]
TimeLimit = Annotated[float, typer.Option(help="Seconds for all passes together.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Same input, same plan: one worker, fixed seeds.")]
Dim = Annotated[list[str] | None, typer.Option("--dim", help="Bind a symbolic dimension: --dim batch=1.")]
FillSeed = Annotated[int | None, typer.Option(help="Replace all-equal weights by random ones from this seed.")]
Definitions = Annotated[
    Path | None, typer.Option(help="Python file whose DEFINITIONS maps operator types to functions.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse operators that have no lowering of our own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

AS_GIVEN = (
    *("machine", "scratchpad", "weights", "order", "residency", "address", "objective", "recompute", "inplace"),
    *("kernels", "time_limit", "deterministic", "strict"),
)


def keywords(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ``api.compile`` from a command's parameters, leaving out what was not given. Raises OptionError."""
    found = {name: given[name] for name in AS_GIVEN if given.get(name) is not None}
    found["fill_seed"] = given.get("fill_seed")
    found["dims"] = _dims(given.get("dim") or ())
    found["pins"] = _pins(given.get("pin") or ())
    if given.get("definitions") is not None:
        from ..compiler.frontend.definitions import load_definitions

        found["definitions"] = load_definitions(given["definitions"])
    return found


def _dims(texts: list[str] | tuple[str, ...]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for text in texts:
        name, value = _dim(text)
        if dims.setdefault(name, value) != value:
            raise OptionError(f"--dim {text!r} contradicts what was said before: {name}={dims[name]}")
    return dims


def _dim(text: str) -> tuple[str, int]:
    name, _, value = text.rpartition("=")
    if not name or not value.isdecimal() or int(value) < 1:
        raise OptionError(f"--dim is {text!r}; expected NAME=VALUE with a whole VALUE above 0, such as batch=1")
    return name, int(value)


def _pins(texts: list[str] | tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Pins by tensor name; what is said of one tensor in several places comes together."""
    pins: dict[str, dict[str, object]] = {}
    for text in texts:
        name, field, value = _pin(text)
        known = pins.setdefault(name, {})
        if known.get(field, value) != value:
            raise OptionError(f"--pin {text!r} contradicts what was said before: {field} {known[field]}")
        known[field] = value
    return pins


def _pin(text: str) -> tuple[str, str, object]:
    name, _, value = text.rpartition("=")
    bank = value.removeprefix("bank:")
    if not name or not value or (bank != value and not bank.isdecimal()):
        hint = "an offset is in bytes or text such as 4KiB; banks are counted from 0"
        raise OptionError(f"--pin is {text!r}; expected NAME=OFFSET, NAME=bank:NUMBER or NAME=resident", hint=hint)
    if value == "resident":
        return name, "resident", True
    if bank != value:
        return name, "bank", int(bank)
    try:
        return name, "offset", parse_bytes(value)
    except OptionError as error:
        raise OptionError(
            f"--pin is {text!r}, where {value!r} is neither an offset, bank:NUMBER nor resident", hint=error.hint
        ) from error


def refuse(reason: str, **given: object) -> None:
    """Refuse options that would be ignored. Raises OptionError."""
    for name, value in given.items():
        if value not in (None, False) and value != []:
            raise OptionError(f"--{name.replace('_', '-')} has no effect here: {reason}")


def make_folder(path: Path) -> None:
    """Make a folder for reports, before the time of planning is spent on what cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write a report to {str(path)!r}: {error.strerror}") from error


def print_json(value: object) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """``value`` as JSON can say it: infinities and NaN, which it cannot, become ``None``."""
    if isinstance(value, dict):
        return {name: _finite(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """A line, or several, on standard output."""
    sys.stdout.write(text + "\n")
