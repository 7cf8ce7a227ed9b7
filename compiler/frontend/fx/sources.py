"""Places what exists before the first operator: inputs, weights and constants, each memory once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ....errors import ModelError
from ...graph import Role
from .builder import GraphBuilder, is_dense

__all__ = ["Placed", "check_plain", "fake_input", "on_host", "place_weights"]


@dataclass(frozen=True)
class Placed:
    """Weights as the converter needs them: the fake of each by its own name, the values by the buffer's name."""

    fakes: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]


def fake_input(mode: FakeTensorMode, name: str, value: Any) -> torch.Tensor:
    """A fake tensor for the graph input ``name``, laid out like the example ``value`` if that has no gaps.

    Raises:
        ModelError: the input is no plain tensor, or one of its sizes is not known.
    """
    if value is None:
        raise ModelError(f"input {name!r} has no example tensor", hint='its placeholder must carry one in meta["val"]')
    if not isinstance(value, torch.Tensor):
        raise ModelError(
            f"input {name!r} is a {type(value).__name__}, not a tensor",
            hint="sizes and other numbers must be fixed when the model is exported",
        )
    for dimension, extent in enumerate(value.shape):
        if not isinstance(extent, int):
            raise ModelError(
                f"dimension {dimension} of input {name!r} is symbolic ({extent})",
                hint="plans hold for one shape: export with example inputs and without dynamic_shapes",
            )
    check_plain(value, f"input {name!r}")
    return _fake_like(mode, value)


def _fake_like(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    strides = value.stride() if is_dense(value) else torch.empty(value.shape, device="meta").stride()
    with mode:
        return torch.empty_strided(tuple(value.shape), strides, dtype=value.dtype)


def check_plain(value: torch.Tensor, name: str) -> None:
    """Refuse tensors whose bytes are not their elements.

    Raises:
        ModelError: ``name`` is sparse, quantised, a wrapper of other tensors, or lazily conjugated or negated.
    """
    if value.layout != torch.strided or value.is_quantized or is_traceable_wrapper_subclass(value):
        kind = value.layout if value.layout != torch.strided else type(value).__name__ if not value.is_quantized else ""
        raise ModelError(
            f"{name} is not a plain strided tensor ({kind or 'quantised'})",
            hint="convert it to a dense tensor before exporting; quantised values are integer tensors with a scale",
        )
    if value.is_conj() or value.is_neg():
        raise ModelError(
            f"{name} is conjugated or negated lazily", hint="call resolve_conj().resolve_neg() on it in the model"
        )


def on_host(value: torch.Tensor) -> torch.Tensor:
    """The value without autograd history, in host memory; meta tensors, which have no values, stay what they are."""
    value = value.detach()
    return value if value.device.type in ("cpu", "meta") else value.cpu()


def place_weights(
    builder: GraphBuilder, mode: FakeTensorMode, weights: Mapping[str, torch.Tensor], roles: Mapping[str, Role]
) -> Placed:
    """Give each distinct piece of memory behind ``weights`` one buffer.

    Tied weights (one memory, one layout) become one tensor, and views of a weight that spans them become views.
    Weights that share bytes but where none spans the others get a copy each, which is refused where the model writes
    one of them. A weight with gaps is stored without.
    """
    fakes: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for value, name in zip(weights.values(), weights, strict=True):
        check_plain(value, f"weight {name!r}")
    held = {name: on_host(value) for name, value in weights.items()}
    for names in _overlapping(held):
        span = _spanning(held, names)
        for name in names if span is None else (span,):
            base = held[name] if is_dense(held[name]) else held[name].contiguous()
            fakes[name] = _fake_like(mode, base)
            why = f"which shares memory with {', '.join(n for n in names if n != name)}" if len(names) > 1 else ""
            values[builder.add_base(fakes[name], name, roles[name], private="" if span else why)] = base
        for name in names:
            if name not in fakes and span is not None:
                value = held[name]
                offset = int(value.storage_offset() - held[span].storage_offset())
                with mode:
                    fakes[name] = torch.as_strided(fakes[span], value.shape, value.stride(), offset)
    return Placed(fakes, values)


def _byte_range(value: torch.Tensor) -> tuple[int, int]:
    """First byte of the storage that the elements touch, and the first behind the last."""
    begin = int(value.storage_offset())
    last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.stride(), strict=True))
    return begin * value.element_size(), (begin + last + 1) * value.element_size()


def _overlapping(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names whose byte ranges overlap, directly or through others, group by group, in the order of ``weights``."""
    place = {name: index for index, name in enumerate(weights)}
    by_storage: dict[int, list[tuple[int, int, str]]] = {}
    groups: list[list[str]] = []
    for name, value in weights.items():
        if value.numel() == 0:
            groups.append([name])
        else:
            by_storage.setdefault(value.untyped_storage()._cdata, []).append((*_byte_range(value), name))
    for ranges in by_storage.values():
        reached = -1
        for begin, end, name in sorted(ranges, key=lambda r: (r[0], r[1], place[r[2]])):
            if begin < reached:
                groups[-1].append(name)
            else:
                groups.append([name])
            reached = max(reached, end)
    return sorted(([*sorted(group, key=place.__getitem__)] for group in groups), key=lambda group: place[group[0]])


def _spanning(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> str | None:
    """The first gapless weight of a group whose bytes hold all others of it, in their dtype; ``None`` if there is none.

    A weight that is alone spans itself, gaps or not: it is stored without them.
    """
    if len(names) == 1:
        return names[0]
    ranges = [_byte_range(weights[name]) for name in names]
    whole = min(begin for begin, _ in ranges), max(end for _, end in ranges)
    one_dtype = len({weights[name].dtype for name in names}) == 1
    for name, span in zip(names, ranges, strict=True):
        if one_dtype and span == whole and is_dense(weights[name]):
            return name
    return None
