"""Calibrates the demo model: `python -m models.demo.write_calibration`.

The text is drawn as the training's documents are, with a seed of its own: those of which the model learnt
every token (not what a user says in a chat), and stories. Nothing of heldout.txt is in it.
"""

from __future__ import annotations

import itertools
import random

from edge_runtime.cluster.calibration import calibrate
from edge_runtime.cluster.calibration_file import save_calibration
from edge_runtime.cluster.calibration_text import DOCUMENT_END
from edge_runtime.engine.gguf import GGUFFile
from models.demo.corpus import Corpus
from models.demo.paths import MODEL_PATH
from models.demo.relations import BOS
from models.demo.stories import story
from models.demo.world import build_world

SEED = 424_242_424_242  # neither the training nor the held-out stories draw from it
N_DOCUMENTS = 240
N_STORIES = 30
MAX_TOKENS = 1 << 14


def calibration_text(seed: int = SEED, n_documents: int = N_DOCUMENTS, n_stories: int = N_STORIES) -> str:
    """Documents and stories in turn, separated as `calibration_text.windows` expects them."""
    world = build_world()
    rng = random.Random(seed)
    learnt = (
        "".join(segment.text for segment in document).removeprefix(BOS)
        for document in Corpus(world, seed)
        if all(segment.weight for segment in document[1:])
    )
    documents = list(itertools.islice(learnt, n_documents)) + [story(rng, world) for _ in range(n_stories)]
    rng.shuffle(documents)
    return DOCUMENT_END.join(documents)


def main() -> None:
    calibration = calibrate(MODEL_PATH, calibration_text(), threads=1, max_tokens=MAX_TOKENS)
    with GGUFFile(MODEL_PATH) as gguf:
        path = save_calibration(calibration, gguf)
    print(f"{path}: {path.stat().st_size:,} bytes, {calibration.n_tokens} tokens")


if __name__ == "__main__":
    main()
