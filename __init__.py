"""opweave weaves a model's operators onto an accelerator.

``compile`` reads a PyTorch or ONNX model and returns a verified, executable space-time plan; ``load_plan`` reads a
saved one; ``explain`` says why a plan moves what it moves; ``fit`` answers how small a scratchpad may be; ``hardware``
describes machines; ``onnx_backend`` is the ONNX Backend interface; ``backend`` is what ``torch.compile(model,
backend="opweave")`` calls, and ``backend_reports`` what it made; ``errors`` holds every deliberate error.

Importing this package imports neither torch nor a solver: everything below is resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import errors as errors
    from .api import CompiledModel as CompiledModel
    from .api import compile as compile
    from .api import explain as explain
    from .api import fit as fit
    from .api import hardware as hardware
    from .api import load_plan as load_plan
    from .api import onnx_backend as onnx_backend
    from .torch_backend import backend as backend
    from .torch_backend import backend_reports as backend_reports

__version__ = "0.1.0"
__all__ = [
    "CompiledModel",
    "backend",
    "backend_reports",
    "compile",
    "errors",
    "explain",
    "fit",
    "hardware",
    "load_plan",
    "onnx_backend",
]

_TORCH = ("backend", "backend_reports")


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name in __all__:
        roof = ".torch_backend" if name in _TORCH else ".api"
        return getattr(importlib.import_module(roof, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
