"""opweave weaves a model's operators onto an accelerator; see ``README.md``."""

__version__ = "0.1.0"
