"""Machines: typed descriptions with units, and their cost model."""
