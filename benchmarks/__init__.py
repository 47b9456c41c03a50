"""Measurements against peers. Each module runs as ``python -m benchmarks.NAME [--quick]``."""
