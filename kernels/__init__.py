"""Fused Triton kernels, one a file; docs/adding-a-kernel.md leads through one.

Nothing here is imported by ``import opweave``: a kernel's module needs triton, which exists for Linux only.
"""
