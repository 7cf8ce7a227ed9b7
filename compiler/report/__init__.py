"""Plans for people to look at: text, Chrome trace, pictures, and one self-contained page."""

from __future__ import annotations

from .html import write_html, write_report

__all__ = ["write_html", "write_report"]
