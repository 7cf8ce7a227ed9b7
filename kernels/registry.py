"""Kernels by name: a kernel's name is that of its file, or of the entry point that another package registers.

A package of a user's own names its kernels in the group ``opweave.kernels``::

    [project.entry-points."opweave.kernels"]
    my_kernel = "my_package.my_kernel:KERNEL"

Listing names imports nothing.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    from ._kernel import Kernel

__all__ = ["GROUP", "digest", "load", "names"]

GROUP = "opweave.kernels"
_NOT_KERNELS = frozenset({"authoring", "quantized", "registry", "tuning"})


def names() -> tuple[str, ...]:
    """Names of all kernels, sorted. Imports none of them."""
    return tuple(sorted(_places()))


@functools.cache
def load(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        OptionError: there is none, or what its entry point names is no kernel of that name.
    """
    from ._kernel import Kernel

    places = _places()
    if name not in places:
        close = difflib.get_close_matches(name, places, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"there is no kernel {name!r}; there are {', '.join(sorted(places))}", hint=hint)
    module, _, attribute = places[name].partition(":")
    try:
        kernel = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"kernel {name!r} cannot be loaded from {places[name]!r}: {error}") from error
    if not isinstance(kernel, Kernel) or kernel.name != name:
        raise OptionError(f"{places[name]!r} is not the kernel {name!r}")
    return kernel


@functools.cache
def digest() -> str:
    """A digest of the code and configurations of all kernels here, and of the packages that have others."""
    content = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.glob("configs/*.toml")]):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=str):
        version = point.dist.version if point.dist is not None else ""
        content.update(f"{point.name}={point.value} {version}".encode())
    return content.hexdigest()[:16]


@functools.cache
def _places() -> dict[str, str]:
    """``module:attribute`` of each kernel by name; a file here takes precedence."""
    folder = Path(__file__).parent
    found = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.ispkg and not module.name.startswith("_") and module.name not in _NOT_KERNELS:
            found[module.name] = f"{__package__}.{module.name}:KERNEL"
    return found
