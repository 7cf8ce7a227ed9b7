"""Questions with figures for answers; each module runs as ``python -m benchmarks.<name>``."""
