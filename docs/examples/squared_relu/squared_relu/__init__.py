"""A fused kernel of another package, found by its entry point."""
