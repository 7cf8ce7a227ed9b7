"""Which buffers stay in the scratchpad, for a fixed order."""
