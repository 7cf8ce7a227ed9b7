"""Passes that decide more than one thing at once: order, residency and addresses together."""
