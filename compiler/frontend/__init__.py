"""Frontends: each reads one kind of model and ends in the same Graph."""
