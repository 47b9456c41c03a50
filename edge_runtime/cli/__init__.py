"""The command ``edgert``: one verb a file, nothing heavy imported until the verb runs."""

from edge_runtime.cli.program import main

__all__ = ["main"]
