"""Machines by name or file, and sizes as people write them.

A bad file gets the field, its value and what is allowed there.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import inspect

from ..errors import MachineError, OptionError
from .model import HardwareModel

__all__ = ["load", "names", "parse_bytes"]

_UNITS: Mapping[str, int] = MappingProxyType(
    {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
)
#: Fields of a file that are no fields of a machine: what it takes from others. By the path of their table.
_TAKEN: Mapping[str, tuple[str, ...]] = MappingProxyType({"": ("device",), "fabric": ("like",)})
#: Lists that a machine's own are added to, where it takes from another.
_JOINED = ("sources", "links", "rates", "interference")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes that ``text`` asks for: ``"1MiB"``, ``"0.5 GiB"``, ``"640 kB"``; a plain number is bytes.
    Fractions of a byte are dropped.

    Raises:
        OptionError: not a number and a unit, or an unknown unit.
    """
    match = _SIZE.fullmatch(text)
    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise OptionError(
            f"{text!r} is not a size", hint=f"write a number and one of {', '.join(filter(None, _UNITS))}: 1.5MiB"
        )
    return int(Fraction(match[1]) * _UNITS[unit])


@cache
def names() -> tuple[str, ...]:
    """Names of the machines that come with opweave, sorted."""
    found = (entry.name for entry in (files(__package__) / "data").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml")))


def load(name_or_path: str) -> HardwareModel:
    """The machine of that name, or described by the TOML file at that path.

    Anything that ends in ``.toml`` or contains a path separator is a path.

    Raises:
        MachineError: an unknown name, a file that cannot be read, or a field that is missing, unknown or out of range.
    """
    return _load(name_or_path, ())


def _load(name_or_path: str, takers: tuple[str, ...]) -> HardwareModel:
    """``load``, for the files ``takers``, each of which takes fields from the next one."""
    if name_or_path in takers:
        chain = " takes from ".join(repr(taker) for taker in (*takers, name_or_path))
        raise MachineError(f"machine files take their fields from one another in a circle: {chain}")
    if name_or_path in names():
        text = (files(__package__) / "data" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        return _read(text, name_or_path, takers)
    if not name_or_path.endswith(".toml") and Path(name_or_path).name == name_or_path:
        near = get_close_matches(name_or_path.lower(), names(), n=1, cutoff=0.5)
        close = [name for name in names() if name.startswith(name_or_path.lower())] or near
        hint = f"did you mean {close[0]!r}? " if close and name_or_path else ""
        raise MachineError(
            f"no machine is named {name_or_path!r}; there are {', '.join(names())}",
            hint=f"{hint}a machine of your own is the path of its .toml file".strip(),
        )
    try:
        text = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MachineError(f"cannot read machine file {name_or_path!r}: {reason}") from error
    return _read(text, name_or_path, takers)


def _read(text: str, source: str, takers: tuple[str, ...]) -> HardwareModel:
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise MachineError(f"machine file {source!r} is not TOML: {error}") from error
    data = _completed(data, source, (*takers, source))
    for problem in _problems(data, inspect.type_info(HardwareModel), ""):
        raise MachineError(f"machine file {source!r}: {problem}", hint="docs/adding-a-machine.md lists the fields")
    try:
        return msgspec.convert(data, HardwareModel)
    except MachineError as error:
        raise MachineError(f"machine file {source!r}: {error.message}", hint=error.hint) from error


def _completed(data: dict[str, Any], source: str, takers: tuple[str, ...]) -> dict[str, Any]:
    """``data`` with what it takes from other machines: all that it leaves out from the ``device`` it names, and what
    its fabric leaves out from the fabric of the machine that this one is ``like``.
    """
    device = _other(data.pop("device", None), "device", source, takers)
    if device is not None:
        data = _merged(device, data)
    fabric = data.get("fabric")
    other = _other(fabric.pop("like", None), "fabric.like", source, takers) if isinstance(fabric, dict) else None
    if other is None:
        return data
    if "fabric" not in other:
        raise MachineError(f"machine file {source!r}: field fabric.like names {other['name']!r}, which has no fabric")
    return {**data, "fabric": _merged(other["fabric"], data["fabric"])}


def _other(name: Any, path: str, source: str, takers: tuple[str, ...]) -> dict[str, Any] | None:
    """The machine of that name as its file would state it; ``None`` if none is named."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise MachineError(f"machine file {source!r}: field {path} is {_shown(name)}, allowed are names of machines")
    other: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(_load(name, takers)))
    return other


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the fields of ``own`` instead; the lists in ``_JOINED`` are the base's with the own ones behind."""
    joined = {
        name: [*base[name], *own[name]]
        for name in _JOINED
        if isinstance(base.get(name), list) and isinstance(own.get(name), list)
    }
    return {**base, **own, **joined}


def _problems(value: Any, kind: inspect.Type, path: str) -> Iterator[str]:
    """What is wrong with ``value``, which should be a ``kind``; one sentence for each field."""
    match kind:
        case inspect.StructType() if isinstance(value, dict):
            yield from _struct_problems(value, kind, path)
        case inspect.VarTupleType(item_type=item) if isinstance(value, list):
            for index, element in enumerate(value):
                yield from _problems(element, item, f"{path}[{index}]")
        case inspect.DictType(value_type=item) if isinstance(value, dict):
            for key, element in value.items():
                yield from _problems(element, item, f"{path}.{key}")
        case inspect.UnionType(types=types):
            yield from _problems(value, next(t for t in types if not isinstance(t, inspect.NoneType)), path)
        case _ if not _allows(kind, value):
            yield f"field {path or '(the whole file)'} is {_shown(value)}, allowed are {_allowed(kind)}"


def _struct_problems(value: dict[str, Any], kind: inspect.StructType, path: str) -> Iterator[str]:
    fields = {field.encode_name: field for field in kind.fields}
    known = [*fields, *_TAKEN.get(path, ())]
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in fields:
            close = get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            yield f"field {prefix}{name} is unknown, allowed are {', '.join(known)}{meant}"
    for name, field in fields.items():
        if name in value:
            yield from _problems(value[name], field.type, f"{prefix}{name}")
        elif field.required:
            yield f"field {prefix}{name} is missing, it takes {_allowed(field.type)}"


def _allows(kind: inspect.Type, value: Any) -> bool:
    match kind:
        case inspect.StrType():
            return isinstance(value, str)
        case inspect.EnumType(cls=cls):
            return value in [member.value for member in cls]
        case inspect.IntType():
            return type(value) is int and _in_range(kind, value)
        case inspect.FloatType():
            return type(value) in (int, float) and math.isfinite(value) and _in_range(kind, value)
    return False


def _in_range(kind: inspect.IntType | inspect.FloatType, value: float) -> bool:
    above = (kind.gt is None or value > kind.gt) and (kind.ge is None or value >= kind.ge)
    return above and (kind.le is None or value <= kind.le)


def _allowed(kind: inspect.Type) -> str:
    match kind:
        case inspect.StrType():
            return "strings"
        case inspect.EnumType(cls=cls):
            return ", ".join(repr(member.value) for member in cls)
        case inspect.IntType() | inspect.FloatType():
            noun = "integers" if isinstance(kind, inspect.IntType) else "finite numbers"
            bound = (
                f" above {kind.gt:g}" if kind.gt is not None else f" from {kind.ge:g}" if kind.ge is not None else ""
            )
            return noun + bound + (f" up to {kind.le:g}" if kind.le is not None else "")
        case inspect.VarTupleType(item_type=item):
            return f"a list of {_allowed(item)}"
        case inspect.DictType(value_type=item):
            return f"a table of {_allowed(item)}"
        case inspect.StructType(fields=fields):
            return f"a table with the fields {', '.join(field.encode_name for field in fields)}"
    return str(kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
