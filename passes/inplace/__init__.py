"""Which results are written over their own operands."""
