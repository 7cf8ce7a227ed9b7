"""Fused kernels, one a file."""
