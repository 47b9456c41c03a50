"""``python -m edge_runtime.cli``, for where the ``edgert`` script is not on the path."""

from edge_runtime.cli.program import main

main()
