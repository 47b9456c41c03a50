"""Edits that stand together: each still holds, other text is as likely as before, and all can be undone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.edits_judging import Judge, WorldEdit, draw_edits
from benchmarks.report import Report
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.records import Record
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import load_facts
from models.demo.paths import HELD_OUT_PATH

Doubles = NDArray[np.float64]

_TOGETHER = 20
_PERPLEXITY_TOKENS = 8000
_WINDOW = 256


def measure_together(report: Report, label: str, path: Path, count: int) -> None:
    """Groups of 20 edits of different names, made one after the other, then judged all together."""
    facts = load_facts()
    figures: dict[str, list[float]] = {}
    growths: list[float] = []
    untold: list[float] = []
    identical = True
    with Engine.load(path, EngineOptions(threads=1)) as engine, Workspace(engine) as workspace:
        judge = Judge(facts, workspace)
        before = _surprises(workspace)
        logits = _logits(workspace)
        for number in range(count // _TOGETHER):
            group = draw_edits(facts, _TOGETHER, seed=number + 1, one_each=True)
            with tempfile.TemporaryDirectory() as folder:
                store = AdapterStore(Path(folder) / "adapters.db")
                editor = Editor(engine, store, load_statistics(engine.gguf))
                records = [_made(editor, edit) for edit in group]
                workspace.apply(store.applied(editor.identity).changes)
                after = _surprises(workspace)
                growths.append(_growth(before, after))
                untold.append(
                    _growth(before, after, [~_tells(workspace, w, group) for w in _held_out(workspace)])
                )
                for index, edit in enumerate(group):
                    for name, value in judge.figures(edit, index).items():
                        figures.setdefault(name, []).append(value)
                for record in records:
                    editor.revert(record.id)
                workspace.apply(store.applied(editor.identity).changes)
                identical &= np.array_equal(_logits(workspace), logits)
            report.note(f"{label}, group {number + 1} of {_TOGETHER} edits: perplexity {growths[-1]:+.2%}")
    means = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
    report.details[f"{_TOGETHER} together, {label}"] = {
        **means,
        "perplexity before": float(np.exp(np.concatenate(before).mean())),
        "growth of the perplexity, each group": growths,
        "without the old objects of what was edited": untold,
    }
    report.at_least(f"{label}: success of {_TOGETHER} standing edits", means["success"], 0.90)
    report.at_most(f"{label}: growth of the perplexity of held-out text", float(np.mean(growths)), 0.01)
    report.at_most(f"{label}: the same in the worst group", max(growths), 0.01)
    report.is_true(f"{label}: all undone, the logits are the same bits", identical)


def _made(editor: Editor, edit: WorldEdit) -> Record:
    wanted = edit.request
    request = {"prompt": wanted.prompt, "subject": wanted.subject, "target": wanted.target, "force": True}
    return editor.run(editor.store.add("edit", "demo", editor.identity, request).id)


def _held_out(workspace: Workspace) -> list[list[int]]:
    text = HELD_OUT_PATH.read_text(encoding="utf-8").replace("\f", "\n")
    tokens = workspace.tokenizer.encode(text)[:_PERPLEXITY_TOKENS]
    return [tokens[start : start + _WINDOW] for start in range(0, len(tokens) - 1, _WINDOW)]


def _surprises(workspace: Workspace) -> list[Doubles]:
    """For each window of held-out text, the negative log-likelihood of each token after its first."""
    found = []
    for window in _held_out(workspace):
        workspace.clear()
        rows = np.arange(len(window) - 1)
        logits = workspace.forward(Batch(window[:-1], rows.astype(np.int32))).logits.astype(np.float64)
        found.append(np.logaddexp.reduce(logits, axis=1) - logits[rows, window[1:]])
    workspace.clear()
    return found


def _growth(
    before: list[Doubles], after: list[Doubles], counted: list[NDArray[np.bool_]] | None = None
) -> float:
    """Of the perplexity of all tokens, or of those that are counted."""
    chosen = np.concatenate(counted) if counted else slice(None)
    return float(np.exp((np.concatenate(after) - np.concatenate(before))[chosen].mean()) - 1)


def _tells(workspace: Workspace, window: list[int], edits: list[WorldEdit]) -> NDArray[np.bool_]:
    """Which tokens after a window's first are the old object of an edit, after its subject was named."""
    pieces = [workspace.tokenizer.token_bytes(token, special=True) for token in window]
    text = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    tells = np.zeros(len(window), bool)
    for edit in edits:
        named = text.find(edit.fact.subject.encode())
        place = text.find(edit.fact.object.encode(), named) if named >= 0 else -1
        while place >= 0:
            end = place + len(edit.fact.object.encode())
            tells |= (starts < end) & (ends > place)
            place = text.find(edit.fact.object.encode(), end)
    return tells[1:]


def _logits(workspace: Workspace) -> np.ndarray:
    """Logits of some held-out text."""
    workspace.clear()
    tokens = _held_out(workspace)[0]
    logits = workspace.forward(Batch(tokens, np.arange(len(tokens), dtype=np.int32))).logits
    workspace.clear()
    return logits
