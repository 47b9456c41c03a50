"""The demo model opened for edits, for the tests of what makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from edit_requests import QUICK, Asked
from numpy.typing import NDArray

from benchmarks.correctness_trained import requantized
from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.asking import Asker
from edge_runtime.personalize.contexts import Amounts, Context, choose_contexts
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.probes import Probes
from edge_runtime.personalize.records import Record
from edge_runtime.personalize.request import EditRequest
from edge_runtime.personalize.solve import KeyCovariance, readouts
from edge_runtime.personalize.statistics import EditStatistics, load_statistics, save_statistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.survey import survey_edit
from edge_runtime.personalize.workspace import Workspace
from models.demo.paths import HELD_OUT_PATH

FEW = Amounts(say=3, prefixes=1, implied=1, keep=2)


@contextmanager
def opened(path: Path) -> Iterator[Engine]:
    """The model on one thread."""
    with Engine.load(path, EngineOptions(threads=1)) as engine:
        yield engine


def in_float32(model: Path, folder: Path) -> Path:
    """The same weights as float32, with statistics: the products then round no activations."""
    path = requantized(model, "F32", folder / "demo-f32.gguf")
    with opened(model) as engine, opened(path) as other:
        save_statistics(load_statistics(engine.gguf), other.gguf)
    return path


@contextmanager
def opened_workspace(path: Path) -> Iterator[Workspace]:
    with opened(path) as engine, Workspace(engine) as workspace:
        yield workspace


def asker_of(engine: Engine, workspace: Workspace) -> Asker:
    """With the sentences that were shipped with the model."""
    statistics = load_statistics(engine.gguf)
    return Asker(workspace, statistics.templates, statistics.usual, engine.chat_template)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def contexts_of(asker: Asker, sentences: Sequence[str], asked: Asked, amounts: Amounts) -> list[Context]:
    """Of a search for this edit."""
    survey = survey_edit(asker, EditRequest(*asked.texts))
    return choose_contexts(asker, survey, sentences, generator(), amounts)


def objective_of(
    engine: Engine, workspace: Workspace, asked: Asked = QUICK, amounts: Amounts = FEW
) -> tuple[Objective, NDArray[np.float32]]:
    """What a search makes small, and its readout (n_ff,)."""
    statistics = load_statistics(engine.gguf)
    contexts = contexts_of(asker_of(engine, workspace), statistics.sentences, asked, amounts)
    probes = Probes(workspace, statistics.layer, contexts)
    keys = probes.keys[[context.goal == "say" for context in contexts]]
    readout = readouts(KeyCovariance(statistics.keys), keys, np.ones((len(keys), 1)))[0]
    probes.read_out(readout)
    return Objective(probes), readout


def rank_one(
    readout: NDArray[np.float32], delta: NDArray[np.floating], statistics: EditStatistics
) -> LowRank:
    """The adapter that a probe stands for."""
    b = np.ascontiguousarray(delta, np.float32)[:, None]
    return LowRank(f"blk.{statistics.layer}.ffn_down.weight", readout[None], b)


def queued(store: AdapterStore, engine: Engine, asked: Asked, **options: Any) -> int:
    """A new edit's number."""
    request = {"prompt": asked.prompt, "subject": asked.subject, "target": asked.target, **options}
    return store.add("edit", "demo", model_identity(engine.gguf), request).id


def said(workspace: Workspace, prompt: str, n_tokens: int = 16) -> str:
    """What the model goes on with, up to the end of the sentence."""
    (tokens,) = workspace.generate([workspace.tokenizer.encode(prompt)], n_tokens)
    return workspace.tokenizer.decode(tokens).strip().partition(".")[0]


def apply_standing(workspace: Workspace, store: AdapterStore, engine: Engine) -> None:
    """What the store says is applied, and nothing else."""
    applied = store.applied(model_identity(engine.gguf))
    workspace.apply({record.name: applied.changes[record.name] for record in applied.records})


def logits_of(workspace: Workspace, text: str) -> NDArray[np.float32]:
    """(n_tokens, n_vocab) of a text."""
    workspace.clear()
    tokens = workspace.tokenizer.encode(text)
    logits = workspace.forward(Batch(tokens, np.arange(len(tokens), dtype=np.int32))).logits
    workspace.clear()
    return logits


def figures(record: Record) -> dict[str, float | None]:
    """Name of a check -> its figure after the edit."""
    return {check["name"]: check["after"] for check in record.report["checks"]}


def held_out() -> str:
    """Some text that the model was not trained on."""
    return HELD_OUT_PATH.read_text(encoding="utf-8")[:400]


@dataclass(frozen=True, slots=True)
class Device:
    """A model, a store, and a workspace to ask the model with what the store says is applied."""

    engine: Engine
    workspace: Workspace
    store: AdapterStore
    identity: str

    @property
    def editor(self) -> Editor:
        return Editor(self.engine, self.store, load_statistics(self.engine.gguf))

    def made(self, asked: Asked, **options: Any) -> Record:
        return self.editor.run(queued(self.store, self.engine, asked, **options))

    def answers(self, *asked: Asked) -> list[str]:
        """To each prompt, with what the store says is applied."""
        apply_standing(self.workspace, self.store, self.engine)
        return [said(self.workspace, one.prompt) for one in asked]

    def logits(self) -> np.ndarray:
        apply_standing(self.workspace, self.store, self.engine)
        return logits_of(self.workspace, held_out())


def device_with(engine: Engine, workspace: Workspace, store: Path) -> Device:
    """With the store of this file."""
    return Device(engine, workspace, AdapterStore(store), model_identity(engine.gguf))
