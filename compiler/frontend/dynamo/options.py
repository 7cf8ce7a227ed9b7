"""What a user may say in ``torch.compile(model, backend="opweave", options={...})``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ....errors import OptionError
from ....hw_models.model import LARGEST_MEMORY_BYTES
from ....hw_models.registry import parse_bytes
from ...overlap import OverlapOptions

__all__ = ["MODES", "TIERS", "BackendOptions"]

#: torch.compile's modes, and what each means to Inductor, whose kernels we run.
MODES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
}
TIERS = ("auto", "T0", "T1")

_NUMBER = (int, float)
#: For each option: the types it takes, and those types in words.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "mode": ((str,), f"one of {', '.join(map(repr, MODES))}"),
    "tier": ((str,), "one of 'auto', 'T0', 'T1'"),
    "memory_limit": ((int, float, str), "bytes, a size such as '8GiB', or a fraction of the device's memory up to 1.0"),
    "streams": ((int,), "a number of streams, 1 or more"),
    "time_limit": (_NUMBER, "seconds for planning one graph, above 0"),
    "strict": ((bool,), "True or False"),
    "deterministic": ((bool,), "True or False"),
    "cuda_graph": ((bool,), "True or False"),
    "cache": ((bool,), "True or False"),
    "device": ((str,), "a device such as 'cuda'"),
    "kernels": ((str,), "'auto', 'all', 'off', or names of kernels with commas between them"),
    "overlap": ((bool, Mapping), "True, False or a mapping of options"),
    "machine": ((str,), "the name of a machine that `opweave hw` lists, or a machine file"),
}


@dataclass(frozen=True)
class BackendOptions:
    """The backend's options; each field is a key of ``options``.

    ``mode`` is one of torch.compile's. ``tier`` says who runs a graph: ``"T1"`` our executor over one arena, ``"T0"``
    stock Inductor in our order, ``"auto"`` T1 wherever it can. ``memory_limit`` is what the graph may occupy on the
    device, weights included: bytes, text such as ``"8GiB"``, or a fraction of the device's memory. ``streams`` is how
    many CUDA streams compute may use. ``time_limit`` is in seconds, for planning one graph. ``strict`` turns every
    fallback into an error. ``deterministic`` makes plans that no clock decides. ``cuda_graph`` captures inference on a
    GPU in a CUDA graph. ``cache`` keeps what was compiled and planned for later processes. ``device`` runs a model that
    lives on the host on another device, its weights streamed where they do not fit. ``machine`` names the hardware
    model that times are predicted with; without it, the one of the device. ``kernels`` says which fused kernels may
    replace operators: ``"auto"`` those that are predicted to be faster, on a GPU, ``"all"`` wherever one fits,
    ``"off"`` none, or names with commas between them. On a CPU, a kernel that was asked for computes its reference.
    ``overlap`` hides collectives behind compute: the tokens are cut into parts, and the parts put in turns, where that
    is predicted to be faster on the machine; a mapping says more, as ``OverlapOptions`` has it.

    Raises:
        OptionError: a value has a wrong type or is out of range.
    """

    mode: str = "default"
    tier: str = "auto"
    memory_limit: int | float | str | None = None
    streams: int = 1
    time_limit: float = 10.0
    strict: bool = False
    deterministic: bool = False
    cuda_graph: bool = True
    cache: bool = True
    device: str | None = None
    machine: str | None = None
    kernels: str = "auto"
    overlap: bool | Mapping[str, Any] = False

    def __post_init__(self) -> None:
        for name, (types, expected) in _TYPES.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
            if wrong or not _in_range(name, value):
                raise OptionError(f"option {name!r} of backend 'opweave' is {value!r}; it takes {expected}")
        self.overlapping  # noqa: B018 -- checked when built

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> BackendOptions:
        """Options as torch.compile passes them on.

        Raises:
            OptionError: a key is unknown, or a value has a wrong type or is out of range.
        """
        if not isinstance(options, Mapping | None):
            raise OptionError(
                f"options of backend 'opweave' is {options!r}; it takes a dictionary such as {{'memory_limit': '8GiB'}}"
            )
        given = dict(options or {})
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in given if key not in known)
        if unknown:
            raise OptionError(
                f"backend 'opweave' has no option {', '.join(map(repr, unknown))}",
                hint=f"its options are {', '.join(sorted(known))}",
            )
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    def limit_bytes(self, device_bytes: int) -> int | None:
        """The memory limit in bytes on a device of ``device_bytes``; ``None`` without one."""
        limit = self.memory_limit
        if limit is None:
            return None
        if isinstance(limit, float) and limit <= 1.0:
            return int(limit * device_bytes)
        return min(parse_bytes(limit) if isinstance(limit, str) else int(limit), LARGEST_MEMORY_BYTES)

    @property
    def overlapping(self) -> OverlapOptions | None:
        """What is wanted of overlap; ``None`` for nothing."""
        return OverlapOptions.of(self.overlap)

    @property
    def key(self) -> str:
        """A digest of all options that decide what is compiled."""
        text = repr([(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "cache"])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_range(name: str, value: Any) -> bool:
    if name == "mode":
        return value in MODES
    if name == "tier":
        return value in TIERS
    if name == "memory_limit":
        if isinstance(value, float):
            return 0 < value <= 1.0
        return _is_size(value) if isinstance(value, str) else value > 0
    if name == "device":
        return _is_device(value)
    return value > 0 if name in ("streams", "time_limit") else True


def _is_size(text: str) -> bool:
    try:
        return parse_bytes(text) > 0
    except OptionError:
        return False


def _is_device(text: str) -> bool:
    import torch

    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True
