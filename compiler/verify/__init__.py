"""Independent judges of plans."""
