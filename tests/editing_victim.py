"""Makes a store's queued edits until it is killed, for `test_personalize_resume`: ``STORE MODEL``."""

from __future__ import annotations

import sys
from pathlib import Path

from editing_parts import opened

from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.progress import Progress
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.store import AdapterStore


def main() -> None:
    store = AdapterStore(Path(sys.argv[1]))
    with opened(Path(sys.argv[2])) as engine:
        editor = Editor(engine, store, load_statistics(engine.gguf))

        def tell(progress: Progress) -> None:
            print(progress.stage, progress.step, flush=True)

        for record in store.records(model_identity(engine.gguf), ("running", "queued")):
            editor.run(record.id, tell)
            print("ended", record.id, flush=True)


if __name__ == "__main__":
    main()
