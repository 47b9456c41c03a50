"""The shape of the demo world's median edit: what it computes, apart from the values."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.edits_judging import draw_edits
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize import editor as editing
from edge_runtime.personalize.contexts import Context, choose_contexts
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import load_facts
from models.demo.paths import MODEL_PATH


@dataclass(slots=True)
class Profile:
    """Of one edit.

    Attributes:
        steps: of the search.
        contexts: (goal, tokens, tokens of the prompt, index of the subject's last token) of each.
        asked: for each call that generates, (tokens of the prompt, tokens of the answer) of each prompt.
        read: for each call that reads texts, their tokens.
    """

    steps: int = 0
    contexts: list[tuple[str, int, int, int]] = field(default_factory=list)
    asked: list[list[tuple[int, int]]] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        names = ("steps", "contexts", "asked", "read")
        return {name: getattr(self, name) for name in names}


def median_profile(count: int) -> Profile:
    """The profile of the edit that has the median number of search steps, of so many."""
    with Engine.load(MODEL_PATH, EngineOptions(threads=1)) as engine:
        profiles = [_profile(engine, number, count) for number in range(count)]
    middle = statistics.median_low(profile.steps for profile in profiles)
    return next(profile for profile in profiles if profile.steps == middle)


def _profile(engine: Engine, number: int, count: int) -> Profile:
    edit = draw_edits(load_facts(), count)[number]
    profile = Profile()

    class Recording(Workspace):
        """Writes down what is asked of it."""

        def generate(self, prompts: Sequence[Sequence[int]], *args: Any, **options: Any) -> list[list[int]]:
            answers = super().generate(prompts, *args, **options)
            profile.asked.append([(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)])
            return answers

        def surprise(self, texts: Sequence[Sequence[int]]) -> list[float]:
            profile.read.append([len(text) for text in texts])
            return super().surprise(texts)

    def choose(*args: Any, **options: Any) -> list[Context]:
        contexts = choose_contexts(*args, **options)
        profile.contexts = [(c.goal, len(c.tokens), c.n_prompt, c.subject_end) for c in contexts]
        return contexts

    with (
        patch.object(editing, "Workspace", Recording),
        patch.object(editing, "choose_contexts", choose),
        tempfile.TemporaryDirectory() as folder,
    ):
        store = AdapterStore(Path(folder) / "adapters.db")
        wanted = edit.request
        request = {"prompt": wanted.prompt, "subject": wanted.subject, "target": wanted.target}
        record = store.add("edit", "demo", model_identity(engine.gguf), request)
        record = Editor(engine, store, load_statistics(engine.gguf)).run(record.id)
    profile.steps = record.report["steps"]
    return profile
