"""Launch configurations: data in ``kernels/configs/<kernel>.toml``, one list an architecture, and what tuning stored.

A file reads::

    [[sm_90]]
    up_to = { columns = 256 }          # the row holds for sizes up to these; a row without them holds for all
    constants = { block = 256 }        # the kernel's tl.constexpr arguments
    num_warps = 1
    num_stages = 1

Rows are tried from the first to the last. An architecture without rows takes those of the nearest older one.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import OptionError

__all__ = ["HOPPER", "Config", "Configs", "architecture_of"]

#: What is assumed where no GPU says otherwise: under the interpreter and when compiling without one.
HOPPER = 90
ADA, CONSUMER = 89, 12


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: its block sizes and other constants, warps of a program, and pipeline stages."""

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1
    up_to: Mapping[str, int] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of a launch. Fusing products and sums is said explicitly: Triton's default is about to change."""
        return {
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def holds_for(self, sizes: Mapping[str, int]) -> bool:
        """Whether ``sizes`` are all within ``up_to``."""
        return all(sizes[name] <= bound for name, bound in self.up_to.items())


@dataclass(frozen=True)
class Configs:
    """The configurations of one kernel, by architecture: 90 is ``sm_90``.

    ``fingerprint`` tells one version of the kernel and its rows from others; results of tuning hold for one.
    """

    kernel: str
    rows: Mapping[int, tuple[Config, ...]]
    fingerprint: str = ""

    @classmethod
    def beside(cls, module_file: str) -> Configs:
        """Those of the kernel in ``module_file``: ``configs/<its name>.toml`` in the same folder.

        Raises:
            OptionError: the file is missing or malformed.
        """
        module = Path(module_file)
        path = module.parent / "configs" / f"{module.stem}.toml"
        try:
            text = path.read_bytes()
            data = tomllib.loads(text.decode())
            rows = {int(name.removeprefix("sm_")): tuple(Config(**row) for row in rows) for name, rows in data.items()}
        except (OSError, TypeError, ValueError) as error:
            raise OptionError(f"launch configurations {path} cannot be read: {error}") from error
        if not rows or not all(rows.values()):
            raise OptionError(f"launch configurations {path} hold no row")
        source = module.read_bytes() if module.is_file() else b""
        return cls(module.stem, MappingProxyType(rows), hashlib.sha256(source + text).hexdigest()[:16])

    def of_architecture(self, architecture: int) -> tuple[Config, ...]:
        """The rows of an architecture, or of the nearest older one, or of the oldest.

        Consumer GPUs of Blackwell's generation, 12.x, have as little shared memory as those of Ada's, and its rows.
        """
        known = sorted(self.rows)
        if architecture // 10 == CONSUMER and architecture not in known:
            architecture = ADA
        return self.rows[max((a for a in known if a <= architecture), default=known[0])]

    def choose(self, device: torch.device, dtype: torch.dtype | None = None, /, **sizes: int) -> Config:
        """The stored result of tuning for such sizes and dtype on this device, else the first row that holds.

        Without ``dtype``, that of the operand the kernel moves most of, no stored result is used: what is fastest in a
        narrow dtype may need more shared memory in a wide one than there is.

        Raises:
            OptionError: no row holds; the last row of a file should hold for all.
        """
        from .tuning import tuned

        found = tuned(self, device, dtype, sizes)
        if found is not None:
            return found
        for row in self.of_architecture(architecture_of(device)):
            if row.holds_for(sizes):
                return row
        raise OptionError(f"kernel {self.kernel} has no launch configuration for {sizes}")


@cache
def architecture_of(device: torch.device) -> int:
    """Compute capability as one number, such as 90; Hopper's where the device is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
