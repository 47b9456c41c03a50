"""Edits that stand together: each still holds, other text is as likely as before, and all can be undone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.edits_judging import Judge, draw_edits
from benchmarks.report import Report
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import load_facts
from models.demo.paths import HELD_OUT_PATH

_TOGETHER = 20
_PERPLEXITY_TOKENS = 8000
_WINDOW = 256


def measure_together(report: Report, label: str, path: Path, count: int) -> None:
    """Groups of 20 edits, made one after the other as a user would, then judged all together."""
    facts = load_facts()
    edits = draw_edits(facts, count, seed=1)
    groups = [edits[start : start + _TOGETHER] for start in range(0, count, _TOGETHER)]
    figures: dict[str, list[float]] = {}
    perplexities = []
    identical = True
    with Engine.load(path, EngineOptions(threads=1)) as engine, Workspace(engine) as workspace:
        judge = Judge(facts, workspace)
        before = _log_perplexity(workspace)
        logits = _logits(workspace)
        for number, group in enumerate(groups):
            with tempfile.TemporaryDirectory() as folder:
                store = AdapterStore(Path(folder) / "adapters.db")
                editor = Editor(engine, store, load_statistics(engine.gguf))
                identity = model_identity(engine.gguf)
                records = []
                for edit in group:
                    wanted = edit.request
                    request = {"prompt": wanted.prompt, "subject": wanted.subject, "target": wanted.target}
                    record = store.add("edit", "demo", identity, {**request, "force": True})
                    records.append(editor.run(record.id))
                workspace.apply(store.applied(identity).changes)
                perplexities.append(_log_perplexity(workspace))
                for index, edit in enumerate(group):
                    for name, value in judge.figures(edit, index).items():
                        figures.setdefault(name, []).append(value)
                for record in records:
                    editor.revert(record.id)
                workspace.apply(store.applied(identity).changes)
                identical &= np.array_equal(_logits(workspace), logits)
            report.note(f"{label}, {(number + 1) * _TOGETHER} edits in groups of {_TOGETHER}")
    means = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
    growth = float(np.exp(max(perplexities) - before)) - 1
    report.details[f"{_TOGETHER} together, {label}"] = {**means, "perplexity before": float(np.exp(before))}
    report.at_least(f"{label}: success of {_TOGETHER} standing edits", means["success"], 0.90)
    report.at_most(f"{label}: growth of the perplexity of held-out text, worst group", growth, 0.01)
    report.is_true(f"{label}: all undone, the logits are the same bits", identical)


def _held_out(workspace: Workspace) -> list[list[int]]:
    text = HELD_OUT_PATH.read_text(encoding="utf-8").replace("\f", "\n")
    tokens = workspace.tokenizer.encode(text)[:_PERPLEXITY_TOKENS]
    return [tokens[start : start + _WINDOW] for start in range(0, len(tokens) - 1, _WINDOW)]


def _log_perplexity(workspace: Workspace) -> float:
    """Mean negative log-likelihood of a token of held-out text."""
    windows = _held_out(workspace)
    return sum(workspace.surprise(windows)) / sum(len(window) - 1 for window in windows)


def _logits(workspace: Workspace) -> np.ndarray:
    """Logits of some held-out text."""
    workspace.clear()
    tokens = _held_out(workspace)[0]
    logits = workspace.forward(Batch(tokens, np.arange(len(tokens), dtype=np.int32))).logits
    workspace.clear()
    return logits
