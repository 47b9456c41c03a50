"""Folders of the store, and the demo model that comes with the program."""

from __future__ import annotations

import os
from pathlib import Path

from edge_runtime.errors import ModelNotFoundError

DEMO_NAME = "demo"
CALIBRATION_SUFFIX = ".calibration.npz"
"""What `edgert calibrate` keeps of a model NAME.gguf lies beside it as NAME and this."""

EDITS_SUFFIX = ".edits.npz"
"""What `edgert edits prepare` keeps of a model NAME.gguf lies beside it as NAME and this."""

_DEMO_FILE = "edge-demo-q8_0.gguf"


def home() -> Path:
    """Folder of everything this program keeps: ``EDGERT_HOME``, else the user's data folder."""
    chosen = os.environ.get("EDGERT_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_data_path("edgert", appauthor=False)


def demo_model_path() -> Path:
    """The embedded demo model: inside the installed package, or in the source tree.

    Raises:
        ModelNotFoundError: this installation has none.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "demo_model" / _DEMO_FILE, package.parent / "models" / "demo" / _DEMO_FILE)
    for path in candidates:
        if path.is_file():
            return path
    raise ModelNotFoundError(
        f"this installation has no demo model (looked for {' and '.join(map(str, candidates))}); "
        "name a model with --model, or reinstall edge-runtime"
    )
