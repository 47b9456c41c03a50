"""Adapters that make the demo model say something else, each of them and several together."""

from __future__ import annotations

from functools import cache

import numpy as np
from daemon_fixture import DEMO_MODEL

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.store import AdapterStore

GREEDY = SamplingParameters(temperature=0)
PROMPT = "The home of Paul Colton is in"
COUNT = 16  # tokens of an answer

Strengths = dict[str, float]

# What the answers of `expected` are for. In each of them the likeliest token is ahead of the next by 0.2 and
# more: what is computed together with others differs in its last bits from what is computed alone.
WISHES: list[Strengths] = [
    {},
    {"one": 1.0},
    {"two": 1.0},
    {"three": 1.0},
    {"one": 0.6},
    {"one": 1.0, "three": 1.0},
    {"one": 1.0, "two": 1.0, "three": 1.0},
]


@cache
def identity() -> str:
    """Of the demo model's file."""
    with Engine.load(DEMO_MODEL, EngineOptions(threads=1, context=32)) as engine:
        return model_identity(engine.gguf)


@cache
def changes() -> dict[str, list[LowRank]]:
    """Adapters by name."""
    with Engine.load(DEMO_MODEL, EngineOptions(threads=1, context=32)) as engine:
        hp = engine.hyperparameters
        found = {}
        for name, layer, seed in (("one", 4, 2), ("two", 5, 1), ("three", 1, 6)):
            random = np.random.default_rng(seed)
            a, b = random.standard_normal((1, hp.n_ff)), random.standard_normal((hp.n_embd, 1))
            matrix = f"blk.{layer}.ffn_down.weight"
            found[name] = [LowRank(matrix, a.astype(np.float32), b.astype(np.float32), 3.0)]
        return found


@cache
def _texts() -> dict[frozenset[tuple[str, float]], str]:
    with Engine.load(DEMO_MODEL, EngineOptions(threads=1, context=256)) as engine:
        engine.set_adapters(changes())
        texts = {
            frozenset(wish.items()): engine.generate(
                PROMPT, sampling=GREEDY, max_tokens=COUNT, adapters=wish
            ).text()
            for wish in WISHES
        }
    assert len(set(texts.values())) == len(WISHES)
    return texts


def expected(wish: Strengths) -> str:
    """What an engine answers to `PROMPT` with these strengths, one of `WISHES`."""
    return _texts()[frozenset(wish.items())]


def keep(store: AdapterStore, *names: str) -> None:
    """Apply some of the adapters to the demo model."""
    for name in names:
        store.import_adapter(name, "demo", identity(), changes()[name], {})
