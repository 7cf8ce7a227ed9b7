"""PyTorch programs into graphs: an ``nn.Module``, an ``ExportedProgram``, or a ``GraphModule`` of ATen calls.

One ATen call is one operator. What eager execution aliases is aliased here: a call whose results lie in storage that
already exists makes views, one that returns new storage makes an operator, and one that writes its operand makes a
new version of that operand's buffer. Which it is, is read off a run on fake tensors that follows the program line by
line, so the graph says what eager does and no table of operators has to be kept.
"""

from __future__ import annotations

from .convert import from_graph_module
from .export import from_exported, from_module

__all__ = ["from_exported", "from_graph_module", "from_module"]
