"""Executors of plans."""
