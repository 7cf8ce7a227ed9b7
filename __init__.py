"""opweave weaves a model's operators onto an accelerator.

``compile`` reads a PyTorch or ONNX model and returns a verified, executable space-time plan; ``load_plan`` reads a
saved one; ``explain`` says why a plan moves what it moves; ``fit`` answers how small a scratchpad may be; ``hardware``
describes machines; ``onnx_backend`` is the ONNX Backend interface; ``backend`` is what ``torch.compile(model,
backend="opweave")`` calls, and ``backend_reports`` what it made; ``pipeline`` trains a model in stages, and
``schedule_pipeline`` finds a schedule for them; ``errors`` holds every deliberate error.

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
    from .pipelining import pipeline as pipeline
    from .pipelining import schedule_pipeline as schedule_pipeline
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
    "pipeline",
    "schedule_pipeline",
]

_ROOFS = {
    "backend": ".torch_backend",
    "backend_reports": ".torch_backend",
    "pipeline": ".pipelining",
    "schedule_pipeline": ".pipelining",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name in __all__:
        return getattr(importlib.import_module(_ROOFS.get(name, ".api"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
