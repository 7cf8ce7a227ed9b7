"""Results of tuning, kept in a file of the user's and found again by kernel, device, dtype and sizes.

``opweave bench kernels --tune`` writes them; launchers read them through ``Configs.choose``. The file is
``opweave/tuning.json`` in ``$XDG_CACHE_HOME`` (``~/.cache`` where that is not set). A result holds for

* one kernel with one source and one set of rows, and one version of Triton: another may need more shared memory;
* one device, by its name, and one dtype;
* a bucket of sizes: each size rounded up to a power of two, so 2049 to 4096 tokens are one bucket.

A file that cannot be read is warned of once and ignored, and so are results that do not fit the kernel.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import msgspec
import torch
import triton

from ..errors import ExecutionError
from ._checks import dtype_name
from ._configs import Config, Configs

__all__ = ["TunedResult", "bucket", "forget", "load", "results_file", "store", "tuned"]

VERSION = 1

Key = tuple[str, str, str, tuple[tuple[str, int], ...]]


class TunedResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fastest configuration found for a kernel: ``sizes`` are those of its bucket.

    ``ms`` is what it took, ``default_ms`` what the configuration took that would have been chosen without tuning.
    """

    kernel: str
    fingerprint: str
    device: str
    dtype: str
    triton: str
    sizes: dict[str, int]
    constants: dict[str, int]
    num_warps: int
    num_stages: int
    ms: float
    default_ms: float

    @property
    def config(self) -> Config:
        """How to launch."""
        return Config(self.constants, self.num_warps, self.num_stages)

    @property
    def place(self) -> tuple[object, ...]:
        """What it is the result of; a later one for the same takes its place."""
        return self.kernel, self.device, self.dtype, self.triton, tuple(sorted(self.sizes.items()))


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    results: list[TunedResult]


def bucket(sizes: Mapping[str, int]) -> dict[str, int]:
    """Each size rounded up to a power of two; 0 stays."""
    return {name: 1 << (size - 1).bit_length() if size > 0 else 0 for name, size in sizes.items()}


def results_file() -> Path:
    """Where results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opweave" / "tuning.json"


def load(path: Path) -> tuple[TunedResult, ...]:
    """The results in a file; none, with a warning, where it cannot be read."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, msgspec.DecodeError) as error:
        warnings.warn(f"results of tuning {path} cannot be read and are ignored: {error}", RuntimeWarning, stacklevel=2)
        return ()
    if content.version != VERSION:
        message = f"results of tuning {path} are of version {content.version}, not {VERSION}, and are ignored"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return ()
    return tuple(content.results)


def store(results: Iterable[TunedResult], path: Path | None = None) -> Path:
    """Add results to the file, all at once; those for the same kernel, device, dtype and sizes are replaced.

    Raises:
        ExecutionError: the file cannot be written.
    """
    path = path or results_file()
    everything = {result.place: result for result in (*load(path), *results)}
    content = msgspec.json.format(msgspec.json.encode(_File(VERSION, list(everything.values()))), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content + b"\n")
            Path(name).replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
    except OSError as error:
        raise ExecutionError(f"results of tuning cannot be written to {path}: {error}") from error
    forget()
    return path


def forget() -> None:
    """Read the file again at the next launch."""
    _known.cache_clear()
    _results.cache_clear()


def tuned(configs: Configs, device: torch.device, dtype: torch.dtype | None, sizes: Mapping[str, int]) -> Config | None:
    """What tuning found fastest on a device, for a dtype and sizes in the same bucket; ``None`` if never tuned.

    Launches ask every time: without results this is two look-ups.
    """
    if device.type != "cuda" or dtype is None:
        return None
    known = _known(configs.kernel)
    if not known:
        return None
    key = (_device_name(device), dtype_name(dtype), tuple(sorted(bucket(sizes).items())))
    found = known.get((configs.fingerprint, *key))
    return found if found is not None and _fits(found, configs) else None


def _fits(config: Config, configs: Configs) -> bool:
    return any(set(config.constants) == set(row.constants) for rows in configs.rows.values() for row in rows)


@cache
def _known(kernel: str) -> Mapping[Key, Config]:
    """Configurations of a kernel for this version of Triton."""
    return {
        (result.fingerprint, result.device, result.dtype, tuple(sorted(result.sizes.items()))): result.config
        for result in _results()
        if (result.kernel, result.triton) == (kernel, triton.__version__)
    }


@cache
def _results() -> tuple[TunedResult, ...]:
    return load(results_file())


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
