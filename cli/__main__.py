"""``python -m opweave.cli`` is the command line, wherever its script is."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
