"""Cutting a region of a graph along an axis of its tokens, so that one part computes while another communicates."""

from __future__ import annotations

from .axes import token_axes
from .forms import Joined
from .rule import Rule
from .split import Split, split

__all__ = ["Joined", "Rule", "Split", "split", "token_axes"]
