"""Measurements against peers. Each module runs as ``python -m benchmarks.NAME [--quick]``."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the program has it; before numpy is loaded
