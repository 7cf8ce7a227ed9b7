"""How fast are the kernels next to their peers and the roofline? ``opweave bench kernels``, under a name like the rest.

Options, files and what happens without a GPU are those of the command; ``--json`` prints the rows.
"""

from __future__ import annotations

import sys

from opweave.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "kernels"]
    main()
